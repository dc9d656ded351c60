"""The README of studies/training has the tables of what it found."""

from __future__ import annotations

import json
import runpy

import doc_tables

STUDY = doc_tables.DOCS.parent / "studies" / "training"
REPORT = runpy.run_path(str(STUDY / "report.py"))


def test_the_readme_shows_the_results() -> None:
    for name in ("speed", "lds"):
        found = json.loads((STUDY / f"{name}.json").read_text())
        assert doc_tables.read(STUDY / "README.md", name) == REPORT[f"{name}_table"](found)


def test_the_ways_that_are_measured_are_those_of_the_script() -> None:
    ways = runpy.run_path(str(STUDY / "speed.py"))["WAYS"]
    assert list(json.loads((STUDY / "speed.json").read_text())["ways"]) == list(ways)
