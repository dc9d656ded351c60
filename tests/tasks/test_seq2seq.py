"""Encoder-decoder models: the completion's loss given the prompt, against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from task_gradients import assert_exact
from tiny_tasks import some_words, tiny_bart, tiny_t5, word_tokenizer
from torch import Tensor

from rapidin import Attributor, UserError

TOKENIZER = word_tokenizer()
RECORDS = [{"prompt": a, "completion": b} for a, b in zip(some_words(6), some_words(6, seed=1), strict=True)]


def loss_of(model: Any, record: dict[str, str], *, total: bool = False) -> Tensor:
    labels = TOKENIZER(record["completion"])["input_ids"]
    begun = torch.tensor([[model.config.decoder_start_token_id, *labels[:-1]]])
    inputs = torch.tensor([TOKENIZER(record["prompt"])["input_ids"]])
    logits = torch.log_softmax(model(input_ids=inputs, decoder_input_ids=begun).logits[0], 1)
    losses = -logits[torch.arange(len(labels)), torch.tensor(labels)]
    return losses.sum() if total else losses.mean()


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_the_gradients_of_completions(make: Any, loss: str) -> None:
    model = make()
    source = Attributor(model, TOKENIZER, width=256, preconditioner="off", loss=loss).source
    assert source.task.name == "seq2seq"
    assert_exact(source, RECORDS, [lambda r=r: loss_of(model, r, total=loss == "sum") for r in RECORDS])


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_a_prompt_is_answered_and_the_answer_explained(make: Any, tmp_path: Path) -> None:
    model = make()
    records = [
        {"instruction": a, "output": b} for a, b in zip(some_words(20), some_words(20, seed=1), strict=True)
    ]
    attributor = Attributor(model, TOKENIZER, width=256)
    cache = attributor.cache(records, tmp_path / "cache")
    results = attributor.query(cache, [records[3], {"instruction": "one two"}], examples=records)
    assert results[0].top[0].row == 3
    assert results[1].generated
    answer = attributor.source.task.answer(model, "one two", 8)
    inputs = TOKENIZER("one two", return_tensors="pt")["input_ids"]
    want = model.generate(inputs, max_new_tokens=8, do_sample=False, num_beams=1)[0, 1:].tolist()
    assert answer.encoded.inputs["labels"] == [token for token in want if token != 0]
    with pytest.raises(UserError, match="no tokens with scores"):
        attributor.query(cache, [records[3]], targets="tokens")
    with pytest.raises(UserError, match="expected 'prompt' and 'completion'"):
        attributor.cache(["a text"], tmp_path / "other")
