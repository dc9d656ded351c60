"""The result of an evaluation: a table for the terminal, and JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rapidin.evaluate.metrics import Estimate
from rapidin.results.text import one_line


@dataclass(slots=True)
class Result:
    """The metrics of several methods.

    name: of the evaluation; setting: what it was run on, as JSON values; columns: keys of the metrics and
    their headings; rows: the metrics of each method, in the order of the table; sd: show standard deviations
    over the queries instead of intervals; lower: keys of the metrics of which less is better; notes: lines
    below the table.
    """

    name: str
    setting: dict[str, Any]
    columns: dict[str, str]
    rows: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    sd: bool = False
    lower: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def add(self, method: str, estimates: Mapping[str, Estimate]) -> None:
        """Add the metrics of a method."""
        self.rows[method] = dict(estimates)

    def to_json(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        rows = [
            {"method": method, **{key: value.to_json() for key, value in estimates.items()}}
            for method, estimates in self.rows.items()
        ]
        return {"evaluation": self.name, "setting": self.setting, "results": rows, "notes": self.notes}

    def table(self, width: int = 80) -> RenderableType:
        """The table, with the best of each column in bold.

        Each mean is followed by its 95% interval, or by half of the interval's length if `width` columns have
        no room for it, or with `sd` by the standard deviation.
        """
        spreads = ("sd",) if self.sd else ("interval", "half", "none")
        for spread in spreads:
            table = self._table(spread)
            if spread == spreads[-1] or Measurement.get(_WIDE, _WIDE.options, table).maximum <= width:
                break
        notes = [*self.notes, *([] if self.sd else [_SPREAD[spread]])]
        lines = [Text(one_line(note), style="dim") for note in notes]
        return Group(table, Text(), *lines)

    def _table(self, spread: str) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("method", no_wrap=True)
        for heading in self.columns.values():
            table.add_column(heading, justify="right", overflow="fold")
        best = {
            key: (min if key in self.lower else max)(
                (e[key].mean for e in self.rows.values() if _defined(e.get(key))), default=math.nan
            )
            for key in self.columns
        }
        for method, estimates in self.rows.items():
            cells = [self._cell(estimates.get(key), best[key], spread) for key in self.columns]
            table.add_row(one_line(method), *cells)
        return table

    def _cell(self, estimate: Estimate | None, best: float, spread: str) -> Text:
        if estimate is None or not _defined(estimate):
            return Text("")
        style = "bold" if len(self.rows) > 1 and estimate.mean == best else ""
        after = ""
        if spread == "sd" and math.isfinite(estimate.sd):
            after = f" ± {estimate.sd:.3f}"
        elif spread == "interval" and math.isfinite(estimate.low):
            after = f" ({estimate.low:.3f} to {estimate.high:.3f})"
        elif spread == "half" and math.isfinite(estimate.low):
            after = f" ± {(estimate.high - estimate.low) / 2:.3f}"
        return Text.assemble((f"{estimate.mean:.3f}", style), (after, "dim"))


_WIDE = Console(width=10_000, file=io.StringIO())
_SPREAD = {
    "interval": "In brackets: 95% bootstrap interval.",
    "half": "±: half of the 95% bootstrap interval; widen the terminal or use --json for its ends.",
    "none": "The 95% bootstrap intervals are in --json.",
}


def _defined(estimate: Estimate | None) -> bool:
    return estimate is not None and math.isfinite(estimate.mean)
