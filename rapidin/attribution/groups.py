"""All scores at a glance: their histogram, and their sums by a column of the training data."""

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
LEAST_BINS = 6  # of them that the middle 98% of the scores are spread over, at least

NONE = "(none)"  # where a record has nothing in the column
FILE = "file"  # the column that stands for the file an example is from, where there is none of that name


def histogram(scores: Tensor) -> Histogram:
    """The histogram of the finite ones of these scores [rows]: `BINS` bins of one width.

    Where few scores lie so far out that the middle 98% of all would share less than `LEAST_BINS` bins, the
    first and the last bin are wider and reach out to them. One bin where all scores are the same, none where
    there is none.
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
    room = (BINS / LEAST_BINS - 1) / 2 * (far - near)
    if room > 0:
        first, last = max(low, near - room), min(high, far + room)
    edges = np.linspace(first, last, BINS + 1)
    edges[0], edges[-1] = low, high
    edges = np.unique(edges)  # neighbours that float64 cannot tell apart
    counts, _ = np.histogram(values, edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def check_column(examples: Examples, column: str) -> None:
    """Raise UserError where no training example has the column; reads as far as the first that has it."""
    if column == FILE:
        return
    there: dict[str, None] = {}
    for row in range(len(examples)):
        try:
            record = examples[row]
        except UserError:  # malformed, so without a score; the column may be in the others
            continue
        if column in record:
            return
        there.update(dict.fromkeys(record))
    names = ", ".join(f"'{short(name)}'" for name in list(there)[:20])
    raise UserError(
        f"no training example has a column '{short(column)}'",
        f"there are {names}" + ("" if FILE in there else f", and '{FILE}'"),
    )


def groups(cache: Cache, examples: Examples, column: str, scores: Tensor) -> list[list[Group]]:
    """Of each query the training examples by what they have in a column, largest sum of scores first.

    scores: [Q, rows] as `rapidin.attribution.scan.all_scores` gives them; rows without a score are left out.
    column: a field of the records, or "file", for the file that they are from. The data is read once, a
    record at a time. Raises UserError where the data is not what was cached.
    """
    names: dict[str, int] = {}
    known = False
    which = torch.full((scores.shape[1],), -1, dtype=torch.int64, device="cpu")
    has_score = (~scores.isnan()).any(0)
    for first, part in cache.shards():
        for place, wanted in enumerate(part.record.tolist()):
            row = first + place
            if not has_score[row]:
                continue
            record = cached_record(examples, row, int(part.index[place]), wanted)
            known = known or column in record
            which[row] = names.setdefault(_value(record, column), len(names))
    if not known and column == FILE:
        return groups_of(scores, *_files(examples, which))
    return groups_of(scores, which, list(names))


def _value(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None:
        return NONE
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    )


def _files(examples: Examples, which: Tensor) -> tuple[Tensor, list[str]]:
    names: dict[str, int] = {}
    for row in (which >= 0).nonzero()[:, 0].tolist():
        which[row] = names.setdefault(examples.file(row) or NONE, len(names))
    return which, list(names)


def groups_of(scores: Tensor, which: Tensor, names: list[str]) -> list[list[Group]]:
    """The groups of each query from scores [Q, rows] and the number of each row's group [rows] among
    `names`, below 0 for none."""
    found = []
    for own in scores.double().cpu():
        counted = (which >= 0) & own.isfinite()
        group, score = which[counted], own[counted]
        size = len(names)
        total, up, down = (
            torch.zeros(size, dtype=torch.float64, device="cpu").index_add_(0, group, part)
            for part in (score, score.clamp(min=0), score.clamp(max=0))
        )
        counts = torch.bincount(group, minlength=size)
        helpful, harmful = float(up.sum()) or 1.0, float(down.sum()) or 1.0
        made = [
            Group(names[n], int(counts[n]), float(total[n]), float(up[n]) / helpful, float(down[n]) / harmful)
            for n in range(size)
            if counts[n]
        ]
        found.append(sorted(made, key=lambda group: (-group.total, group.value)))
    return found
