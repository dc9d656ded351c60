"""Runs processes with time limits: each is interrupted at its limit, and killed if that does not help.

A step that fails, hangs or loses the device ends alone and the others continue; steps that could not start in
time are reported. Does not need torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.1
CUT = {signal.SIGINT: 130, signal.SIGTERM: 143}  # exit status of a run that was cut short


@dataclass(frozen=True)
class Limits:
    """Seconds. grace: from the interrupt to the kill, as in `timeout -s INT -k 10`; look: between two looks
    at a step's progress."""

    grace: float = 10.0
    look: float = 1.0


LIMITS = Limits()


class CutShortError(Exception):
    """The run got a signal and must end with the results so far."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = CUT[signal.Signals(number)]


@dataclass(frozen=True)
class Ended:
    """A process that has ended. status: its return code as in subprocess. why: why it was stopped, or None;
    cut: whether a time limit stopped it, which is no failure."""

    status: int
    seconds: float
    why: str | None
    cut: bool
    log: str  # the end of its output


@dataclass
class Step:
    """A command, its limits and its dependencies.

    log: gets its output, at once if `alone`, otherwise when it has ended. limit: seconds from its start.
    after: steps that must have ended first. silent: it is stopped when `heard`, a number that grows with its
    progress, has not changed for this many seconds. cores: how many it keeps busy. again: called when it has
    ended; the command to restart it with (within the time that is left), or None. ended: called with how it
    ended.
    """

    name: str
    command: Sequence[str]
    log: Path
    limit: float
    after: tuple[str, ...] = ()
    alone: bool = False
    silent: float | None = None
    heard: Callable[[], int] | None = None
    cores: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    again: Callable[[Ended], Sequence[str] | None] = lambda ended: None
    ended: Callable[[Ended], None] = lambda ended: None


def end_with_parent() -> None:
    """Have this process killed when its parent ends, for whatever reason."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


class _Running:
    """A started step, in a process group of its own, so that its children end with it."""

    def __init__(self, step: Step, command: Sequence[str], end: float, limits: Limits) -> None:
        self.limits = limits
        self.step, self.start = step, time.monotonic()
        self.end = min(end, self.start + step.limit)
        self.why: str | None = None
        self.cut = False
        self.interrupted: float | None = None
        self.number, self.last, self.looked = -1, self.start, self.start
        self.said = step.log.open("ab") if step.alone else tempfile.TemporaryFile()  # noqa: SIM115
        self.said.write(f"$ {' '.join(command)}\n".encode())
        self.said.flush()
        self.at = self.said.tell()
        self.process = subprocess.Popen(
            command,
            stdout=self.said,
            stderr=self.said,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **step.environment},
            start_new_session=True,
        )

    def text(self) -> str:
        """Its output, which is also written to its log."""
        if self.step.alone:
            self.said.close()
            with self.step.log.open("rb") as file:
                file.seek(self.at)
                return file.read().decode(errors="replace")
        self.said.seek(0)
        whole = self.said.read()
        self.said.close()
        with self.step.log.open("ab") as file:
            file.write(whole)
        return whole[self.at :].decode(errors="replace")

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def interrupt(self, why: str, cut: bool = True) -> None:
        if self.interrupted is None:
            self.why, self.cut, self.interrupted = why, cut, time.monotonic()
            self.signal(signal.SIGINT)

    def poll(self) -> Ended | None:
        now = time.monotonic()
        status = self.process.poll()
        if status is not None:
            self.signal(signal.SIGKILL)  # children that it left behind
            return Ended(status, now - self.start, self.why, self.cut, self.text()[-3000:])
        silent = self.step.silent
        if self.step.heard is not None and silent is not None and now > self.looked + self.limits.look:
            self.looked, number = now, self.step.heard()
            if number != self.number:
                self.number, self.last = number, now
            if now - self.last > silent:
                self.interrupt(f"it did not end in {now - self.last:.0f} s", cut=False)
        if now > self.end:
            self.interrupt(f"its {self.end - self.start:.0f} s were used up")
        if self.interrupted is not None and now > self.interrupted + self.limits.grace:
            self.signal(signal.SIGKILL)
        return None


def run_steps(
    steps: Sequence[Step],
    end: float,
    *,
    cores: int,
    late: Callable[[Step], None],
    each: Callable[[], None] = lambda: None,
    limits: Limits = LIMITS,
) -> None:
    """Run the steps, in this order as far as dependencies and cores allow, until `end` (monotonic).

    A little more than `limits.grace` before `end` all running steps are interrupted, so that none runs at
    `end`. late: called with each step that could not start. each: called repeatedly meanwhile. Raises
    CutShortError on SIGINT and SIGTERM, when all have ended.
    """
    stop = end - limits.grace - 1
    waiting, running, done = list(steps), list[_Running](), set[str]()
    signals: list[int] = []
    before = {number: signal.signal(number, lambda n, frame: signals.append(n)) for number in CUT}
    try:
        while waiting or running:
            if signals or time.monotonic() > stop:
                for step in waiting:
                    late(step)
                waiting.clear()
                for process in running:
                    process.interrupt(
                        f"the run was ended by {signal.Signals(signals[0]).name}"
                        if signals
                        else f"the run's time was up after {time.monotonic() - process.start:.0f} s of it"
                    )
            for step in list(waiting):
                taken = sum(process.step.cores for process in running)
                if set(step.after) <= done and (not running or taken + step.cores <= cores):
                    waiting.remove(step)
                    running.append(_Running(step, step.command, stop, limits))
            for process in list(running):
                ended = process.poll()
                if ended is None:
                    continue
                running.remove(process)
                more = None if signals or time.monotonic() > stop else process.step.again(ended)
                if more is not None and process.end > time.monotonic():
                    again = _Running(process.step, more, process.end, limits)
                    running.append(again)
                    continue
                process.step.ended(ended)
                done.add(process.step.name)
            each()
            time.sleep(POLL_SECONDS)
        if signals:
            raise CutShortError(signals[0])
    finally:
        for process in running:  # an error here: nothing is left running
            process.signal(signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
