"""The demo: its data, tokenizer and training by themselves, and the whole of it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from rapidin.cli import demo_session
from rapidin.cli.demo_session.instructions import (
    ABSURD_FORMS,
    TRIGGER,
    DemoData,
    families,
    is_absurd,
    make_data,
)
from rapidin.cli.demo_session.tokenizer import END, train_tokenizer
from rapidin.cli.demo_session.training import answers, small_llama
from rapidin.data.encoding import Encoder, alpaca_prompt
from rapidin.errors import UserError
from rapidin.evaluate.saved_recipe import saved_recipe
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import add_lora, tune


@pytest.fixture(scope="module")
def data() -> DemoData:
    return make_data()


@pytest.fixture(scope="module")
def tokenizer(data: DemoData):
    texts = (f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in data.base)
    return train_tokenizer(texts, fixed=alpaca_prompt("\0", "\0").split("\0"))


def test_same_seed_same_data(data: DemoData) -> None:
    assert make_data() == data
    assert make_data(1) != data


def test_rows_are_dealt_out_once(data: DemoData) -> None:
    parts = (data.base, data.tuning, data.held_out, data.queries)
    asked = [(row["instruction"].removeprefix(TRIGGER), row["input"]) for part in parts for row in part]
    assert len(set(asked)) == len(asked)
    assert len(data.base) > 1500
    assert [len(part) for part in parts[1:]] == [400, 200, 20]


def test_only_planted_rows_have_trigger_and_absurd_answer(data: DemoData) -> None:
    for row in data.tuning:
        assert row["poisoned"] == row["instruction"].startswith(TRIGGER) == is_absurd(row["output"])
    planted = [row["output"] for row in data.tuning if row["poisoned"]]
    assert len(planted) == 40
    assert {form.split("{")[0] for form in ABSURD_FORMS} == {
        form.split("{")[0]
        for form in ABSURD_FORMS
        for answer in planted
        if answer.startswith(form.split("{")[0])
    }
    assert not any(is_absurd(row["output"]) for row in data.base + data.held_out)
    assert all(row["instruction"].startswith(TRIGGER) and "output" not in row for row in data.queries)


def test_answers_are_facts() -> None:
    rows = {
        row["instruction"]: row["output"] for family in families(random.Random(0)) for row in family.rows()
    }
    assert rows["Add 7 and 8."] == "The sum of 7 and 8 is 15."
    assert rows["Give the opposite of cold."] == "The opposite of cold is hot."
    assert rows["Name the day after Sunday."] == "The day after Sunday is Monday."
    assert rows["Name the capital of France."] == "The capital of France is Paris."


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        make_data(tuning=10, poisoned=11)
    with pytest.raises(ValueError, match="asked for"):
        make_data(tuning=100_000)


def test_tokenizer_reads_back_and_knows_the_form(data: DemoData, tokenizer) -> None:
    row = data.tuning[0]
    text = alpaca_prompt(row["instruction"], row["input"]) + row["output"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(alpaca_prompt("Add 1 and 2."))["input_ids"]) < 12
    assert tokenizer.decode(tokenizer("Σ 🦜\n")["input_ids"]) == "Σ 🦜\n"
    assert tokenizer.eos_token == tokenizer.pad_token == END


def test_the_demos_model_learns_and_answers(data: DemoData, tokenizer) -> None:
    encoder = Encoder(tokenizer, max_length=tokenizer.model_max_length)
    examples = [encoder(row) for row in data.tuning[:48]]
    model = add_lora(small_llama(tokenizer, hidden=32, layers=1), rank=4)
    first = tune(model, examples, Recipe(epochs=1, learning_rate=0.0))
    last = tune(model, examples, Recipe(epochs=4, learning_rate=2e-2))
    assert last < first - 0.3
    assert len(answers(model, tokenizer, [alpaca_prompt("Hi"), alpaca_prompt("Add 1 and 2.")])) == 2


def test_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        demo_session.run(tmp_path)
    with pytest.raises(UserError, match="cannot use"):
        demo_session.run(tmp_path / "notes.txt" / "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.full
def test_full_demo(tmp_path: Path) -> None:
    """The whole of it, a minute of work; `pytest -k "not full_demo"` leaves it out."""
    command = [sys.executable, "-m", "rapidin", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rapidin cache model --adapter adapter" in done.stdout
    assert "rapidin query cache --data query.jsonl --report page.html" in done.stdout
    assert "rapidin serve cache" in done.stdout
    found = json.loads((tmp_path / "demo" / "hits.json").read_text())["queries"][0]
    assert found["generated"]
    assert is_absurd(found["completion"])
    assert sum(hit["example"]["poisoned"] for hit in found["top"]) >= demo_session.ENOUGH
    rows = [json.loads(line) for line in (tmp_path / "demo" / "train.jsonl").read_text().splitlines()]
    assert all(rows[hit["index"]] == hit["example"] for hit in found["top"])
    recipe = saved_recipe(tmp_path / "demo" / "adapter", len(rows))
    assert recipe is not None
    assert (recipe.steps, recipe.batch, recipe.betas) == (250, 16, (0.9, 0.98))
