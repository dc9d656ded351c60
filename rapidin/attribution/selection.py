"""Choosing training data for a target set, and the table of what examples do to themselves.

As LESS does (Xia et al., ICML 2024, section 3): an example is worth its mean influence on the target set, or,
where the set has groups, the largest of its groups' means.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import UserError, short


def share_of(text: str, rows: int) -> int:
    """How many of `rows` a share like "5%", or a number, names. UserError where it is none of both."""
    try:
        wanted = float(text[:-1]) / 100 * rows if text.endswith("%") else float(int(text))
    except ValueError:
        raise UserError(f"--top {short(text)} is neither a number nor a share", "as in --top 5%") from None
    if not 0 < wanted <= rows:
        raise UserError(
            f"--top {short(text)} of {rows:,} examples", "say more than 0 and at most all of them"
        )
    return max(1, round(wanted))


def groups_of(records: Sequence[Mapping[str, Any]], column: str) -> dict[str, list[int]]:
    """Places of the records by their value in a column, as they appear; UserError where one lacks it."""
    found: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        if column not in record:
            raise UserError(f"example {place} of the target set has no column '{column}'")
        found.setdefault(str(record[column]), []).append(place)
    return found


def best_rows(scores: Tensor, count: int) -> list[int]:
    """The rows with the largest of their scores [groups, rows], ascending; NaN: rows that do not count, which
    are never chosen. Equal scores: the smaller row first. UserError where fewer rows count."""
    best = torch.where(scores.isnan(), -torch.inf, scores).amax(0)
    usable = int((best > -torch.inf).sum())
    if usable < count:
        raise UserError(f"only {usable:,} examples have a gradient, {count:,} are wanted", "lower --top")
    return sorted(torch.sort(best, descending=True, stable=True).indices[:count].tolist())


def jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """Records a line each."""
    return "".join(json.dumps(dict(record), ensure_ascii=False, default=str) + "\n" for record in records)


def table(columns: Mapping[str, Sequence[Any]], path: str) -> str:
    """Columns of like length as the text of a file: jsonl where its name says so, else CSV; NaN: nothing."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [{k: None if isinstance(v, float) and v != v else v for k, v in row.items()} for row in rows]
    if path.endswith((".jsonl", ".json")):
        return jsonl(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
