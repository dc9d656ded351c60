"""Progress bars of the command line."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from rapidin.attribution.progress import ShownBar


class BytesBar(ShownBar):
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


class TrainingBar(ShownBar):
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
