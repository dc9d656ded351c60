"""The README of studies/training has the tables of what it found, and its scripts run on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import doc_tables
import numpy as np
import pytest
from tiny import records, save_tiny

from rapidin.cli import main as rapidin

STUDY = doc_tables.DOCS.parent / "studies" / "training"
REPORT = runpy.run_path(str(STUDY / "report.py"))


def test_the_readme_shows_the_results() -> None:
    for name in ("speed", "lds"):
        found = json.loads((STUDY / f"{name}.json").read_text())
        assert doc_tables.read(STUDY / "README.md", name) == REPORT[f"{name}_table"](found)


def test_the_ways_that_are_measured_are_those_of_the_script() -> None:
    ways = runpy.run_path(str(STUDY / "speed.py"))["WAYS"]
    assert list(json.loads((STUDY / "speed.json").read_text())["ways"]) == list(ways)


@pytest.mark.full
def test_retraining_runs_on_texts_of_unequal_lengths(tmp_path: Path) -> None:
    model, _ = save_tiny(tmp_path)
    for name, some in (("train", records(12)), ("test", records(3))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    truth, out = tmp_path / "truth", tmp_path / "found.json"
    data = ["--data", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]
    sizes = ["--epochs", "2", "--batch-size", "4", "--warmup-steps", "1", "--subsets", "3", "--seeds", "1"]
    assert rapidin(["eval", "lds", str(model), *data, *sizes, "--out", str(truth), "--quiet"]) == 0
    runpy.run_path(str(STUDY / "retraining.py"))["main"]([str(truth), str(model), "--out", str(out)])
    found, kept = json.loads(out.read_text()), json.loads((STUDY / "lds.json").read_text())
    assert list(found["lds"]) == list(kept["lds"])


@pytest.mark.parametrize("settings", [{"lora": 4}, {"steps": 9}, {"warm_up": 5}], ids=str)
def test_a_truth_that_the_trainer_cannot_repeat_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = {"steps": None, "warm_up": 1} | settings
    (tmp_path / "lds.json").write_text(json.dumps({"settings": {"lora": None, "recipe": recipe} | settings}))
    np.savez(tmp_path / "retrained.npz", masks=np.zeros((1, 2), bool), losses=np.zeros((1, 1, 1)))
    with pytest.raises(SystemExit, match="with an adapter, for some steps or with a warm-up; make it"):
        runpy.run_path(str(STUDY / "retraining.py"))["main"]([str(tmp_path), "base"])
