"""The attribution methods that an evaluation compares, and their scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rapidin.attribution import methods
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import QuerySketch
from rapidin.attribution.query_sketch import scores as scores_of
from rapidin.data.generations import Generation
from rapidin.errors import UserError
from rapidin.evaluate.metrics import Floats

DEFAULT = (
    "dot:weighted,dot:layer,dot:cosine,dot:none,datainf:weighted,datainf:layer,datainf:none,fisher:weighted,"
    "fisher:layer,fisher:none"
)


@dataclass(frozen=True, slots=True)
class Method:
    """A method of `rapidin.attribution.methods` with its normalization and damping.

    damping: None for the method's default.
    """

    method: str
    normalize: str
    damping: float | None = None

    def __str__(self) -> str:
        if self.damping is None:
            return f"{self.method}:{self.normalize}"
        damping = f"{self.damping:g}"
        if float(damping) != self.damping:
            damping = repr(self.damping)
        return f"{self.method}:{self.normalize}:{damping}"

    def scoring(self, *, together: bool = False) -> ScoringConfig:
        """The settings of a scan with this method. together: score all generations as one target set."""
        return ScoringConfig(self.normalize, self.method, self.damping, together=together)


def parse_methods(text: str | None, default: str = DEFAULT) -> list[Method]:
    """The methods of a comma-separated list of METHOD:NORMALIZE[:DAMPING], without repetitions.

    Raises UserError for an unknown method or a malformed entry.
    """
    parsed: list[Method] = []
    for entry in (text or default).split(","):
        name, _, options = entry.strip().partition(":")
        normalize, _, damping = options.partition(":")
        if not normalize:
            raise UserError(
                f"'{entry}' in `methods` is not a method with its normalization",
                "give METHOD:NORMALIZE, as in dot:weighted,fisher:none",
            )
        try:
            method = Method(name, normalize, float(damping) if damping else None)
        except ValueError:
            raise UserError(
                f"the damping of '{entry}' in `methods` is not a number", "write it as in fisher:layer:0.1"
            ) from None
        methods.check(method.method, method.normalize, method.damping)
        if method not in parsed:
            parsed.append(method)
    return parsed


def each_score(
    sketches: Sequence[QuerySketch], generations: Sequence[Generation], chosen: Sequence[Method]
) -> Iterator[tuple[Method, Floats, float]]:
    """(method, scores [Q, rows], seconds) of every method; NaN where a row has no sketch."""
    for method in chosen:
        start = time.perf_counter()
        scores = scores_of(sketches, generations, method.scoring())
        yield method, scores.double().numpy(), time.perf_counter() - start
