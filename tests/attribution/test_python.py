"""What a user of the Python API meets: questions, one call, data in memory, names, progress and lines."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import caller
from tiny import records, save_tiny, tiny_llama, tiny_lora, tiny_tokenizer

import rapidin
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.progress import WrittenLine, in_notebook
from rapidin.attribution.questions import all_asked, asked, continued
from rapidin.cache import Cache, Manifest
from rapidin.errors import UserError

CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in records()
]
QUESTION = "one two three"
PLAIN: dict[str, Any] = {"width": 32, "preconditioner": "off"}


@pytest.fixture(scope="module")
def tuned() -> Any:
    return tiny_lora(tiny_llama())


@pytest.fixture(scope="module")
def attributor(tuned: Any) -> Attributor:
    return Attributor(tuned, tiny_tokenizer(chat=True), **PLAIN)


@pytest.fixture(scope="module")
def cache(attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return attributor.cache(CHATS, tmp_path_factory.mktemp("cache"), shard_rows=7)


def found(results: Any) -> list[tuple[int, float]]:
    return [(hit.index, round(hit.score, 4)) for hit in results.top]


# --------------------------------------------------------------------------------------------- questions


def test_a_question_is_put_in_the_form_of_the_data(attributor: Attributor, cache: Cache) -> None:
    results = attributor.ask(QUESTION, cache, top_k=3, max_new_tokens=4)
    (result,) = results
    assert result.prompt == f"<|user|>\n{QUESTION}</s>\n<|assistant|>\n"
    assert result.generated
    record = {"messages": [{"role": "user", "content": QUESTION}]}
    assert found(attributor.query(cache, record, top_k=3, max_new_tokens=4)) == found(results)
    given = attributor.ask((QUESTION, "lazy dog"), cache, top_k=3)
    assert (given[0].completion, given[0].generated) == ("lazy dog", False)
    answer = {"role": "assistant", "content": "lazy dog"}
    assert found(attributor.ask({"messages": [*record["messages"], answer]}, cache, top_k=3)) == found(given)
    both = attributor.ask([QUESTION, (QUESTION, "lazy dog")], cache, top_k=3, max_new_tokens=4)
    for each, alone in zip(both, (result, given[0]), strict=True):
        assert [hit.index for hit in each.top] == [hit.index for hit in alone.top]
    with pytest.raises(UserError, match=r"results of 2 generations; choose one: results\[0\]"):
        both.top  # noqa: B018
    # As it is, without a form around it, it is another question.
    assert attributor.query(cache, QUESTION, top_k=3, max_new_tokens=4)[0].prompt == QUESTION


@pytest.mark.parametrize(
    ("form", "task", "record"),
    [
        ("messages", "causal", {"messages": [{"role": "user", "content": "a"}]}),
        ("instruction", "causal", {"instruction": "a"}),
        ("prompt", "causal", {"prompt": "a"}),
        ("text", "seq2seq", {"prompt": "a"}),
        ("preference chat", "preference", {"messages": [{"role": "user", "content": "a"}]}),
        ("text", "classification", {"text": "a"}),
    ],
)
def test_forms_of_questions(cache: Cache, form: str, task: str, record: dict[str, Any]) -> None:
    manifest = Manifest.read(cache.path)
    manifest.data["form"], manifest.gradient["task"] = form, task
    assert asked(manifest, "a") == record
    assert all_asked(manifest, ["a", record]) == [record, record]
    assert continued(manifest, "a") == ({"text": "a"} if task == "classification" else {"prompt": "a"})
    if task == "classification":
        assert asked(manifest, "a", "2") == {"text": "a", "label": 2}


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", "the question is empty"),
        (" \n", "the question is empty"),
        (None, "the question is empty; give a question"),
        ([], "the question is empty"),
        (3, "the question is a int; give a question"),
        ([3], "a question is a int"),
        (("a", 3), "a question is a int"),
    ],
)
def test_what_is_no_question(attributor: Attributor, cache: Cache, question: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        attributor.ask(question, cache)


# --------------------------------------------------------------------------------------------- one call


def test_one_call_finds_what_the_two_steps_find(tuned: Any, attributor: Attributor, tmp_path: Path) -> None:
    tokenizer, asked_for = tiny_tokenizer(chat=True), {"top_k": 4, "max_new_tokens": 4}
    made = attributor.cache(CHATS, tmp_path / "a", bytes=200, sample=8)
    wanted = attributor.ask(QUESTION, made, **asked_for)
    options: dict[str, Any] = {**PLAIN, **asked_for, "bytes": 200, "sample": 8}
    in_between = rapidin.explain(tuned, tokenizer, CHATS, QUESTION, **options)
    assert found(in_between) == found(wanted)
    assert in_between.top[0].example == wanted.top[0].example
    folder = tmp_path / "b"
    assert found(rapidin.explain(tuned, tokenizer, CHATS, QUESTION, cache=folder, **options)) == found(wanted)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard*")}
    again = rapidin.explain(tuned, tokenizer, CHATS, (QUESTION, "lazy"), cache=folder, **options)
    assert again[0].completion == "lazy"
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard*")} == written


def test_models_are_taken_as_they_come(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path, chat=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    model, tokenizer = tiny_llama().train(), tiny_tokenizer(chat=True)
    options: dict[str, Any] = {**PLAIN, "top_k": 4, "max_new_tokens": 4}
    wanted = found(rapidin.explain(model, tokenizer, data, QUESTION, **options))
    assert model.training
    for given in (saved.model, str(saved.model), rapidin.load_model(str(saved.model))):
        assert found(rapidin.explain(given, data=data, question=QUESTION, **options)) == wanted
    for held in (
        SimpleNamespace(model=model, processing_class=tokenizer, train_dataset=CHATS),
        SimpleNamespace(model=model, processing_class=None, tokenizer=tokenizer, train_dataset=str(data)),
    ):
        assert found(rapidin.explain(held, question=QUESTION, **options)) == wanted
    assert Attributor(str(saved.model), tokenizer, **PLAIN).loaded.tokenizer is tokenizer


def test_a_trainer_is_taken_with_its_data(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    tokenizer, model = tiny_tokenizer(chat=True), tiny_llama()
    arguments = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=CHATS, processing_class=tokenizer)  # type: ignore[arg-type]
    options: dict[str, Any] = {**PLAIN, "top_k": 4, "max_new_tokens": 4}
    results = rapidin.explain(trainer, question=QUESTION, **options)
    assert found(results) == found(rapidin.explain(model, tokenizer, CHATS, QUESTION, **options))
    assert results.top[0].example == CHATS[results.top[0].index]
    assert Attributor(trainer, **PLAIN).loaded.tokenizer is tokenizer


def test_what_one_call_lacks_is_said(tuned: Any) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    for call, error, words in (
        (
            lambda: rapidin.explain(tuned, tokenizer, CHATS),
            UserError,
            "there is no question; give `question`",
        ),
        (
            lambda: rapidin.explain(tuned, tokenizer, question="a"),
            UserError,
            "no training data; give `data`",
        ),
        (
            lambda: rapidin.explain(tuned, tokenizer, CHATS, "a", topk=2),
            TypeError,
            "unknown option 'topk'; did you mean 'top_k'",
        ),
        (lambda: Attributor(tuned, tokenizer, widht=2), TypeError, "did you mean 'width'"),
        (lambda: Attributor(tuned), UserError, "no tokenizer; give it: rapidin.Attributor"),
        (lambda: Attributor(tuned, "gpt2"), UserError, "the tokenizer is a str"),
        (lambda: Attributor(3, tokenizer), UserError, "the model is a int, not a torch module"),
        (lambda: Attributor("./none"), UserError, "model not found: './none'"),
        (lambda: Attributor(rapidin.load_model("./none")), UserError, "model not found"),
    ):
        with pytest.raises(error, match=words):
            call()


# ------------------------------------------------------------------------------------------ in memory


def test_data_in_memory_is_shown_with_hits_in_this_process_and_asked_for_in_others(
    attributor: Attributor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, data in enumerate((CHATS, (row for row in CHATS))):
        made = attributor.cache(data, tmp_path / str(number))
        for opened in (made, made.path, str(made.path)):
            hit = attributor.query(opened, CHATS[3], top_k=1).top[0]
            assert (hit.index, hit.example) == (3, CHATS[3])
        results = attributor.query(made, CHATS[3], top_k=1, contributions=True, rescore="exact")
        assert results.top[0].tokens is not None
    assert caplog.records == []
    # A cache that is opened anew is what another process sees.
    hit = attributor.query(Cache(made.path), CHATS[3], top_k=1).top[0]
    assert (hit.index, hit.example) == (3, None)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("rapidin", "WARNING")
    assert "was made from data in memory; give the same data with `examples`" in record.getMessage()
    assert attributor.query(Cache(made.path), CHATS[3], top_k=1, examples=CHATS).top[0].example == CHATS[3]
    with pytest.raises(UserError, match="`by` needs the training examples; give them with `examples`"):
        attributor.query(Cache(made.path), CHATS[3], by="file")


def test_a_cache_of_a_model_in_memory_is_opened_again_by_its_weights(
    attributor: Attributor, cache: Cache, tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    wanted = found(attributor.ask((QUESTION, "lazy"), cache))
    same = tiny_lora(tiny_llama())
    for which in (cache, cache.path, str(cache.path), cache.manifest):
        again = Attributor.like(which, same, tokenizer)
        assert found(again.ask((QUESTION, "lazy"), cache)) == wanted
    with pytest.raises(UserError, match=r"another adapter.*Attributor\.like\(cache, model, tokenizer\)"):
        Attributor.like(cache, tiny_lora(tiny_llama(), seed=9), tokenizer)
    with pytest.raises(UserError, match="the cache is a int"):
        Attributor.like(3, same, tokenizer)  # type: ignore[arg-type]
    # Neither model nor adapter has a name by which another process could load it.
    with pytest.raises(UserError, match=r"does not say which model made it; .*Attributor\.like\("):
        Attributor.from_cache(cache.path)
    ran = caller(capsys)("query", cache.path, "--ask", "a", "--no-text")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "save the adapter and the model with save_pretrained and name --adapter and --model" in ran.err
    # What is advised works.
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tuned.save_pretrained(tmp_path / "adapter")
    where = {"model": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter")}
    assert found(Attributor.from_cache(cache.path, **where).ask((QUESTION, "lazy"), cache)) == wanted
    named = [part for name, value in where.items() for part in (f"--{name}", value)]
    ran = caller(capsys)("query", cache.path, "--ask", QUESTION, "--completion", "lazy", *named)
    assert ran.code == 0
    assert "the hits have no texts" in ran.err
    assert "give the same data with --train-data" in ran.err


# ------------------------------------------------------------------------------------- what is to be seen


def test_things_say_what_they_are_on_few_lines(attributor: Attributor, cache: Cache) -> None:
    assert repr(cache) == f"Cache('{cache.path}': 30 examples, 8 layers x 32 dimensions in float16, 0.0 MB)"
    for thing, words in (
        (attributor, "8 layers x 32 dimensions, task 'causal', gradients at 0.5, preconditioner 'off'"),
        (attributor.source, "GradientSource(LoadedModel(LlamaForCausalLM with the adapter"),
        (attributor.loaded, "parameters on cpu"),
    ):
        assert words in repr(thing)
        assert "\n" not in repr(thing)
    results = attributor.ask((QUESTION, "lazy\x1b"), cache, top_k=9)
    lines = repr(results).splitlines()
    helpful, harmful = len(results.helpful), len(results.harmful)
    assert (helpful, len(lines)) == (9, 1 + 4 + min(harmful, 4))
    assert repr(results[0]) == repr(results)
    assert f"-> 'lazy\\x1b': 9 helpful, then {harmful} harmful of 30 examples)" in lines[0]
    assert lines[1] == f"  {results.top[0]!r}"
    assert lines[4] == "  and 6 more"
    hit = results.top[0]
    assert repr(hit).startswith(f"Hit(1, score {hit.score:+.4g} ± {hit.error:.2g}, index {hit.index}: '")
    several = repr(attributor.ask([(QUESTION, "lazy"), (QUESTION, "dog")], cache))
    assert several.splitlines()[0] == "Results of 2 generations"
    assert len(several.splitlines()) == 3


def test_lines_go_to_the_logger_and_bars_to_a_terminal(
    attributor: Attributor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def written(**options: Any) -> str:
        attributor.cache(CHATS, tmp_path / str(len(list(tmp_path.iterdir()))), **options)
        attributor.query(Cache(next(tmp_path.iterdir())), CHATS[3], examples=False, **options)
        assert isinstance(sys.stderr, io.StringIO)
        text = sys.stderr.getvalue()
        sys.stderr.truncate(0)
        return text

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO, "rapidin"):
        text = written()
    assert "caching" in text
    assert "explaining 1 among 30 examples" in text
    said = [record.getMessage() for record in caplog.records if record.name == "rapidin"]
    assert [line.split(" ")[0] for line in said] == ["cached", "1"]
    assert "30 with a sketch" in said[0]
    assert "1 query over 30 examples: " in said[1]
    assert any("compared with autograd's" in record.getMessage() for record in caplog.records)
    assert written(progress=False) == ""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert written() == ""
    assert written(progress=True).splitlines()[-1].startswith("explaining 1 among 30 examples")


def test_a_notebook_gets_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = io.StringIO(), [0.0]
    with WrittenLine(file, over=True, clock=lambda: now[0]) as line:
        line("caching 10")
        line("too soon")
        now[0] = 1.0
        line("caching\n2")
    assert file.getvalue() == "\rcaching 10\rcaching 2 \r         \r"

    class ZMQInteractiveShell:
        pass

    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    assert in_notebook()


def test_number_formats_are_taken_by_any_of_their_names(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path)
    for dtype in ("bf16", torch.bfloat16, "bfloat16"):
        assert rapidin.load_model(str(saved.model), dtype=dtype).model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown model dtype 'int3'"):
        rapidin.load_model(str(saved.model), dtype="int3")
    for device, words in (("cuda:99", "cannot use the device 'cuda:99'"), ("gpu", "unknown device 'gpu'")):
        with pytest.raises(UserError, match=words):
            rapidin.load_model(str(saved.model), device=device)
