"""Progress messages of an evaluation: lines of text, and counted steps with an estimate of the time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from rapidin.results.text import time_text

Log = Callable[[str], None]  # takes one line about the progress

INTERVAL_SECONDS = 30


def no_log(_: str) -> None:
    """Discard the line."""


class StepLog:
    """Logs counted steps every INTERVAL_SECONDS, and the last one.

    label: what is counted; first: steps that an earlier run has done.
    """

    def __init__(self, log: Log, label: str, first: int = 0) -> None:
        self.done = self._first = first
        self._log, self._label = log, label
        self._start = self._logged = time.monotonic()

    def step(self, done: int, total: int, loss: float) -> None:
        """Note that `done` of `total` steps are done, the last with this loss."""
        if self.done == self._first and done > self.done + 1:
            self._first = done - 1  # the run resumed at this step
        self.done = done
        now = time.monotonic()
        if now - self._logged >= INTERVAL_SECONDS or done == total:
            left = (now - self._start) / (done - self._first) * (total - done)
            self._log(f"{self._label}: {done:,} of {total:,}, loss {loss:.3f}, {time_text(left)} left")
            self._logged = now
