"""The sketches of the generations to explain, and the vectors that every cache is scanned for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution import methods
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.scan import all_scores
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.data.encoding import Encoded, Status
from rapidin.data.generations import Generation
from rapidin.data.spans import Span
from rapidin.errors import UserError, short
from rapidin.gradients.batching import SILENT, StageReporter
from rapidin.gradients.source import GradientSource

_FILL_A_BATCH = 8  # targets of each generation, from which on they are no longer batched with others'

OnStage = Callable[[str, int, int], None]  # called with a stage's name, the steps done, and all of its steps


@dataclass(frozen=True)
class QuerySketch:
    """The sketches [Q, blocks, width] of the generations, made as the rows of one cache were.

    weight: of the cache's scores in the sum, such as the learning rate of a checkpoint; targets: sketches
    [P, blocks, width] of the generations' targets, one generation after the other, None for none.
    """

    cache: Cache
    sketch: Tensor
    weight: float = 1.0
    targets: Tensor | None = None


@dataclass(frozen=True)
class Query:
    """The generations, their sketches for every cache, and for a finer cache to rescore by.

    In processes that do not lead, the generations have no text.
    """

    texts: list[Generation]
    sketches: list[QuerySketch]
    finer: QuerySketch | None = None


@dataclass(frozen=True)
class TargetTexts:
    """The targets of generations as texts of their own.

    texts: each has the loss of its target, and ends with the target's last token, since later tokens do not
    change the loss of a causal model; weights: of this loss in the generation's loss; owners: the number of
    the generation.
    """

    texts: list[Encoded]
    weights: list[float]
    owners: list[int]


def target_texts(generations: Sequence[Generation], loss: str) -> TargetTexts:
    """The targets of all generations, one generation after the other; loss: "mean" or "sum"."""
    targets = TargetTexts([], [], [])
    for owner, generation in enumerate(generations):
        text = generation.encoded
        if not generation.spans:
            continue
        assert isinstance(text, Encoded)  # only a causal model's texts have targets
        counted = [n for n, has_loss in enumerate(text.target) if has_loss]
        for span in generation.spans:
            chosen = {counted[position] for position in span.positions}
            end = max(chosen) + 1
            counts = [n in chosen for n in range(end)]
            targets.texts.append(Encoded(text.ids[:end], counts, Status.OK))
            targets.weights.append(len(chosen) / len(counted) if loss == "mean" else 1.0)
            targets.owners.append(owner)
    return targets


def sketch_query(
    cache: Cache,
    source: GradientSource,
    generations: Sequence[Generation],
    weight: float = 1.0,
    on_stage: OnStage | None = None,
) -> QuerySketch:
    """The sketches of generations and their targets; source: the source that made the cache; on_stage: as for
    `rapidin.Ensemble.query`.

    Raises UserError if a gradient holds NaN or Inf or does not fit into memory.
    """
    return QuerySketch(
        cache, sketch_generations(source, generations), weight, sketch_targets(source, generations, on_stage)
    )


def sketch_generations(source: GradientSource, generations: Sequence[Generation]) -> Tensor:
    """Sketches of generations: [Q, blocks, width] float32.

    Raises UserError for one with NaN or Inf, and ValueError for a source whose preconditioner is not fitted:
    take it from the cache, by `rapidin.attribution.provenance.checked`.
    """
    _check_fitted(source)
    sketch, status = source.sketches([generation.encoded for generation in generations])
    if bool((status != 0).any()):
        row = int(status.nonzero()[0])
        large = int(status[row]) == Status.TOO_LARGE
        raise UserError(
            f"the gradient of the generation for '{short(generations[row].prompt)}' "
            f"{'does not fit into memory' if large else 'holds NaN or Inf'}"
        )
    return sketch


def sketch_targets(
    source: GradientSource, generations: Sequence[Generation], on_stage: OnStage | None = None
) -> Tensor | None:
    """Sketches of the targets of all generations: [targets, blocks, width] float32, None if there are none.

    Those of all tokens of a generation sum to the generation's. Raises UserError for one with NaN or Inf, and
    for a projection that does not keep layers apart.
    """
    _check_fitted(source)
    targets = target_texts(generations, source.settings.loss)
    if not targets.texts:
        return None
    if source.whole:
        raise UserError(
            "the rapidgrad projection scales the gradient of a whole generation, so its tokens have no "
            "scores of their own",
            "make the cache with `projection='tensor'`",
        )
    reporter = (
        SILENT if on_stage is None else StageReporter(on_stage, "tokens of the answer", len(targets.texts))
    )
    # Targets of one generation share a forward pass, which is worth a batch of their own if they are many.
    many = len(targets.texts) >= _FILL_A_BATCH * len(generations)
    owners = targets.owners
    parts = [len(list(of_one)) for _, of_one in groupby(owners)] if many else [len(owners)]
    ends = [0, *accumulate(parts)]
    found = [source.sketches(targets.texts[a:b], reporter) for a, b in pairwise(ends)]
    sketch, status = (torch.cat(each) for each in zip(*found, strict=True))
    if bool((status != 0).any()):
        raise UserError("the gradient of a token of a generation holds NaN or Inf, or needs too much memory")
    return sketch * torch.tensor(targets.weights, device=sketch.device)[:, None, None]


def _check_fitted(source: GradientSource) -> None:
    if not source.fitted:
        raise ValueError(
            "the source's preconditioner is not fitted, so its sketches do not match a cache's rows; "
            "use checked(source, manifest)"
        )


def shared_by_leader(
    caches: Sequence[Cache],
    make: Callable[[], Query],
    *,
    device: str | None = None,
    everywhere: bool = False,
) -> Query:
    """The query that the leading process makes, in all processes: the others need no model, and all scan for
    the same bits.

    caches: all caches that the query may use; device: where the other processes keep the sketches;
    everywhere: whether all processes call `make`, because the model is sharded over them. In the other
    processes the generations have their weights and the number of their targets, but no text.
    """

    world = distributed.world()
    if world.alone:
        return make()
    query = make() if everywhere or world.leads else None

    def message() -> bytes:
        assert query is not None
        return _to_bytes(query, caches)

    shared = world.share(message)
    if world.leads:
        assert query is not None
        return query
    return _from_bytes(shared, caches, world.device(device))


def _to_bytes(query: Query, caches: Sequence[Cache]) -> bytes:
    """A query without its texts."""
    from safetensors.torch import save

    sketches = [*query.sketches, *([] if query.finer is None else [query.finer])]
    tensors = {f"sketch {n}": each.sketch.cpu().contiguous() for n, each in enumerate(sketches)}
    for n, each in enumerate(sketches):
        if each.targets is not None:
            tensors[f"targets {n}"] = each.targets.cpu().contiguous()
    weights, texts = [each.weight for each in sketches], query.texts
    tensors["caches"] = torch.tensor([caches.index(each.cache) for each in sketches], device="cpu")
    tensors["weights"] = torch.tensor(weights, dtype=torch.float64, device="cpu")
    tensors["texts"] = torch.tensor([text.weight for text in texts], dtype=torch.float64, device="cpu")
    tensors["spans"] = torch.tensor([len(text.spans) for text in texts], device="cpu")
    tensors["finer"] = torch.tensor(query.finer is not None, device="cpu")
    message: bytes = save(tensors)
    return message


def _from_bytes(message: bytes, caches: Sequence[Cache], device: str) -> Query:
    """The query of `_to_bytes`, its sketches on a device."""
    from safetensors.torch import load

    tensors = load(message)
    nothing, span = Encoded([], [], Status.EMPTY), Span("", ())
    texts = [
        Generation("", "", False, nothing, weight, spans=(span,) * spans)
        for weight, spans in zip(tensors["texts"].tolist(), tensors["spans"].tolist(), strict=True)
    ]
    columns = zip(tensors["caches"].tolist(), tensors["weights"].tolist(), strict=True)
    sketches = [
        QuerySketch(
            caches[cache],
            tensors[f"sketch {n}"].to(device),
            weight,
            targets.to(device) if (targets := tensors.get(f"targets {n}")) is not None else None,
        )
        for n, (cache, weight) in enumerate(columns)
    ]
    finer = sketches.pop() if bool(tensors["finer"]) else None
    return Query(texts, sketches, finer)


def scans_of(
    sketches: Sequence[QuerySketch], generations: Sequence[Generation], scoring: ScoringConfig
) -> list[CacheScan]:
    """The scan of each cache: for the generations, then for all their targets. Raises UserError for unusable
    weights."""
    owners = [n for n, generation in enumerate(generations) for _ in generation.spans]
    scans = []
    for each in sketches:
        query = methods.prepare(
            each.sketch,
            each.cache,
            method=scoring.method,
            normalize=scoring.normalize,
            damping=scoring.damping,
            targets=None if each.targets is None else (each.targets, owners),
        )
        vectors = query.vectors * each.weight
        groups = [range(len(generations))] if scoring.together else scoring.groups
        if groups is not None:
            vectors = torch.stack([_mean(vectors, generations, group) for group in groups])
        scans.append(CacheScan(each.cache, replace(query, vectors=vectors)))
    return scans


def weights_of(generations: Sequence[Generation], chosen: Sequence[int]) -> Tensor:
    """The share of each chosen generation in the target set of all chosen ones: [chosen] float64; shares sum
    to 1 if none is negative. Raises UserError for unusable weights."""
    weights = torch.tensor([generations[n].weight for n in chosen], dtype=torch.float64, device="cpu")
    total = float(weights.abs().sum())
    if not 0 < total < float("inf"):
        raise UserError("the weights of a target set are all zero, or not finite", "fix the column 'weight'")
    return weights / total


def _mean(vectors: Tensor, generations: Sequence[Generation], chosen: Sequence[int]) -> Tensor:
    """The weighted mean of chosen query vectors [Q, blocks, width]: [blocks, width]."""
    return torch.einsum("q,qbk->bk", weights_of(generations, chosen).to(vectors), vectors[list(chosen)])


def scores(
    sketches: Sequence[QuerySketch], generations: Sequence[Generation], scoring: ScoringConfig
) -> Tensor:
    """The scores of all rows: [Q, rows] float32 on the CPU, NaN for rows that do not count; [1, rows] for all
    generations together, [groups, rows] for groups."""
    return all_scores(scans_of(sketches, generations, scoring))
