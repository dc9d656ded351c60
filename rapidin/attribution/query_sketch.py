"""What is asked: generations and their targets, how influence is estimated, and what is to be scanned for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rapidin.attribution import methods
from rapidin.attribution.scan import Source, all_scores
from rapidin.cache import Cache
from rapidin.data.encoding import Encoded, Status
from rapidin.data.examples import frame_records
from rapidin.data.spans import Span, Targets
from rapidin.distributed import world
from rapidin.errors import UserError, short


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation to explain.

    generated: the model wrote the completion; weight: its part in a set; pieces: texts of its tokens that
    count, where they are wanted; spans: its targets; missing: hot words that it does not say.
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
        """Raise UserError where it has no token to explain."""
        if self.encoded.status == Status.OK:
            return
        words = {Status.EMPTY: "has no text", Status.TOO_LONG: "is longer than the context"}
        why = words.get(self.encoded.status, "has no completion token")
        raise UserError(f"the generation for '{short(self.prompt)}' {why}")


def as_records(generations: Any) -> list[dict[str, Any]]:
    """The generations to explain, as records: from a sequence of (prompt, completion) pairs, prompts and
    records, a data frame, or a single pair, prompt or record. Raises UserError for anything else."""
    if isinstance(generations, str | Mapping) or _is_pair(generations):
        generations = [generations]
    frame = frame_records(generations)
    if frame is not None:
        return frame
    if not isinstance(generations, Iterable):
        raise UserError(f"generations must be a list, got {type(generations).__name__}", _GENERATION)
    return [_as_record(value, n) for n, value in enumerate(generations)]


_GENERATION = "give (prompt, completion) pairs, prompts, or records as in training data"


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, str) for x in value)


def _as_record(value: Any, n: int) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"prompt": value[0], "completion": value[1]}
    raise UserError(f"generation {n + 1} has no prompt and completion: {short(repr(value))}", _GENERATION)


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
