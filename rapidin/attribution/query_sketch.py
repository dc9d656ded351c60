"""What is asked: generations and their targets, how influence is estimated, and what is to be scanned for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rapidin.attribution import methods
from rapidin.attribution.options import Scoring
from rapidin.attribution.scan import Source, all_scores
from rapidin.cache import Cache
from rapidin.data.encoding import Encoded, Status
from rapidin.data.generations import Generation
from rapidin.data.spans import Span
from rapidin.distributed import world
from rapidin.errors import UserError


@dataclass(frozen=True)
class Part:
    """A cache, and the sketches [Q, blocks, width] of the generations at the place where it was made.

    weight: of its scores in the sum, such as the learning rate of a checkpoint; targets: sketches
    [P, blocks, width] of the generations' targets, one generation after the other.
    """

    cache: Cache
    sketch: Tensor
    weight: float = 1.0
    targets: Tensor | None = None


@dataclass(frozen=True)
class Query:
    """What `parts` of `rapidin.attribution.ensemble` gives: the generations, every cache with their sketches,
    and, of a
    single cache, a finer one to rescore by. In processes that do not lead the generations have no text."""

    texts: list[Generation]
    parts: list[Part]
    finer: Part | None = None


def leaders(
    caches: Sequence[Cache],
    make: Callable[[], Query],
    *,
    device: str | None = None,
    everywhere: bool = False,
) -> Query:
    """What `make` gives in the leading process, for all: the others need no model, and all scan for the same
    bits.

    caches: of which the parts are; device: where the others have their sketches. everywhere: all processes
    call `make`, since the model is spread over them. The others' generations have their weights, the number
    of their targets, and no text.
    """
    from safetensors.torch import load, save

    here = world()
    if here.alone:
        return make()
    made = make() if everywhere or here.leads else None

    def data() -> bytes:
        assert made is not None
        parts = [*made.parts, *([] if made.finer is None else [made.finer])]
        found = {f"sketch {n}": part.sketch.cpu().contiguous() for n, part in enumerate(parts)}
        for n, part in enumerate(parts):
            if part.targets is not None:
                found[f"targets {n}"] = part.targets.cpu().contiguous()
        found["caches"] = torch.tensor([caches.index(part.cache) for part in parts], device="cpu")
        found["weights"] = torch.tensor([part.weight for part in parts], dtype=torch.float64, device="cpu")
        found["texts"] = torch.tensor([text.weight for text in made.texts], dtype=torch.float64, device="cpu")
        found["spans"] = torch.tensor([len(text.spans) for text in made.texts], device="cpu")
        found["finer"] = torch.tensor(made.finer is not None, device="cpu")
        shared: bytes = save(found)
        return shared

    found = load(here.share(data))
    if here.leads:
        assert made is not None
        return made
    nothing, span = Encoded([], [], Status.EMPTY), Span("", ())
    texts = [
        Generation("", "", False, nothing, weight, spans=(span,) * spans)
        for weight, spans in zip(found["texts"].tolist(), found["spans"].tolist(), strict=True)
    ]
    columns = zip(found["caches"].tolist(), found["weights"].tolist(), strict=True)
    where = here.device(device)
    parts = [
        Part(
            caches[cache],
            found[f"sketch {n}"].to(where),
            weight,
            targets.to(where) if (targets := found.get(f"targets {n}")) is not None else None,
        )
        for n, (cache, weight) in enumerate(columns)
    ]
    finer = parts.pop() if bool(found["finer"]) else None
    return Query(texts, parts, finer)


def sources(parts: Sequence[Part], generations: Sequence[Generation], scoring: Scoring) -> list[Source]:
    """What to scan for: the generations, then all their targets. UserError where weights are not usable."""
    owners = [n for n, generation in enumerate(generations) for _ in generation.spans]
    found = []
    for part in parts:
        turned = methods.prepare(
            part.sketch,
            part.cache,
            method=scoring.method,
            normalize=scoring.normalize,
            damping=scoring.damping,
            parts=None if part.targets is None else (part.targets, owners),
        )
        vectors = turned.vectors * part.weight
        groups = [range(len(generations))] if scoring.together else scoring.groups
        if groups is not None:
            vectors = torch.stack([_mean(vectors, generations, group) for group in groups])
        found.append(Source(part.cache, replace(turned, vectors=vectors)))
    return found


def weights_of(generations: Sequence[Generation], chosen: Sequence[int]) -> Tensor:
    """The share of each chosen generation in their target set [chosen] float64; they sum to 1 where none is
    negative. Raises UserError where they are not usable."""
    weights = torch.tensor([generations[n].weight for n in chosen], dtype=torch.float64, device="cpu")
    total = float(weights.abs().sum())
    if not 0 < total < float("inf"):
        raise UserError("the weights of a target set are all zero, or not finite", "mend its column 'weight'")
    return weights / total


def _mean(vectors: Tensor, generations: Sequence[Generation], chosen: Sequence[int]) -> Tensor:
    """The weighted mean of chosen query vectors [Q, blocks, width]: [blocks, width]."""
    return torch.einsum("q,qbk->bk", weights_of(generations, chosen).to(vectors), vectors[list(chosen)])


def scores(parts: Sequence[Part], generations: Sequence[Generation], scoring: Scoring) -> Tensor:
    """The scores of all rows: [Q, rows] float32 on the CPU, NaN for rows that do not count; [1, rows] for all
    generations together, [groups, rows] for groups."""
    return all_scores(sources(parts, generations, scoring))
