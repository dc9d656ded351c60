"""Passes over texts in batches that fit into memory, at one pace in all processes that share a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from rapidin import distributed
from rapidin.data.encoding import AnyExample, by_length
from rapidin.errors import UserError, is_out_of_memory
from rapidin.gradients.calls import NotBatchedError
from rapidin.ops.transfer import Download
from rapidin.tasks.task import Task

_T = TypeVar("_T")


class Reporter(Protocol):
    """Is told how far sketching is."""

    def add(self, done: int, tokens: int, *, skipped: int) -> None:
        """So many examples are done; `skipped` of them have no sketch."""

    def sketched(self, done: int, tokens: int, skipped: Download | None) -> None:
        """As `add`, for a batch that the device is still working on."""

    def tell(self, message: str | None) -> None:
        """Something to tell the user."""

    def stage(self, name: str, done: int, total: int) -> None:
        """So many of `total` passes over examples are done, of a step that comes before sketching."""


class Silent:
    """A reporter that tells nobody."""

    def add(self, done: int, tokens: int, *, skipped: int) -> None: ...

    def sketched(self, done: int, tokens: int, skipped: Download | None) -> None: ...

    def tell(self, message: str | None) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...


SILENT = Silent()


class StageReporter(Silent):
    """Reports the texts that are sketched as steps of a stage.

    on_stage: called with the stage's name, the texts that are done, and `total`; tell: what is told.
    """

    def __init__(
        self,
        on_stage: Callable[[str, int, int], None],
        name: str,
        total: int,
        tell: Callable[[str | None], None] | None = None,
    ) -> None:
        self._on_stage, self._name, self._done, self._total = on_stage, name, 0, total
        self._tell = tell

    def add(self, done: int, tokens: int, *, skipped: int) -> None:
        self._done += done
        self._on_stage(self._name, self._done, self._total)

    def sketched(self, done: int, tokens: int, skipped: Download | None) -> None:
        self.add(done, tokens, skipped=0)

    def tell(self, message: str | None) -> None:
        if self._tell is not None:
            self._tell(message)


class Counted:
    """Counts the passes over the sample of one point; before: those of earlier points, of `total`."""

    def __init__(self, reporter: Reporter, before: int, total: int) -> None:
        self.reporter = reporter
        self._before, self._done, self._total = before, 0, total

    def add(self, passes: int) -> None:
        self._done += passes
        self.reporter.stage("fitting the preconditioner", self._before + self._done, self._total)

    def restart(self) -> None:
        self._done = 0


class Lockstep:
    """The processes that share one model (FSDP), all of which make the same number of passes.

    shared: whether the model is spread over them; otherwise this process goes at its own pace.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared

    @property
    def _world(self) -> distributed.World:
        return distributed.world() if self.shared else distributed.World()

    def idle(self, passes: int) -> int:
        """How many passes this process makes for the others, if it has so many of its own; collective."""
        return self._world.most(passes) - passes

    def run(self, step: Callable[[], _T]) -> _T:
        """One pass, together with the others."""
        return self._world.collective(step) if self.shared else step()

    def begin(self) -> None:
        """Announce texts to sketch; the others join in, from `until_all_are_done` if they have none left."""
        if self.shared:
            self._world.most(1)

    def until_all_are_done(self, join: Callable[[], object]) -> None:
        """Call `join`, which sketches no text, as often as others announce theirs."""
        while self.shared and self._world.most(0):
            join()


class BatchRunner:
    """Runs passes over texts in batches of like length, smaller ones once memory has run out.

    task: makes the batches; batch_tokens: padded tokens per batch to begin with. one_at_a_time: set if a
    layer is found to mix the examples of a batch; why: the reason for which it is set from the start, "" for
    none.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        batch_tokens: int,
        lockstep: Lockstep,
        why: str = "",
    ) -> None:
        self.task, self.device, self.lockstep = task, device, lockstep
        self.batch_tokens = batch_tokens
        self.one_at_a_time, self._why = bool(why), why

    @property
    def why_one_at_a_time(self) -> str:
        """The reason in words."""
        return f"examples are processed one at a time: {self._why}"

    def run(
        self,
        chosen: Sequence[int],
        texts: Sequence[AnyExample],
        step: Callable[[Any], _T],
        reporter: Reporter = SILENT,
    ) -> Iterator[tuple[list[int], _T | None]]:
        """Yields the numbers of a batch's texts and what `step` returned for the batch.

        chosen: numbers of the texts to take. A batch that does not fit into memory is halved, and later ones
        are as small; for an example that does not fit even alone, None is yielded. Raises UserError for both
        if the model is shared, since other processes are in the same pass.
        """
        queue = by_length(chosen, texts, 0 if self.one_at_a_time else self.batch_tokens)
        idle = self.lockstep.idle(len(queue))
        while queue:
            numbers = queue.pop()
            result: _T | None = None
            try:
                batch = self.task.batch([texts[n] for n in numbers], self.device)
                result = self.lockstep.run(partial(step, batch))
            except NotBatchedError as error:
                self._not_batched(error.reason, reporter)
                queue.extend([n] for n in reversed(numbers))
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.lockstep.shared:
                    raise UserError("a batch does not fit into memory", "lower `batch_tokens`") from None
                fits = False
            else:
                fits = True
            if not fits:  # outside of the handler, where nothing keeps the failed pass's memory
                self._release_memory()
                if len(numbers) > 1:
                    longest = max(texts[n].length for n in numbers)
                    self.batch_tokens = longest * (len(numbers) // 2)
                    reporter.tell(f"out of memory: continuing with batches of {self.batch_tokens:,} tokens")
                    left = [n for each in (*queue, numbers) for n in each]
                    queue = by_length(left, texts, self.batch_tokens)
                    continue
            yield numbers, result
        for _ in range(idle):
            filler = self.task.filler()
            if filler is None:
                raise UserError(f"the task '{self.task.name}' has no use for `shard_model`")
            self.lockstep.run(partial(step, self.task.batch([filler], self.device)))

    def _not_batched(self, why: str, reporter: Reporter) -> None:
        if self.lockstep.shared:
            raise UserError(
                "a layer mixes the examples of a batch", "use `batch_tokens=1` with `shard_model`"
            ) from None
        if not self.one_at_a_time:
            self.one_at_a_time = True
            self._why = why
            reporter.tell(self.why_one_at_a_time)

    def _release_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
