"""What a caller sees of long work: a bar on a terminal, a line in a notebook, and the lines of the logger
"rapidin"."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from rapidin.attribution.decoys import decoys_text
from rapidin.cache import Cache
from rapidin.cache.progress import OnProgress, Progress
from rapidin.results.terminal import make_console
from rapidin.results.text import bytes_text, counts_text, one_line, time_text

if TYPE_CHECKING:
    from typing_extensions import Self

    from rapidin.attribution.query_sketch import OnStage
    from rapidin.results.types import QueryResult

LOG = logging.getLogger("rapidin")
_STEPS = logging.getLogger("rapidin.progress")

_LINE_SECONDS = 0.2  # between two states of a line
LOG_SECONDS = 30.0  # between two lines of a file
_CERTAIN_SECONDS = 3.0  # of caching, before it says how long the rest takes


class ShownBar:
    """A progress bar that is shown inside a `with` block."""

    _bar: Bar

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class CachingBar(ShownBar):
    """Shows the progress of caching: examples/s, tokens/s and time left. Call it with each `Progress`.

    If the console is not a terminal, it writes a line every `LOG_SECONDS` seconds. words: of a message, as
    they are shown.
    """

    def __init__(
        self,
        console: Console,
        clock: Callable[[], float] = time.perf_counter,
        words: Callable[[str], str] = str,
    ) -> None:
        self.watch = Watch(clock=clock)
        self._console, self._words = console, words
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
        self._line = WrittenLine(console.file, over=False, clock=clock, at_once=False)

    def __call__(self, progress: Progress) -> None:
        first = self.watch.last is None
        self.watch(progress)
        if first and self._console.is_terminal and progress.resumed:
            self._bar.console.print(
                f"{progress.resumed:,} of {progress.total:,} examples were cached before; resuming"
            )
        if progress.message and self._console.is_terminal:
            self._bar.console.print(one_line(self._words(progress.message)))
        step = progress if progress.stage is None else progress.stage
        what, rates = self.watch.what, self.watch.rates
        self._bar.update(self._task, description=what, completed=step.done, total=step.total, rates=rates)
        if not self._console.is_terminal:
            self._line(f"rapidin: {what}: {rates}")


class Watch:
    """Remembers how far caching is. Call it with each `Progress`.

    last: the latest; seconds: time since the first, by the clock; preparation: of these, the seconds before
    examples were cached, which rates leave out with the examples of that time. then: is called with each too;
    log: whether messages go to the logger "rapidin.progress".
    """

    def __init__(
        self,
        then: OnProgress | None = None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        log: bool = False,
    ) -> None:
        self.last: Progress | None = None
        self._then, self._clock, self._log = then, clock, log
        self._started = clock()
        self.preparation = 0.0
        self._prepared = (0, 0)  # examples that this run had sketched by then, and their tokens

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    def __call__(self, progress: Progress) -> None:
        if self.last is None:
            self._started = self._clock()
        self.last = progress
        if progress.stage is not None and progress.done < progress.total:  # decoys come after examples
            self.preparation = self.seconds
            self._prepared = progress.done - progress.resumed, progress.tokens
        if self._log and progress.message:
            _STEPS.info(progress.message)
        if self._then is not None:
            self._then(progress)

    @property
    def rates(self) -> str:
        """How far it is, how fast, and the time left, in words."""
        last = self.last
        if last is None:
            return ""
        if last.stage is not None:
            return f"{last.stage.done:,}/{last.stage.total:,} examples"
        rates = f"{last.done:,}/{last.total:,}"
        examples, tokens = self._per_second(last)
        if examples and self.seconds > self.preparation:
            rates += f" · {examples:,.1f} examples/s · {tokens:,.0f} tokens/s"
            if self.seconds - self.preparation >= _CERTAIN_SECONDS:
                rates += f" · {time_text((last.total - last.done) / examples)} left"
        return rates

    def _per_second(self, last: Progress) -> tuple[float, float]:
        """Examples and tokens per second of caching."""
        examples, tokens = self._prepared
        seconds = max(1e-9, self.seconds - self.preparation)
        return (last.done - last.resumed - examples) / seconds, (last.tokens - tokens) / seconds

    @property
    def what(self) -> str:
        """The step that it is at, in words."""
        return "caching" if self.last is None or self.last.stage is None else self.last.stage.name

    @property
    def done_text(self) -> str:
        """What was done, in words."""
        last = self.last
        assert last is not None
        count = last.done - last.resumed
        if not count:
            return f"all {last.total:,} examples were cached before"
        text = f"cached {count:,} example{'' if count == 1 else 's'} in {time_text(self.seconds)}"
        preparation = f"{time_text(self.preparation)} of preparation, then " if self.preparation else ""
        examples, tokens = self._per_second(last)
        text += f" ({preparation}{examples:,.1f} examples/s, {tokens:,.0f} tokens/s)"
        return text + (f" after the {last.resumed:,} cached before" if last.resumed else "")


class WrittenLine:
    """A state that is written again and again: over the line before in a notebook, on lines of their own,
    far apart, in a file. Use it in a `with` block."""

    def __init__(
        self,
        file: IO[str],
        *,
        over: bool,
        clock: Callable[[], float] = time.monotonic,
        at_once: bool = True,
    ) -> None:
        """at_once: write the first state; otherwise the first line comes after some time."""
        self._file, self._over, self._clock = file, over, clock
        self._next = clock() + (0.0 if at_once else LOG_SECONDS)
        self._length = 0

    def __call__(self, text: str) -> None:
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (_LINE_SECONDS if self._over else LOG_SECONDS)
        text = one_line(text)
        self._write(text)

    def _write(self, text: str) -> None:
        if self._over:
            self._file.write("\r" + text.ljust(self._length))
            self._length = len(text)
        else:
            self._file.write(text + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._over and self._length:
            self._write("")
            self._file.write("\r")
            self._file.flush()


def in_notebook() -> bool:
    """Whether output is shown in a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # Jupyter's, and Colab's


def _line(progress: bool | None) -> WrittenLine | None:
    """The line to write states on, if there is no terminal for a bar."""
    notebook = in_notebook()
    return WrittenLine(sys.stderr, over=notebook) if notebook or progress else None


@contextmanager
def caching_progress(progress: bool | None) -> Iterator[OnProgress | None]:
    """Shows how far caching is. progress: None: on a terminal and in a notebook; True: in a file too; False:
    nowhere."""
    if progress is False:
        yield None
    elif sys.stderr.isatty() and not in_notebook():
        with CachingBar(make_console(sys.stderr)) as bar:
            yield bar
    elif (line := _line(progress)) is not None:
        watch = Watch(lambda _: line(f"{watch.what} {watch.rates}"))
        with line:
            yield watch
    else:
        yield None


@contextmanager
def query_progress(progress: bool | None, what: str) -> Iterator[OnStage | None]:
    """Shows the stages of a query, as `caching_progress` does; what: is done in all of them."""
    if progress is False:
        yield None
    elif sys.stderr.isatty() and not in_notebook():
        with make_console(sys.stderr).status(what) as status:
            yield lambda stage, done, of: status.update(f"{what}: {stage} {done:,}/{of:,}")
    elif (line := _line(progress)) is not None:
        with line:
            line(what)
            yield lambda stage, done, of: line(f"{what}: {stage} {done:,}/{of:,}")
    else:
        yield None


# ---------------------------------------------------------------------------------------------- log lines


def caching_text(watch: Watch, made: Cache) -> str:
    """What caching did, on one line."""
    info = made.info()
    text = f"{watch.done_text}: {counts_text(info['counts'])}; {bytes_text(info['bytes'])} in {made.path}"
    return text if made.decoys is None else f"{text}; {decoys_text(made, made.decoys)}"


def query_text(result: QueryResult, count: int, cache: Cache) -> str:
    """What a query of `count` generations did, on one line; result: one of its results."""
    stages = ", ".join(f"{stage} {time_text(value)}" for stage, value in result.seconds.items())
    text = f"{count:,} {'query' if count == 1 else 'queries'} over {len(cache):,} examples: {stages}"
    if not cache.manifest.complete:
        text += f"; the cache is unfinished: {len(cache):,} of {cache.manifest.rows:,} examples are cached"
    return text
