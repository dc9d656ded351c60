"""Padding of texts, and the losses of a batch."""

from __future__ import annotations

import pytest
import torch
from own_gradients import texts
from tiny import tiny_gpt2, tiny_llama

from rapidin.tasks.causal import TokenBatch, batch_loss, example_losses


def test_texts_are_padded_on_the_right() -> None:
    batch = TokenBatch.of([([5, 6, 7, 8], [False, False, True, True]), ([9, 4], [False, True])])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.target.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.first == 0  # the position before the second text's target
    assert TokenBatch.of([([5, 6, 7], [False, False, True])]).first == 1
    assert TokenBatch.of([([5, 6], [False, False])]).first == 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_loss_of_a_batch_is_the_mean_over_all_target_tokens(make: type) -> None:
    model, given = make().requires_grad_(False), texts()
    batch = TokenBatch.of(given)
    tokens = sum(sum(flags[1:]) for _, flags in given)
    want = example_losses(model, batch, "sum").sum() / tokens
    torch.testing.assert_close(batch_loss(model, batch), want, rtol=1e-5, atol=0.0)
    assert abs(float(want - example_losses(model, batch).mean())) > 1e-3  # texts differ in length
