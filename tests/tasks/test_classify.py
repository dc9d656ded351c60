"""Classifiers, regression and reward models: losses, labels, and gradients against plain autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import caller
from task_gradients import assert_exact
from tiny_tasks import (
    some_words,
    tiny_bert,
    tiny_classifier_lora,
    tiny_llama_classifier,
    tiny_masked_bert,
    tiny_masked_roberta,
    word_tokenizer,
)
from torch.nn import functional as F
from transformers import BertForSequenceClassification, RobertaForSequenceClassification

from rapidin import Attributor, UserError
from rapidin.gradients.source import GradientSource

TOKENIZER = word_tokenizer()
TEXTS = some_words(6)


def source_of(model: Any, **settings: Any) -> GradientSource:
    return Attributor(model, TOKENIZER, width=256, preconditioner="off", **settings).source


def logits_of(model: Any, *texts: str) -> torch.Tensor:
    return model(**TOKENIZER(*texts, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama_classifier])
def test_the_gradients_of_classes(make: Any) -> None:
    model = make(num_labels=3)
    records = [{"text": text, "label": n % 3} for n, text in enumerate(TEXTS)]
    source = source_of(model)
    assert source.task.name == "classification"
    assert any("classifier" in t.name or "score" in t.name for t in source.targets)  # the head counts
    losses = [
        lambda r=r: F.cross_entropy(logits_of(model, r["text"]), torch.tensor(r["label"])) for r in records
    ]
    assert_exact(source, records, losses)


def test_the_gradients_of_all_parameters_of_a_classifier() -> None:
    model = tiny_bert(num_labels=3)
    records = [{"text": text, "label": n % 3} for n, text in enumerate(TEXTS)]
    source = source_of(model, include=["*"], exclude=["key.bias"])  # softmax ignores a key's bias
    losses = [
        lambda r=r: F.cross_entropy(logits_of(model, r["text"]), torch.tensor(r["label"])) for r in records
    ]
    assert_exact(source, records, losses)


def test_two_texts_and_names_of_labels() -> None:
    model = tiny_bert(id2label={0: "no", 1: "yes"})
    records = [
        {"premise": a, "hypothesis": b, "label": name}
        for a, b, name in zip(TEXTS, reversed(TEXTS), ["yes", "no"] * 3, strict=True)
    ]
    losses = [
        lambda r=r: F.cross_entropy(
            logits_of(model, r["premise"], r["hypothesis"]), torch.tensor(int(r["label"] == "yes"))
        )
        for r in records
    ]
    assert_exact(source_of(model), records, losses)


def test_several_labels_of_a_text() -> None:
    model = tiny_bert(num_labels=3, problem_type="multi_label_classification")
    labels = [[1, 0, 1], ["LABEL_1"], [2], [0.0, 1.0, 1.0], [0, 0, 0], ["LABEL_0", "LABEL_1"]]
    flags = [[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 0]]
    records = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    losses = [
        lambda r=r, f=f: F.binary_cross_entropy_with_logits(
            logits_of(model, r["text"]), torch.tensor(f, dtype=torch.float32)
        )
        for r, f in zip(records, flags, strict=True)
    ]
    assert_exact(source_of(model), records, losses)


def test_the_gradients_of_numbers() -> None:
    model = tiny_bert(num_labels=1)
    records = [{"sentence": text, "label": 0.5 * n} for n, text in enumerate(TEXTS)]
    source = source_of(model)
    assert source.task.name == "regression"
    losses = [lambda r=r: (logits_of(model, r["sentence"])[0] - r["label"]) ** 2 for r in records]
    assert_exact(source, records, losses)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama_classifier])
def test_a_pair_of_a_reward_model_has_one_gradient(make: Any) -> None:
    model = make(num_labels=1)
    records = [
        {"prompt": f"{a} ", "chosen": b, "rejected": c}
        for a, b, c in zip(TEXTS, TEXTS[1:] + TEXTS[:1], TEXTS[2:] + TEXTS[:2], strict=True)
    ]
    source = source_of(model, task="reward")

    def reward(record: dict[str, str], name: str) -> torch.Tensor:
        return logits_of(model, record["prompt"] + record[name] + "</s>")[0]

    losses = [lambda r=r: -F.logsigmoid(reward(r, "chosen") - reward(r, "rejected")) for r in records]
    assert_exact(source, records, losses)


def test_an_adapter_with_a_head_of_its_own() -> None:
    model = tiny_classifier_lora(tiny_bert(num_labels=3))
    records = [{"text": text, "label": n % 3} for n, text in enumerate(TEXTS)]
    source = source_of(model, at=0.5)
    assert any("classifier.modules_to_save" in t.name for t in source.targets)
    losses = [
        lambda r=r: F.cross_entropy(logits_of(model, r["text"]), torch.tensor(r["label"])) for r in records
    ]
    assert_exact(source, records, losses)


def test_labels_that_the_model_does_not_have() -> None:
    source = source_of(tiny_bert(num_labels=3))
    for label in (3, -1, "none", 0.5, None):
        with pytest.raises(UserError, match=r"none of the model's 3 classes"):
            source.example({"text": "fox", "label": label})
    number = source_of(tiny_bert(num_labels=1))
    for label in ("one", None, True, [1, 2]):
        with pytest.raises(UserError, match="is not a number"):
            number.example({"text": "fox", "label": label})
    with pytest.raises(UserError, match=r"one output.*2"):
        source_of(tiny_bert(), task="reward")
    with pytest.raises(UserError, match="one loss per example"):
        source_of(tiny_bert(), loss="sum")
    with pytest.raises(UserError, match="no pad_token_id"):
        source_of(tiny_llama_classifier(pad_token_id=None))


def test_long_texts_are_cut_or_skipped() -> None:
    long = {"text": "fox " * 100, "label": 1}
    cut = source_of(tiny_bert()).example(long)
    assert (cut.length, cut.truncated) == (64, True)
    skipped = source_of(tiny_bert(), too_long="skip").example(long)
    assert skipped.status.name == "TOO_LONG"
    assert source_of(tiny_bert()).example({"text": "", "label": 1}).status.name == "EMPTY"


def test_a_cache_of_a_classifier_is_queried_with_and_without_labels(tmp_path: Path) -> None:
    model = tiny_bert(id2label={0: "no", 1: "yes"})
    records = [{"text": text, "label": n % 2} for n, text in enumerate(some_words(30))]
    attributor = Attributor(model, TOKENIZER, width=256)
    cache = attributor.cache(records, tmp_path / "cache")
    assert cache.manifest.gradient["task"] == "classification"
    said = "yes" if int(logits_of(model, records[3]["text"]).argmax()) else "no"
    results = attributor.query(
        cache, [{"text": records[3]["text"]}, records[3]], examples=records, rescore="exact"
    )
    assert (results[0].completion, results[0].generated) == (said, True)
    assert (results[1].completion, results[1].generated) == ("yes", False)
    assert results[1].top[0].row == 3  # the example itself
    same = Attributor.like(cache.manifest, model, TOKENIZER)
    assert torch.equal(same.scores(cache, [records[3]]), attributor.scores(cache, [records[3]]))
    for wanted in ({"targets": "tokens"}, {"contributions": True}):
        with pytest.raises(UserError, match="no tokens with scores of their own"):
            attributor.query(cache, [records[3]], examples=records, **wanted)


def test_a_regression_needs_a_label_to_explain() -> None:
    source = source_of(tiny_bert(num_labels=1))
    with pytest.raises(UserError, match="needs a label"):
        source.task.generation(source.loaded.model, {"text": "fox"}, 8)


def test_a_classifier_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder says what the model is for; labels are checked before any work."""
    run = caller(capsys)
    model = tiny_bert(id2label={0: "no", 1: "yes"})
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    records = [{"text": text, "label": n % 2, "flipped": n % 3 == 0} for n, text in enumerate(some_words(30))]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    cache = tmp_path / "cache"
    made = run("cache", tmp_path / "model", "--data", data, "--out", cache)
    assert made.code == 0, made.err
    assert json.loads((cache / "manifest.json").read_text())["gradient"]["task"] == "classification"
    for label in ("1", "yes"):
        asked = run("query", cache, "--ask", records[3]["text"], "--completion", label)
        assert asked.code == 0, asked.err
        assert "yes" in asked.out.split("Most harmful")[0]
    page = tmp_path / "page.html"
    asked = run("query", cache, "--ask", records[3]["text"], "--report", page, "--json", "-")
    assert asked.code == 0, asked.err
    assert json.loads(asked.out)["queries"][0]["generated"]
    assert page.stat().st_size > 10_000
    (tmp_path / "target.jsonl").write_text(json.dumps(records[5]) + "\n")
    target, out = tmp_path / "target.jsonl", tmp_path / "chosen.jsonl"
    chosen = run("select", cache, "--target", target, "--top", "3", "--out", out)
    assert chosen.code == 0, chosen.err
    assert records[5] in [json.loads(line) for line in out.read_text().splitlines()]
    own = run("self", cache, "--top-k", "3")
    assert own.code == 0, own.err
    measured = run("eval", "mislabel", cache, "--column", "flipped", "--baselines", "--json", "-")
    assert measured.code == 0, measured.err
    assert "loss at 1" in measured.out
    for arguments in (
        ("classes", cache, "--data", data),
        ("fidelity", cache, "--data", tmp_path / "target.jsonl", "--rows", "10"),
    ):
        measured = run("eval", *arguments)
        assert measured.code == 0, measured.err
    planned = run("plan", tmp_path / "model", "--data", data)
    assert planned.code == 0, planned.err
    for arguments, what in (
        (("query", cache, "--ask", "fox", "--tokens"), "no tokens with scores of their own"),
        (("query", cache, "--ask", "fox", "--completion", "maybe"), "none of the model's 2 classes"),
        (("plan", tmp_path / "model", "--examples", "9"), "give --data"),
        (("eval", "facts", tmp_path / "model", "--out", tmp_path / "facts"), "was saved as BertForSequence"),
    ):
        refused = run(*arguments)
        assert refused.code == 2, refused
        assert what in refused.err
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "fox", "label": 0}\n{"text": "fox", "label": 2}\n')
    refused = run("cache", tmp_path / "model", "--data", wrong, "--out", tmp_path / "other")
    assert refused.code == 2
    assert "line 2: the label 2 is none of the model's 2 classes" in refused.err
    skipped = run(
        "cache", tmp_path / "model", "--data", wrong, "--out", tmp_path / "other", "--on-error", "skip"
    )
    assert skipped.code == 0, skipped.err


def test_an_adapter_brings_the_head_of_a_model_without_one(tmp_path: Path) -> None:
    """As usual: a classifier's adapter on a model that was trained on masked words."""
    from rapidin import load_model

    masked = tiny_masked_roberta()
    masked.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    base = RobertaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    tuned = tiny_classifier_lora(base)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    again = load_model(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), task="classification")
    assert loaded.identity == again.identity
    named = dict(loaded.model.named_parameters())
    assert set(named) == {name for name, _ in tuned.named_parameters()}
    for name, value in tuned.named_parameters():
        if "original_module" in name:
            assert not named[name].any()
        else:
            torch.testing.assert_close(named[name], value)
    with pytest.raises(UserError, match=r"lacks 'classifier.*saved as RobertaForMaskedLM"):
        load_model(str(tmp_path / "base"), task="classification")
    # BERT's pooler is random in such a model too, and no adapter brings it.
    tiny_masked_bert().save_pretrained(tmp_path / "base")
    bert = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    tiny_classifier_lora(bert).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"lacks 'bert.pooler"):
        load_model(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
