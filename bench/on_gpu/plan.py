"""Names, time limits and the file of rows that all runs on a GPU share. Imports no torch, which is slow."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
BACKENDS = ("triton", "cuda")
ROOT = Path(__file__).resolve().parents[2]

# Seconds of a whole call: both fit into 15 minutes of GPU time, including one or two to start a machine.
SMOKE_SECONDS, MEASURE_SECONDS = 150.0, 420.0
# Stages in the order in which they are measured, and seconds for each, of some 370 s in all. Time that a
# stage does not need goes to those after it.
STAGES = {
    "ceilings": 15,
    "caching": 110,
    "linear_sketch": 75,
    "topk_scan": 75,
    "flat_sketch": 45,
    "pack": 20,
    "stream": 20,
}
# Ceilings for dry runs; never used on a GPU.
NOMINAL = {"read_bytes_per_s": 1e9, "copy_bytes_per_s": 1e9, "bf16_per_s": 1e9, "float32_per_s": 1e9}
LOST = 3  # exit status of a worker whose device no longer answers


class RowFile:
    """Rows as JSON lines, each written in one call at once, so that a killed run keeps its results.

    Several processes may write to one file; `lane` says which one wrote a row. about: fields of every row,
    such as device, date and commit.
    """

    def __init__(self, path: Path, lane: str) -> None:
        self.path, self.lane = path, lane
        self.about: Facts = {}

    def write(self, row: Facts) -> None:
        line = json.dumps({"lane": self.lane, **self.about, **row}, allow_nan=False, default=str) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def rows(self) -> Iterator[Facts]:
        """The lane's rows; a truncated line is ignored."""
        return (row for row in all_rows(self.path) if row["lane"] == self.lane)

    def open_case(self) -> Facts | None:
        """The case that was started and has no row yet, at which the process ended; None if there is none."""
        begun: Facts | None = None
        for row in self.rows():
            if "begun" in row:
                begun = row
            elif "state" in row and begun is not None and row.get("number") == begun["number"]:
                begun = None
        return begun


def all_rows(path: Path) -> Iterator[Facts]:
    """The rows of all lanes, in the order in which they were written."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # a line that was truncated when its process ended
            yield json.loads(line)


def ceilings_of(rows: Iterable[Facts], dry: bool) -> dict[str, float]:
    """The best rate of each ceiling that was measured."""
    best: dict[str, float] = dict(NOMINAL) if dry else {}
    for row in rows:
        if row.get("state") == "measured" and "ceiling" in row:
            before = 0.0 if dry else best.get(row["ceiling"], 0.0)
            best[row["ceiling"]] = max(before, row["rate"])
    return best
