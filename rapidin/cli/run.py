"""Runs a command line: parse, call, exit code.

Results go to standard output and everything else to standard error. Exit codes: 0; 1 for an error in rapidin,
with its traceback; 2 for a mistake of the user, with one line that says what and how to mend it; 130 and 143
when stopped by Ctrl-C or SIGTERM; 141 when whoever reads the output has gone. Of several processes (torchrun)
one prints.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

import rapidin
from rapidin.cli.console import line
from rapidin.cli.options import app, renamed_flags
from rapidin.distributed import PeerError, join, leave, world
from rapidin.errors import UserError, is_out_of_memory
from rapidin.threads import patient_threads


class Terminated(KeyboardInterrupt):
    """SIGTERM: leave as for Ctrl-C, with its own exit code."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    arguments = renamed_flags(sys.argv[1:] if argv is None else argv)
    if "torch" not in sys.modules:  # or it is too late
        patient_threads()
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # text that the terminal's encoding lacks is escaped, never an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            join()
            command: Any = app(arguments or ["--help"], prog_name="rapidin", standalone_mode=False)
            code = command() if callable(command) else command  # else help or version, printed already
            sys.stdout.flush()
            return int(code or 0)
    except UserError as error:
        return _fail(str(error), 2)
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "rapidin"
        return _fail(f"{error.format_message().rstrip('.')}; see '{where} --help'", 2)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", 143 if isinstance(stop, Terminated) else 130)
    except PeerError as error:
        return error.code if error.said else _fail(str(error), error.code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory: {str(error) or type(error).__name__}; {_LESS_MEMORY}", 2)
    except BrokenPipeError:
        # Python flushes standard output again as it ends; that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException:
        world().fail("another process failed", 1)  # its traceback comes from Python
        raise
    finally:
        leave()


def _fail(text: str, code: int) -> int:
    """Of several processes the first to fail prints its line."""
    if world().fail(text, code):
        line(text)
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, so that what is open is closed and the cache can be resumed."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
