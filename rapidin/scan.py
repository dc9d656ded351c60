"""The scan: all shards of a cache for both ends of the ranking, and the hits of what was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin import methods, ops
from rapidin.cache import Cache
from rapidin.errors import UserError
from rapidin.examples import Examples, open_examples, record_hash
from rapidin.hits import Hit
from rapidin.transfer import Conveyor, GpuOrder

Ends = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def scan_cache(
    cache: Cache, query: methods.ScanQuery, top_k: int, device: torch.device | None = None
) -> Ends:
    """((scores, rows) of the top, (scores, rows) of the bottom), each [Q, k] on the CPU, over all shards.

    device: where the rows are scanned, by default where the query's vectors are. To a GPU the shards are
    copied while those before them are scanned, so that the cache may be larger than its memory.
    """
    device = query.vectors.device if device is None else torch.empty(0, device=device).device
    shards = _shards(cache, query)
    if device.type == "cuda":
        shards = Conveyor[_Label](GpuOrder(device)).carry(shards)
    return scan_shards(cache, query, top_k, device, shards)


# A shard's first row, and whether one of its blocks is without gradient, where that matters.
_Label = tuple[int, bool | None]


def _shards(cache: Cache, query: methods.ScanQuery) -> Iterator[tuple[_Label, dict[str, Tensor]]]:
    """What a scan reads of each shard, on the CPU."""
    for first, rows in cache.shards(ahead=True):
        dead = cache.code.some_dead(rows.code) if query.normalize == "layer" else None
        yield (first, dead), rows.code | {_STATUS: rows.status}


_STATUS = "status"


def scan_shards(
    cache: Cache,
    query: methods.ScanQuery,
    top_k: int,
    device: torch.device,
    shards: Iterable[tuple[_Label, dict[str, Tensor]]],
) -> Ends:
    """`scan_cache` of shards that are on `device`, in the order of their rows."""
    code = cache.code.to(device)
    prepared = code.prepare(query.vectors.to(device))
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for (first, dead), fields in shards:
        plan = prepared.plan(fields, query.scales(code, fields), dead)
        top, top_rows, bottom, bottom_rows = ops.topk_scan_both_ends(
            plan.parts,
            plan.queries,
            top_k,
            scales=plan.scales,
            offsets=plan.offsets,
            base=plan.base,
            valid=fields[_STATUS] == 0,
        )
        shift = [torch.where(i >= 0, i + first, i) for i in (top_rows, bottom_rows)]
        constant = plan.constant[:, None]
        parts.append((top + constant, shift[0], bottom + constant, shift[1]))
    if not parts:
        raise UserError(
            f"the cache in '{cache.path}' holds no examples yet", "run the same 'rapidin cache' again"
        )
    joined = [torch.cat(column, dim=1) for column in zip(*parts, strict=True)]
    top, top_rows = (x.cpu() for x in _best(joined[0], joined[1], top_k, True))
    bottom, bottom_rows = (x.cpu() for x in _best(joined[2], joined[3], top_k, False))
    return (top, top_rows), (bottom, bottom_rows)


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
            example = source[row] if row < len(source) else None
            if example is None or record_hash(example) != hashes[n]:
                raise UserError(
                    f"the training data '{source.path}' is not what was cached: see example {index[n]}",
                    "name the right file with --train-data, or say --no-text",
                )
        hits.append(Hit(n + 1, index[n], row, score, example))
    return hits


def training_data(cache: Cache, examples: Any) -> Examples | None:
    """The data to show with hits, opened but not read: `examples`, by default from where the cache was made.

    None for False, and where the examples were never in a file. Raises UserError where it is not there, or
    has another number of examples; each one that is shown is checked by `hits_of`.
    """
    if examples is False:
        return None
    if isinstance(examples, Examples):
        return examples
    source = cache.manifest.data.get("path") if examples is None else examples
    if source is None:
        return None
    remedy = "name it with --train-data, or say --no-text to see line numbers only"
    in_file = isinstance(source, str | Path)
    if in_file and not Path(source).exists():
        raise UserError(f"the training data of the cache {cache.path} is not at {source}", remedy)
    found = open_examples(source, limit=cache.manifest.rows, checked=False)
    if len(found) != cache.manifest.rows:
        raise UserError(
            f"{source if in_file else 'the data'} has {len(found):,} examples, "
            f"the cache {cache.path} was made from {cache.manifest.rows:,}",
            remedy,
        )
    return found
