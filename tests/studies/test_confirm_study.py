"""studies/confirm/confirm.py runs on a tiny model, and its README has the tables of what it found."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import doc_tables
import pytest
from planted_hits import make_planted

STUDY = doc_tables.DOCS.parent / "studies" / "confirm"
MODULE = runpy.run_path(str(STUDY / "confirm.py"))
PLANTED, RANDOM = (json.loads((STUDY / f"{name}.json").read_text()) for name in ("planted", "random"))


@pytest.mark.full
def test_every_line_runs_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_planted(tmp_path, max_position_embeddings=512)
    MODULE["main"](["planted", str(tmp_path), "--controls", "1", "--out", str(tmp_path / "planted.json")])
    found = json.loads((tmp_path / "planted.json").read_text())
    assert [each["rows"] for each in found["sets"]] == [6, 6]
    assert MODULE["planted_table"](found).count("\n") == 4
    capsys.readouterr()
    MODULE["main"](["random", str(tmp_path), "--controls", "2", "--tries", "3"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["tries"]) == 3
    assert all(each["p"] in (1 / 3, 2 / 3, 1.0) for each in found["tries"])
    assert MODULE["random_table"](found).count("\n") == 3


def test_the_readme_shows_the_results() -> None:
    assert doc_tables.read(STUDY / "README.md", "planted") == MODULE["planted_table"](PLANTED)
    assert doc_tables.read(STUDY / "README.md", "random") == MODULE["random_table"](RANDOM)


def test_planted_rows_are_confirmed() -> None:
    for each in PLANTED["sets"]:
        assert each["p"] < 0.05
        assert each["said"]
        assert each["changed"]
        assert each["fall"] > 5 * max(each["controls"])


def test_random_rows_are_confirmed_as_often_as_chance_has_it() -> None:
    assert len(RANDOM["tries"]) == 50
    assert RANDOM["kolmogorov_smirnov"] > 0.05
