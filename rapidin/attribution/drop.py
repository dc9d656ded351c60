"""Rows of the training data that are to be dropped: hits of a query, rows by their scores, or by a column.

`rapidin.data.dropping` writes the data without them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rapidin.attribution.drop_conditions import DropConditions
from rapidin.attribution.groups import check_column
from rapidin.attribution.training_data import cached_record, training_data
from rapidin.cache import Cache, Manifest
from rapidin.data.examples import Examples, open_examples
from rapidin.data.opening import Reading
from rapidin.data.records import record_hash
from rapidin.data.sources import Malformed, join_paths
from rapidin.errors import UserError
from rapidin.files import reason
from rapidin.tasks.names import CAUSAL, forms_of

_RAGGED = "\0"  # stands for the cells that a row of a table lacks, or has too many
_SCORES = ("score", "self_influence")  # the columns of a table, or what their names begin with


@dataclass
class Candidates:
    """Rows that may be dropped, and of which data.

    lines: line numbers from 0, None for all rows; records: of some of them, as they were when they were
    scored; caches, data, reading, task: what the file says that they come from; copies: how many of the lines
    are duplicates that were folded into a hit; unlisted: how many more duplicates there are. doubtful: the
    queries whose verdict was that nothing stands out, numbered from 1.
    """

    lines: list[int] | None
    records: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    caches: list[Path] = field(default_factory=list)
    data: Any = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    task: str = CAUSAL
    copies: int = 0
    unlisted: int = 0
    doubtful: list[int] = field(default_factory=list)


def candidates(source: str, conditions: DropConditions) -> Candidates:
    """The rows that a file or folder names: a cache, the hits that `rapidin query --json` wrote, or a table
    of `rapidin self --out` or `rapidin select --scores`.

    Raises UserError if it is none of these, or the conditions do not apply to it.
    """
    if Path(source).is_dir():
        Manifest.read(Path(source))  # or it is no cache
        scored = (conditions.top_k, conditions.min_score, conditions.max_score) != (None, None, None)
        if scored or conditions.harmful or not conditions.where:
            raise UserError(
                f"a cache has no scores, so rows of '{source}' can be chosen by `where` alone",
                "give the hits of 'rapidin query --json', or the table of 'rapidin self --out'",
            )
        return Candidates(None, caches=[Path(source)])
    text = read_text(source, "neither a cache nor a file")
    hits = hits_in(text)
    if hits is not None:
        return hit_candidates(hits, source, conditions)
    lines = _of_table(text, source, conditions)
    if conditions.harmful:
        raise UserError("`harmful` chooses among hits, and this is a table", "use `max_score`")
    if conditions.top_k is conditions.min_score is conditions.max_score is None:
        raise UserError(
            f"'{source}' has the scores of all rows", "say which: `top_k`, `min_score` or `max_score`"
        )
    return Candidates(lines)


def read_text(source: str, missing: str) -> str:
    """The text of a file; missing: what is said of a name that is none. Raises UserError."""
    try:
        return Path(source).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{missing}: '{source}'") from None
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not text"
        raise UserError(f"cannot read '{source}': {why}") from None


def hits_in(text: str) -> Mapping[str, Any] | None:
    """What `rapidin query --json` wrote; None if the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("queries"), list) else None


def hit_candidates(value: Mapping[str, Any], source: str, conditions: DropConditions) -> Candidates:
    """The rows that hits name; source: their file, for messages. Raises UserError for a damaged one."""
    found = Candidates([], data=value.get("train_data"), reading=value.get("reading") or {})
    found.caches = [Path(str(path)) for path in value.get("caches") or ()]
    found.task = str(value.get("task") or CAUSAL)
    lines: dict[int, None] = {}
    copies: dict[int, None] = {}
    try:
        for number, query in enumerate(value["queries"], 1):
            if (query.get("verdict") or {}).get("strength") == "nothing":
                found.doubtful.append(number)
            hits = query["bottom" if conditions.harmful else "top"]
            for hit in hits[: conditions.top_k]:
                if not conditions.scored(hit["score"]):
                    continue
                lines[int(hit["index"])] = None
                if "example" in hit:
                    found.records[int(hit["index"])] = hit["example"]
                folded = hit.get("copies", {"indices": [], "more": 0})
                copies.update(dict.fromkeys(map(int, folded["indices"])))
                found.unlisted += int(folded["more"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"'{source}' is not what 'rapidin query --json' writes") from None
    extra = [line for line in copies if line not in lines]
    found.lines, found.copies = [*lines, *extra], len(extra)
    return found


def _of_table(text: str, source: str, conditions: DropConditions) -> list[int]:
    """The line numbers of a table's rows that are chosen; of several scores the largest counts."""
    scored = []
    try:
        for row in _table_rows(text):
            scores = [float(v) for name, v in row.items() if name.startswith(_SCORES) and v not in ("", None)]
            if scores and conditions.scored(max(scores)):
                scored.append((-max(scores), int(row["index"])))
    except (KeyError, TypeError, ValueError, csv.Error):
        scored = []
        text = ""
    if not text:
        raise UserError(
            f"'{source}' is neither the hits of a query nor a table of scores",
            "give what 'rapidin query --json', 'rapidin self --out' or 'rapidin select --scores' wrote",
        )
    return [line for _, line in sorted(scored)[: conditions.top_k]]


def _table_rows(text: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a table. Raises ValueError for one that has not the cells that the header names."""
    rows: Iterator[Mapping[str, Any]]
    if text.lstrip().startswith("{"):
        rows = (dict(json.loads(line)) for line in text.split("\n") if line.strip())
    else:
        rows = csv.DictReader(io.StringIO(text, newline=""), restval=_RAGGED, restkey=_RAGGED)
    for row in rows:
        if _RAGGED in row or _RAGGED in row.values():
            raise ValueError(_RAGGED)
        if not any(name.startswith(_SCORES) for name in row):
            raise KeyError(_SCORES[0])
        yield row


@dataclass(frozen=True)
class Chosen:
    """Rows that are dropped, ascending, of which data, and how that is read.

    malformed: how many rows could not be read, so that `where` left them; uncompared: how many of the rows
    nothing could be compared with.
    """

    rows: list[int]
    data: Any
    reading: Reading
    malformed: int = 0
    uncompared: int = 0


def rows_to_drop(
    found: Candidates, conditions: DropConditions, train_data: str | Sequence[str] | None = None
) -> Chosen:
    """The rows of the candidates that meet the conditions.

    train_data: the files, by default those that the candidates name. Each row is compared with what was
    cached, or with the record of its hit. Raises UserError if the data does not exist or is another, or if no
    row is chosen.
    """
    cache = _cache_of(found)
    data = join_paths(train_data)
    if data is None:
        data = join_paths(found.data if cache is None else cache.manifest.data.get("path"))
    if data is None:
        raise UserError("nothing says which training data the rows are of", "name it with `train_data`")
    if cache is not None:
        opened = training_data(cache, data)
        assert opened is not None
    else:
        opened = open_examples(data, checked=False, forms=forms_of(found.task), **found.reading)
    if opened.path is None:
        raise UserError("the training data cannot be read a second time", "save it as a file, and name that")
    rows = sorted(_rows_of(found.lines, opened))
    malformed = uncompared = 0
    if conditions.where:
        entries = [(row, opened.entry(row)) for row in rows]
        malformed = sum(isinstance(entry, Malformed) for _, entry in entries)
        rows = [row for row, entry in entries if not isinstance(entry, Malformed) and conditions.has(entry)]
        if not rows:
            for condition in conditions.where:
                check_column(opened, condition.partition("=")[0], files=False)
    if not rows:
        raise UserError("no row meets the conditions, so nothing is dropped")
    if cache is not None:
        hashes = cache.records(rows).tolist()
        for row, expected in zip(rows, hashes, strict=True):
            if expected:  # 0: the example was malformed
                cached_record(opened, row, opened.index(row), expected)
    else:
        for row in rows:
            record = found.records.get(opened.index(row))
            if record is None:
                uncompared += 1
            else:
                cached_record(opened, row, opened.index(row), record_hash(dict(record)))
    return Chosen(rows, data, opened.reading, malformed, uncompared)


def _cache_of(found: Candidates) -> Cache | None:
    """The cache that rows are compared with, if one is still there."""
    for path in found.caches:
        try:
            return Cache(path)
        except UserError:
            if found.lines is None:
                raise
    return None


def _rows_of(lines: list[int] | None, examples: Examples) -> Iterator[int]:
    """The rows of line numbers. Raises UserError for a line without an example."""
    if lines is None:
        yield from range(len(examples))
        return
    rows = {examples.index(row): row for row in range(len(examples))}
    for line in lines:
        if line not in rows:
            raise UserError(
                f"the training data has no example {line}, so it is not what was scored",
                "name the right file with `train_data`",
            )
        yield rows[line]
