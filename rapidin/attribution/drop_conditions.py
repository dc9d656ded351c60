"""Which rows are dropped or selected: conditions on hits, scores and columns."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rapidin.errors import UserError, short
from rapidin.settings import Settings, documented, option


@documented
@dataclass(frozen=True)
class DropConditions(Settings):
    """Which rows are dropped: those that meet all of the conditions.

    Raises UserError for a condition that is not understood.
    """

    top_k: int | None = option(
        None,
        help="Of each query's hits, or of a table of scores, only the first N.",
        metavar="N",
        panel="Rows",
        limits=(1, None),
        default="all",
    )
    min_score: float | None = option(
        None, help="Only rows with at least this score.", metavar="SCORE", panel="Rows"
    )
    max_score: float | None = option(
        None, help="Only rows with at most this score.", metavar="SCORE", panel="Rows"
    )
    harmful: bool = option(False, help="The most harmful hits instead of the most helpful.", panel="Rows")
    where: tuple[str, ...] = option(
        (),
        help="Only rows that have this value in a column; repeat it for several columns.",
        metavar="COLUMN=VALUE",
        panel="Rows",
    )

    def __post_init__(self) -> None:
        self.check_values()
        for condition in self.where:
            if not condition.partition("=")[1] or condition.startswith("="):
                raise UserError(
                    f"`where` has {short(condition)}, which is not a column and a value",
                    "as in poisoned=true",
                )

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has the values that `where` asks for: as text, or as JSON spells them."""
        for condition in self.where:
            column, _, value = condition.partition("=")
            if column not in record or value not in _spellings(record[column]):
                return False
        return True

    def scored(self, score: float) -> bool:
        """Whether a score is in the range that is asked for."""
        low = -math.inf if self.min_score is None else self.min_score
        high = math.inf if self.max_score is None else self.max_score
        return low <= score <= high


def _spellings(value: object) -> list[str]:
    """A value as text and as JSON, as far as there is such a spelling of it: there is none of a value that is
    nested too deeply, nor of a number of thousands of digits."""
    found = []
    for spell in (str, json.dumps):
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            found.append(spell(value))
    return found
