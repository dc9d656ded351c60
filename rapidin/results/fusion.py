"""How a fused ranking came about: of each hit, its rank in each ranking and what that adds to its score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BEST = 10  # rows at the top of a ranking that are compared with another's
SAME = 9  # of them in common with BM25, from which on its best rows are the gradient's (studies/fuse)


@dataclass(frozen=True, slots=True)
class Fused:
    """A hit in a fused ranking.

    score: the sum of `adds`; ranks: by the name of a ranking the hit's rank there, from 1, or None if it is
    not among the rows that count; adds: what each ranking adds, weight / (60 + rank), 0 without a rank.
    """

    score: float
    ranks: Mapping[str, int | None]
    adds: Mapping[str, float]

    def share(self, name: str) -> float:
        """The part of the score that a ranking adds, from 0 to 1."""
        return self.adds[name] / self.score if self.score else 0.0

    def to_json(self) -> dict[str, Any]:
        """The score, and of each ranking the rank and what it adds."""
        rankings = {name: {"rank": rank, "adds": self.adds[name]} for name, rank in self.ranks.items()}
        return {"score": self.score, "rankings": rankings}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Fused:
        """What `to_json` returned."""
        rankings = value["rankings"].items()
        return Fused(
            float(value["score"]),
            {name: None if each["rank"] is None else int(each["rank"]) for name, each in rankings},
            {name: float(each["adds"]) for name, each in rankings},
        )


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a fused ranking is made of.

    weights: of the rankings, by name; depth: how many of the best rows of a ranking have a rank; common: how
    many of the `best` rows with the highest gradient scores are among as many best of BM25.
    """

    weights: Mapping[str, float]
    depth: int
    common: int
    best: int

    @property
    def only_words(self) -> bool:
        """Whether the gradient's best rows are nearly the same as BM25's."""
        return self.common >= SAME / BEST * self.best

    @property
    def sentence(self) -> str:
        """Whether gradients say something beyond words, without a full stop."""
        if self.best == 0:
            return "no row has a gradient score"
        counts = (
            f"{self.common} of the {self.best} rows with the highest gradient scores are also among the "
            f"{self.best} best of BM25"
        )
        return f"at the top gradients say nothing beyond words: {counts}" if self.only_words else counts

    def to_json(self) -> dict[str, Any]:
        """Its fields and the sentence."""
        return {
            "weights": dict(self.weights),
            "depth": self.depth,
            "common": self.common,
            "best": self.best,
            "sentence": self.sentence,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Fusion:
        """What `to_json` returned."""
        weights = {str(name): float(weight) for name, weight in value["weights"].items()}
        return Fusion(weights, int(value["depth"]), int(value["common"]), int(value["best"]))
