"""Work with the model: one job at a time, in the order in which they came; a limited number waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

OnEvent = Callable[[str, dict[str, Any]], None]  # called with an event's name and what is to be known of it


class QueueFullError(Exception):
    """So many jobs wait that another one is not taken."""


class CancelledError(Exception):
    """The job was cancelled: nobody waits for its result."""


class Job:
    """Some work with the model.

    result: what the work returned, or its error; on_event: is called in the worker's thread, and in that of
    whoever gives or cancels jobs.
    """

    def __init__(self, work: Callable[[Job], Any], on_event: OnEvent) -> None:
        self.result: Future[Any] = Future()
        self.on_event = on_event
        self._work = work
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """The work ends at its next step, or is not begun."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises CancelledError if the job is cancelled."""
        if self.cancelled:
            raise CancelledError

    def run(self, ended: Callable[[], None] = lambda: None) -> None:
        """Do the work, and set `result`; ended: called before that."""
        value, failure = None, None
        try:
            self.check()
            value = self._work(self)
        except BaseException as error:  # whoever waits is told
            failure = error
        ended()
        if failure is None:
            self.result.set_result(value)
        else:
            self.result.set_exception(failure)


class Worker:
    """A thread that does one job after the other. most: jobs that may wait besides the one that is done."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._current: Job | None = None
        self._thread = threading.Thread(target=self._run, name="rapidin-jobs", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        with self._changed:
            return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether no more jobs are taken."""
        return self._closed

    def submit(self, work: Callable[[Job], Any], on_event: OnEvent = lambda *_: None) -> Job:
        """A job that waits for its turn. Raises QueueFullError if there are too many."""
        job = Job(work, on_event)
        with self._changed:
            self._drop_cancelled()
            if self._closed or len(self._waiting) >= self.most:
                raise QueueFullError
            self._waiting.append(job)
            before = len(self._waiting) - 1 + (self._current is not None)
            if before:  # before its own events, which may begin as soon as the worker knows of it
                on_event("waiting", {"before": before})
            self._changed.notify()
        return job

    def close(self, seconds: float | None = None) -> int:
        """Take no more jobs, and cancel all. Waits until the one that is done has ended, or so many seconds.

        Returns how many were cancelled.
        """
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *([] if self._current is None else [self._current])]
            for job in jobs:
                job.cancel()
            self._changed.notify()
        self._thread.join(seconds)
        return len(jobs)

    @property
    def busy(self) -> bool:
        """Whether the thread still runs after `close`."""
        return self._thread.is_alive()

    def _drop_cancelled(self) -> None:
        """Jobs that nobody waits for leave their places to others."""
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            job.result.set_exception(CancelledError())

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            self._drop_cancelled()
            if self._waiting:
                self._current = self._waiting.popleft()
            later = list(self._waiting)
        for before, job in enumerate(later, 1):
            job.on_event("waiting", {"before": before})
        return self._current

    def _ended(self) -> None:
        with self._changed:
            self._current = None

    def _run(self) -> None:
        while True:
            job = self._next()
            if job is not None:
                job.run(self._ended)
            elif self._closed:
                return
            del job  # its result is the history's to keep
