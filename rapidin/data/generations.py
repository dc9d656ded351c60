"""Generations to explain, and the forms in which they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rapidin.data.encoding import Encoded, Status
from rapidin.data.memory import frame_records
from rapidin.data.records import Record
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
    encoded: Encoded
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


def as_records(generations: Any) -> list[Record]:
    """The generations to explain, as records: from a sequence of (prompt, completion) pairs, prompts and
    records, a data frame, or a single pair, prompt or record. Raises UserError for anything else."""
    if isinstance(generations, str | Mapping) or _is_pair(generations):
        generations = [generations]
    frame = frame_records(generations)
    if frame is not None:
        return frame
    if not isinstance(generations, Iterable):
        raise UserError(f"generations must be a list, got {type(generations).__name__}", _EXPECTED)
    return [_as_record(value, n) for n, value in enumerate(generations)]


_EXPECTED = "give (prompt, completion) pairs, prompts, or records as in training data"


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, str) for x in value)


def _as_record(value: Any, n: int) -> Record:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"prompt": value[0], "completion": value[1]}
    raise UserError(f"generation {n + 1} has no prompt and completion: {short(repr(value))}", _EXPECTED)
