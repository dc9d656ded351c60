"""What a query is to bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rapidin.attribution import methods
from rapidin.data.spans import Targets
from rapidin.errors import UserError


@dataclass(frozen=True, slots=True)
class Scoring:
    """How influence is estimated: see `rapidin.attribution.methods`.

    together: all generations are one target set, whose score is the mean of theirs by their weights; groups:
    places of generations, each group such a set.
    """

    normalize: str = "layer"
    method: str = "dot"
    damping: float | None = None
    together: bool = False
    groups: Sequence[Sequence[int]] | None = None

    def check(self) -> None:
        """Raise UserError for an unknown name."""
        methods.check(self.method, self.normalize, self.damping)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a query is to bring, see `rapidin.Ensemble.query`. candidates: at each end, that are rescored."""

    top_k: int = 10
    targets: Targets | None = None
    exact: bool = False
    candidates: int = 0
    contributions: bool = False
    fold: bool = False
    errors: bool = True
    layers: bool = False
    histogram: bool = False
    by: str | None = None
    baselines: bool = False

    def check(self) -> None:
        """Raise UserError where this is not to be had."""
        if self.top_k < 1:
            raise UserError(f"--top-k {self.top_k} is less than 1")
        if 0 < self.candidates < self.top_k:
            raise UserError(f"--candidates {self.candidates} is less than --top-k {self.top_k}")

    @property
    def overview(self) -> bool:
        """Whether all scores are to be looked at."""
        return self.histogram or self.by is not None

    @property
    def texts(self) -> str:
        """What of this needs the training examples, in words; "" for none."""
        inside = "what lies inside of hits" if self.inside else ""
        return inside or ("--by" if self.by is not None else "--baselines" if self.baselines else "")

    @property
    def inside(self) -> bool:
        """Whether gradients of training examples are to be taken again."""
        return self.exact or self.contributions
