"""The command line with all its commands."""

# Each module adds its commands to the app of `options`.
from rapidin.cli import cache, confirm, demo, drop, evaluate, inspect, query, select, serve, show
from rapidin.cli.run import main

__all__ = [
    "cache",
    "confirm",
    "demo",
    "drop",
    "evaluate",
    "inspect",
    "main",
    "query",
    "select",
    "serve",
    "show",
]
