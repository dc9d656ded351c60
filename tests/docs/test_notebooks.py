"""The notebooks of docs/: stored as they were run, and run again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from notebooks import NOTEBOOKS, executed, printed


def test_there_is_one_for_each_start() -> None:
    starts = Path(__file__).parents[2] / "docs" / "start"
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in starts.glob("*.md")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_it_was_run(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.full
def test_it_runs(path: Path, demo: Path, tmp_path: Path) -> None:
    """Each cell prints what is stored, but for numbers and rows, which vary from machine to machine."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    stored = printed(json.loads(path.read_text("utf-8")))
    again = printed(executed(path, tmp_path, demo))
    assert [labels(text) for text in again] == [labels(text) for text in stored]


def labels(text: str) -> list[str]:
    """The words before a colon that begin a line."""
    return re.findall(r"^([A-Za-z][\w, ]*):", re.sub(r"\d+", "0", text), re.MULTILINE)
