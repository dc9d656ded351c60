"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rapidin.cli.interrupts import Interruptible, exit_code

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code.

    Of this process's own no signal is lost: neither while the commands are imported, nor when it ends.
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
            signals.end()
    return code
