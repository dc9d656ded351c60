"""What the evaluations compare: methods, places where gradients are taken, sizes of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin.attribution import methods as known
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.checkpoints import find_checkpoints
from rapidin.attribution.generate import generations_of
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import QuerySketch, sketch_generations
from rapidin.attribution.query_sketch import scores as part_scores
from rapidin.cache import Cache
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.errors import UserError
from rapidin.evaluate.result import Say, silent
from rapidin.gradients.load import LoadedModel
from rapidin.results.text import time_text

Floats = npt.NDArray[np.float64]

DEFAULT = "dot:layer,dot:cosine,dot:none,datainf:layer,datainf:none,fisher:layer,fisher:none"
CHECKPOINTS = "checkpoints"
PRECONDITIONERS = ("kfac", "off", "sample", "optimizer")  # the first is the default


@dataclass(frozen=True, slots=True)
class Method:
    """A method with its normalisation and damping (None: the method's own), as `rapidin.attribution.methods`
    knows
    them."""

    method: str
    normalize: str
    damping: float | None = None

    def __str__(self) -> str:
        return f"{self.method}:{self.normalize}" + ("" if self.damping is None else f":{self.damping:g}")


def parse_methods(text: str | None, default: str = DEFAULT) -> list[Method]:
    """METHOD:NORMALIZE[:DAMPING] between commas. UserError for what is none."""
    found: list[Method] = []
    for part in (text or default).split(","):
        method, _, rest = part.strip().partition(":")
        normalize, _, damping = rest.partition(":")
        if not normalize:
            raise UserError(
                f"'{part}' names no method and normalisation",
                "give METHOD:NORMALIZE, as in dot:layer,fisher:none",
            )
        try:
            made = Method(method, normalize, float(damping) if damping else None)
        except ValueError:
            raise UserError(f"the damping of '{part}' is no number", "as in fisher:layer:0.1") from None
        known.check(made.method, made.normalize, made.damping)
        if made not in found:
            found.append(made)
    return found


def each_score(
    parts: Sequence[QuerySketch], texts: Sequence[Generation], methods: Sequence[Method]
) -> Iterator[tuple[Method, Floats, float]]:
    """(method, scores [Q, rows] with NaN for rows that do not count, seconds) of every method."""
    for method in methods:
        began = time.perf_counter()
        made = part_scores(parts, texts, ScoringConfig(method.normalize, method.method, method.damping))
        yield method, made.double().numpy(), time.perf_counter() - began


# ------------------------------------------------------------------------------------------------ places


@dataclass(frozen=True, slots=True)
class Place:
    """Where gradients are taken, and in how many bytes a row is kept (None: every number of the sketch).

    at: points between base and tuned model, summed; None for the checkpoints of the tuning, summed with their
    learning rates. preconditioner: "kfac", "off", "sample", or "optimizer": the state in the last checkpoint,
    or in each.
    """

    at: tuple[float, ...] | None
    bytes: int | None = None
    preconditioner: str = PRECONDITIONERS[0]

    def __str__(self) -> str:
        where = CHECKPOINTS if self.at is None else "at " + "+".join(f"{a:g}" for a in self.at)
        where += "" if self.bytes is None else f", {self.bytes:,} bytes"
        return where + (
            "" if self.preconditioner == PRECONDITIONERS[0] else f", preconditioner {self.preconditioner}"
        )

    @property
    def folder(self) -> str:
        """A name for its cache."""
        where = CHECKPOINTS if self.at is None else "at-" + "-".join(f"{a:g}" for a in self.at)
        where += "" if self.bytes is None else f"-bytes-{self.bytes}"
        return where + ("" if self.preconditioner == PRECONDITIONERS[0] else f"-{self.preconditioner}")


def parse_places(at: Sequence[str], sizes: Sequence[int], preconditioners: Sequence[str] = ()) -> list[Place]:
    """Every `--at` (numbers between commas, or "checkpoints") with every `--bytes` (0: all of the sketch)
    and every `--precondition`."""
    for name in preconditioners:
        if name not in PRECONDITIONERS:
            raise UserError(f"unknown --precondition '{name}'", f"known: {', '.join(PRECONDITIONERS)}")
    found = []
    for text in at:
        points: tuple[float, ...] | None = None
        if text != CHECKPOINTS:
            try:
                points = tuple(float(part) for part in text.split(","))
            except ValueError:
                raise UserError(
                    f"--at {text} is not a number, numbers between commas, or '{CHECKPOINTS}'",
                    "as in --at 0.5 --at 0.1,0.5,0.9",
                ) from None
        found += [
            Place(points, size or None, name)
            for size in sizes or [0]
            for name in preconditioners or PRECONDITIONERS[:1]
        ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Rows:
    """The training rows that a folder keeps caches of. width: bins of a block, "auto" for as many as pay."""

    folder: Path
    examples: Examples
    max_length: int
    width: Any = "auto"
    say: Say = silent

    def cached(
        self, loaded: LoadedModel, place: Place, name: str, checkpoint: Path | None
    ) -> tuple[Attributor, Cache]:
        """The cache of a place, made or gone on with, and its attributor.

        checkpoint: whose optimizer's state a preconditioner is made from."""
        preconditioner: str | Path | None = place.preconditioner
        if preconditioner == "optimizer":
            if checkpoint is None:
                raise UserError("no checkpoint was kept whose optimizer's state could be read", _AGAIN)
            preconditioner = checkpoint / "optimizer.pt"
        limit = loaded.context_length
        attributor = Attributor(
            loaded,
            at=list(place.at or (1.0,)),
            width=self.width,
            bytes_per_example=place.bytes,
            preconditioner=preconditioner,
            max_length=min(self.max_length, limit) if limit else self.max_length,
        )
        path = self.folder / f"{name}-width-{attributor.settings.width}"
        began = time.perf_counter()
        cache = attributor.cache(self.examples, path, bytes=place.bytes)
        took = time.perf_counter() - began
        self.say(f"{place}: {len(cache):,} examples cached in {path} ({time_text(took)})")
        return attributor, cache


_AGAIN = "start anew with --checkpoints, in another --out"


def parts_at(
    place: Place,
    rows: Rows,
    load: Callable[[Path | None], LoadedModel],
    checkpoints: Path,
    queries: Sequence[Any],
) -> tuple[list[QuerySketch], list[Generation]]:
    """The caches of a place with the sketches of the queries there.

    load: the tuned model (None) or one of its checkpoints, whose folder is `checkpoints`; their weights are
    those of `rapidin.attribution.checkpoints.find_checkpoints`, adding up to 1. Raises UserError where there
    are none.
    """
    kept = find_checkpoints(checkpoints)[0] if checkpoints.exists() else []
    last = kept[-1].path if kept else None
    members: list[tuple[Path | None, float, str]] = [(None, 1.0, place.folder)]
    if place.at is None:
        if not kept:
            raise UserError("no checkpoints were kept", _AGAIN)
        total = sum(each.weight for each in kept)
        members = [(c.path, c.weight / total, f"{c.path.name}-{place.folder}") for c in kept]
    parts: list[QuerySketch] = []
    for path, weight, name in members:
        attributor, cache = rows.cached(load(path), place, name, path or last)
        texts = generations_of(attributor.source, list(queries))
        parts.append(QuerySketch(cache, sketch_generations(attributor.source, texts), weight))
    return parts, texts
