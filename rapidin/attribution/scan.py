"""The scan: all shards of several caches for both ends of the ranking, for all scores, or for chosen rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import distributed, ops
from rapidin.attribution.scan_pieces import (
    CacheRows,
    CacheScan,
    Piece,
    pieces,
    pieces_of,
    prefetched,
)
from rapidin.cache.codec import JoinedQueries, concatenate_plans
from rapidin.cache.resident import resident_on
from rapidin.errors import UserError
from rapidin.ops.transfer import GpuCopyStream

Ends = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Found:
    """What a scan found, on the CPU.

    ends: ((scores, rows) of the top, (scores, rows) of the bottom), each [Q, k]; scores: [S, rows] float32 of
    the first S queries, NaN for rows that do not count; of an unfinished cache the rows up to the last that
    is cached.
    """

    ends: Ends
    scores: Tensor


def scan_cache(
    scans: CacheScan | Sequence[CacheScan], top_k: int, device: torch.device | None = None
) -> Ends:
    """Both ends of the ranking, as `scan_scored` without scores of all rows."""
    return scan_scored(scans, top_k, 0, device).ends


def all_scores(scans: CacheScan | Sequence[CacheScan], device: torch.device | None = None) -> Tensor:
    """The scores of all rows, [Q, rows], as `scan_scored` of all queries without a ranking."""
    return scan_scored(scans, 0, len(_listed(scans)[0].query.vectors), device).scores


def scan_scored(
    scans: CacheScan | Sequence[CacheScan], top_k: int, scored: int, device: torch.device | None = None
) -> Found:
    """Both ends of the ranking over all shards, and the scores of all rows for the first `scored` queries.

    scans: caches of the same examples; rows that are not in all of them, or do not count in one, are left
    out. device: where the rows are scanned, by default where the query's vectors are. To a GPU, shards are
    copied while those before them are scanned, so that the cache may be larger than its memory. Of several
    processes each scans its share of the shards, and all get the same, which is what one alone would find.
    Raises UserError if the caches are of other examples, or hold none yet.
    """
    world, listed = distributed.world(), _listed(scans)
    share = _share(scans, world)
    pieces = scored_pieces(*_begin(scans, device, share), top_k=top_k, scored=scored)
    shape = (scored, listed[0].cache.table_rows(4 * scored)) if scored else (0, 0)
    scores = torch.full(shape, torch.nan, device="cpu")
    found: list[tuple[Tensor, ...]] = []
    for piece in pieces:
        found.append(piece.ends)
        if scored:
            scores[:, piece.first : piece.first + piece.scores.shape[1]] = piece.scores
    low, high = share
    gathered = world.gather((share, len(found), joined_ends(found, top_k), scores[:, low:high].clone()))
    if not any(count for _, count, _, _ in gathered):
        raise _empty(scans)
    for (low, high), _, _, of_share in gathered:
        scores[:, low:high] = of_share
    # Shares are in the order of their rows.
    (top, top_rows), (bottom, bottom_rows) = joined_ends(
        [(*a, *b) for _, n, (a, b), _ in gathered if n], top_k
    )
    return Found(((top, top_rows), (bottom, bottom_rows)), scores)


def rescore(scan: CacheScan, ends: Ends, top_k: int, device: torch.device | None = None) -> Ends:
    """The best of the rows that another scan found, by their scores here: as `scan_cache` gives them.

    scan: of a cache of the same examples, say one that keeps more of each. Rows that it lacks, or that do not
    count in it, are left out.
    """
    chosen = torch.unique(torch.cat([rows.flatten() for _, rows in ends]))  # ascending
    chosen = chosen[chosen >= 0]
    scores = scores_of(scan, chosen, device)
    best = []
    for (_, rows), largest in zip(ends, (True, False), strict=True):
        ordered = rows.sort(dim=1).values
        position = torch.searchsorted(chosen, ordered).clamp(0, max(0, len(chosen) - 1))
        rescored = torch.full(rows.shape, torch.nan, device="cpu")
        if len(chosen):
            rescored = scores.gather(1, position)
        kept = torch.where((ordered >= 0) & ~rescored.isnan(), ordered, -1)
        best.append(_best(rescored, kept, top_k, largest))
    return best[0], best[1]


def scores_of(scan: CacheScan, chosen: Tensor, device: torch.device | None = None) -> Tensor:
    """The scores of these rows [n], ascending, on the CPU: [Q, n] float32 there, NaN for rows that do not
    count; as a scan has them."""
    device = scan.query.vectors.device if device is None else device
    scores = torch.full((len(scan.query.vectors), len(chosen)), torch.nan, device="cpu")
    read = (Piece(each.first, (each.caches[0].to(device),)) for each in pieces_of(scan, chosen))
    for piece in scored_pieces([scan], device, read, top_k=0, scored=len(scores)):
        scores[:, piece.first : piece.first + piece.scores.shape[1]] = piece.scores
    return scores


def some_rows(scan: CacheScan, chosen: Tensor) -> Iterator[CacheRows]:
    """These rows [n], ascending, on the CPU, some at a time; rows that the cache does not hold are left
    out."""
    return (piece.caches[0] for piece in pieces_of(scan, chosen))


def _listed(scans: CacheScan | Sequence[CacheScan]) -> list[CacheScan]:
    return [scans] if isinstance(scans, CacheScan) else list(scans)


def _empty(scans: CacheScan | Sequence[CacheScan]) -> UserError:
    return UserError(
        f"the cache in '{_listed(scans)[0].cache.path}' holds no examples yet",
        "run the same 'rapidin cache' again",
    )


def _share(scans: CacheScan | Sequence[CacheScan], world: distributed.World) -> tuple[int, int]:
    """The rows, from one to before another, that this process scans: whole pieces of what one alone would."""
    shards = [shard for scan in _listed(scans) for shard in scan.cache.manifest.shards]
    edges = sorted({s.first for s in shards} | {s.first + s.rows for s in shards}) or [0]
    low, high = world.range_of(len(edges) - 1)
    return edges[low], edges[high]


def _begin(
    scans: CacheScan | Sequence[CacheScan],
    device: torch.device | None,
    within: tuple[int, int],
) -> tuple[list[CacheScan], torch.device, Iterable[Piece]]:
    """The scans, the device, and the pieces on it, from rows `within`."""
    scans = _listed(scans)
    device = scans[0].query.vectors.device if device is None else torch.empty(0, device=device).device
    if device.type != "cuda":
        return scans, device, pieces(scans, within)
    return scans, device, prefetched(GpuCopyStream(device), resident_on(device), scans, within)


@dataclass(frozen=True)
class ScoredPiece:
    """What a piece's rows score, on the device.

    first: number of its first row; ends: scores of the top, their rows, scores of the bottom, their rows,
    [Q, k] each; scores: of all its rows for the first queries [S, n], NaN for rows that do not count.
    """

    first: int
    ends: tuple[Tensor, Tensor, Tensor, Tensor]
    scores: Tensor


def scored_pieces(
    scans: Sequence[CacheScan],
    device: torch.device,
    read: Iterable[Piece],
    *,
    top_k: int,
    scored: int = 0,
) -> Iterator[ScoredPiece]:
    """Each piece with its best and worst `top_k` rows, and all scores of the first `scored` queries."""
    codecs = [scan.cache.codec.to(device) for scan in scans]
    prepared = [
        codec.prepare(scan.query.vectors.to(device)) for codec, scan in zip(codecs, scans, strict=True)
    ]
    joined: JoinedQueries = {}
    uploaded: dict[int, ops.ScanQueries] = {}  # by id() of a plan's queries, which stay alive here
    for piece in read:
        plans, counts = [], None
        for scan, codec, query, rows in zip(scans, codecs, prepared, piece.caches, strict=True):
            counts = rows.status == 0 if counts is None else counts & (rows.status == 0)
            scales = scan.query.scales(codec, rows.stored, rows.factors, rows.zero_gradient)
            plans.append(query.plan(rows.stored, scales, rows.zero_gradient))
        assert counts is not None
        plan = concatenate_plans(plans, joined)
        queries = uploaded.setdefault(id(plan.queries), ops.ScanQueries(plan.queries))
        scores = torch.empty(scored, len(counts), device=device)
        top, top_rows, bottom, bottom_rows = ops.topk_scan_both_ends(
            plan.parts,
            queries,
            top_k,
            scales=plan.scales,
            offsets=plan.offsets,
            base=plan.base,
            valid=counts,
            scores=scores if scored else None,
        )
        shifted = [torch.where(i >= 0, i + piece.first, i) for i in (top_rows, bottom_rows)]
        constant = plan.constant[:, None]
        ends = top + constant, shifted[0], bottom + constant, shifted[1]
        yield ScoredPiece(piece.first, ends, scores + constant[:scored])


def joined_ends(found: Sequence[tuple[Tensor, ...]], top_k: int) -> Ends:
    """Both ends, on the CPU, of those of several ranges of rows, in the order of the rows."""
    if not found:
        none = torch.zeros(0, 0, device="cpu"), torch.zeros(0, 0, dtype=torch.int64, device="cpu")
        return none, none
    top, top_rows, bottom, bottom_rows = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
    of_top, of_bottom = _best(top, top_rows, top_k, True), _best(bottom, bottom_rows, top_k, False)
    return (of_top[0].cpu(), of_top[1].cpu()), (of_bottom[0].cpu(), of_bottom[1].cpu())


def _best(scores: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    # Shards come in row order and a stable sort keeps it among equal scores; rows below 0 sort last.
    empty = float("-inf") if largest else float("inf")
    keys = torch.where(rows >= 0, scores, empty)
    order = torch.sort(keys, dim=1, descending=largest, stable=True).indices[:, :k]
    return scores.gather(1, order), rows.gather(1, order)
