"""rapidin confirm: what it prints, where the answer goes, and a user's mistakes on one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import caller
from planted_hits import make_planted


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("confirm")
    make_planted(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*arguments) -> Ran"""
    return caller(capsys)


def test_the_answer_is_printed_and_added_to_the_file(place: Path, tmp_path: Path, run: Any) -> None:
    hits = tmp_path / "hits.json"
    shutil.copy(place / "hits.json", hits)
    page = tmp_path / "hits.html"
    command = ("confirm", hits, "--by", "poisoned", "--top-k", "1", "--controls", "3")
    ran = run(*command, "--json", hits, "--report", page)
    assert ran.code == 0, ran
    assert "these sets are too few to be sure: p = 0.25." in " ".join(ran.out.split())
    assert "Now says" in ran.out
    assert "training again on all rows" in " ".join(ran.out.split())
    assert f"kept in {tmp_path / 'hits.confirm'}" in ran.err
    value = json.loads(hits.read_text())
    confirmed = value["queries"][0]["confirmation"]
    assert confirmed["left_out"][0]["column"] == "poisoned"
    assert len(confirmed["left_out"][0]["controls"]) == 3
    assert confirmed["recipe"]["recipe"]["batch"] == 8
    # The rest of the file is as it was, so the command may be repeated; everything is done already.
    again = run(*command, "--json", "-", "--quiet")
    assert (again.code, again.err) == (0, "")
    assert json.loads(again.out) == value
    assert "with poisoned=true the model says this less readily" in page.read_text()
    assert str(tmp_path) not in page.read_text()
    kept = run("drop", hits, "--out", tmp_path / "out.jsonl")
    assert kept.code == 0, kept


def test_the_cost_alone(place: Path, tmp_path: Path, run: Any) -> None:
    ran = run("confirm", place / "hits.json", "--work", tmp_path / "work", "--controls", "5", "--only-cost")
    assert (ran.code, ran.out) == (0, "")
    assert "9 trainings of 30 steps, about" in ran.err
    ran = run("confirm", place / "hits.json", "--work", tmp_path / "work", "--only-cost", "--quiet")
    assert ran.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query", "3"], "there is no query 3"),
        (["--by", "source"], "no training example has a column 'source'"),
        (["--trainer", "train.py"], "the command of --trainer does not contain {data}"),
        (
            ["--trainer", "t {data} {out}", "--batch-size", "4"],
            "--batch-size and --trainer do not go together",
        ),
        (["--json", "/no/such/folder/out.json"], "cannot write"),
        (["--report", "/no/such/folder/out.html"], "cannot write"),
        (["--adapter", "/no/such/adapter"], "/no/such/adapter"),
        (["--train-data", "/no/such/data.jsonl"], "/no/such/data.jsonl"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, tmp_path: Path, run: Any, arguments: list[str], message: str
) -> None:
    ran = run("confirm", place / "hits.json", "--work", tmp_path / "work", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("rapidin: ")
    assert ran.err.count("\n") == 1
    assert message in ran.err
