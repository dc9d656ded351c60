"""`--fuse`, and with it `--baselines`, in each task whose model reads texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama, tiny_lora
from tiny_tasks import (
    some_words,
    tiny_bart,
    tiny_bert,
    tiny_masked_bert,
    tiny_t5,
    word_tokenizer,
)

from rapidin import Attributor

TOKENIZER = word_tokenizer()
ONE, TWO, THREE = (some_words(12, seed=seed) for seed in range(3))
PROMPTS = [{"prompt": a, "completion": b} for a, b in zip(ONE, TWO, strict=True)]
PAIRS = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(ONE, TWO, THREE, strict=True)]
LABELS = [{"text": text, "label": n % 2} for n, text in enumerate(ONE)]


@pytest.mark.parametrize(
    ("make", "task", "records"),
    [
        (tiny_t5, None, PROMPTS),
        (tiny_bart, None, PROMPTS),
        (lambda: tiny_lora(tiny_llama(vocab_size=len(TOKENIZER))), "preference", PAIRS),
        (tiny_bert, None, LABELS),
        (tiny_masked_bert, None, [{"text": text} for text in ONE]),
    ],
    ids=["t5", "bart", "preference", "classification", "masked"],
)
def test_texts_of_a_task_are_compared(make: Any, task: str | None, records: Any, tmp_path: Path) -> None:
    attributor = Attributor(make(), TOKENIZER, width=64, **({} if task is None else {"task": task}))
    cache = attributor.cache(records, tmp_path / "cache")
    (result,) = attributor.query(cache, [records[3]], top_k=12, fuse=True, examples=records)
    assert len(result.top) == 12
    (itself,) = (hit for hit in result.top if hit.row == 3)
    assert itself.fused is not None
    assert (itself.fused.ranks["gradients"], itself.fused.ranks["hidden states"]) == (1, 1)
    assert itself.fused.ranks["BM25"] is not None
