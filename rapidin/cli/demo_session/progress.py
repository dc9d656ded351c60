"""A progress bar with rate, time left and loss for the demo's training; shown on a terminal only."""

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Steps:
    """A context manager that shows the progress of `total` steps on `console`."""

    def __init__(self, label: str, total: int, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} steps/s  loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(label, total=total, rate=0.0, loss=float("nan"))

    def step(self, loss: float) -> None:
        """Count one more step, with this loss."""
        rate = self._progress.tasks[0].speed or 0.0
        self._progress.update(self._task, advance=1, loss=loss, rate=rate)

    def __enter__(self) -> "Steps":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
