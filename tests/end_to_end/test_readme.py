"""The README's Python snippet and its command line find the same hits."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command import caller

from rapidin.cli.demo_session.instructions import make_data
from rapidin.cli.demo_session.tokenizer import train_tokenizer
from rapidin.cli.demo_session.training import small_llama
from rapidin.data.encoding import Encoder, alpaca_prompt
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import add_lora, tune
from rapidin.results.collection import Results

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## On your own model and data")[1].split("## Documentation")[0]


def snippet() -> str:
    return SECTION.split("```python")[1].split("```")[0]


def command_line(start: str) -> list[str]:
    """The first command of the section that begins so, with its own values."""
    line = next(line.strip() for line in SECTION.splitlines() if line.strip().startswith(start))
    words = re.findall(r'"[^"]*"|\S+', line.split("  #")[0])
    names = {"MODEL": "model", "ADAPTER": "adapter"}
    return [names.get(word, word.strip('"')) for word in words][1:]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def compare(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs both in folders of their own, on a folder with model, adapter and train.jsonl."""
    ran: dict[str, Any] = {}
    for name in ("python", "command"):
        (tmp_path / name).mkdir()
        for part in ("model", "adapter", "train.jsonl"):
            os.symlink(demo / part, tmp_path / name / part)
    with inside(tmp_path / "python"):
        exec(snippet(), ran)
    results = ran["results"]
    assert isinstance(results, Results)
    run = caller(capsys)
    with inside(tmp_path / "command"):
        assert run(*command_line("rapidin cache")).code == 0
        asked = run(*command_line("rapidin query cache --ask"), "--top-k", "20", "--json", "-")
    (query,) = json.loads(asked.out)["queries"]
    (result,) = results
    assert (query["prompt"], query["completion"]) == (result.prompt, result.completion)
    assert query["generated"]
    assert result.generated
    for side, hits in (("top", results.helpful), ("bottom", results.harmful)):
        assert [hit["index"] for hit in query[side]] == [hit.index for hit in hits]
        assert [hit["score"] for hit in query[side]] == pytest.approx([hit.score for hit in hits], abs=1e-5)
        assert [hit["example"] for hit in query[side]] == [hit.example for hit in hits]
    assert len(result.top) == 20
    assert query["top"]
    assert ran["cache"].manifest.model["source"]["adapter"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's kind of model, small and hardly trained, with an adapter and 48 of its rows."""
    folder, data = tmp_path_factory.mktemp("demo"), make_data()
    texts = (f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in data.base)
    tokenizer = train_tokenizer(texts, fixed=alpaca_prompt("\0", "\0").split("\0"))
    model = small_llama(tokenizer, hidden=32, layers=1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model.name_or_path = str(folder / "model")
    rows = data.tuning[:48]
    encoder = Encoder(tokenizer, max_length=tokenizer.model_max_length)
    tuned = add_lora(model, rank=4)
    tune(tuned, [encoder(row) for row in rows], Recipe(epochs=4, learning_rate=2e-2))
    tuned.save_pretrained(folder / "adapter")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_snippet_and_the_command_line_find_the_same_hits(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(demo, tmp_path, capsys)


@pytest.mark.full
def test_they_do_on_the_demo_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rapidin.cli import demo_session

    demo_session.run(tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "cache")
    capsys.readouterr()
    compare(tmp_path / "demo", tmp_path, capsys)
