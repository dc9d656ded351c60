"""The command line."""

from rapidin.cli.main import main

__all__ = ["main"]
