"""Variants of a cache that the evaluations compare: where gradients are taken, bytes per row,
preconditioner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.checkpoints import find_checkpoints
from rapidin.attribution.generate import generations_of
from rapidin.attribution.provenance import checked
from rapidin.attribution.query_sketch import QuerySketch, sketch_query
from rapidin.cache import Cache
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.errors import UserError
from rapidin.evaluate.log import Log, no_log
from rapidin.evaluate.tuned import MAX_LENGTH, TunedModel
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.source import GradientSource
from rapidin.results.text import time_text

CHECKPOINTS = "checkpoints"
PRECONDITIONERS = ("kfac", "off", "sample", "optimizer")  # the first is the default

_START_ANEW = "start anew with `checkpoints`, in another folder"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of making a cache.

    at: points between base and tuned model, whose gradients are added up; None for the checkpoints of the
    tuning, added up by their learning rates. bytes: of a row, None for the uncompressed sketch.
    preconditioner: "kfac", "off", "sample", or "optimizer", the state in the last checkpoint (with
    checkpoints, in each).
    """

    at: tuple[float, ...] | None
    bytes: int | None = None
    preconditioner: str = PRECONDITIONERS[0]

    def __str__(self) -> str:
        name = CHECKPOINTS if self.at is None else "at " + "+".join(f"{a:g}" for a in self.at)
        name += "" if self.bytes is None else f", {self.bytes:,} bytes"
        return name + (
            "" if self.preconditioner == PRECONDITIONERS[0] else f", preconditioner {self.preconditioner}"
        )

    @property
    def folder(self) -> str:
        """Name of the cache's folder."""
        name = CHECKPOINTS if self.at is None else "at-" + "-".join(f"{a:g}" for a in self.at)
        name += "" if self.bytes is None else f"-bytes-{self.bytes}"
        return name + ("" if self.preconditioner == PRECONDITIONERS[0] else f"-{self.preconditioner}")


def parse_variants(
    at: Sequence[str], sizes: Sequence[int], preconditioners: Sequence[str] = ()
) -> list[Variant]:
    """Every combination of points, sizes and preconditioners, without repetitions.

    at: each is numbers between commas, or "checkpoints"; sizes: bytes of a row, 0 for the uncompressed
    sketch, none given for [0]. Raises UserError for values that are none of these.
    """
    for name in preconditioners:
        if name not in PRECONDITIONERS:
            raise UserError(f"unknown `preconditioner` '{name}'", f"known: {', '.join(PRECONDITIONERS)}")
    variants = [
        Variant(_points(text), size or None, name)
        for text in at
        for size in sizes or [0]
        for name in preconditioners or PRECONDITIONERS[:1]
    ]
    return list(dict.fromkeys(variants))


def _points(text: str) -> tuple[float, ...] | None:
    if text == CHECKPOINTS:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UserError(
            f"`at` {text} is not a number, numbers between commas, or '{CHECKPOINTS}'",
            "as in 0.5 and 0.1,0.5,0.9",
        ) from None


@dataclass(frozen=True)
class VariantCaches:
    """The caches of one set of training examples, a folder for each variant.

    folder: holds all of them; examples: the training examples; max_length: tokens of an example; width:
    sketch dimension per layer, "auto" to choose it from the number of layers; log: takes a line for each
    cache.
    """

    folder: Path
    examples: Examples
    max_length: int = MAX_LENGTH
    width: int | Literal["auto"] = "auto"
    log: Log = no_log

    def query(
        self, variant: Variant, tuned: TunedModel, queries: Sequence[Any]
    ) -> tuple[list[QuerySketch], list[Generation]]:
        """The caches of a variant with the query sketches for each, and the generations of the queries.

        One cache, or with `checkpoints` one for each checkpoint, with weights that add up to 1
        (`rapidin.attribution.checkpoints.find_checkpoints`). Raises UserError if checkpoints are needed and
        none were kept.
        """
        kept = find_checkpoints(tuned.checkpoints)[0] if tuned.checkpoints.exists() else []
        last = kept[-1].path if kept else None
        members: list[tuple[Path | None, float, str]] = [(None, 1.0, variant.folder)]
        if variant.at is None:
            if not kept:
                raise UserError("no checkpoints were kept", _START_ANEW)
            total = sum(each.weight for each in kept)
            members = [(c.path, c.weight / total, f"{c.path.name}-{variant.folder}") for c in kept]
        sketches: list[QuerySketch] = []
        for checkpoint, weight, name in members:
            loaded = tuned.load(checkpoint)
            source, cache = self.build(loaded, variant, name, checkpoint or last)
            generations = generations_of(source, list(queries))
            sketches.append(sketch_query(cache, source, generations, weight))
        return sketches, generations

    def build(
        self, loaded: LoadedModel, variant: Variant, name: str, checkpoint: Path | None
    ) -> tuple[GradientSource, Cache]:
        """Build the cache of a variant in a folder of this name, or resume it.

        Returns the source of its gradients, with the preconditioner that the cache has, and the cache.
        checkpoint: provides the optimizer's state for the preconditioner "optimizer".
        """
        preconditioner: str | Path | None = variant.preconditioner
        if preconditioner == "optimizer":
            if checkpoint is None:
                raise UserError(
                    "`preconditioner='optimizer'` needs a checkpoint, and none were kept", _START_ANEW
                )
            preconditioner = checkpoint / "optimizer.pt"
        limit = loaded.context_length
        attributor = Attributor(
            loaded,
            at=list(variant.at or (1.0,)),
            width=self.width,
            bytes_per_example=variant.bytes,
            preconditioner=preconditioner,
            max_length=min(self.max_length, limit) if limit else self.max_length,
        )
        path = self.folder / f"{name}-width-{attributor.settings.width}"
        start = time.perf_counter()
        cache = attributor.cache(self.examples, path, bytes=variant.bytes, null=False, progress=False)
        seconds = time.perf_counter() - start
        self.log(f"{variant}: {len(cache):,} examples cached in {path} ({time_text(seconds)})")
        return checked(attributor.source, cache.manifest), cache
