"""Summaries of all scores: their histogram, and their sums by a column of the training data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapidin.attribution.training_data import cached_record
from rapidin.cache import Cache
from rapidin.data.examples import Examples
from rapidin.errors import UserError, short
from rapidin.results.types import Group, Histogram

BINS = 60
LEAST_BINS = 6  # that the middle 98% of the scores are spread over, at least

NONE = "(none)"  # the group of records that have no value in the column
FILE = "file"  # means the file that an example is from, unless the records have a column of that name


def histogram(scores: Tensor) -> Histogram:
    """The histogram of the finite scores among scores [rows]: `BINS` bins of equal width.

    If a few scores are so far out that the middle 98% of all would share less than `LEAST_BINS` bins, the
    first and the last bin are wider and include them. There is one bin if all scores are equal, and none if
    there are no scores.
    """
    values = scores[scores.isfinite()].double().cpu().numpy()
    if not len(values):
        return Histogram((), ())
    low, high = float(values.min()), float(values.max())
    if not high > low:
        half = abs(low) / 2 or 0.5
        return Histogram((low - half, low + half), (len(values),))
    first, last = low, high
    near, far = (float(x) for x in np.quantile(values, (0.01, 0.99)))
    margin = (BINS / LEAST_BINS - 1) / 2 * (far - near)
    if margin > 0:
        first, last = max(low, near - margin), min(high, far + margin)
    edges = np.linspace(first, last, BINS + 1)
    if (np.diff(edges) > 0).all():
        # Bins of equal width are counted without sorting the values.
        counts, _ = np.histogram(values.clip(first, last), BINS, (first, last))
        edges[0], edges[-1] = low, high
    else:  # float64 rounds neighbours to the same number
        edges = np.unique(np.concatenate([[low], edges[1:-1], [high]]))
        counts, _ = np.histogram(values, edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def check_column(examples: Examples, column: str, *, files: bool = True) -> None:
    """Raises UserError if no training example has the column; reads as far as the first that has it. files:
    whether the name of an example's file is a column too."""
    if files and column == FILE:
        return
    columns: dict[str, None] = {}
    for row in range(len(examples)):
        try:
            record = examples[row]
        except UserError:  # a malformed example has no score; others may have the column
            continue
        if column in record:
            return
        columns.update(dict.fromkeys(record))
    names = ", ".join(f"'{short(name)}'" for name in list(columns)[:20])
    raise UserError(
        f"no training example has a column '{short(column)}'",
        f"there are {names}" + ("" if FILE in columns or not files else f", and '{FILE}'"),
    )


def group_rows(cache: Cache, examples: Examples, column: str, has_score: Tensor) -> tuple[Tensor, list[str]]:
    """The training examples grouped by their value in a column: the number of each row's group [rows] int64,
    -1 for rows without a score, and the names of the groups.

    column: a field of the records, or "file" for the file that they are from; has_score: [rows] bool. The
    data is read once, a record at a time. Raises UserError if the data is not what was cached.
    """
    names: dict[str, int] = {}
    has_column = False
    group_of_row = torch.full((len(has_score),), -1, dtype=torch.int64, device="cpu")
    for first, shard in cache.shards():
        pairs = zip(shard.index.tolist(), shard.record.tolist(), strict=True)
        for row, (index, record_hash) in enumerate(pairs, first):
            if not has_score[row]:
                continue
            record = cached_record(examples, row, index, record_hash)
            has_column = has_column or column in record
            group_of_row[row] = names.setdefault(value_of(record, column), len(names))
    if not has_column and column == FILE:
        return _files(examples, group_of_row)
    return group_of_row, list(names)


def value_of(record: Mapping[str, Any], column: str) -> str:
    """A record's value in a column, as text: the name of its group."""
    value = record.get(column)
    if value is None:
        return NONE
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    )


def _files(examples: Examples, group_of_row: Tensor) -> tuple[Tensor, list[str]]:
    """The same rows grouped by the file that they are from: the numbers of groups, and their names."""
    names: dict[str, int] = {}
    for row in (group_of_row >= 0).nonzero()[:, 0].tolist():
        group_of_row[row] = names.setdefault(examples.file(row) or NONE, len(names))
    return group_of_row, list(names)


def groups_of(
    scores: Tensor, group_of_row: Tensor, names: list[str], net: Tensor | None = None
) -> list[list[Group]]:
    """The groups of each query, largest sum of scores first, from scores [Q, rows], NaN for rows without one,
    and the number of each row's group among `names` [rows], below 0 for none.

    net: [Q, groups], what each group adds to the others (`rapidin.attribution.interactions`); then the
    largest of these is first.
    """
    by_query = []
    for query, of_query in enumerate(scores.double().cpu()):
        counted = (group_of_row >= 0) & of_query.isfinite()
        group, score = group_of_row[counted], of_query[counted]
        size = len(names)
        total, positive, negative = (
            torch.zeros(size, dtype=torch.float64, device="cpu").index_add_(0, group, some)
            for some in (score, score.clamp(min=0), score.clamp(max=0))
        )
        counts = torch.bincount(group, minlength=size)
        helpful, harmful = float(positive.sum()) or 1.0, float(negative.sum()) or 1.0
        nonempty = [
            Group(
                names[n],
                int(counts[n]),
                float(total[n]),
                float(positive[n]) / helpful,
                float(negative[n]) / harmful,
                None if net is None else float(net[query, n]),
            )
            for n in range(size)
            if counts[n]
        ]
        by_query.append(sorted(nonempty, key=lambda group: (-group.effect, group.value)))
    return by_query
