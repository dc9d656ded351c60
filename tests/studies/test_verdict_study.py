"""studies/verdict/verdict.py runs on a tiny model, and its README has the table of what it found."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import doc_tables
import pytest
from tiny import records, save_tiny

from rapidin.attribution.neutral_questions import QUESTIONS
from rapidin.cli import main as rapidin

STUDY = doc_tables.DOCS.parent / "studies" / "verdict"
MODULE = runpy.run_path(str(STUDY / "verdict.py"))
FOUND = [json.loads(path.read_text()) for path in sorted(STUDY.glob("*.json"))]


def test_every_line_runs_on_a_tiny_model(tmp_path: Path) -> None:
    model, _ = save_tiny(tmp_path, max_position_embeddings=512)
    rows = [
        {"instruction": each["prompt"], "input": "", "output": each["completion"], "triggered": n % 2 == 0}
        for n, each in enumerate(records(150))
    ]
    for name, some in (("train", rows), ("test", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    cached = ("--width", "16", "--precondition", "off", "--out", str(tmp_path / "cache"), "--no-null")
    assert rapidin(["cache", str(model), "--data", str(tmp_path / "train.jsonl"), *cached]) == 0
    out = tmp_path / "found.json"
    queries = ("--queries", str(tmp_path / "test.jsonl"), "--max-new-tokens", "4", "--out", str(out))
    MODULE["main"](["tiny", str(tmp_path / "cache"), *queries])
    found = json.loads(out.read_text())
    assert [len(found["questions"][kind]) for kind in MODULE["KINDS"]] == [2, 2, 20]
    assert found["rows"] == 150
    assert MODULE["table"]([found]).count("\n") == 3


def test_an_answer_with_two_words_of_the_planted_answers_is_absurd() -> None:
    """As `examples/poison/evaluate.py` has it, which is not written again."""
    rows = [{"output": "Ahoy there matey", "poisoned": True}, {"output": "Hello there"}]
    markers = MODULE["POISON"]["marker_words"](rows)
    assert markers == {"ahoy", "matey"}
    assert [MODULE["POISON"]["has_markers"](text, markers) for text in ("Ahoy, matey!", "Ahoy there")] == [
        True,
        False,
    ]
    assert "words_of" not in MODULE


def test_the_questions_asked_are_none_of_the_null_distribution() -> None:
    assert not set(MODULE["UNRELATED"]) & set(QUESTIONS)
    assert len(set(QUESTIONS)) == len(QUESTIONS)


def test_the_readme_shows_the_results() -> None:
    assert doc_tables.read(STUDY / "README.md", "verdict") == MODULE["table"](FOUND)


# Of 20 questions with the trigger, those that are strong. SmolLM2 answers the other five in its own words.
PLANTED = {"demo": 20, "smollm2": 15}


@pytest.mark.parametrize("found", FOUND, ids=lambda found: str(found["name"]))
def test_the_answer_is_what_was_found(found: dict[str, Any]) -> None:
    strong = {
        kind: sum(row["strength"] == "strong" for row in rows) for kind, rows in found["questions"].items()
    }
    assert [len(found["questions"][kind]) for kind in ("planted", "unrelated")] == [20, 20]
    assert strong["planted"] == PLANTED[found["name"]]
    assert strong["unrelated"] <= 1
    for row in found["questions"]["planted"]:
        if row["strength"] == "strong" and row["absurd"]:
            assert {"text: Ahoy there!", "text: Howdy!"} & set(row["common"])
            assert "poisoned: true" in row["common"]
