"""What an evaluation found, as a table for a person and as JSON for a program."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rapidin.attribution.selection import jsonl
from rapidin.evaluate.figures import Figure
from rapidin.files import replace_file
from rapidin.results.text import one_line

Say = Callable[[str], None]  # a line about what goes on


def silent(_: str) -> None:
    """Say nothing."""


@dataclass(slots=True)
class Result:
    """The figures of several methods.

    name: of the evaluation; setting: what it was run on, values that JSON has; columns: names of the figures
    and their headings; rows: method -> its figures, in the order they are shown; sd: show standard deviations
    over the queries instead of intervals; lower: figures of which less is
    better; notes: lines below the table.
    """

    name: str
    setting: dict[str, Any]
    columns: dict[str, str]
    rows: dict[str, dict[str, Figure]] = field(default_factory=dict)
    sd: bool = False
    lower: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def add(self, method: str, figures: Mapping[str, Figure]) -> None:
        """One more method."""
        self.rows[method] = dict(figures)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        rows = [
            {"method": method, **{key: figure.to_json() for key, figure in figures.items()}}
            for method, figures in self.rows.items()
        ]
        return {"evaluation": self.name, "setting": self.setting, "results": rows, "notes": self.notes}

    def table(self, width: int = 80) -> RenderableType:
        """The figures, the best of each column in bold.

        After each mean the 95% interval; where `width` has no room for that, half of its length; with `sd`
        the standard deviation.
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
                (f[key].mean for f in self.rows.values() if _known(f.get(key))), default=math.nan
            )
            for key in self.columns
        }
        for method, figures in self.rows.items():
            cells = [self._cell(figures.get(key), best[key], spread) for key in self.columns]
            table.add_row(one_line(method), *cells)
        return table

    def _cell(self, figure: Figure | None, best: float, spread: str) -> Text:
        if figure is None or not _known(figure):
            return Text("")
        style = "bold" if len(self.rows) > 1 and figure.mean == best else ""
        after = ""
        if spread == "sd" and math.isfinite(figure.sd):
            after = f" ± {figure.sd:.3f}"
        elif spread == "interval" and math.isfinite(figure.low):
            after = f" ({figure.low:.3f} to {figure.high:.3f})"
        elif spread == "half" and math.isfinite(figure.low):
            after = f" ± {(figure.high - figure.low) / 2:.3f}"
        return Text.assemble((f"{figure.mean:.3f}", style), (after, "dim"))


_WIDE = Console(width=10_000, file=io.StringIO())
_SPREAD = {
    "interval": "In brackets: 95% bootstrap interval.",
    "half": "±: half of the 95% bootstrap interval; a wider terminal or --json shows its ends.",
    "none": "The 95% bootstrap intervals are in --json.",
}


def _known(figure: Figure | None) -> bool:
    return figure is not None and math.isfinite(figure.mean)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A jsonl file, whole or not at all."""
    replace_file(path, jsonl(rows).encode())
