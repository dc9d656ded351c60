"""Selection of training data for a target set, and the tables of `rapidin select` and `rapidin self`.

As in LESS (Xia et al., ICML 2024, section 3) an example is worth its mean influence on the target set, or, if
the set has groups, the largest of its means over the groups.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rapidin.data.records import jsonl
from rapidin.errors import UserError, short


def count_of(text: str, rows: int) -> int:
    """The number of `rows` that a share such as "5%", or a number, stands for. Raises UserError if it is
    neither."""
    try:
        count = float(text[:-1]) / 100 * rows if text.endswith("%") else float(int(text))
    except ValueError:
        raise UserError(f"`top` {short(text)} is neither a number nor a share", "as in 5%") from None
    if not 0 < count <= rows:
        raise UserError(
            f"`top` {short(text)} of {rows:,} examples", "use more than 0 and at most all of them"
        )
    return max(1, round(count))


def group_by(records: Sequence[Mapping[str, Any]], column: str) -> dict[str, list[int]]:
    """The numbers of the records by their value in a column, in order. Raises UserError if one lacks it."""
    groups: dict[str, list[int]] = {}
    for n, record in enumerate(records):
        if column not in record:
            raise UserError(f"example {n} of the target set has no column '{column}'")
        groups.setdefault(str(record[column]), []).append(n)
    return groups


def best_rows(scores: Tensor, count: int) -> list[int]:
    """The `count` rows with the largest scores, ascending, a row's score being the maximum of its scores
    [groups, rows].

    Rows that do not count have NaN and are never chosen; of equal scores the smaller row comes first. Raises
    UserError if fewer rows count.
    """
    best = torch.where(scores.isnan(), -torch.inf, scores).amax(0)
    usable = int((best > -torch.inf).sum())
    if usable < count:
        raise UserError(f"only {usable:,} examples have a gradient, `top` asks for {count:,}", "lower `top`")
    return sorted(torch.sort(best, descending=True, stable=True).indices[:count].tolist())


def table(columns: Mapping[str, Sequence[Any]], path: str) -> str:
    """The text of a file with these columns of equal length: jsonl if the path ends in .jsonl or .json, else
    CSV. NaN becomes null or an empty field."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [{k: None if isinstance(v, float) and v != v else v for k, v in row.items()} for row in rows]
    if path.endswith((".jsonl", ".json")):
        return jsonl(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
