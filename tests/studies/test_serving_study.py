"""studies/serving/serving.py runs on a tiny model, and its README has the table of what it found."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import doc_tables
import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'rapidin[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rapidin[serve]'")
from tiny import records, save_tiny

from rapidin import Cache
from rapidin.cli import main

STUDY = doc_tables.DOCS.parent / "studies" / "serving"


def test_the_readme_has_the_table_of_the_result() -> None:
    module = runpy.run_path(str(STUDY / "serving.py"))
    found = json.loads((STUDY / "serving.json").read_text())
    assert doc_tables.read(STUDY / "README.md", "serving") == module["table"](found)
    added = json.loads((STUDY / "added.json").read_text())
    assert doc_tables.read(STUDY / "README.md", "added") == module["added_table"](added)
    for each in found.values():  # nothing is lost, and memory does not grow with the requests
        assert each["outcomes"] == {"right": each["requests"]}
        assert max(each["memory_mb"]) < 1.1 * each["memory_mb"][0]


@pytest.mark.full
def test_every_step_runs_on_a_tiny_model(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path, lora=True)
    rows = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in records(30)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ["--adapter", str(saved.adapter), "--data", str(data), "--out", str(tmp_path / "cache")]
    assert main(["cache", str(saved.model), *made, "--width", "64", "--bytes", "128", "--quiet"]) == 0
    large, out = tmp_path / "large", tmp_path / "result.json"
    enlarge = ["enlarge", tmp_path / "cache", "--rows", "300", "--out", large]
    load = ["load", large / "cache", "--questions", data, "--add", "tiny", "--out", out]
    more = tmp_path / "added.json"
    added = ["added", tmp_path / "cache", large / "cache", "--questions", data, "--out", more]
    for command in (enlarge, [*load, "--clients", "3", "--requests", "2"], added):
        subprocess.run([sys.executable, str(STUDY / "serving.py"), *map(str, command)], check=True)
    assert len(Cache(large / "cache")) == 300
    found = json.loads(out.read_text())["tiny"]
    assert found["outcomes"] == {"right": 6}
    assert found["rows"] == 300
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    compared = json.loads(more.read_text())
    assert compared["rows"] == {"small": 30, "large": 300}
    assert all(0 < compared["ms"][name]["scan"] < compared["ms"][name]["all"] for name in ("small", "large"))
