"""topk_scan: the rows of a cache with the largest (or smallest) inner products with each query."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rapidin.ops.backends import find
from rapidin.ops.checks import check_same_device, check_tensor


def topk_scan(
    cache: Tensor,
    queries: Tensor,
    k: int,
    *,
    largest: bool = True,
    scales: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows with the largest scores for each query (largest=False: the smallest), best first.

    cache: [N, D] float32 or float16; a view of a memory map will do, and rows may lie further apart than D
    queries: [Q, D] float32
    offsets: nb + 1 ascending ints from 0 to D that cut D into blocks; scales: [N, nb] float32
    valid: [N] bool
    -> scores [Q, k'] float32, indices [Q, k'] int64, where k' = min(k, N)

    score[q, n] = sum_b scales[n, b] * <queries[q, b], cache[n, b]>, or without scales one plain dot product.
    Rows that are not valid and rows whose score is NaN are never returned; a missing place holds index -1 and
    score NaN. Equal scores: the smaller index first. The same bits for any number of threads and of queries.
    Raises TypeError or ValueError on arguments that are not as above.
    """
    run = _checked("topk_scan", cache, queries, k, scales, offsets, valid, backend)
    scores, indices = run(
        cache.detach(), queries.detach(), k, largest=largest, scales=scales, offsets=offsets, valid=valid
    )
    return scores, indices


def topk_scan_both_ends(
    cache: Tensor,
    queries: Tensor,
    k: int,
    *,
    scales: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both ends of the ranking from one pass over the cache; arguments as topk_scan.

    -> top scores, top indices, bottom scores, bottom indices, [Q, k'] each; the bottom ascends
    """
    run = _checked("topk_scan_both_ends", cache, queries, k, scales, offsets, valid, backend)
    top, top_indices, bottom, bottom_indices = run(
        cache.detach(), queries.detach(), k, scales=scales, offsets=offsets, valid=valid
    )
    return top, top_indices, bottom, bottom_indices


def _checked(  # type: ignore[no-untyped-def]
    op: str,
    cache: Tensor,
    queries: Tensor,
    k: int,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    valid: Tensor | None,
    backend: str | None,
):
    check_tensor(op, "cache", cache, (torch.float32, torch.float16), ndim=2)
    check_tensor(op, "queries", queries, (torch.float32,), ndim=2)
    n, d = cache.shape
    if queries.shape[1] != d:
        raise ValueError(
            f"{op}: queries must have the cache's width, got {tuple(queries.shape)} for a cache of {(n, d)}"
        )
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"{op}: k must not be negative, got {k}")
    if (scales is None) != (offsets is None):
        raise ValueError(
            f"{op}: scales and offsets go together, got only {'offsets' if scales is None else 'scales'}"
        )
    if offsets is not None and scales is not None:
        edges = list(offsets)
        if not edges or edges[0] != 0 or edges[-1] != d or edges != sorted(edges):
            raise ValueError(f"{op}: offsets must ascend from 0 to the cache's width {d}, got {edges}")
        check_tensor(op, "scales", scales, (torch.float32,), ndim=2)
        if scales.shape != (n, len(edges) - 1):
            raise ValueError(
                f"{op}: scales must be [N, blocks] = {(n, len(edges) - 1)}, got {tuple(scales.shape)}"
            )
    if valid is not None:
        check_tensor(op, "valid", valid, (torch.bool,), ndim=1)
        if len(valid) != n:
            raise ValueError(f"{op}: valid must have one entry for each of the {n} rows, got {len(valid)}")
    named = {"cache": cache, "queries": queries, "scales": scales, "valid": valid}
    return find(op, backend, check_same_device(op, named))
