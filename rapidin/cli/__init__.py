"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rapidin.cli.interrupts import Interruptible, exit_code

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; by default this process's, which ends then.

    No signal is lost, neither while the commands are imported nor at the end.
    """
    signals = Interruptible()
    with signals:
        try:
            from rapidin.cli.app import main as run
        except BaseException:
            if signals.stop is None:
                raise
            signals.settle()
            print("rapidin: interrupted", file=sys.stderr)
            code = exit_code(signals.stop)
        else:
            code = run(argv, signals)
        if argv is None:
            signals.end(code)
    return code
