"""The scan: all shards of several caches for both ends of the ranking, for all scores, or for chosen rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rapidin import distributed, ops
from rapidin.attribution.scan_pieces import (
    PIECE_ROWS,
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

# Rows of a piece of which all scores are kept: GPU kernels keep that many, on a CPU each piece has its cost.
_PIECE_ROWS_OF_CPU = 4096

Ends = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def scan_cache(
    scans: CacheScan | Sequence[CacheScan], top_k: int, device: torch.device | None = None
) -> Ends:
    """((scores, rows) of the top, (scores, rows) of the bottom), each [Q, k] on the CPU, over all shards.

    scans: caches of the same examples; rows that are not in all of them, or do not count in one, are left
    out. device: where the rows are scanned, by default where the query's vectors are. To a GPU, shards are
    copied while those before them are scanned, so that the cache may be larger than its memory. Of several
    processes each scans its share of the shards, and all get the same, which is what one alone would find.
    Raises UserError if the caches are of other examples, or hold none yet.
    """
    world = distributed.world()
    shares = world.gather(scan_pieces(*_begin(scans, device, _share(scans, world)), top_k=top_k))
    ends = []
    for end, largest in ((0, True), (1, False)):  # shares are in the order of their rows
        scores, rows = (torch.cat([share[end][n] for share in shares], 1) for n in (0, 1))
        ends.append(_best(scores, rows, top_k, largest))
    if not ends[0][0].shape[1]:
        raise _empty(scans)
    return ends[0], ends[1]


def all_scores(scans: CacheScan | Sequence[CacheScan], device: torch.device | None = None) -> Tensor:
    """The scores of all rows: [Q, rows] float32 on the CPU, NaN for rows that do not count.

    Of an unfinished cache the rows up to the last that is cached. Arguments as `scan_cache`.
    """
    world = distributed.world()
    share = _share(scans, world)
    on_gpu = (device or _listed(scans)[0].query.vectors.device).type == "cuda"
    most = PIECE_ROWS if on_gpu else _PIECE_ROWS_OF_CPU
    listed, on, read = _begin(scans, device, share, most)
    queries, count = len(listed[0].query.vectors), 0
    all_rows = torch.full((queries, listed[0].cache.table_rows(4 * queries)), torch.nan, device="cpu")
    for scores, rows, _, _ in scored_pieces(listed, on, read, top_k=most):
        scores, rows, count = scores.cpu(), rows.cpu(), count + 1
        for query in range(queries):
            real = rows[query] >= 0
            all_rows[query, rows[query][real]] = scores[query][real]
    low, high = share
    gathered = world.gather((share, count, all_rows[:, low:high].clone()))
    if not any(count for _, count, _ in gathered):
        raise _empty(scans)
    for (low, high), _, scores in gathered:
        all_rows[:, low:high] = scores
    return all_rows


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
    for values, positions, _, _ in scored_pieces([scan], device, read, top_k=PIECE_ROWS):
        values, positions = values.cpu(), positions.cpu()
        for query in range(len(scores)):
            real = positions[query] >= 0
            scores[query, positions[query][real]] = values[query][real]
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
    most: int | None = None,
) -> tuple[list[CacheScan], torch.device, Iterable[Piece]]:
    """The scans, the device, and the pieces on it, from rows `within`, of at most `most` rows each."""
    scans = _listed(scans)
    device = scans[0].query.vectors.device if device is None else torch.empty(0, device=device).device
    if device.type != "cuda":
        return scans, device, pieces(scans, within, most)
    return scans, device, prefetched(GpuCopyStream(device), resident_on(device), scans, within, most)


def scan_pieces(
    scans: Sequence[CacheScan], device: torch.device, read: Iterable[Piece], *, top_k: int
) -> Ends:
    """`scan_cache` of pieces that are on `device`, in the order of their rows."""
    of_pieces = list(scored_pieces(scans, device, read, top_k=top_k))
    if not of_pieces:
        queries = len(scans[0].query.vectors)
        end = torch.zeros(queries, 0, device="cpu"), torch.zeros(queries, 0, dtype=torch.int64, device="cpu")
        return end, end
    joined = [torch.cat(column, dim=1) for column in zip(*of_pieces, strict=True)]
    top, top_rows = (x.cpu() for x in _best(joined[0], joined[1], top_k, True))
    bottom, bottom_rows = (x.cpu() for x in _best(joined[2], joined[3], top_k, False))
    return (top, top_rows), (bottom, bottom_rows)


def scored_pieces(
    scans: Sequence[CacheScan], device: torch.device, read: Iterable[Piece], *, top_k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each piece (scores of the top, its rows, scores of the bottom, its rows)."""
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
            scales = scan.query.scales(codec, rows.stored, rows.factors)
            plans.append(query.plan(rows.stored, scales, rows.zero_gradient))
        plan = concatenate_plans(plans, joined)
        queries = uploaded.setdefault(id(plan.queries), ops.ScanQueries(plan.queries))
        top, top_rows, bottom, bottom_rows = ops.topk_scan_both_ends(
            plan.parts,
            queries,
            top_k,
            scales=plan.scales,
            offsets=plan.offsets,
            base=plan.base,
            valid=counts,
        )
        shifted = [torch.where(i >= 0, i + piece.first, i) for i in (top_rows, bottom_rows)]
        constant = plan.constant[:, None]
        yield top + constant, shifted[0], bottom + constant, shifted[1]


def _best(scores: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    # Shards come in row order and a stable sort keeps it among equal scores; rows below 0 sort last.
    empty = float("-inf") if largest else float("inf")
    keys = torch.where(rows >= 0, scores, empty)
    order = torch.sort(keys, dim=1, descending=largest, stable=True).indices[:, :k]
    return scores.gather(1, order), rows.gather(1, order)
