"""The tables of studies/training/README.md, from speed.json and lds.json.

python studies/training/report.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "common"))

import doc_tables  # noqa: E402

METHODS = ("dot:none", "dot:layer", "fisher:layer")


def speed_table(found: dict[str, Any]) -> str:
    """A row for each way: tokens a second, and peak memory."""
    rows = [
        [way, f"{values['tokens_per_second']:,.0f}", f"{values['peak_bytes'] / 1e6:,.0f}"]
        for way, values in found["ways"].items()
    ]
    return doc_tables.table(["way", "tokens a second", "peak memory, MB"], rows)


def lds_table(found: dict[str, Any]) -> str:
    """A row for each cache: the LDS of each method and its 95% interval."""
    rows = []
    for label, values in found["lds"].items():
        cells = [f"{values[m][0]:.3f} ({values[m][1]:.3f} to {values[m][2]:.3f})" for m in METHODS]
        rows.append([label, *cells])
    return doc_tables.table(["cache", *METHODS], rows)


def main() -> None:
    page = FOLDER / "README.md"
    doc_tables.write(page, "speed", speed_table(json.loads((FOLDER / "speed.json").read_text())))
    doc_tables.write(page, "lds", lds_table(json.loads((FOLDER / "lds.json").read_text())))


if __name__ == "__main__":
    main()
