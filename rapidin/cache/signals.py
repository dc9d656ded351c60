"""Ctrl-C and SIGTERM, kept until the work in hand is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_MESSAGE = "stopping when the shard in hand is written; once more stops at once"


class Stop:
    """Inside a `with` block the first SIGINT or SIGTERM waits for `check`; a second one acts at once.

    Signals that are ignored, or end the process by themselves, stay as they are, and so do all of them where
    this is not the main thread. tell: called with something to say to the user when a signal has come.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._kept: tuple[int, FrameType | None] | None = None

    def check(self) -> None:
        """Act on a signal that has come: KeyboardInterrupt, or what else its handler raises."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._before[kept[0]](*kept)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self._kept = number, frame
        self._tell(_MESSAGE)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if error is None:
            self.check()
