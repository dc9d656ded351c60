"""The training examples behind the rows of a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from rapidin.cache import Cache
from rapidin.data.examples import Examples, open_examples
from rapidin.data.records import Record, record_hash
from rapidin.data.sources import Files, join_paths
from rapidin.errors import UserError
from rapidin.results.types import Hit


def cached_record(source: Examples, row: int, index: int, wanted: int, otherwise: str = "") -> Record:
    """The record of a row, whose line has this index, if it has the hash of the one that was cached.

    otherwise: what else the user may do. Raises UserError where it is another.
    """
    record = source[row] if row < len(source) else None
    if record is None or record_hash(record) != wanted:
        named = ", ".join(source.path) if isinstance(source.path, list) else source.path
        raise UserError(
            f"the training data '{named}' is not what was cached: see example {index}",
            f"name the right file with --train-data{otherwise}",
        )
    return record


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
    if examples is None:
        source = join_paths([source] if isinstance(source, str) else source)
    paths = list(source.paths) if isinstance(source, Files) else [source]
    for path in paths:
        if isinstance(path, str | Path) and not os.path.exists(path):
            raise UserError(f"the training data of the cache {cache.path} is not at {path}", remedy)
    found = open_examples(source, limit=cache.manifest.rows, checked=False)
    if len(found) != cache.manifest.rows:
        named = ", ".join(map(str, paths)) if found.path is not None else "the data"
        raise UserError(
            f"{named} has {len(found):,} examples, "
            f"the cache {cache.path} was made from {cache.manifest.rows:,}",
            remedy,
        )
    return found


def hits_of(cache: Cache, source: Examples | None, scores: Tensor, rows: Tensor) -> list[Hit]:
    """The hits of one end of one query, from scores [k] and rows [k]; rows below 0 are no hits.

    Raises UserError if `source` is not the data that was cached: no hit is shown with another's text.
    """
    ranked = [(float(score), int(row)) for score, row in zip(scores, rows, strict=True) if row >= 0]
    if not ranked:
        return []
    numbers = [row for _, row in ranked]
    index, hashes = cache.index(numbers).tolist(), cache.records(numbers).tolist()
    hits = []
    for n, (score, row) in enumerate(ranked):
        example = None
        if source is not None:
            example = cached_record(source, row, index[n], hashes[n], ", or use --no-text")
        hits.append(Hit(n + 1, index[n], row, score, example))
    return hits
