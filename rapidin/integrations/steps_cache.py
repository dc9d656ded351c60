"""A cache of the sketches that a training run made, from the log of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin.attribution.caching import add_null, format_of
from rapidin.attribution.options import CacheOptions
from rapidin.attribution.progress import LOG
from rapidin.attribution.provenance import manifest_of
from rapidin.cache import Cache, build
from rapidin.cache.writer import CacheWriter
from rapidin.data.encoding import Status
from rapidin.data.examples import Examples
from rapidin.data.fields import plain
from rapidin.distributed import World
from rapidin.gradients.batching import SILENT
from rapidin.gradients.check import GradientCheck
from rapidin.gradients.source import GradientSource
from rapidin.integrations.steps import SeenRow, StepSums

_MOST_RATES = 1000  # of a manifest; of more steps, some at even distances
_FIELDS = (
    "input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks",
    "prompt_ids", "chosen_ids", "rejected_ids",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainedRow:
    """An example as the caching loop takes it.

    seen: what the log says of it; length: for its place in a shard's groups alone.
    """

    seen: SeenRow
    length: int = 1
    truncated: bool = False

    @property
    def status(self) -> Status:
        """Why it has no sketch. An example that the training did not see has one: zero."""
        if not self.seen.visits:
            return Status.OK
        return Status(self.seen.status) if self.seen.targets else Status.NO_TARGET


class TokenRecords:
    """The records of examples that are known by their token ids alone: those of the rows of a data set, or of
    the texts that are packed in its rows.

    places: (row, number within it) of each example, None for a row each.
    """

    def __init__(self, dataset: Any, places: Sequence[tuple[int, int]] | None) -> None:
        self._dataset, self._places = dataset, places

    def __len__(self) -> int:
        return len(self._dataset) if self._places is None else len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        row, part = (number, None) if self._places is None else self._places[number]
        item = self._dataset[row]
        if not isinstance(item, Mapping):
            return {"row": row}
        record = {name: plain(item[name]) for name in _FIELDS if item.get(name) is not None}
        if part is None:
            return record or {"row": row}
        start = sum(item["seq_lengths"][:part])
        return {name: ids[start : start + item["seq_lengths"][part]] for name, ids in record.items()}


def training_record(sums: StepSums, first: int, last: int, trainer: str, rows: int) -> dict[str, Any]:
    """What a manifest says of the steps that its sketches were taken in: from `first` up to `last`, counted
    from 1."""
    steps = sorted(sums.rates)
    chosen = steps[:: max(1, -(-len(steps) // _MOST_RATES))]
    return {
        "trainer": trainer,
        "first_step": first + 1,
        "last_step": last,
        "visits": sums.visits,
        "seen": sums.seen,
        "weight": sums.weight,
        "learning_rates": [[step + 1, sum(sums.rates[step]) / len(sums.rates[step])] for step in chosen],
    }


def write_cache(
    source: GradientSource,
    examples: Examples,
    sums: StepSums,
    path: Path,
    options: CacheOptions,
    training: Mapping[str, Any],
    check: GradientCheck | None,
    *,
    null: bool,
) -> Cache:
    """Write the weighted sums of a run's sketches as the cache at `path`; resumes an unfinished cache.

    source: with the weights at which queries are to be taken, and its preconditioner; training, check: for
    the manifest; null: add the null distribution that a query's verdict needs. Raises UserError if folder or
    disk cannot be used.
    """
    manifest = manifest_of(source, format_of(options, source.width), len(examples), examples)
    manifest.gradient["training"] = dict(training)
    manifest.shard_rows = options.shard_rows or build.shard_rows(manifest, path)
    world = World()  # this process alone: the others train on, or are done
    device = source.loaded.device

    def sketches(rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
        status = torch.tensor([int(row.status) for row in rows], dtype=torch.uint8)
        made = sums.sketches([row.seen.row for row in rows])
        made[status != int(Status.OK)] = 0.0
        return made.to(device), status.to(device)

    with build.open_writer(path, manifest, world) as writer:
        assert isinstance(writer, CacheWriter)
        if source.config.fitted is not None:
            writer.set_preconditioner(source.config.fitted.data)
        if check is not None:
            writer.set_check(check.to_json())
        loop = build.CachingLoop(
            writer,
            world,
            examples,
            lambda row, _: TrainedRow(sums.of_row(row)),
            sketches,
            device,
            LOG.info,
        )
        loop.run()
        if null:
            add_null(writer, source, examples, SILENT)
    return Cache(path)
