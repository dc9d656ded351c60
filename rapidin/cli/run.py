"""Runs a command line: parse, call, exit code.

Results go to standard output and everything else to standard error. Exit codes: 0; 1 for an error in rapidin,
with its traceback; 2 for a mistake of the user, with one line that says what and how to mend it; 130 and 143
when stopped by Ctrl-C or SIGTERM; 141 when whoever reads the output has gone. Of several processes (torchrun)
one prints.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

import rapidin
from rapidin.cli.console import line
from rapidin.cli.interrupts import Interruptible, exit_code
from rapidin.cli.options import app, renamed_flags
from rapidin.distributed import PeerError, join, leave, patient_threads, world
from rapidin.errors import UserError, is_out_of_memory


def _version(requested: bool) -> None:
    if requested:
        print(f"rapidin {rapidin.__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------- main

# typer brings its own click from 0.26 on and uses the installed one before; in both this is the class of all
# mistakes in a command line.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


_LESS_MEMORY = "give a smaller model or --model-dtype, fewer --batch-tokens, or another --device"


def main(argv: Sequence[str] | None, signals: Interruptible) -> int:
    """Run a command line (default: this process's) and return its exit code; signals: those that may stop
    it."""
    arguments = renamed_flags(sys.argv[1:] if argv is None else argv)
    if "torch" not in sys.modules:  # or it is too late
        patient_threads()
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # text that the terminal's encoding lacks is escaped, never an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with _log_lines():
        try:
            join()
            command: Any = app(arguments or ["--help"], prog_name="rapidin", standalone_mode=False)
            if signals.stop is not None:  # typer says nothing of it
                raise signals.stop
            code = command() if callable(command) else command  # else help or version, printed already
            sys.stdout.flush()
            if signals.stop is not None and not code:
                raise signals.stop
            return int(code or 0)
        except BaseException as error:
            # What a signal led to counts as the signal, whatever became of it on the way.
            stop = None if isinstance(error, KeyboardInterrupt) else signals.stop
            code = _code_of(stop or error)
            if code is None:
                world().fail("another process failed", 1)  # its traceback comes from Python
                raise
            return code
        finally:
            signals.settle()
            leave()


def _code_of(error: BaseException) -> int | None:
    """Says what is wrong, on one line, and returns the exit code; None for an error in rapidin."""
    if isinstance(error, UserError):
        return _fail(str(error), 2)
    if type(error).__name__ == "NoArgsIsHelpError":  # of a command that has commands of its own
        print(error)
        return 0
    if isinstance(error, _USAGE_ERROR):
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "rapidin"
        return _fail(f"{error.format_message().rstrip('.')}; see '{where} --help'", 2)
    if isinstance(error, KeyboardInterrupt):
        return _fail(str(error) or "interrupted", exit_code(error))
    if isinstance(error, PeerError):
        return error.code if error.said else _fail(str(error), error.code)
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return _fail(f"out of memory: {str(error) or type(error).__name__}; {_LESS_MEMORY}", 2)
    if isinstance(error, BrokenPipeError):
        # Python flushes standard output again as it ends; that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return None


@contextmanager
def _log_lines() -> Iterator[None]:
    """Warnings of the library's logger are lines of the command line."""
    handler = _Lines(logging.WARNING)
    logging.getLogger("rapidin").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("rapidin").removeHandler(handler)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line(record.getMessage())


def _fail(text: str, code: int) -> int:
    """Of several processes the first to fail prints its line."""
    if world().fail(text, code):
        line(text)
    return code
