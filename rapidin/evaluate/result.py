"""What an evaluation found, as a table for a person and as JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rapidin.evaluate.figures import Figure
from rapidin.report import one_line

Say = Callable[[str], None]  # a line about what goes on


def silent(_: str) -> None:
    """Say nothing."""


@dataclass(slots=True)
class Result:
    """The figures of several methods.

    name: of the evaluation; setting: what it was run on, values that JSON has; columns: names of the figures
    and their headings; rows: method -> its figures, in the order they are shown; sd: show standard deviations
    over the queries instead of intervals; notes: lines below the table.
    """

    name: str
    setting: dict[str, Any]
    columns: dict[str, str]
    rows: dict[str, dict[str, Figure]] = field(default_factory=dict)
    sd: bool = False
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

    def table(self) -> RenderableType:
        """The best of each column in bold; after each mean its 95% interval, or its standard deviation."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("method", no_wrap=True)
        for heading in self.columns.values():
            table.add_column(heading, justify="right", no_wrap=True)
        best = {
            key: max((f[key].mean for f in self.rows.values() if _known(f.get(key))), default=math.nan)
            for key in self.columns
        }
        for method, figures in self.rows.items():
            cells = [self._cell(figures.get(key), best[key]) for key in self.columns]
            table.add_row(one_line(method), *cells)
        lines = [Text(one_line(note), style="dim") for note in self.notes]
        return Group(table, *([Text()] if lines else []), *lines)

    def _cell(self, figure: Figure | None, best: float) -> Text:
        if figure is None or not _known(figure):
            return Text("")
        style = "bold" if len(self.rows) > 1 and figure.mean == best else ""
        spread = ""
        if self.sd and math.isfinite(figure.sd):
            spread = f" ± {figure.sd:.3f}"
        elif not self.sd and math.isfinite(figure.low):
            spread = f" ({figure.low:.3f} to {figure.high:.3f})"
        return Text.assemble((f"{figure.mean:.3f}", style), (spread, "dim"))


def _known(figure: Figure | None) -> bool:
    return figure is not None and math.isfinite(figure.mean)


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole file or nothing: written beside it, and put in its place."""
    part = path.with_name(path.name + ".partial")
    part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    part.replace(path)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A jsonl file, whole or not at all."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
