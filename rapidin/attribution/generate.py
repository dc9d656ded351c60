"""The generations to explain: the caller's records, with completions that the model generates if missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rapidin.data.generations import Generation, as_records
from rapidin.data.records import Record
from rapidin.data.spans import HOTWORDS, Targets, check_targets, find_spans, split_words
from rapidin.errors import UserError, short
from rapidin.gradients.source import GradientSource


def generations_of(
    source: GradientSource, values: Any, max_new_tokens: int = 64, targets: Targets | None = None
) -> list[Generation]:
    """The generations to explain, with their targets.

    values: as for `rapidin.Ensemble.query`; the model of `source` generates missing completions. Raises
    UserError if there is no generation, or one cannot be made or has no token to explain; of several it says
    which one.
    """
    records = as_records(values, source.task.forms)
    if not records:
        raise UserError("there is no generation to explain")
    check_targets(targets, len(records))
    found = []
    for n, record in enumerate(records):
        try:
            generation = _generation(source, record, max_new_tokens)
            generation.check()
            wanted = targets if isinstance(targets, str | None) else targets[n]
            found.append(_with_targets(source, generation, record, wanted))
        except UserError as error:
            if len(records) == 1:
                raise
            raise UserError(f"query {n + 1} of {len(records)}: {error.what}", error.remedy) from None
    return found


def _generation(source: GradientSource, record: Record, max_new_tokens: int) -> Generation:
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UserError(f"the weight {short(weight)} is not a number", "fix the column 'weight'")
    generation = source.task.generation(source.loaded.model, record, max_new_tokens)
    return replace(generation, weight=float(weight))


def _with_targets(source: GradientSource, generation: Generation, record: Record, targets: Any) -> Generation:
    """The generation with its targets; targets: "tokens", "hotwords", None, or a list of words and spans."""
    if targets is None:
        return generation
    words = split_words(record.get(HOTWORDS) or ())
    if targets == "hotwords" and not words:
        return generation
    ids, target = source.task.tokens(generation.encoded)
    pieces = source.encoder.pieces(ids)
    counted = [piece for piece, counts in zip(pieces, target, strict=True) if counts]
    chosen = None if targets == "tokens" else words if targets == "hotwords" else targets
    spans, missing = find_spans(chosen, counted, generation.completion)
    return replace(generation, pieces=tuple(counted), spans=tuple(spans), missing=tuple(missing))
