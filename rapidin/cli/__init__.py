"""The command line."""

from rapidin.cli.app import main

__all__ = ["main"]
