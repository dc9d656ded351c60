"""The scan: all shards of a cache for both ends of the ranking, and the hits of what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin import methods, ops
from rapidin.cache import Cache
from rapidin.errors import UserError
from rapidin.examples import Examples, open_examples, record_hash
from rapidin.hits import Hit

Ends = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def scan_cache(cache: Cache, query: methods.ScanQuery, top_k: int) -> Ends:
    """((scores, rows) of the top, (scores, rows) of the bottom), each [Q, k], over all shards."""
    prepared = cache.code.prepare(query.vectors)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for first, rows in cache.shards(ahead=True):
        plan = prepared.plan(rows.code, query.scales(cache.code, rows.code))
        top, top_rows, bottom, bottom_rows = ops.topk_scan_both_ends(
            plan.parts,
            plan.queries,
            top_k,
            scales=plan.scales,
            offsets=plan.offsets,
            base=plan.base,
            valid=rows.status == 0,
        )
        shift = [torch.where(i >= 0, i + first, i) for i in (top_rows, bottom_rows)]
        constant = plan.constant[:, None]
        parts.append((top + constant, shift[0], bottom + constant, shift[1]))
    if not parts:
        raise UserError(
            f"the cache in '{cache.path}' holds no examples yet", "run the same 'rapidin cache' again"
        )
    joined = [torch.cat(column, dim=1) for column in zip(*parts, strict=True)]
    return _best(joined[0], joined[1], top_k, True), _best(joined[2], joined[3], top_k, False)


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
