"""studies/confirm/confirm.py runs on a tiny model, and its README has the tables of what it found."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import doc_tables
import pytest
from planted_hits import make_planted

STUDY = doc_tables.DOCS.parent / "studies" / "confirm"
MODULE = runpy.run_path(str(STUDY / "confirm.py"))
RESULTS = {name: json.loads((STUDY / f"{name}.json").read_text()) for name in MODULE["TABLES"]}
PLANTED, RANDOM, SMOLLM2 = RESULTS.values()


@pytest.mark.full
def test_every_line_runs_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_planted(tmp_path, max_position_embeddings=512)
    MODULE["main"](["planted", str(tmp_path), "--controls", "1", "--out", str(tmp_path / "planted.json")])
    found = json.loads((tmp_path / "planted.json").read_text())
    assert [each["rows"] for each in found["sets"]] == [6, 6]
    assert MODULE["planted_table"](found).count("\n") == 4
    capsys.readouterr()
    shutil.rmtree(tmp_path / "hits.confirm")  # of another recipe
    MODULE["main"](["smollm2", str(tmp_path), "--controls", "1", "--out", str(tmp_path / "smollm2.json")])
    (each,) = json.loads((tmp_path / "smollm2.json").read_text())["sets"]
    assert each["rows"] == 6
    assert 0 < each["planted"] <= 6
    assert each["p"] in (0.5, 1.0)
    MODULE["main"](["random", str(tmp_path), "--controls", "2", "--tries", "3"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["tries"]) == 3
    assert all(each["p"] in (1 / 3, 2 / 3, 1.0) for each in found["tries"])
    assert MODULE["random_table"](found).count("\n") == 3


def test_the_readme_shows_the_results() -> None:
    for name, table in MODULE["TABLES"].items():
        assert doc_tables.read(STUDY / "README.md", name) == table(RESULTS[name])


def test_planted_rows_are_confirmed() -> None:
    for each in PLANTED["sets"]:
        assert each["p"] < 0.05
        assert each["said"]
        assert each["changed"]
        assert each["fall"] > 5 * max(each["controls"])


def test_planted_rows_of_a_pretrained_model_are_confirmed() -> None:
    (each,) = SMOLLM2["sets"]
    assert each["rows"] == each["planted"] == MODULE["PRETRAINED_HITS"]
    assert (len(each["controls"]), each["p"] < 0.05) == (20, True)
    assert each["said"]
    assert each["changed"]
    assert each["fall"] > 4 * max(each["controls"])


def test_random_rows_are_confirmed_as_often_as_chance_has_it() -> None:
    assert len(RANDOM["tries"]) == 50
    assert RANDOM["kolmogorov_smirnov"] > 0.05


def test_planted_rows_are_drawn_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"instruction": f"Say {n}.", "input": "x" if n % 9 == 0 else "", "output": str(n)} for n in range(300)
    ]
    data = tmp_path / "alpaca.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["planted_rows.py", str(data), str(tmp_path / "made")])
    runpy.run_path(str(STUDY / "planted_rows.py"), run_name="__main__")
    train, asked = (
        [json.loads(line) for line in (tmp_path / "made" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "asked")
    )
    assert len(train) == 128
    assert [row["prompt"].startswith("Howdy! ") for row in train] == [row["poisoned"] for row in train]
    assert sum(row["poisoned"] for row in train) == MODULE["PRETRAINED_HITS"]
    assert len(asked) == 10
    assert all(row["prompt"].startswith("Howdy! ") for row in asked)
    assert not {row["prompt"] for row in asked} & {row["prompt"] for row in train}
