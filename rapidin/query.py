"""From the sketches of generations to hits: methods turn them, one scan over all caches ranks examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rapidin import methods
from rapidin.cache import Cache
from rapidin.distributed import world
from rapidin.encoding import Encoded, Status
from rapidin.errors import UserError, short
from rapidin.hits import QueryResult
from rapidin.scan import Source, all_scores, hits_of, rescore, scan_cache, training_data


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation to explain. generated: the model wrote the completion; weight: its part in a set."""

    prompt: str
    completion: str
    generated: bool
    encoded: Encoded
    weight: float = 1.0

    def check(self) -> None:
        """Raise UserError where it has no token to explain."""
        if self.encoded.status == Status.OK:
            return
        words = {Status.EMPTY: "has no text", Status.TOO_LONG: "is longer than the context"}
        why = words.get(self.encoded.status, "has no completion token")
        raise UserError(f"the generation for '{short(self.prompt)}' {why}")


@dataclass(frozen=True, slots=True)
class Scoring:
    """How influence is estimated: see `rapidin.methods`.

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


@dataclass(frozen=True)
class Part:
    """A cache, and the sketches [Q, blocks, width] of the generations at the place where it was made.

    weight: of its scores in the sum, such as the learning rate of a checkpoint.
    """

    cache: Cache
    sketch: Tensor
    weight: float = 1.0


def leaders(
    caches: Sequence[Cache],
    make: Callable[[], tuple[list[Generation], list[Part]]],
    *,
    device: str | None = None,
    everywhere: bool = False,
) -> tuple[list[Generation], list[Part]]:
    """What `make` gives in the leading process, for all: the others need no model, and all scan for the same
    bits.

    caches: of which the parts are; device: where the others have their sketches. everywhere: all processes
    call `make`, since the model is spread over them. The others' generations have their weights and no text.
    """
    from safetensors.torch import load, save

    here = world()
    if here.alone:
        return make()
    made = make() if everywhere or here.leads else None

    def data() -> bytes:
        assert made is not None
        texts, parts = made
        found = {f"sketch {n}": part.sketch.cpu().contiguous() for n, part in enumerate(parts)}
        found["caches"] = torch.tensor([caches.index(part.cache) for part in parts])
        found["weights"] = torch.tensor([part.weight for part in parts], dtype=torch.float64)
        found["texts"] = torch.tensor([text.weight for text in texts], dtype=torch.float64)
        shared: bytes = save(found)
        return shared

    found = load(here.share(data))
    if here.leads:
        assert made is not None
        return made
    nothing = Encoded([], [], Status.EMPTY)
    texts = [Generation("", "", False, nothing, weight) for weight in found["texts"].tolist()]
    columns = zip(found["caches"].tolist(), found["weights"].tolist(), strict=True)
    where = here.device(device)
    return texts, [
        Part(caches[cache], found[f"sketch {n}"].to(where), weight)
        for n, (cache, weight) in enumerate(columns)
    ]


def sources(parts: Sequence[Part], generations: Sequence[Generation], scoring: Scoring) -> list[Source]:
    """What to scan for. Raises UserError where weights are not usable."""
    found = []
    for part in parts:
        turned = methods.prepare(
            part.sketch,
            part.cache,
            method=scoring.method,
            normalize=scoring.normalize,
            damping=scoring.damping,
        )
        vectors = turned.vectors * part.weight
        groups = [range(len(generations))] if scoring.together else scoring.groups
        if groups is not None:
            vectors = torch.stack([_mean(vectors, generations, group) for group in groups])
        found.append(Source(part.cache, replace(turned, vectors=vectors)))
    return found


def _mean(vectors: Tensor, generations: Sequence[Generation], chosen: Sequence[int]) -> Tensor:
    """The weighted mean of chosen query vectors [Q, blocks, width]: [blocks, width]."""
    weights = torch.tensor([generations[n].weight for n in chosen], dtype=torch.float64, device="cpu")
    total = float(weights.abs().sum())
    if not 0 < total < float("inf"):
        raise UserError("the weights of a target set are all zero, or not finite", "mend its column 'weight'")
    return torch.einsum("q,qbk->bk", (weights / total).to(vectors), vectors[list(chosen)])


def explain(
    parts: Sequence[Part],
    generations: Sequence[Generation],
    scoring: Scoring,
    *,
    top_k: int,
    examples: Any,
    clock: Clock,
    finer: Part | None = None,
    candidates: int = 0,
) -> list[QueryResult]:
    """The hits of each generation, or of all of them together; of several processes, for the leader alone.

    finer: a cache of the same examples by whose scores the best of so many candidates at each end are chosen.
    """
    wanted = sources(parts, generations, scoring)
    again = [] if finer is None else sources([finer], generations, scoring)
    clock.lap("method")
    top, bottom = scan_cache(wanted, max(top_k, candidates))
    clock.lap("scan")
    if not world().leads:
        return []
    if again:
        top, bottom = rescore(again[0], (top, bottom), top_k)
        clock.lap("rescore")
    cache = parts[0].cache
    source = training_data(cache, examples)
    named = [(g.prompt, g.completion, g.generated) for g in generations]
    if scoring.together:
        named = [("", "", any(g.generated for g in generations))]
    results = []
    for n, (prompt, completion, generated) in enumerate(named):
        best, worst = (hits_of(cache, source, scores[n], rows[n]) for scores, rows in (top, bottom))
        results.append(
            QueryResult(
                prompt,
                completion,
                generated,
                best,
                worst,
                scoring.normalize,
                clock.seconds,
                scoring.method,
                len(generations) if scoring.together else 0,
            )
        )
    return results


def scores(parts: Sequence[Part], generations: Sequence[Generation], scoring: Scoring) -> Tensor:
    """The scores of all rows: [Q, rows] float32 on the CPU, NaN for rows that do not count; [1, rows] for all
    generations together, [groups, rows] for groups."""
    return all_scores(sources(parts, generations, scoring))


class Clock:
    """Seconds by stage."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._last = now()

    def lap(self, stage: str) -> None:
        """The time since the last lap belongs to this stage."""
        now = self._now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
