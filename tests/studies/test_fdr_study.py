"""studies/fdr/fdr.py measures a tiny set, and its README and the guide have the tables of what it found."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from statistics import fmean
from typing import Any

import doc_tables
import pytest
from tiny import save_tiny

STUDY = doc_tables.DOCS.parent / "studies" / "fdr"
MODULE = runpy.run_path(str(STUDY / "fdr.py"))
FOUND = MODULE["read"](STUDY / "fdr.json")
TABLES = {name: MODULE[f"{name}_table"](FOUND) for name in ("rates", "neutral", "levels")}


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_the_results(name: str) -> None:
    assert doc_tables.read(STUDY / "README.md", name) == TABLES[name]


def test_the_guide_shows_the_realised_rates() -> None:
    assert doc_tables.read(doc_tables.DOCS / "guide" / "reading.md", "fdr") == TABLES["rates"]


def test_every_line_runs_on_a_tiny_model(tmp_path: Path) -> None:
    """With the model of tests in the place of the demo's, on facts."""
    _, adapter = save_tiny(tmp_path / "demo-0", lora=True, max_position_embeddings=512)
    assert adapter is not None
    (tmp_path / "demo-0" / "hits.json").write_text("{}")
    data = MODULE["facts"](0, decoys=40)
    small = MODULE["Data"](
        data.tuning[:20], data.decoys, data.questions[:2], data.behind[:2], data.planted, epochs=1
    )
    row: dict[str, Any] = MODULE["measure"]("facts", 0, small, tmp_path, neutral=["What time is it?"])
    assert (row["rows"], row["decoys"], row["neutral"]["asked"]) == (20, 40, 1)
    assert len(row["questions"]) == 2
    out = tmp_path / "found.json"
    MODULE["write"](out, [row])
    assert json.loads(out.read_text())["rows"] == [row]
    for name in TABLES:
        assert MODULE[f"{name}_table"]([row]).startswith("| set |")


def test_facts_decoys_are_about_other_persons() -> None:
    data = MODULE["facts"](0)
    person = MODULE["_person"]
    assert not {person(row["prompt"]) for row in data.tuning} & {person(row["prompt"]) for row in data.decoys}
    assert (len(data.tuning), len(data.decoys)) == (120, 1200)
    assert {len(behind) for behind in data.behind} == {3}


def test_half_of_the_planted_rows_are_left() -> None:
    assert [sum(row["poisoned"] for row in MODULE[name](0).tuning) for name in ("demo", "planted")] == [
        40,
        20,
    ]


def test_the_answer_is_what_was_found() -> None:
    shares = {
        rate: fmean(
            fmean(MODULE["false_share"](question, rate) for question in row["questions"])
            for row in FOUND
            if row["set"] == "demo"
        )
        for rate in MODULE["RATES"]
    }
    assert all(share <= rate + 0.02 for rate, share in shares.items())
