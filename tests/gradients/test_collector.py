"""Per-example sketches by hooks against the sketch of each example's own autograd gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from own_gradients import SEED, WIDTH, Scaled, own_gradients, own_sketches, relative_error, texts
from tiny import tiny_gpt2, tiny_llama, tiny_lora

from rapidin import ops
from rapidin.errors import UserError
from rapidin.gradients.calls import NotBatchedError
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import block_seed, find_targets
from rapidin.tasks.causal import TokenBatch, example_losses


class Unused(torch.nn.Module):
    """A module that uses none of its parameters."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = [inner]
        self.gain = torch.nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner[0](x)
        return output


class Changing(Unused):
    """A module that changes its parameter in place when it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x) * self.gain
        with torch.no_grad():
            self.gain.mul_(1.0)
        return output


MODELS = {
    "llama": lambda: tiny_llama(),
    "llama tied": lambda: tiny_llama(tie_word_embeddings=True),
    "llama biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "gpt2": lambda: tiny_gpt2(),
    "lora": lambda: tiny_lora(tiny_llama()),
    "lora gpt2": lambda: tiny_lora(tiny_gpt2()),
    "lora saved": lambda: tiny_lora(tiny_llama(), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_has_its_own_gradients_sketch(kind: str, loss: str) -> None:
    model = MODELS[kind]()
    adapter = "lora" in kind
    trained = LoadedModel.of(model, None).trained if adapter else None
    # An adapter's frozen originals take no part in the loss, so everything else is asked for by name.
    targets = find_targets(model, trained=trained, include=() if adapter else ["*"])
    if not adapter:
        assert {t.name for t in targets} == {name for name, _ in model.named_parameters()}
    want = torch.stack([own_sketches(model, targets, text, loss) for text in texts()])
    sketcher = GradientSketcher(
        model, targets, width=WIDTH, seed=SEED, losses=partial(example_losses, kind=loss)
    )
    assert not sketcher.single_names
    got, losses = sketcher(TokenBatch.of(texts()))
    assert relative_error(got, want) < 1e-4
    assert losses.shape == (5,)
    assert bool((losses > 0).all())


@pytest.mark.parametrize("kind", MODELS)
def test_padding_batch_and_order_change_nothing(kind: str) -> None:
    model = MODELS[kind]()
    trained = LoadedModel.of(model, None).trained if "lora" in kind else None
    targets = find_targets(model, trained=trained, include=() if trained else ["*"])
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    alone = torch.cat([sketcher(TokenBatch.of([text]))[0] for text in texts()])
    order = [3, 0, 4, 2, 1]
    shuffled, _ = sketcher(TokenBatch.of([texts()[n] for n in order]))
    padded, _ = sketcher(TokenBatch.of([*texts(), ([5] * 60, [True] * 60)]))
    assert relative_error(shuffled, alone[order]) < 1e-4
    assert relative_error(padded[:5], alone) < 1e-4


def test_default_targets_are_the_linear_layers_of_the_blocks() -> None:
    names = {t.name for t in find_targets(tiny_llama())}
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    kinds += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == {f"model.layers.{n}.{kind}.weight" for n in range(2) for kind in kinds}
    assert all(".h." in t.name and t.uses[0].kind == "conv1d" for t in find_targets(tiny_gpt2()))


def test_default_targets_of_an_adapter_are_what_it_trains() -> None:
    model = tiny_lora(tiny_llama(), modules_to_save=["lm_head"])
    names = [t.name for t in find_targets(model, trained=LoadedModel.of(model, None).trained)]
    assert len([n for n in names if "lora_" in n]) == 8
    assert [n for n in names if "lora_" not in n] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]


def test_no_parameter_gets_a_gradient_and_all_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    before = [p.requires_grad for p in model.parameters()]
    GradientSketcher(model, find_targets(model), width=WIDTH, seed=SEED)(TokenBatch.of(texts()))
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_flat_projection_is_that_of_the_formed_gradient() -> None:
    model = tiny_gpt2()
    targets = find_targets(model, include=["*"])
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED, projection="flat")
    got, _ = sketcher(TokenBatch.of(texts()))
    for row, text in enumerate(texts()):
        grads = own_gradients(model, text)
        for n, target in enumerate(targets):
            seed = block_seed(SEED, target.name)
            want = ops.flat_sketch([grads[target.name].flatten()], WIDTH, seed=seed, backend="reference")
            assert relative_error(got[row, n], want) < 1e-4, target.name


def test_an_unknown_kind_of_parameter_comes_by_autograd_one_example_at_a_time() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    targets = find_targets(model, include=["gain", "q_proj"])
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    with pytest.raises(NotBatchedError) as raised:
        sketcher(TokenBatch.of(texts()))
    assert [raised.value.name] == sketcher.single_names == ["model.layers.0.mlp.gain"]
    for text in texts():
        got, _ = sketcher(TokenBatch.of([text]))
        assert relative_error(got[0], own_sketches(model, targets, text)) < 1e-4


class Mixing(torch.nn.Module):
    """A layer that sees only some tokens of the batch, as a routed expert does.

    lose: hand the tokens over in a way that does not show which they are.
    """

    def __init__(self, inner: torch.nn.Module, lose: bool = False) -> None:
        super().__init__()
        self.inner, self.lose = inner, lose

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen = flat[:, 0] > flat[:, 1]
        mask = chosen[:, None]
        seen = torch.masked_select(flat, mask).view(-1, flat.shape[1]) if self.lose else flat[chosen]
        return torch.zeros_like(flat).masked_scatter(mask, self.inner(seen)).view(x.shape)


def test_a_layer_that_sees_some_tokens_is_batched() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj = Mixing(model.model.layers[1].self_attn.o_proj)
    targets = find_targets(model)
    want = torch.stack([own_sketches(model, targets, text) for text in texts()])
    got, _ = GradientSketcher(model, targets, width=WIDTH, seed=SEED)(TokenBatch.of(texts()))
    assert relative_error(got, want) < 1e-4


def test_a_layer_that_mixes_examples_is_noticed_and_done_one_at_a_time() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj = Mixing(model.model.layers[1].self_attn.o_proj, lose=True)
    targets = find_targets(model)
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    with pytest.raises(NotBatchedError):
        sketcher(TokenBatch.of(texts()))
    for text in texts():
        got, _ = sketcher(TokenBatch.of([text]))
        assert relative_error(got[0], own_sketches(model, targets, text)) < 1e-4


def test_a_norm_among_tokens_of_no_batch_is_done_one_example_at_a_time() -> None:
    class Flat(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.flatten(0, 1)).view(x.shape)

    model = tiny_llama()
    layer = model.model.layers[1]
    layer.input_layernorm = Flat(layer.input_layernorm)
    targets = find_targets(model, include=["norm"])
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    with pytest.raises(NotBatchedError):
        sketcher(TokenBatch.of(texts()))
    for text in texts():
        got, _ = sketcher(TokenBatch.of([text]))
        assert relative_error(got[0], own_sketches(model, targets, text)) < 1e-4


def test_a_parameter_that_its_own_module_does_not_use_has_no_gradient() -> None:
    model = tiny_llama()
    model.model.norm = Unused(model.model.norm)
    targets = find_targets(model, include=["*"])
    got, _ = GradientSketcher(model, targets, width=WIDTH, seed=SEED)(TokenBatch.of(texts()))
    n = next(n for n, target in enumerate(targets) if target.name.endswith("norm.gain"))
    assert not got[:, n].any()
    want = torch.stack([own_sketches(model, targets, text) for text in texts()])
    assert relative_error(got, want) < 1e-4


def test_a_module_that_changes_its_parameters_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].input_layernorm = Changing(model.model.layers[1].input_layernorm)
    sketcher = GradientSketcher(model, find_targets(model), width=WIDTH, seed=SEED)
    with pytest.raises(UserError, match="changes its parameters in place"):
        sketcher(TokenBatch.of(texts()))
