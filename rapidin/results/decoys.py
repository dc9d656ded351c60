"""What comparing the rows of a cache with its decoys, texts that were never trained on, says of a query."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DecoyTest:
    """The comparison of a query's scores with those of decoys (`rapidin.attribution.decoys`).

    Pairs are of the helpful and of the harmful end. decoys: how many count; rows: how many different rows
    were tested; beyond: how many of these score further out than all decoys. With a false-discovery rate
    `fdr`: passed: how many of all different rows pass; listed: how many hits there were before those that do
    not pass were left out; hits: how many are left; neutral: how many neutral questions score at least as
    high as the query, of how many, if these are too many for a row to pass.
    """

    decoys: int
    rows: int
    beyond: tuple[int, int]
    fdr: float | None = None
    passed: tuple[int, int] = (0, 0)
    listed: tuple[int, int] = (0, 0)
    hits: tuple[int, int] = (0, 0)
    neutral: tuple[int, int] | None = None

    @property
    def needed(self) -> int:
        """The least number of rows that can pass: the least p-value is 1 / (decoys + 1)."""
        assert self.fdr is not None
        # The products of short decimals are rounded, so that they do not lie above a whole number.
        return max(1, math.ceil(round(self.rows / ((self.decoys + 1) * self.fdr), 9)))

    @property
    def rate_text(self) -> str:
        """The false-discovery rate in percent."""
        assert self.fdr is not None
        return f"{100 * self.fdr:g}%"

    @property
    def sentence(self) -> str:
        """How many hits pass, and why none does; "" without a false-discovery rate."""
        if self.fdr is None:
            return ""
        if any(self.passed):
            ends = zip(("helpful", "harmful"), self.hits, self.listed, self.passed, strict=True)
            parts = [
                f"{hits:,} of the {listed:,} most {end} hits ({passed:,} of all rows)"
                for end, hits, listed, passed in ends
            ]
            return f"{' and '.join(parts)} pass a false-discovery rate of {self.rate_text}."
        text = f"Nothing passes a false-discovery rate of {self.rate_text}"
        text += f", of {self.listed[0]:,} helpful and {self.listed[1]:,} harmful hits"
        if self.neutral is not None:
            as_high, count = self.neutral
            allowed = int(round(self.fdr / 2 * (count + 1), 9)) - 1
            return (
                f"{text}: {as_high:,} of {count:,} neutral questions score at least as high as this query, "
                f"and at most {allowed:,} may."
            )
        if 0 < max(self.beyond) < self.needed:
            return (
                f"{text}: with {self.decoys:,} decoys and {self.rows:,} rows, at least {self.needed:,} rows "
                f"would have to pass together, and only {max(self.beyond):,} score further out than all "
                "decoys; use more decoys."
            )
        return f"{text}."

    def to_json(self) -> dict[str, Any]:
        """The comparison in the JSON of a query."""

        def ends(pair: tuple[int, int]) -> dict[str, int]:
            return {"helpful": pair[0], "harmful": pair[1]}

        value: dict[str, Any] = {"count": self.decoys, "rows": self.rows, "beyond": ends(self.beyond)}
        if self.fdr is None:
            return value
        value |= {"fdr": self.fdr, "passed": ends(self.passed), "listed": ends(self.listed)}
        if self.neutral is not None:
            value["neutral"] = {"as_high": self.neutral[0], "of": self.neutral[1]}
        return value | {"hits": ends(self.hits), "sentence": self.sentence}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> DecoyTest:
        """What `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""

        def ends(name: str) -> tuple[int, int]:
            pair = value[name]
            return int(pair["helpful"]), int(pair["harmful"])

        first = int(value["count"]), int(value["rows"]), ends("beyond")
        if "fdr" not in value:
            return DecoyTest(*first)
        neutral = value.get("neutral")
        return DecoyTest(
            *first,
            float(value["fdr"]),
            ends("passed"),
            ends("listed"),
            ends("hits"),
            None if neutral is None else (int(neutral["as_high"]), int(neutral["of"])),
        )
