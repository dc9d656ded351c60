"""Hits: training examples with their scores, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Hit:
    """A training example with its score.

    rank: from 1; index: its line number in the training data, from 0; row: its row in the cache; score: its
    influence on the generation, positive for helpful and negative for harmful; example: the record, where
    the data is at hand.
    """

    rank: int
    index: int
    row: int
    score: float
    example: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """rank, index, score, and the example where there is one."""
        value: dict[str, Any] = {"rank": self.rank, "index": self.index, "score": self.score}
        if self.example is not None:
            value["example"] = dict(self.example)
        return value


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The hits of one generation.

    prompt, completion: its text; generated: whether the model wrote the completion just now; top: most
    helpful first; bottom: most harmful first; normalize, method: what the scores are
    (`rapidin.methods`); seconds: time by stage, of the whole call; together: how many generations
    these are the hits of, as one target set, else 0.
    """

    prompt: str
    completion: str
    generated: bool
    top: list[Hit]
    bottom: list[Hit]
    normalize: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    method: str = "dot"
    together: int = 0

    def to_json(self) -> dict[str, Any]:
        """The query as `rapidin query --json` prints it."""
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "generated": self.generated,
            "normalize": self.normalize,
            "method": self.method,
            **({"together": self.together} if self.together else {}),
            "top": [hit.to_json() for hit in self.top],
            "bottom": [hit.to_json() for hit in self.bottom],
        }
