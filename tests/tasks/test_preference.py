"""Preferences: DPO's and KTO's losses by hand, one sketch a pair, and what may be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import caller
from task_gradients import assert_exact
from tiny import records as plain_records
from tiny import tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F

from rapidin import Attributor, UserError
from rapidin.data.examples import open_examples
from rapidin.gradients.source import GradientSource

TOKENIZER = tiny_tokenizer(chat=True)
BETA = 0.3


def pairs(n: int = 6) -> list[dict[str, Any]]:
    made = plain_records(n)
    return [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in zip(made, made[1:] + made[:1], strict=True)
    ]


def verdicts(n: int = 6) -> list[dict[str, Any]]:
    return [record | {"label": row % 2 == 0} for row, record in enumerate(plain_records(n))]


def chats(n: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "chosen": [{"role": "assistant", "content": pair["chosen"]}],
            "rejected": [{"role": "assistant", "content": pair["rejected"]}],
        }
        for pair in pairs(n)
    ]


def tuned() -> Any:
    return tiny_lora(tiny_llama())


def source_of(model: Any, task: str, **settings: Any) -> GradientSource:
    defaults = {"width": 256, "preconditioner": "off", "beta": BETA, "at": 0.5}
    return Attributor(model, TOKENIZER, task=task, **defaults | settings).source


def log_probability(model: Any, before: str, after: str) -> Tensor:
    """Of `after`, given `before`, its tokens one by one."""
    encoding = TOKENIZER(before + after, return_offsets_mapping=True)
    ids = torch.tensor([encoding["input_ids"]])
    logits = torch.log_softmax(model(input_ids=ids).logits[0], 1)
    counted = [t for t, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(before)]
    return torch.stack([logits[t - 1, ids[0, t]] for t in counted]).sum()


def margin(model: Any, before: str, after: str) -> Tensor:
    """The log-probability less that without the adapter."""
    with torch.no_grad(), model.disable_adapter():
        reference = log_probability(model, before, after)
    return log_probability(model, before, after) - reference


def texts_of(pair: dict[str, Any], name: str) -> tuple[str, str]:
    if isinstance(pair["prompt"], str):
        return pair["prompt"], pair[name] + "</s>"
    return (
        f"<|user|>\n{pair['prompt'][0]['content']}</s>\n<|assistant|>\n",
        f"{pair[name][0]['content']}</s>\n",
    )


@pytest.mark.parametrize("make", [pairs, chats])
@pytest.mark.parametrize("at", [0.5, 1.0])
def test_a_pair_has_the_gradient_of_dpos_loss(make: Any, at: float) -> None:
    model, records = tuned(), make()

    def loss(pair: dict[str, Any]) -> Tensor:
        chosen, rejected = (margin(model, *texts_of(pair, name)) for name in ("chosen", "rejected"))
        return -F.logsigmoid(BETA * (chosen - rejected))

    source = source_of(model, "preference", at=at)
    assert_exact(source, records, [lambda p=p: loss(p) for p in records])


def test_a_verdict_has_the_gradient_of_ktos_loss() -> None:
    model, records = tuned(), verdicts()

    def loss(record: dict[str, Any]) -> Tensor:
        sign = 1 if record["label"] else -1
        return 1 - torch.sigmoid(sign * BETA * margin(model, *texts_of(record, "completion")))

    assert_exact(source_of(model, "kto"), records, [lambda r=r: loss(r) for r in records])


def test_the_reference_of_a_model_that_was_tuned_in_full() -> None:
    """The margins of examples are those of the two models, whichever weights the model has now."""
    from rapidin.gradients.model import LoadedModel
    from rapidin.gradients.path import base_path

    base, model = tiny_llama(seed=0), tiny_llama(seed=1)
    loaded = LoadedModel(model, TOKENIZER, base_path(model, base, "model", "base"))
    source = Attributor(loaded, task="preference", width=256, preconditioner="off", at=(0.25, 1.0)).source
    prepared = source.prepared([source.example(pair) for pair in pairs()])
    for pair, example in zip(pairs(), prepared, strict=True):
        for name, found in zip(("chosen", "rejected"), example.reference, strict=True):
            want = log_probability(base, *texts_of(pair, name)).item()
            assert found == pytest.approx(want, rel=1e-4)
    assert torch.equal(model.lm_head.weight, tiny_llama(seed=1).lm_head.weight)


def test_without_the_untuned_model_there_is_no_reference() -> None:
    with pytest.raises(UserError, match=r"before it was tuned: no base model is given.*`base`"):
        source_of(tiny_llama(), "preference", at=1.0)


@pytest.mark.parametrize(("task", "make"), [("preference", pairs), ("kto", verdicts)])
def test_a_completion_is_explained_by_preferences(task: str, make: Any, tmp_path: Path) -> None:
    """A query may be an example of the task, a completion, or a prompt that the model answers."""
    model, records = tuned(), make(20)
    attributor = Attributor(model, TOKENIZER, task=task, width=256, beta=BETA)
    cache = attributor.cache(records, tmp_path / "cache")
    gradient = cache.manifest.gradient
    assert (gradient["task"], gradient["beta"]) == (task, BETA)
    asked = [records[3], ("Say one: ", "two three"), "Say one: "]
    results = attributor.query(cache, asked, examples=records)
    assert results[0].top[0].row == 3
    assert [result.generated for result in results] == [False, False, True]
    assert "rejected" in results[0].completion or task == "kto"
    # The gradient of a completion is that of the causal task.
    causal = Attributor(model, TOKENIZER, width=256, at=0.5, preconditioner="off").source
    plain = source_of(model, task, width=256)
    of_task = plain.task.generation(model, {"prompt": "Say one: ", "completion": "two three"}, 8)
    both = [causal.example({"prompt": "Say one: ", "completion": "two three"})]
    torch.testing.assert_close(plain.sketches([of_task.encoded])[0], causal.sketches(both)[0])
    with pytest.raises(UserError, match="other settings"):
        Attributor(model, TOKENIZER, task=task, width=256, beta=2 * BETA).query(cache, asked)


def test_a_cache_of_preferences_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = caller(capsys)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    model.name_or_path = str(tmp_path / "model")
    tiny_lora(model).save_pretrained(tmp_path / "adapter")
    for name, records in (("train", pairs(20)), ("chats", chats(20)), ("asked", pairs(20)[4:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    made = run(
        *("cache", tmp_path / "model", "--adapter", tmp_path / "adapter"),
        *("--task", "preference", "--beta", "0.2"),
        *("--data", tmp_path / "train.jsonl", "--out", tmp_path / "cache"),
    )
    assert made.code == 0, made.err
    asked = run("query", tmp_path / "cache", "--data", tmp_path / "asked.jsonl", "--json", "-")
    assert asked.code == 0, asked.err
    assert json.loads(asked.out)["queries"][0]["top"][0]["index"] == 4
    shown = run("query", tmp_path / "cache", "--ask", "one two", "--completion", "three")
    assert shown.code == 0, shown.err
    assert "rejected:" in shown.out
    told = run("info", tmp_path / "cache")
    assert "of the task 'preference', beta 0.2" in " ".join(told.out.split())
    # A question about a cache of chats is put into the chat template.
    made = run(
        *("cache", tmp_path / "model", "--adapter", tmp_path / "adapter", "--task", "preference"),
        *("--data", tmp_path / "chats.jsonl", "--out", tmp_path / "chats"),
    )
    assert made.code == 0, made.err
    asked = run("query", tmp_path / "chats", "--ask", "one", "--completion", "two", "--json", "-")
    assert json.loads(asked.out)["queries"][0]["prompt"] == "<|user|>\none</s>\n<|assistant|>\n"
    refused = run(
        "cache", tmp_path / "model", "--data", tmp_path / "train.jsonl", "--out", tmp_path / "other"
    )
    assert refused.code == 2
    assert "expected 'prompt' and 'completion'" in refused.err


def test_what_is_not_read_of_a_pairs_prompt_is_counted_once() -> None:
    image = {"type": "image"}
    asked = {"role": "user", "content": [image, {"type": "text", "text": "Say "}]}
    other = {"role": "assistant", "content": [image, {"type": "text", "text": "six"}]}
    pair = chats(1)[0] | {"prompt": [asked], "rejected": [other]}
    source = source_of(tuned(), "preference")
    for _ in range(2):
        notes = source.check_records(open_examples([pair], forms=source.task.forms))
        assert notes == ["parts of messages that are not text are not read: 2 image"]


@pytest.mark.parametrize("rows", range(1, 12))
def test_a_batch_has_never_as_many_rows_as_tokens(rows: int) -> None:
    """Rows of two texts each, all of 8 tokens."""
    source = source_of(tuned(), "preference")
    ids = list(range(8))
    example = source.task.filler()
    texts = {"texts": [(ids, [False] * 4 + [True] * 4)] * 2, "sign": 1.0, "plain": False}
    batch = source.task.batch([type(example)(texts, 16)] * rows, torch.device("cpu"))
    assert batch.ids.shape[0] == 2 * rows != batch.ids.shape[1]
    assert batch.length == 2 * batch.ids.shape[1]
