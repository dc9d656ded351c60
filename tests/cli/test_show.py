"""rapidin show: the first examples as the model reads them; and hits of data given as token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import caller
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from tiny_tasks import tiny_bert, word_tokenizer

from rapidin import Attributor
from rapidin.attribution.reading import read_examples
from rapidin.errors import UserError
from rapidin.gradients.reader import load_reader
from rapidin.gradients.settings import GradientSettings
from rapidin.results.html import page
from rapidin.results.terminal import hits_report, make_console

CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho."},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "One,\ttwo.\x1b[1m"},
    ]
}
SHOWN = (
    "<|user|>\nHi</s>\n<|assistant|>\n[[Ho.</s>\n]]"
    "<|user|>\nMore</s>\n<|assistant|>\n[[One,\ttwo.\\x1b[1m</s>\n]]"
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return caller(capsys)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_first_examples_with_marks(tmp_path: Path, run: Any) -> None:
    saved = save_tiny(tmp_path, lora=True, chat=True)
    data = lines(tmp_path / "d.jsonl", [CHAT, CHAT, {"messages": []}, CHAT])
    ran = run("show", str(saved.model), "--adapter", str(saved.adapter), "--data", data)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.count("[[") == 4
    first, *_ = ran.out.split(f"\n\n{data}")
    head, _, text = first.partition("\n")
    assert text == SHOWN
    encoded = Attributor(tiny_llama(), tiny_tokenizer(chat=True)).source.example(CHAT)
    tokens, targets = len(encoded.ids), sum(encoded.target)  # type: ignore[attr-defined]
    assert head == f"{data}, line 1: {tokens} tokens, {targets} with a loss"
    assert f"{data}, line 3: 0 tokens, 0 with a loss, not used: empty" in ran.out
    assert "line 4" not in ran.out
    last = run("show", str(saved.model), "--data", data, "--limit", "1", "--turns", "last")
    assert last.out.count("[[") == 1


def test_the_weights_are_not_needed(tmp_path: Path, run: Any) -> None:
    saved = save_tiny(tmp_path, chat=True)
    data = lines(tmp_path / "d.jsonl", [{"q": "One", "a": " two"}])
    (saved.model / "model.safetensors").unlink()
    ran = run("show", str(saved.model), "--data", data, "--map", "prompt=q,completion=a")
    assert ran.code == 0
    assert ran.out.endswith(" with a loss\nOne[[ two</s>]]\n")


def test_json_has_every_token(tmp_path: Path, run: Any) -> None:
    saved = save_tiny(tmp_path, chat=True)
    data = lines(tmp_path / "d.jsonl", [CHAT])
    ran = run("show", str(saved.model), "--data", data, "--json", "--max-length", "30")
    (example,) = json.loads(ran.out)
    (text,) = example["texts"]
    encoded = Attributor(tiny_llama(), tiny_tokenizer(chat=True), max_length=30).source.example(CHAT)
    assert (text["ids"], text["loss"]) == (encoded.ids, encoded.target)  # type: ignore[attr-defined]
    assert "".join(text["pieces"]) == text["text"]
    facts = {name: example[name] for name in ("row", "status", "truncated", "tokens", "targets", "label")}
    assert facts == {
        "row": 0,
        "status": "ok",
        "truncated": True,
        "tokens": 30,
        "targets": sum(encoded.target),  # type: ignore[attr-defined]
        "label": "",
    }


def test_another_tokenizer_and_a_template_with_a_date(tmp_path: Path, run: Any) -> None:
    saved = save_tiny(tmp_path, chat=True)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') + '\n' }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path / "other")
    data = lines(tmp_path / "d.jsonl", [CHAT])
    rest = ["--data", data, "--tokenizer", str(tmp_path / "other"), "--date", "2024-02-29"]
    ran = run("show", str(saved.model), *rest)
    assert "\n29 Feb 2024\n<|user|>" in ran.out
    assert "is used: its chat template differs from the model's" in ran.err
    assert "rapidin: the chat template writes the date, and examples are read with 2024-02-29\n" in ran.err


def test_what_is_wrong_is_one_line(tmp_path: Path, run: Any) -> None:
    saved = save_tiny(tmp_path)
    data = lines(tmp_path / "d.jsonl", [CHAT])
    ran = run("show", str(saved.model), "--data", data)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "line 1: the data has chats ('messages'), but the model's tokenizer has no chat" in ran.err
    ran = run("show", str(tmp_path / "nowhere"), "--data", data)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)


# ------------------------------------------------------------------------------------------------- in Python


def test_an_attributor_shows_examples() -> None:
    attributor = Attributor(tiny_llama(), tiny_tokenizer(chat=True), width=64)
    shown = attributor.show([CHAT] * 5, limit=2)
    assert len(shown) == 2
    assert repr(shown).partition("\n")[2].partition("\n\nexamples[1]")[0] == SHOWN
    markup = shown._repr_html_()
    assert ">Ho.&lt;/s&gt;\n</mark>" in markup
    assert "\x1b" not in markup
    with pytest.raises(UserError, match="`limit` must be at least 1"):
        attributor.show([CHAT], limit=0)


def test_other_tasks_show_what_they_read(tmp_path: Path) -> None:
    pair = {"prompt": "One", "chosen": " two", "rejected": " six"}
    saved = save_tiny(tmp_path, chat=True)
    reader, tokenizer, _ = load_reader(str(saved.model), "preference", GradientSettings())
    (example,) = read_examples(reader, tokenizer, [pair])
    assert [text.name for text in example.texts] == ["chosen", "rejected"]
    assert [[run for run in text.runs() if run[1]] for text in example.texts] == [
        [(" two</s>", True)],
        [(" six</s>", True)],
    ]
    model = tiny_bert()
    model.config.id2label = {0: "no", 1: "yes"}
    model.save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    reader, tokenizer, _ = load_reader(str(tmp_path / "bert"), "classification", GradientSettings())
    (example,) = read_examples(reader, tokenizer, [{"text": "quick fox", "label": 1}])
    assert (example.label, example.targets, example.status) == ("yes", 0, "ok")
    assert "".join(example.texts[0].pieces).split() == ["<s>", "quick", "fox", "</s>"]
    assert example.facts.endswith("tokens, label: yes")


# ------------------------------------------------------------------------------------------- tokens as data


@pytest.mark.parametrize("top_k", [2, 10])  # as many as there are rows, and more
def test_hits_of_token_ids_show_their_text(tmp_path: Path, top_k: int) -> None:
    tokenizer = tiny_tokenizer()
    rows = []
    for text, answer in (("The capital of France is", " Paris."), ("One, two,", " three.")):
        ids, more = (tokenizer(each)["input_ids"] for each in (text, answer))
        rows.append({"input_ids": ids + more, "labels": [-100] * len(ids) + more})
    attributor = Attributor(tiny_llama(), tokenizer, width=64, preconditioner="off")
    cache = attributor.cache(rows, tmp_path / "cache")
    results = attributor.query(cache, [("The capital", " Paris.")], examples=rows, top_k=top_k)
    hits = {hit.index: hit for hit in (*results[0].top, *results[0].bottom)}
    assert {index: hit.parts for index, hit in hits.items()} == {
        0: ("The capital of France is", " Paris."),
        1: ("One, two,", " three."),
    }
    assert "One, two," in repr(hits[1])
    assert hits[0].to_json()["decoded"] == {"prompt": "The capital of France is", "completion": " Paris."}
    with (tmp_path / "out").open("w") as file:
        make_console(file).print(hits_report(results, width=120))
    assert "The capital of France is" in (tmp_path / "out").read_text()
    assert "The capital of France is" in page(results)
