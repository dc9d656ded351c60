"""The scan: all shards of a cache for both ends of the ranking, and the hits of what was found."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rapidin import distributed, ops
from rapidin.attribution import methods
from rapidin.attribution.training_data import cached_record
from rapidin.cache import Cache
from rapidin.cache.codec import JoinedQueries, concatenate_plans
from rapidin.cache.resident import STATUS, HeldShard, Resident, resident_on
from rapidin.cache.shards import Rows
from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.ops.transfer import Conveyor, GpuOrder, Order
from rapidin.results.types import Hit

Ends = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CacheScan:
    """A cache and what it is scanned for; the scores of several sources are added up."""

    cache: Cache
    query: methods.ScanQuery


def scan_cache(
    sources: CacheScan | Sequence[CacheScan], top_k: int, device: torch.device | None = None
) -> Ends:
    """((scores, rows) of the top, (scores, rows) of the bottom), each [Q, k] on the CPU, over all shards.

    sources: caches of the same examples; rows that are not in all of them, or do not count in one, are left
    out. device: where the rows are scanned, by default where the query's vectors are. To a GPU the shards are
    copied while those before them are scanned, so that the cache may be larger than its memory. Of several
    processes each scans its part of the shards, and all get the same, which is what one alone would find.
    Raises UserError where the caches are of other examples.
    """
    world = distributed.world()
    found = world.gather(scan_pieces(*_begin(sources, device, _part(sources, world)), top_k=top_k))
    ends = []
    for end, largest in ((0, True), (1, False)):  # parts are in the order of their rows
        scores, rows = (torch.cat([part[end][n] for part in found], 1) for n in (0, 1))
        ends.append(_best(scores, rows, top_k, largest))
    if not ends[0][0].shape[1]:
        raise _nothing(sources)
    return ends[0], ends[1]


def all_scores(sources: CacheScan | Sequence[CacheScan], device: torch.device | None = None) -> Tensor:
    """The scores of all rows: [Q, rows] float32 on the CPU, NaN for rows that do not count.

    Of an unfinished cache the rows up to the last that is cached. Arguments as `scan_cache`.
    """
    world = distributed.world()
    part = _part(sources, world)
    begun = _begin(sources, device, part, _ALL_ROWS)
    first = begun[0][0]
    queries, pieces = len(first.query.vectors), 0
    found = torch.full((queries, first.cache.table_rows(4 * queries)), torch.nan, device="cpu")
    for scores, rows, _, _ in _scanned(*begun, top_k=_ALL_ROWS):
        scores, rows, pieces = scores.cpu(), rows.cpu(), pieces + 1
        for query in range(queries):
            real = rows[query] >= 0
            found[query, rows[query][real]] = scores[query][real]
    low, high = part
    gathered = world.gather((part, pieces, found[:, low:high].clone()))
    if not any(pieces for _, pieces, _ in gathered):
        raise _nothing(sources)
    for (low, high), _, scores in gathered:
        found[:, low:high] = scores
    return found


def rescore(source: CacheScan, ends: Ends, top_k: int, device: torch.device | None = None) -> Ends:
    """The best of the rows that another scan found, by their scores here: as `scan_cache` gives them.

    source: a cache of the same examples, say one that keeps more of each. Rows that it lacks, or that do not
    count in it, are left out.
    """
    found = torch.unique(torch.cat([rows.flatten() for _, rows in ends]))
    chosen = found[found >= 0]  # ascending
    scores = scores_of(source, chosen, device)
    best = []
    for (_, rows), largest in zip(ends, (True, False), strict=True):
        ordered = rows.sort(dim=1).values
        place = torch.searchsorted(chosen, ordered).clamp(0, max(0, len(chosen) - 1))
        own = scores.gather(1, place) if len(chosen) else torch.full(rows.shape, torch.nan, device="cpu")
        kept = torch.where((ordered >= 0) & ~own.isnan(), ordered, -1)
        best.append(_best(own, kept, top_k, largest))
    return best[0], best[1]


def scores_of(source: CacheScan, chosen: Tensor, device: torch.device | None = None) -> Tensor:
    """The scores of these rows [n], ascending, on the CPU: [Q, n] float32 there, NaN for rows that do not
    count; as a scan has them."""
    device = source.query.vectors.device if device is None else device
    scores = torch.full((len(source.query.vectors), len(chosen)), torch.nan, device="cpu")
    pieces = ((label, _moved(fields, device)) for label, fields in _some_pieces(source, chosen))
    for values, places, _, _ in _scanned([source], device, pieces, top_k=_ALL_ROWS):
        values, places = values.cpu(), places.cpu()
        for query in range(len(scores)):
            real = places[query] >= 0
            scores[query, places[query][real]] = values[query][real]
    return scores


def some_rows(source: CacheScan, chosen: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The code's fields of these rows [n], ascending, on the CPU, some at a time, and the query's factors of
    them; rows that the cache does not hold are left out."""
    for _, fields in _some_pieces(source, chosen):
        mine = {name.partition(".")[2]: value for name, value in fields.items()}
        del mine[STATUS]
        factors = mine.pop(_FACTORS, None)
        yield mine, factors


def _some_pieces(source: CacheScan, chosen: Tensor) -> Iterator[_Piece]:
    """Pieces of these rows [n], ascending, on the CPU; labels are places among them."""
    factors = source.query.factors
    for shard in source.cache.manifest.shards:
        low, high = torch.searchsorted(
            chosen, torch.tensor([shard.first, shard.first + shard.rows], device="cpu")
        ).tolist()
        for start in range(low, high, _ALL_ROWS):
            (first, rows), *_ = source.cache.shards(within=(shard.first, shard.first + 1))
            wanted = chosen[start : min(high, start + _ALL_ROWS)]
            mine = {name: value[wanted - first] for name, value in rows.tensors.items()}
            dead = _some_dead(source, mine, None, (0, 0))
            mine[STATUS] = rows.status[wanted - first]
            if factors is not None:
                mine[_FACTORS] = factors[wanted]
            yield _Label(start, (dead,)), {f"0.{name}": value for name, value in mine.items()}


def _moved(fields: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in fields.items()}


_ALL_ROWS = 256  # that are scanned at a time where all scores are wanted


@dataclass(frozen=True)
class _Label:
    """Describes a piece. first: its first row; dead: for each source whether one of its blocks is without
    gradient, None where that does not matter; there: fields that are on the device already; stay: (source
    number, held shard, low, high) where the piece's fields are kept as rows [low, high) of the shard."""

    first: int
    dead: tuple[bool | None, ...]
    there: Mapping[str, Tensor] = field(default_factory=dict)
    stay: tuple[tuple[int, HeldShard, int, int], ...] = ()


_Piece = tuple[_Label, dict[str, Tensor]]


def _listed(sources: CacheScan | Sequence[CacheScan]) -> list[CacheScan]:
    return [sources] if isinstance(sources, CacheScan) else list(sources)


def _nothing(sources: CacheScan | Sequence[CacheScan]) -> UserError:
    return UserError(
        f"the cache in '{_listed(sources)[0].cache.path}' holds no examples yet",
        "run the same 'rapidin cache' again",
    )


def _part(sources: CacheScan | Sequence[CacheScan], world: distributed.World) -> tuple[int, int]:
    """The rows, from one to before another, that this process scans: whole pieces of what one alone would."""
    shards = [shard for source in _listed(sources) for shard in source.cache.manifest.shards]
    edges = sorted({s.first for s in shards} | {s.first + s.rows for s in shards}) or [0]
    low, high = world.part(len(edges) - 1)
    return edges[low], edges[high]


def _begin(
    sources: CacheScan | Sequence[CacheScan],
    device: torch.device | None,
    within: tuple[int, int],
    most: int | None = None,
) -> tuple[list[CacheScan], torch.device, Iterable[_Piece]]:
    """Sources, the device, and the pieces on it, of these rows and of at most so many rows each."""
    sources = _listed(sources)
    device = sources[0].query.vectors.device if device is None else torch.empty(0, device=device).device
    if device.type != "cuda":
        return sources, device, _pieces(sources, within, most)
    return sources, device, carried(GpuOrder(device), resident_on(device), sources, within, most)


def carried(
    order: Order,
    resident: Resident,
    sources: Sequence[CacheScan],
    within: tuple[int, int] = (0, sys.maxsize),
    most: int | None = None,
) -> Iterator[_Piece]:
    """The pieces of `_pieces`, on a device; rows that fit into its memory stay there."""
    resident.admit([source.cache for source in sources], within)
    for label, fields in Conveyor[_Label](order).carry(_pieces(sources, within, most, resident)):
        for number, shard, low, high in label.stay:
            shard.fill(low, high, {name: fields[f"{number}.{name}"] for name in shard.tensors})
        yield label, {**fields, **label.there}


def _pieces(
    sources: Sequence[CacheScan],
    within: tuple[int, int] = (0, sys.maxsize),
    most: int | None = None,
    resident: Resident | None = None,
) -> Iterator[_Piece]:
    """What a scan reads: rows that all sources hold, a shard or at most `most` at a time, on the CPU. Rows
    that `resident` holds are taken from the device."""
    check_same_examples([source.cache for source in sources])
    shards = [
        source.cache.shards(
            ahead=resident is None or not resident.holds_all(source.cache, within), within=within
        )
        for source in sources
    ]
    held: list[tuple[int, Rows]] = []
    for each in shards:
        held.append(next(each, (-1, _NOTHING)))
    while all(rows is not _NOTHING for _, rows in held):
        first = max(within[0], *(at for at, _ in held))
        end = min(within[1], *(at + len(rows.index) for at, rows in held))
        for start in range(first, end, most or max(1, end - first)):
            stop = min(end, start + (most or end))
            dead: list[bool | None] = []
            fields: dict[str, Tensor] = {}
            there: dict[str, Tensor] = {}
            stay: list[tuple[int, HeldShard, int, int]] = []
            for number, (source, (at, rows)) in enumerate(zip(sources, held, strict=True)):
                low, high = start - at, stop - at
                mine = {name: value[low:high] for name, value in rows.tensors.items()}
                kept = None if resident is None else resident.shard(source.cache, at, rows)
                dead.append(_some_dead(source, mine, kept, (low, high)))
                if kept is not None and kept.has(low, high):
                    there |= {f"{number}.{name}": value for name, value in kept.rows(low, high).items()}
                else:
                    mine[STATUS] = rows.status[low:high]
                    fields |= {f"{number}.{name}": value for name, value in mine.items()}
                    if kept is not None:
                        stay.append((number, kept, low, high))
                if source.query.factors is not None:
                    fields[f"{number}.{_FACTORS}"] = source.query.factors[start:stop]
            yield _Label(start, tuple(dead), there, tuple(stay)), fields
        last = min(at + len(rows.index) for at, rows in held)
        held = [
            (at, rows) if at + len(rows.index) > last else next(each, (-1, _NOTHING))
            for (at, rows), each in zip(held, shards, strict=True)
        ]


def _some_dead(
    source: CacheScan, mine: Mapping[str, Tensor], kept: HeldShard | None, rows: tuple[int, int]
) -> bool | None:
    """Whether one of these rows has a block without gradient, None where that does not matter."""
    if source.query.normalize != "layer":
        return None
    if kept is None:
        return source.cache.codec.has_zero_gradient(mine)
    if rows not in kept.zero_gradient:
        kept.zero_gradient[rows] = source.cache.codec.has_zero_gradient(mine)
    return kept.zero_gradient[rows]


_FACTORS = "factors"
_NOTHING = Rows({}, *(torch.zeros(0, dtype=torch.int64, device="cpu") for _ in range(4)))


def check_same_examples(caches: Sequence[Cache]) -> None:
    """Raise UserError where these caches are not of the same examples."""
    first = caches[0]
    for other in caches[1:]:
        same = other.manifest.rows == first.manifest.rows
        if not same or other.manifest.data.get("identity") != first.manifest.data.get("identity"):
            raise UserError(
                f"the caches {first.path} and {other.path} are not of the same examples",
                "cache the same --data for all of them",
            )


def scan_pieces(
    sources: Sequence[CacheScan], device: torch.device, pieces: Iterable[_Piece], *, top_k: int
) -> Ends:
    """`scan_cache` of pieces that are on `device`, in the order of their rows."""
    parts = list(_scanned(sources, device, pieces, top_k=top_k))
    if not parts:
        queries = len(sources[0].query.vectors)
        none = torch.zeros(queries, 0, device="cpu"), torch.zeros(queries, 0, dtype=torch.int64, device="cpu")
        return none, none
    joined = [torch.cat(column, dim=1) for column in zip(*parts, strict=True)]
    top, top_rows = (x.cpu() for x in _best(joined[0], joined[1], top_k, True))
    bottom, bottom_rows = (x.cpu() for x in _best(joined[2], joined[3], top_k, False))
    return (top, top_rows), (bottom, bottom_rows)


def _scanned(
    sources: Sequence[CacheScan], device: torch.device, pieces: Iterable[_Piece], *, top_k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each piece the top's scores and rows, and the bottom's."""
    codes = [source.cache.codec.to(device) for source in sources]
    prepared = [
        code.prepare(source.query.vectors.to(device)) for code, source in zip(codes, sources, strict=True)
    ]
    joined: JoinedQueries = {}
    asked: dict[int, ops.ScanQueries] = {}  # by id(), which is unique while they are held here
    for label, fields in pieces:
        plans, counts = [], None
        for number, (source, code, query) in enumerate(zip(sources, codes, prepared, strict=True)):
            mine = {
                name.partition(".")[2]: value
                for name, value in fields.items()
                if name.startswith(f"{number}.")
            }
            factors, status = mine.pop(_FACTORS, None), mine.pop(STATUS)
            counts = status == 0 if counts is None else counts & (status == 0)
            plans.append(query.plan(mine, source.query.scales(code, mine, factors), label.dead[number]))
        plan = concatenate_plans(plans, joined)
        queries = asked.setdefault(id(plan.queries), ops.ScanQueries(plan.queries))
        top, top_rows, bottom, bottom_rows = ops.topk_scan_both_ends(
            plan.parts,
            queries,
            top_k,
            scales=plan.scales,
            offsets=plan.offsets,
            base=plan.base,
            valid=counts,
        )
        shift = [torch.where(i >= 0, i + label.first, i) for i in (top_rows, bottom_rows)]
        constant = plan.constant[:, None]
        yield top + constant, shift[0], bottom + constant, shift[1]


def _best(scores: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    # Shards come in row order and a stable sort keeps it among equal scores; places without a row sort last.
    empty = float("-inf") if largest else float("inf")
    keys = torch.where(rows >= 0, scores, empty)
    order = torch.sort(keys, dim=1, descending=largest, stable=True).indices[:, :k]
    return scores.gather(1, order), rows.gather(1, order)


def hits_of(cache: Cache, source: Examples | None, scores: Tensor, rows: Tensor) -> list[Hit]:
    """The hits of one end of one query, from scores [k] and rows [k]; rows below 0 are no hits.

    Raises UserError where `source` is not the data that was cached: no hit is shown with another's text.
    """
    found = [(float(score), int(row)) for score, row in zip(scores, rows, strict=True) if row >= 0]
    if not found:
        return []
    where = [row for _, row in found]
    index, hashes = cache.index(where).tolist(), cache.records(where).tolist()
    hits = []
    for n, (score, row) in enumerate(found):
        example = None
        if source is not None:
            example = cached_record(source, row, index[n], hashes[n], ", or say --no-text")
        hits.append(Hit(n + 1, index[n], row, score, example))
    return hits
