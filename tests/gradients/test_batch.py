"""Padding of texts, and the losses of a batch."""

from __future__ import annotations

import pytest
import torch
from own_gradients import texts
from tiny import tiny_gpt2, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from rapidin.gradients.batch import Batch, batch_loss, cache_use, example_losses


def test_texts_are_padded_on_the_right() -> None:
    batch = Batch.of([([5, 6, 7, 8], [False, False, True, True]), ([9, 4], [False, True])])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.target.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.first == 0  # the position before the second text's target
    assert Batch.of([([5, 6, 7], [False, False, True])]).first == 1
    assert Batch.of([([5, 6], [False, False])]).first == 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_loss_of_a_batch_is_the_mean_over_all_target_tokens(make: type) -> None:
    model, given = make().requires_grad_(False), texts()
    batch = Batch.of(given)
    tokens = sum(sum(flags[1:]) for _, flags in given)
    want = example_losses(model, batch, "sum").sum() / tokens
    torch.testing.assert_close(batch_loss(model, batch), want, rtol=1e-5, atol=0.0)
    assert abs(float(want - example_losses(model, batch).mean())) > 1e-3  # texts differ in length


def test_the_loss_of_layers_that_share_keys_is_the_models_own() -> None:
    """Gemma 3n's last layers take keys and values from the cache: transformers 4.57 needs one for them."""
    config = AutoConfig.for_model(
        "gemma3n_text",
        vocab_size=99,
        vocab_size_per_layer_input=99,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[48] * 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        head_dim=8,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.1)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss
        (loss,) = example_losses(model, Batch.of([(ids[0].tolist(), [True] * 12)]))
    assert float(own) > 0.5
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=0.0)
    assert cache_use(model) is None
    assert cache_use(tiny_llama()) is False
