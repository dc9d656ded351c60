"""topk_scan: the rows of a cache with the largest (or smallest) inner products with each query."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rapidin.ops.backends import find
from rapidin.ops.checks import SKETCHED, check_same_device, check_tensor
from rapidin.ops.packed import Packed

Rows = Tensor | Packed


class ScanQueries:
    """Queries for several scans: a GPU's backend converts them to its own form only once.

    tensor: [Q, D] float32, which must not change from the first scan to the last
    made: the converted queries, by backend
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.made: dict[Any, Any] = {}


def topk_scan(
    cache: Rows | Sequence[Rows],
    queries: Tensor | ScanQueries,
    k: int,
    *,
    largest: bool = True,
    scales: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    valid: Tensor | None = None,
    base: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows with the largest scores for each query (largest=False: the smallest), best first.

    cache: N rows of D numbers: a tensor [N, D] float32, float16 or (not with backend "cpu") bfloat16, a
        Packed, or a sequence of such parts, which lie side by side and whose widths add up to D; views of
        memory maps will do, and rows may lie further apart than they are long
    queries: [Q, D] float32, or a `ScanQueries` of it for several scans
    offsets: nb + 1 ascending ints from 0 to D that cut D into blocks; scales: [N, nb] float32
    valid: [N] bool
    base: [Q, N] float32, added to the scores
    -> scores [Q, k'] float32, indices [Q, k'] int64, where k' = min(k, N)

    score[q, n] = base[q, n] + sum_b scales[n, b] * <queries[q, b], cache[n, b]>, or without scales one plain
    dot product. Rows that are not valid and rows whose score is NaN are never returned; a missing place holds
    index -1 and score NaN. Equal scores: the smaller index first. The same bits for any number of threads and
    of queries.

    Without scales a Packed is scanned in integers: of each query, a part's numbers are rounded to steps of
    their largest magnitude / 127 ("sign", "int4") or / 4095 ("int8"), and the same bits come from every
    instruction set. A part with NaN or Inf in it makes the query's scores NaN. With scales, the
    backend "cpu" with AVX2, AVX-512 or NEON with I8MM rounds a query's numbers to steps of at most 2^-19 of
    the largest magnitude in their block, and "cuda" of that in the part; all others multiply with float32
    precision. A query with NaN or Inf is then multiplied in floats.
    Raises TypeError or ValueError on arguments that are not as above.
    """
    more: dict[str, Any] = {"scales": scales, "offsets": offsets, "valid": valid, "base": base}
    run = _checked("topk_scan", cache, queries, k, backend=backend, **more)
    scores, indices = run(k, largest=largest, **more)
    return scores, indices


def topk_scan_both_ends(
    cache: Rows | Sequence[Rows],
    queries: Tensor | ScanQueries,
    k: int,
    *,
    scales: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    valid: Tensor | None = None,
    base: Tensor | None = None,
    scores: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both ends of the ranking from one pass over the cache; arguments as topk_scan.

    scores: [S, N] float32, S at most Q, whose rows may lie further apart than they are long: filled with all
        scores of the first S queries, NaN for rows that are not valid; a GPU reads the cache once more for it
    -> top scores, top indices, bottom scores, bottom indices, [Q, k'] each; the bottom ascends
    """
    more: dict[str, Any] = {"scales": scales, "offsets": offsets, "valid": valid, "base": base}
    run = _checked("topk_scan_both_ends", cache, queries, k, backend=backend, scores=scores, **more)
    top, top_indices, bottom, bottom_indices = run(k, scores=scores, **more)
    return top, top_indices, bottom, bottom_indices


def _checked(
    op: str,
    cache: Rows | Sequence[Rows],
    queries: Tensor | ScanQueries,
    k: int,
    *,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    valid: Tensor | None,
    base: Tensor | None,
    backend: str | None,
    scores: Tensor | None = None,
) -> Callable[..., Any]:
    """Checks the arguments. -> the backend's function, with parts and queries bound."""
    parts, n, d = _checked_parts(op, cache)
    made = None
    if isinstance(queries, ScanQueries):
        made, queries = queries.made, queries.tensor
    check_tensor(op, "queries", queries, (torch.float32,), ndim=2)
    if queries.shape[1] != d:
        raise ValueError(
            f"{op}: queries must have the cache's width, got {tuple(queries.shape)} for a cache of {(n, d)}"
        )
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"{op}: k must not be negative, got {k}")
    _check_blocks(op, scales, offsets, n, d)
    if valid is not None:
        check_tensor(op, "valid", valid, (torch.bool,), ndim=1)
        if len(valid) != n:
            raise ValueError(f"{op}: valid must have one entry for each of the {n} rows, got {len(valid)}")
    if base is not None:
        check_tensor(op, "base", base, (torch.float32,), ndim=2)
        if base.shape != (len(queries), n):
            raise ValueError(f"{op}: base must be [Q, N] = {(len(queries), n)}, got {tuple(base.shape)}")
    if scores is not None:
        check_tensor(op, "scores", scores, (torch.float32,), ndim=2)
        if len(scores) > len(queries) or scores.shape[1] != n or (n > 1 and scores.stride(1) != 1):
            raise ValueError(
                f"{op}: scores must be [S, N] with S <= {len(queries)} and N = {n}, each row's numbers "
                f"neighbours in memory, got {tuple(scores.shape)} with strides {scores.stride()}"
            )
    named: dict[str, Tensor | None] = {"queries": queries, "scales": scales, "valid": valid, "base": base}
    named["scores"] = scores
    for i, rows in enumerate(parts):
        name = "cache" if len(parts) == 1 else f"cache[{i}]"
        named[name] = rows.codes if isinstance(rows, Packed) else rows
        named[f"{name}.scale"] = rows.scale if isinstance(rows, Packed) else None
    run = find(op, backend, check_same_device(op, named))
    return partial(run, parts, queries.detach(), made=made)


def _checked_parts(op: str, cache: Rows | Sequence[Rows]) -> tuple[list[Rows], int, int]:
    """The parts, how many rows each has, and the numbers of a whole row."""
    parts = [cache] if isinstance(cache, Tensor | Packed) else list(cache)
    if not parts:
        raise ValueError(f"{op}: cache must have at least one part")
    checked: list[Rows] = []
    for rows in parts:
        if isinstance(rows, Packed):
            checked.append(rows)
            continue
        check_tensor(op, "cache", rows, SKETCHED, ndim=2)
        checked.append(rows.detach())
    lengths = [len(rows.codes if isinstance(rows, Packed) else rows) for rows in checked]
    if len(set(lengths)) > 1:
        raise ValueError(f"{op}: all parts of the cache must have equally many rows, got {lengths}")
    widths = [rows.width if isinstance(rows, Packed) else rows.shape[1] for rows in checked]
    return checked, lengths[0], sum(widths)


def _check_blocks(op: str, scales: Tensor | None, offsets: Sequence[int] | None, n: int, d: int) -> None:
    if (scales is None) != (offsets is None):
        raise ValueError(
            f"{op}: scales and offsets go together, got only {'offsets' if scales is None else 'scales'}"
        )
    if offsets is None or scales is None:
        return
    edges = list(offsets)
    if not edges or edges[0] != 0 or edges[-1] != d or edges != sorted(edges):
        raise ValueError(f"{op}: offsets must ascend from 0 to the cache's width {d}, got {edges}")
    check_tensor(op, "scales", scales, (torch.float32,), ndim=2)
    if scales.shape != (n, len(edges) - 1):
        raise ValueError(
            f"{op}: scales must be [N, blocks] = {(n, len(edges) - 1)}, got {tuple(scales.shape)}"
        )
