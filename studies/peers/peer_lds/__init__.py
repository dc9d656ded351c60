"""`peers.py lds`: how well other packages' scores and rapidin's predict retraining, on one setting.

`judge.py` prepares the setting, starts one `run_<package>.py` in each package's own environment, and turns
what they write into the table. `setting.py` is what those have in common; it needs torch and transformers.
"""
