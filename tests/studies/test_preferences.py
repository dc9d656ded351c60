"""studies/preferences/preferences.py runs at tiny sizes, and its README has the table of what it found."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import doc_tables
import pytest

STUDY = doc_tables.DOCS.parent / "studies" / "preferences"
MODULE = runpy.run_path(str(STUDY / "preferences.py"))
ROWS = json.loads((STUDY / "preferences.json").read_text())["rows"]


@pytest.mark.full
def test_every_line_runs_and_results_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    MODULE["main"](["--quick", "--seed", "5", "--out", str(out)])
    row = json.loads(out.read_text())["rows"][0]
    assert row["seed"] == 5
    assert set(row["auc"]) == set(ROWS[0]["auc"])
    assert all(0 <= value <= 1 for value in row["auc"].values())


def test_the_readme_shows_the_results() -> None:
    readme = STUDY / "README.md"
    assert doc_tables.read(readme, "preferences") == MODULE["table"](ROWS)
    assert [row["seed"] for row in ROWS] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["target set", "self-influence"])
def test_the_answer_is_what_was_found(kind: str) -> None:
    """The ranges that the README and the guide name."""
    found = [
        value
        for row in ROWS
        for name, value in row["auc"].items()
        if name.startswith(kind) and (kind != "target set" or "at 0.5" in name)
    ]
    ranges = {"target set": (0.994, 1.0), "self-influence": (0.56, 0.72)}
    assert (min(found), max(found)) == pytest.approx(ranges[kind], abs=0.005)
    text = re.sub(r"\s+", " ", (STUDY / "README.md").read_text())
    assert "0.994 to 1.000" in text
    assert "0.56 to 0.72" in text
    assert (
        min(value for row in ROWS for n, value in row["auc"].items() if "target set" in n and "0.5" in n)
        > 0.9
    )
