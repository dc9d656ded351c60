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

from rapidin.attribution.neutral_questions import QUESTIONS

STUDY = doc_tables.DOCS.parent / "studies" / "fdr"
MODULE = runpy.run_path(str(STUDY / "fdr.py"))
FOUND = MODULE["read"](STUDY / "fdr.json")
TABLES = {name: MODULE[f"{name}_table"](FOUND) for name in ("rates", "neutral", "levels")}


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_the_results(name: str) -> None:
    assert doc_tables.read(STUDY / "README.md", name) == TABLES[name]


@pytest.mark.parametrize(("name", "table"), [("fdr", "rates"), ("fdr of neutral questions", "neutral")])
def test_the_guide_shows_the_results(name: str, table: str) -> None:
    assert doc_tables.read(doc_tables.DOCS / "guide" / "reading.md", name) == TABLES[table]


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


def realised(name: str, at: float, rate: float) -> list[float]:
    """The realised rate of each seed."""
    return [
        fmean(MODULE["false_share"](question, rate) for question in row["questions"])
        for row in FOUND
        if (row["set"], row["at"]) == (name, at)
    ]


def test_the_answer_is_what_was_found() -> None:
    """The rate is held on average over the seeds."""
    missed = []
    for name in MODULE["SETS"]:
        for at in (0.5, 0.0):
            for rate in MODULE["RATES"]:
                shares = realised(name, at, rate)
                assert len(shares) == 3
                if fmean(shares) > rate:
                    missed.append((name, at, rate, round(fmean(shares), 3)))
    assert missed == []


@pytest.mark.parametrize(
    ("name", "at", "nothing", "by_decoys"),
    [
        ("demo", 0.5, 0.989, 0.926),
        ("planted", 0.5, 0.990, 0.979),
        ("facts", 0.5, 0.995, 0.943),
        ("demo", 0.0, 0.989, 0.947),
        ("planted", 0.0, 1.0, 0.990),
        ("facts", 0.0, 0.979, 0.896),
    ],
)
def test_neutral_questions_yield_nothing(name: str, at: float, nothing: float, by_decoys: float) -> None:
    some = [row["neutral"] for row in FOUND if (row["set"], row["at"]) == (name, at)]
    questions = sum(each["asked"] - each["answered_as_planted"] for each in some)
    found = [
        round(1 - sum(each["0.1"][which] for each in some) / questions, 3)
        for which in ("helpful", "decoys_alone")
    ]
    assert found == [nothing, by_decoys]
    assert nothing >= 0.95


def test_the_questions_are_new_to_the_null_distribution() -> None:
    asked = MODULE["everyday"].QUESTIONS
    assert len(set(asked)) == len(asked) == 64
    assert not set(asked) & set(QUESTIONS)
