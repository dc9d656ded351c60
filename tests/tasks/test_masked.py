"""Masked language models: every token of a text once, against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from task_gradients import assert_exact
from tiny import tiny_tokenizer
from tiny_tasks import some_words, tiny_masked_bert, tiny_masked_roberta, word_tokenizer
from torch import Tensor

from rapidin import Attributor, UserError
from rapidin.tasks.masked import GROUPS

TOKENIZER = word_tokenizer()
TEXTS = some_words(6)


def pseudo_loss(model: Any, text: str) -> Tensor:
    """The mean loss of the words of a text, each predicted while every seventh one is masked."""
    ids = torch.tensor(TOKENIZER(text)["input_ids"])
    words = list(range(1, len(ids) - 1))
    losses = []
    for first in range(GROUPS):
        hidden = words[first::GROUPS]
        if hidden:
            masked = ids.clone()
            masked[hidden] = TOKENIZER.mask_token_id
            logits = torch.log_softmax(model(input_ids=masked[None]).logits[0], 1)
            losses += [-logits[n, ids[n]] for n in hidden]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("make", [tiny_masked_bert, tiny_masked_roberta])
def test_the_gradients_of_masked_words(make: Any) -> None:
    model = make()
    source = Attributor(model, TOKENIZER, width=256, preconditioner="off").source
    assert source.task.name == "masked"
    records = [{"text": text} for text in TEXTS]
    assert_exact(source, records, [lambda t=t: pseudo_loss(model, t) for t in TEXTS])


def test_a_mask_in_a_query_is_filled_by_the_model(tmp_path: Path) -> None:
    model = tiny_masked_bert()
    records = [{"text": text} for text in some_words(20)]
    attributor = Attributor(model, TOKENIZER, width=256)
    cache = attributor.cache(records, tmp_path / "cache")
    text = "one <mask> fox <mask>"
    results = attributor.query(cache, [{"text": text}, records[4]], examples=records, rescore="exact")
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    best = model(input_ids=ids).logits[0].argmax(1)
    assert results[0].completion == TOKENIZER.decode(best[[2, 4]])
    assert results[0].generated
    assert results[1].top[0].row == 4
    generation = attributor.source.task.generation(model, {"text": text}, 8)
    batch = attributor.source.task.batch([generation.encoded], torch.device("cpu"))
    loss = attributor.source.task.losses(model, batch)
    logits = torch.log_softmax(model(input_ids=ids).logits[0], 1)
    torch.testing.assert_close(loss[0], -(logits[2, best[2]] + logits[4, best[4]]) / 2)


def test_what_a_masked_model_needs() -> None:
    with pytest.raises(UserError, match="no mask token"):
        Attributor(tiny_masked_bert(vocab_size=320), tiny_tokenizer())
    source = Attributor(tiny_masked_bert(), TOKENIZER).source
    assert source.example({"text": "<s> </s>"}).status.name == "NO_TARGET"


def test_positions_of_roberta_begin_after_the_padding() -> None:
    """Of 64 positions RoBERTa uses those after the padding's, so that longer texts would be an error."""
    source = Attributor(tiny_masked_roberta(), TOKENIZER, width=256).source
    sketch, status = source.sketches([source.example({"text": "fox " * 100})])
    assert not status.any()
    assert bool(sketch.any())
