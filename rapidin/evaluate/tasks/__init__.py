"""Synthetic tasks whose true answers are known: `facts` for `rapidin eval facts`, `labels` for `select`."""
