"""Holds SIGINT (Ctrl-C) and SIGTERM back until the shard that is being made is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_MESSAGE = "stopping after this shard is written; a second signal stops at once"


class Stop:
    """Inside a `with` block the first SIGINT or SIGTERM waits for `check`; a second one acts at once.

    Signals that are ignored, or whose default action ends the process, stay as they are, and so do all of
    them outside the main thread. tell: called with a message for the user when a signal arrives.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._pending: tuple[int, FrameType | None] | None = None

    def check(self) -> None:
        """Act on a signal that arrived: raise KeyboardInterrupt, or whatever its handler raises."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._handlers[pending[0]](*pending)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self._pending = number, frame
        self._tell(_MESSAGE)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if error is None:
            self.check()
