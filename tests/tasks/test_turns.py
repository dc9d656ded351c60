"""Chats of several turns: which of the assistant's turns have a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from task_gradients import assert_exact
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor

from rapidin import Attributor, UserError

TOKENIZER = tiny_tokenizer(chat=True)


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


RECORDS = [
    chat("Hi", "Hello.", "Count", "One, two."),
    chat("Dog?", "Fox.", "Fox?", "Dog.", "Sure?", "Yes, lazy."),
    chat("Paris", "France"),
    chat("Tips", "Three.", "Thanks"),
]


def turn_loss(model: Any, record: dict[str, Any]) -> Tensor:
    """The mean loss of the last assistant turn, by where its text is."""
    text = TOKENIZER.apply_chat_template(record["messages"], tokenize=False)
    last = [message["content"] for message in record["messages"] if message["role"] == "assistant"][-1]
    start = text.rindex("<|assistant|>\n") + len("<|assistant|>\n")
    end = start + len(f"{last}</s>\n")
    encoding = TOKENIZER(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoding["input_ids"]
    logits = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], 1)
    counted = [t for t, (a, b) in enumerate(encoding["offset_mapping"]) if a < end and b > start]
    return -torch.stack([logits[t - 1, ids[t]] for t in counted]).mean()


def test_the_last_turn_alone() -> None:
    model = tiny_llama()
    source = Attributor(model, TOKENIZER, width=256, preconditioner="off", turns="last").source
    assert_exact(source, RECORDS, [lambda r=r: turn_loss(model, r) for r in RECORDS])
    every = Attributor(model, TOKENIZER, width=256, preconditioner="off").source
    for record in RECORDS:
        more, fewer = (sum(each.example(record).target) for each in (every, source))
        turns = sum(message["role"] == "assistant" for message in record["messages"])
        assert (more > fewer) == (turns > 1)


def test_turns_are_recorded_and_must_be_the_same(tmp_path: Path) -> None:
    model = tiny_llama()
    attributor = Attributor(model, TOKENIZER, width=128, turns="last")
    cache = attributor.cache(RECORDS * 4, tmp_path / "cache")
    assert cache.manifest.gradient["turns"] == "last"
    assert Attributor.like(cache.manifest, model, TOKENIZER).settings.turns == "last"
    with pytest.raises(UserError, match="other settings"):
        Attributor(model, TOKENIZER, width=128).query(cache, RECORDS[:1])
    with pytest.raises(UserError, match="unknown turns"):
        Attributor(model, TOKENIZER, turns="first")


def test_a_cache_of_a_causal_model_says_nothing_of_tasks(tmp_path: Path) -> None:
    """Manifests of the causal task are those of caches that are older than tasks."""
    attributor = Attributor(tiny_llama(), TOKENIZER, width=128)
    gradient = attributor.cache(RECORDS * 4, tmp_path / "cache").manifest.gradient
    assert not set(gradient) & {"task", "turns", "beta"}
    assert attributor.settings.task == "causal"
