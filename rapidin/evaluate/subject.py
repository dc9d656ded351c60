"""Finished caches with their model and its training data: what most evaluations run on."""

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
from rapidin.data.examples import Examples, Files
from rapidin.data.generations import Generation
from rapidin.errors import UserError, short
from rapidin.evaluate.methods import Floats, Method, each_score
from rapidin.evaluate.result import Result, Say, silent
from rapidin.gradients.source import GradientSource


def open_data(ensemble: Ensemble, train_data: str | Files | None = None) -> Examples:
    """The data that complete caches were made of. UserError where one is unfinished or the data is gone."""
    for cache in ensemble.caches:
        if not cache.manifest.complete:
            raise UserError(
                f"the cache '{cache.path}' is unfinished: {len(cache):,} of {cache.manifest.rows:,} examples",
                "the same 'rapidin cache' command goes on with it",
            )
    examples = training_data(ensemble.caches[0], train_data)
    if examples is None:
        path = ensemble.caches[0].path
        raise UserError(f"the cache '{path}' was made from data in memory", "name it with --train-data")
    return examples


def column(examples: Examples, name: str) -> list[Any]:
    """A field of every example. UserError naming the first that lacks it."""
    values = []
    for row, record in enumerate(examples):
        if name not in record:
            has = ", ".join(map(repr, record))
            raise UserError(f"{examples.where(row)}: no column '{name}'", f"it has {has}; see --column")
        values.append(record[name])
    return values


def flags(examples: Examples, name: str) -> npt.NDArray[np.bool_]:
    """A field that is true or false: [N] bool. UserError where it is something else, or the same for all."""
    values = column(examples, name)
    for row, value in enumerate(values):
        if value not in (True, False, 0, 1):
            raise UserError(
                f"{examples.where(row)}: '{name}' holds {short(value)}", "expected true or false, 1 or 0"
            )
    made = np.array(values, dtype=np.bool_)
    if made.all() or not made.any():
        raise UserError(
            f"'{name}' is {'true' if made.all() else 'false'} for all {len(made):,} examples",
            "name the column that marks some of them with --column",
        )
    return made


@dataclass(frozen=True)
class Subject:
    """A cache, or several whose scores are added up, with their training data."""

    ensemble: Ensemble
    examples: Examples
    say: Say = silent

    @cached_property
    def source(self) -> GradientSource:
        """What the last cache was made with: of a training run, the finished model."""
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
        """(name, scores [Q, rows]) of every method and baseline; notes seconds in the result's setting.

        The model writes completions that are missing, whatever the methods."""
        self.say(f"gradients of {len(records):,} generations")
        # The weights of `layer` serve all: a common factor changes no ranking.
        asked = self.ensemble.sketched(list(records), QueryOptions(max_new_tokens=max_new_tokens), Clock())
        texts, parts = asked.texts, asked.sketches
        seconds: dict[str, float] = {}
        result.setting |= about(self.ensemble) | {"queries": len(texts), "seconds": seconds}
        written = sum(text.generated for text in texts)
        if written:
            result.notes.append(f"The model wrote {written:,} of the {len(texts):,} completions just now.")
        for method, made, took in each_score(parts, texts, methods):
            self.say(f"{method}: {took:.2f} s")
            seconds[str(method)] = took
            yield str(method), made
        if with_baselines:
            yield from self.baselines(records, texts)

    def baselines(self, records: Sequence[Any], texts: Sequence[Generation]) -> Iterator[tuple[str, Floats]]:
        """(name, scores [Q, rows]) of what needs no gradients."""
        rows = [baselines.plain_text(record) for record in self.examples]
        asked = [
            baselines.asked_text(record, text.completion) for record, text in zip(records, texts, strict=True)
        ]
        self.say(f"hidden states of {len(rows) + len(asked):,} texts")
        length = self.source.encoder.max_length
        yield from baselines.both(self.source.loaded, rows, asked, max_length=length).items()


def about(ensemble: Ensemble) -> dict[str, Any]:
    """What caches were made with, for the JSON of a result."""
    manifest = ensemble.caches[-1].manifest
    return {
        "caches": [str(cache.path) for cache in ensemble.caches],
        "weights": [member.weight for member in ensemble.members],
        "rows": manifest.rows,
        "without_sketch": manifest.rows - manifest.counts.get("ok", 0),
        "at": manifest.gradient["at"],
        "width": manifest.sketch["width"],
        "code": manifest.codec.to_json(),
    }
