"""What the evaluations of a finished cache run on: the cache, its model and its training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin.attribution import baselines
from rapidin.attribution.clock import Clock
from rapidin.attribution.ensemble import Ensemble
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.training_data import training_data
from rapidin.cache import Cache
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.data.sources import Files
from rapidin.errors import UserError, short
from rapidin.evaluate.log import Log, no_log
from rapidin.evaluate.methods import Method, each_score
from rapidin.evaluate.metrics import Floats
from rapidin.evaluate.result import Result
from rapidin.gradients.source import GradientSource


def open_training_data(ensemble: Ensemble, train_data: str | Files | None = None) -> Examples:
    """The training data of complete caches.

    train_data: its new location. Raises UserError if a cache is unfinished or the data is not to be found.
    """
    for cache in ensemble.caches:
        if not cache.manifest.complete:
            raise UserError(
                f"the cache '{cache.path}' is unfinished: {len(cache):,} of {cache.manifest.rows:,} examples",
                "rerun the same 'rapidin cache' command to resume it",
            )
    examples = training_data(ensemble.caches[0], train_data)
    if examples is None:
        path = ensemble.caches[0].path
        raise UserError(f"the cache '{path}' was made from data in memory", "name it with `examples`")
    return examples


def column_values(examples: Examples, name: str) -> list[Any]:
    """A column of every example. Raises UserError, naming the first example that lacks it."""
    values = []
    for row, record in enumerate(examples):
        if name not in record:
            columns = ", ".join(map(repr, record))
            raise UserError(f"{examples.where(row)}: no column '{name}'", f"it has {columns}; see `column`")
        values.append(record[name])
    return values


def boolean_column(examples: Examples, name: str) -> npt.NDArray[np.bool_]:
    """A column that is true or false: [N] bool.

    Raises UserError if it holds something else, or the same value for all examples.
    """
    values = column_values(examples, name)
    for row, value in enumerate(values):
        if value not in (True, False, 0, 1):
            raise UserError(
                f"{examples.where(row)}: '{name}' is {short(value)}, expected true or false, 1 or 0",
                "name another column with `column`",
            )
    marked = np.array(values, dtype=np.bool_)
    if marked.all() or not marked.any():
        raise UserError(
            f"'{name}' is {'true' if marked.all() else 'false'} for all {len(marked):,} examples",
            "name a column that marks some of them with `column`",
        )
    return marked


def cache_settings(ensemble: Ensemble) -> dict[str, Any]:
    """What caches were made with, for the JSON of a result."""
    manifest = ensemble.caches[-1].manifest
    return {
        "caches": [str(cache.path) for cache in ensemble.caches],
        "weights": [member.weight for member in ensemble.members],
        "rows": manifest.rows,
        "without_sketch": manifest.rows - manifest.counts.get("ok", 0),
        "at": manifest.gradient["at"],
        "width": manifest.sketch["width"],
        "codec": manifest.codec.to_json(),
    }


@dataclass(frozen=True)
class Subject:
    """A cache, or an ensemble of caches whose scores are added up, with its training data."""

    ensemble: Ensemble
    examples: Examples
    log: Log = no_log

    @cached_property
    def source(self) -> GradientSource:
        """What made the last cache; of a training run's caches that is the final model's source."""
        return self.ensemble.source()

    @property
    def cache(self) -> Cache:
        """The last cache."""
        return self.ensemble.caches[-1]

    def scores(
        self,
        records: Sequence[Any],
        methods: Sequence[Method],
        result: Result,
        *,
        with_baselines: bool = False,
        max_new_tokens: int = 64,
    ) -> Iterator[tuple[str, Floats]]:
        """(name, scores [Q, rows]) of every method and baseline, for each query in `records`.

        The model writes missing completions. The result's setting gets the seconds of each method.
        """
        self.log(f"gradients of {len(records):,} generation{'s' if len(records) != 1 else ''}")
        # The layer weights that `layer` needs serve every method: a common factor changes no ranking.
        query = self.ensemble.sketched(list(records), QueryOptions(max_new_tokens=max_new_tokens), Clock())
        generations = query.texts
        seconds: dict[str, float] = {}
        result.setting |= cache_settings(self.ensemble) | {"queries": len(generations), "seconds": seconds}
        written = sum(generation.generated for generation in generations)
        if written:
            result.notes.append(
                f"The model wrote {written:,} of the {len(generations):,} completions just now."
            )
        for method, scores, elapsed in each_score(query.sketches, generations, methods):
            self.log(f"{method}: {elapsed:.2f} s")
            seconds[str(method)] = elapsed
            yield str(method), scores
        if with_baselines:
            yield from self.baselines(records, generations)

    def baselines(
        self, records: Sequence[Any], generations: Sequence[Generation]
    ) -> Iterator[tuple[str, Floats]]:
        """(name, scores [Q, rows]) of the rankings that need no gradients."""
        rows = [baselines.plain_text(record) for record in self.examples]
        queries = [
            baselines.query_text(record, generation.completion)
            for record, generation in zip(records, generations, strict=True)
        ]
        self.log(f"hidden states of {len(rows) + len(queries):,} texts")
        length = self.source.settings.max_length
        assert length is not None
        yield from baselines.scores_of_baselines(self.source.loaded, rows, queries, max_length=length).items()
