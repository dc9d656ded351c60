"""Progress bars of the command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column

from rapidin.results.text import (
    one_line,
    time_text,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from rapidin.cache.progress import Progress


LINE_SECONDS = 30.0  # between two lines of a log
_CERTAIN_SECONDS = 3.0  # of caching, before it says how long the rest takes


class _Shown:
    """A progress bar that is shown inside a `with` block."""

    _bar: Bar

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class CachingBar(_Shown):
    """Shows the progress of caching: examples/s, tokens/s and time left. Call it with each `Progress`.

    If the console is not a terminal, it prints a line every `LINE_SECONDS` seconds. last: the latest
    progress; seconds: time since the first, by the clock; preparation: of these, the seconds before examples
    were cached, which rates leave out.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.perf_counter) -> None:
        self.last: Progress | None = None
        self.preparation = 0.0
        self._clock = clock
        self._started = self._line_at = clock()
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[rates]}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("caching", total=None, rates="")

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    def __call__(self, progress: Progress) -> None:
        if self.last is None:
            self._started = self._clock()
            if self._console.is_terminal and progress.resumed:
                self._bar.console.print(
                    f"{progress.resumed:,} of {progress.total:,} examples were cached before; resuming"
                )
        self.last = progress
        if progress.message and self._console.is_terminal:
            self._bar.console.print(one_line(progress.message))
        what, done, total, rates = "caching", progress.done, progress.total, self._rates(progress)
        if progress.stage is not None:
            self.preparation = self.seconds
            what, done, total = progress.stage.name, progress.stage.done, progress.stage.total
            rates = f"{done:,}/{total:,} examples"
        self._bar.update(self._task, description=what, completed=done, total=total, rates=rates)
        if not self._console.is_terminal and self._clock() - self._line_at >= LINE_SECONDS:
            self._line_at = self._clock()
            self._console.print(f"rapidin: {what}: {rates}", soft_wrap=True, highlight=False)

    def rate(self, count: int) -> float:
        """So many examples or tokens per second of caching."""
        return count / max(1e-9, self.seconds - self.preparation)

    def _rates(self, progress: Progress) -> str:
        text = f"{progress.done:,}/{progress.total:,}"
        new = progress.done - progress.resumed
        if new and self.seconds > self.preparation:
            text += f" · {self.rate(new):,.1f} examples/s · {self.rate(progress.tokens):,.0f} tokens/s"
            if self.seconds - self.preparation >= _CERTAIN_SECONDS:
                text += f" · {time_text((progress.total - progress.done) / self.rate(new))} left"
        return text


class BytesBar(_Shown):
    """Shows how many bytes have been read. Call it with (done, total). Prints nothing without a terminal."""

    def __init__(self, console: Console, label: str) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)


class TrainingBar(_Shown):
    """Shows the steps of a training with their rate, the time left and the loss; on a terminal only."""

    def __init__(self, console: Console, label: str, steps: int) -> None:
        self._bar = Bar(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} steps/s  loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=steps, rate=0.0, loss=float("nan"))

    def __call__(self, loss: float) -> None:
        """Count one more step, with this loss."""
        rate = self._bar.tasks[0].speed or 0.0
        self._bar.update(self._task, advance=1, loss=loss, rate=rate)
