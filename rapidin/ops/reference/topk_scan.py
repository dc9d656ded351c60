"""Best and worst rows of a cache for each query, with every score in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rapidin.ops.reference.packed import Packed, decoded


def score_rows(
    parts: Sequence[Tensor | Packed],
    queries: Tensor,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    base: Tensor | None,
) -> Tensor:
    """parts: of [N, D] rows, queries: [Q, D], scales: [N, nb], base: [Q, N] -> [Q, N], summed in float64."""
    cache = torch.cat([rows.double() if isinstance(rows, Tensor) else decoded(rows) for rows in parts], dim=1)
    if scales is None:
        total = queries.double() @ cache.T
    else:
        edges = list(offsets) if offsets is not None else [0, cache.shape[1]]
        total = torch.zeros(len(queries), len(cache), dtype=torch.float64, device=cache.device)
        for b in range(len(edges) - 1):
            block = slice(edges[b], edges[b + 1])
            total += queries[:, block].double() @ cache[:, block].T * scales[:, b].double()
    return (total if base is None else base.double() + total).float()


def select(score: Tensor, valid: Tensor | None, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """score: [Q, N] -> ([Q, k], [Q, k] int64); NaN and invalid rows never; ties by index."""
    usable = ~score.isnan()
    if valid is not None:
        usable &= valid
    # stable sorts, the last one counting most: usable rows first, then by score, equal scores by index
    order = torch.sort(score, dim=1, descending=largest, stable=True).indices
    order = order.gather(1, torch.sort(usable.gather(1, order), dim=1, descending=True, stable=True).indices)
    order = order[:, :k]
    there = usable.gather(1, order)
    return score.gather(1, order).where(there, torch.nan), order.where(there, -1)


def topk_scan(
    cache: Sequence[Tensor | Packed],
    queries: Tensor,
    k: int,
    *,
    largest: bool = True,
    scales: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    valid: Tensor | None = None,
    base: Tensor | None = None,
    made: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """-> scores [Q, min(k, N)] float32, indices [Q, min(k, N)] int64; see rapidin.ops.topk_scan."""
    return select(score_rows(cache, queries, scales, offsets, base), valid, k, largest)


def topk_scan_both_ends(
    cache: Sequence[Tensor | Packed],
    queries: Tensor,
    k: int,
    *,
    scales: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    valid: Tensor | None = None,
    base: Tensor | None = None,
    scores: Tensor | None = None,
    made: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> top scores, top indices, bottom scores, bottom indices; see rapidin.ops.topk_scan_both_ends."""
    score = score_rows(cache, queries, scales, offsets, base)
    if scores is not None:
        every = score[: len(scores)]
        scores.copy_(every if valid is None else every.where(valid, torch.nan))
    return (*select(score, valid, k, True), *select(score, valid, k, False))
