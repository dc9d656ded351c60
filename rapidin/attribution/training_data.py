"""The training examples behind the rows of a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rapidin.attribution.progress import LOG
from rapidin.attribution.provenance import task_name
from rapidin.cache import Cache
from rapidin.data.encoding import answer_start, decoded
from rapidin.data.examples import Examples, open_examples
from rapidin.data.records import TEXTS, Record, record_hash, tokens_of
from rapidin.data.sources import DataNotFound, Files, join_paths
from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.types import Hit
from rapidin.tasks.names import forms_of


def cached_record(
    examples: Examples, row: int, index: int, cached_hash: int, alternative: str = ""
) -> Record:
    """The record of a row, after a check that it has the hash of the record that was cached.

    index: its line number; alternative: what else the user may do. Raises UserError if it is another record.
    """
    record = examples[row] if row < len(examples) else None
    if record is None or record_hash(record) != cached_hash:
        named = ", ".join(examples.path) if isinstance(examples.path, list) else examples.path
        named = f" '{named}'" if named else ""
        raise UserError(
            f"the training data{named} is not what was cached: see example {index}",
            f"name the right file with `examples`{alternative}",
        )
    return record


def cached_records(cache: Cache, examples: Examples, rows: Sequence[int]) -> Iterator[Record]:
    """The records of rows of a cache that count. Raises UserError for one that is not what was cached."""
    columns = cache.index(list(rows)).tolist(), cache.records(list(rows)).tolist()
    for row, index, record in zip(rows, *columns, strict=True):
        yield cached_record(examples, row, index, record)


def training_data(cache: Cache, examples: Any) -> Examples | None:
    """The training examples to show with hits, opened but not read; by default those that the cache was made
    of.

    None if `examples` is False, or if the examples were in the memory of another process, which is said.
    Raises UserError if they do not exist or their number is another; `hits_of` checks each example that is
    shown.
    """
    if examples is False:
        return None
    if isinstance(examples, Examples):
        return examples
    source = cache.manifest.data.get("path") if examples is None else examples
    if source is None and cache.examples is None:
        LOG.warning(
            "the hits have no texts, since the cache %s was made from data in memory; give the same data "
            "with `examples` to see them",
            cache.path,
        )
    if source is None:
        return cache.examples
    remedy = "name it with `examples`, or use `examples=False` to see line numbers only"
    if examples is None:
        source = join_paths(source)
    paths = list(source.paths) if isinstance(source, Files) else [source]
    if examples is None and "-" in paths:
        raise UserError(f"the cache {cache.path} names standard input as its training data", remedy)
    reading = {name: value for name, value in cache.manifest.data.items() if name in ("map", "streaming")}
    forms = forms_of(task_name(cache.manifest))
    try:
        opened = open_examples(source, limit=cache.manifest.rows, checked=False, forms=forms, **reading)
    except DataNotFound as error:
        names = [str(path) for path in paths if isinstance(path, str | Path)]
        named = ", ".join([name for name in names if not os.path.exists(name)] or names)
        raise UserError(f"the training data of the cache {cache.path} is not at {named}", remedy) from error
    if len(opened) != cache.manifest.rows:
        named = ", ".join(map(str, paths)) if opened.path is not None else "the data"
        raise UserError(
            f"{named} has {len(opened):,} examples, "
            f"the cache {cache.path} was made from {cache.manifest.rows:,}",
            remedy,
        )
    return opened


def with_texts(results: Results, tokenizer: Any) -> Results:
    """The results with the texts of the hits whose examples are given as token ids."""
    if tokenizer is None:
        return results

    def read(hits: Sequence[Hit]) -> list[Hit]:
        return [_read(hit, tokenizer) for hit in hits]

    return Results(
        [
            replace(
                result,
                top=read(result.top),
                bottom=read(result.bottom),
                targets=[
                    replace(each, top=read(each.top), bottom=read(each.bottom)) for each in result.targets
                ],
            )
            for result in results
        ]
    )


def _read(hit: Hit, tokenizer: Any) -> Hit:
    if hit.example is None or TEXTS.of(hit.example) != "tokens":
        return hit
    ids, counts = tokens_of(hit.example)
    first = answer_start(counts)
    return replace(hit, decoded=(decoded(tokenizer, ids[:first]), decoded(tokenizer, ids[first:])))


def hits_of(cache: Cache, examples: Examples | None, scores: Tensor, rows: Tensor) -> list[Hit]:
    """The hits of one end of one query, from scores [k] and rows [k]; rows below 0 are no hits.

    Raises UserError if `examples` are not those that were cached, so that no hit has the text of another.
    """
    ranked = [(float(score), int(row)) for score, row in zip(scores, rows, strict=True) if row >= 0]
    if not ranked:
        return []
    numbers = [row for _, row in ranked]
    index, hashes = cache.index(numbers).tolist(), cache.records(numbers).tolist()
    hits = []
    for n, (score, row) in enumerate(ranked):
        example = None
        if examples is not None:
            example = cached_record(examples, row, index[n], hashes[n], ", or use `examples=False`")
        hits.append(Hit(n + 1, index[n], row, score, example))
    return hits
