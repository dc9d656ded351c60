"""Forms of data through the command line: caching, and queries that show the rows again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command import caller
from tiny import save_tiny

import rapidin
from rapidin.cache import Manifest
from rapidin.cli import main
from rapidin.data.examples import open_examples

ROWS = [{"q": f"Give {n} tips.", "a": f" One, two, {n}.", "text": "not this"} for n in range(4)]
NAMES = "prompt=q,completion=a"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model"), chat=True).model)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*arguments) -> Ran"""
    return caller(capsys)


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_map_is_recorded_and_used_again(model: str, tmp_path: Path, run: Any) -> None:
    data, queries, cache = (tmp_path / name for name in ("train.jsonl", "queries.jsonl", "cache"))
    data.write_text(lines_of(ROWS))
    queries.write_text(lines_of([{"ask": {"x": "Give 9 tips."}, "say": " One."}]))
    made = ["cache", model, "--data", str(data), "--map", NAMES, "--out", str(cache), "--width", "64"]
    assert main([*made, "--quiet"]) == 0
    assert main([*made, "--quiet"]) == 0  # the same command finds the same examples
    recorded = Manifest.read(cache).data
    assert recorded["map"] == {"prompt": "q", "completion": "a"}
    hits = tmp_path / "hits.json"
    asked = ["query", str(cache), "--data", str(queries), "--map", "prompt=ask.x,completion=say"]
    ran = run(*asked, "--json", str(hits), "--top-k", "4", "--quiet")
    assert ran.code == 0, ran
    shown = {hit["index"]: hit["example"] for hit in json.loads(hits.read_text())["queries"][0]["top"]}
    assert shown[2]["prompt"] == shown[2]["q"] == "Give 2 tips."
    assert shown[2]["original"] == {"text": "not this"}
    refused = run("query", str(cache), "--prompt", "a", "--map", NAMES)
    assert (refused.code, refused.err) == (2, "rapidin: --map names fields of --data; use --data too\n")
    wrong = run("plan", model, "--data", str(data), "--map", "prompt=none,completion=a")
    assert wrong.code == 2
    assert "no field 'none' to read as 'prompt'; its fields are 'q', 'a', 'text'" in wrong.err


def test_standard_input_is_cached_and_named_again_by_a_query(
    model: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(lines_of([{"prompt": row["q"], "completion": row["a"]} for row in ROWS]))
    cache = str(tmp_path / "cache")
    with data.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert main(["cache", model, "--data", "-", "--out", cache, "--width", "64", "--quiet"]) == 0
    assert Manifest.read(Path(cache)).data["path"] is None
    query = ("query", cache, "--prompt", "Give", "--completion", " One", "--quiet")
    assert "Give 2 tips." not in run(*query).out
    assert "Give 2 tips." in run(*query, "--train-data", str(data)).out


def test_python_takes_the_same_map(model: str, tmp_path: Path) -> None:
    attributor = rapidin.Attributor(rapidin.load_model(model), width=64, preconditioner="off")
    cache = attributor.cache(ROWS, tmp_path / "cache", map={"prompt": "q", "completion": "a"})
    assert len(attributor.query(cache, {"question": "Give", "answer": " One"}, top_k=2)[0].top) == 2
    examples = open_examples(ROWS, map=NAMES)
    with pytest.raises(TypeError, match="their own limit, map and streaming"):
        attributor.cache(examples, tmp_path / "other", map=NAMES)
