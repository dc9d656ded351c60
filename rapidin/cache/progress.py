"""How far caching is, as it is reported to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rapidin.cache.writer import ShardWriter
from rapidin.distributed import World
from rapidin.ops.transfer import Download


@dataclass(frozen=True, slots=True)
class Stage:
    """How far a step is that comes before examples are cached: done, of `total` passes over examples."""

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far caching is, over all processes.

    done: of `total` examples, `resumed` of them by earlier runs; tokens: read by this run; skipped: examples
    without a sketch in this run; message: text for the user, once; stage: what comes before examples are
    cached, such as fitting the preconditioner, and how far it is.
    """

    done: int
    total: int
    tokens: int
    skipped: int
    resumed: int
    message: str | None = None
    stage: Stage | None = None


OnProgress = Callable[[Progress], None]


class Meter:
    """Counts what caching does and reports it to the caller."""

    def __init__(
        self, on_progress: OnProgress | None, writer: ShardWriter, world: World, sampled: int
    ) -> None:
        """sampled: examples that an earlier run sketched for the sample, whose shards are missing."""
        self._on_progress = on_progress
        rows_of = writer.manifest.rows_of
        self._total = sum(map(rows_of, writer.assigned))
        self._resumed = self._total - sum(map(rows_of, writer.missing)) + sampled
        self._tally = world.tally(3)  # done, tokens, skipped
        self._pending: list[tuple[int, int, Download | None]] = []
        self._stage: Stage | None = None  # of the preparation, in which examples may be done too
        self.tell(None)

    def sketched(self, done: int, tokens: int, skipped: Download | None) -> None:
        """Count a batch, like `add`, when the device has finished it; `skipped` is on its way to the CPU."""
        self._pending.append((done, tokens, skipped))
        self.settle(wait=False)

    def settle(self, *, wait: bool) -> None:
        """Count the batches that are finished; wait: all of them."""
        while self._pending:
            done, tokens, skipped = self._pending[0]
            if not (wait or skipped is None or skipped.ready()):
                return
            del self._pending[0]
            self.add(done, tokens, skipped=0 if skipped is None else int(skipped.wait()[0]))
        if wait:
            self._tally.total(now=True)

    def add(self, done: int, tokens: int, *, skipped: int) -> None:
        """Count examples, their tokens, and those of them without a sketch."""
        self._tally.add(done, tokens, skipped)
        self.tell(None, stage=self._stage)

    def stage(self, name: str, done: int, total: int) -> None:
        """Report how far a step is that comes before examples are cached."""
        self._stage = Stage(name, done, total)
        self.tell(None, stage=self._stage)

    def prepared(self) -> None:
        """Examples that are counted from now on are cached in no stage."""
        self._stage = None

    def tell(self, message: str | None, *, now: bool = False, stage: Stage | None = None) -> None:
        """Report to the caller; now: with the latest counts of all processes."""
        done, tokens, skipped = self._tally.total(now=now)
        if self._on_progress:
            done += self._resumed
            self._on_progress(Progress(done, self._total, tokens, skipped, self._resumed, message, stage))
