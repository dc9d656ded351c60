"""Ctrl-C and SIGTERM end a command wherever they arrive.

Python raises KeyboardInterrupt between any two of its instructions, so also where it is dropped: in callbacks
of C code, finalizers, and code that takes any error for "this is not installed", as libraries do while they
are imported. Here it is raised again until it comes through.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

_AGAIN_SECONDS = 0.25  # until a signal that nobody minded is raised again
_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a process that was stopped so."""
    return _CODES[signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT]


class Terminated(KeyboardInterrupt):
    """SIGTERM: leave as for Ctrl-C, with its own exit code."""


class Interruptible:
    """Inside the `with` block SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated, again and again
    until `settle` is called, except where one of them is being handled.

    stop: what was raised first, None if no signal arrived. Signals that are ignored stay so, and outside the
    main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.stop: KeyboardInterrupt | None = None
        self._before: dict[int, Any] = {}

    def settle(self) -> None:
        """Raise nothing again: whoever has to know of the signal does."""
        if sys.platform != "win32" and signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def end(self, code: int) -> NoReturn:
        """End the process. What Python does at its end is left out: a signal during that would be lost, or
        end it in another way, and nothing is left to be done."""
        self.settle()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        stop = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        self.stop = self.stop or stop
        self._wait()
        raise stop

    def _again(self, number: int, frame: FrameType | None) -> None:
        self._wait()
        if self.stop is not None and not _being_handled():
            raise type(self.stop)

    def _wait(self) -> None:
        if sys.platform != "win32":  # which has no timer that raises: a signal there arrives once
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is not threading.main_thread():
            return self
        before: dict[int, Any] = {signal.SIGTERM: self._arrived}
        if sys.platform != "win32":
            before[signal.SIGALRM] = self._again
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            before[signal.SIGINT] = self._arrived
        for number, handler in before.items():
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _being_handled() -> bool:
    """Whether KeyboardInterrupt, or an error that it led to, is on its way through blocks that clean up."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
