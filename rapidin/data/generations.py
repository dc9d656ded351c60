"""Generations to explain, and the forms in which they are given."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rapidin.data.encoding import AnyExample, Status
from rapidin.data.examples import open_examples
from rapidin.data.fields import FieldMap
from rapidin.data.memory import frame_records, refuse_splits, rows_of, single_rows
from rapidin.data.records import TEXTS, Forms, Record, check_record, to_record
from rapidin.data.sources import is_pair
from rapidin.data.spans import Span
from rapidin.errors import UserError, short


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation to explain.

    generated: whether the model wrote the completion; weight: its weight in a set of generations; pieces: the
    texts of its tokens that count, if requested; spans: the parts of it that have scores of their own;
    missing: hot words that it does not contain.
    """

    prompt: str
    completion: str
    generated: bool
    encoded: AnyExample
    weight: float = 1.0
    pieces: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    missing: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError if it has no token to explain."""
        if self.encoded.status == Status.OK:
            return
        reasons = {Status.EMPTY: "has no text", Status.TOO_LONG: "is longer than the context"}
        reason = reasons.get(self.encoded.status, "has no completion token")
        raise UserError(f"the generation for '{short(self.prompt)}' {reason}")


def as_records(generations: Any, forms: Forms | None = TEXTS) -> list[Record]:
    """The generations to explain, as records of these forms.

    generations: a prompt, a (prompt, completion) pair, a record, a list or any other iterable of these or of
    batches, a data frame, a HF dataset, or a file of records (a path object or an open file; a plain string
    is a prompt). Raises UserError for anything else.
    """
    if isinstance(generations, os.PathLike) or hasattr(generations, "read"):
        return list(open_examples(generations, generations=True, forms=forms))
    if isinstance(generations, str) or is_pair(generations):
        generations = [generations]
    elif isinstance(generations, Mapping):
        generations = rows_of(generations, "the batch of generations") or [generations]
    refuse_splits(generations)
    frame = frame_records(generations)
    if frame is not None:
        generations = frame
    if not isinstance(generations, Iterable) or isinstance(generations, bytes | bytearray):
        raise UserError(f"generations must be a list, got {type(generations).__name__}", _EXPECTED)
    rows = single_rows(generations, texts=False)
    return [_as_record(value, f"generation {n}", forms) for n, value in enumerate(rows, 1)]


_EXPECTED = "give (prompt, completion) pairs, prompts, or records as in training data"


def _as_record(value: Any, where: str, forms: Forms | None) -> Record:
    if isinstance(value, str):
        value = {"prompt": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"prompt": value[0], "completion": value[1]}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} has no prompt and completion: {short(repr(value))}", _EXPECTED)
    record = FieldMap().read(to_record(value, where), where, generations=True, forms=forms)
    if isinstance(record.get("weight"), str):  # as in a csv file
        with contextlib.suppress(ValueError):
            record = record | {"weight": float(record["weight"])}
    if forms is not None and forms.of(record, generations=True) is not None:
        check_record(record, forms, "", True, where)
    return record
