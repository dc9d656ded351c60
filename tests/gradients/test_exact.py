"""Exact gradients and their inner products, against the gradients that autograd forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from causal_types import tiny_causal
from own_gradients import SEED, WIDTH, Scaled, own_gradients, texts
from routed import with_linear_experts
from tiny import tiny_gpt2, tiny_llama, tiny_lora
from torch import Tensor, nn

from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.exact import ExactGradient, ExactQueries, lengths_of
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import find_targets
from rapidin.gradients.preconditioner import Preconditioner
from rapidin.gradients.rows import RowFactors
from rapidin.gradients.scale import Scale
from rapidin.tasks.causal import TokenBatch


class Halves(nn.Module):
    """A layer that runs twice, once with the even and once with the odd tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for first in (0, 1):
            output[:, first::2] = self.inner(x[:, first::2])
        return output


class Repeated(nn.Module):
    """A layer that runs twice in succession."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x + self.inner(x))
        return output


def wrapped(kind: Callable[[nn.Module], nn.Module], at: str = "mlp") -> Any:
    model = tiny_llama()
    setattr(model.model.layers[0], at, kind(getattr(model.model.layers[0], at)))
    return model


def adapted() -> Any:
    settings: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
    }
    return tiny_lora(tiny_causal("gpt_oss"), lora_dropout=0.0, fan_in_fan_out=False, **settings)


# How a model is made, and whether each of its parameters' gradients comes position by position.
MODELS: dict[str, tuple[Callable[[], Any], bool]] = {
    "gpt2": (tiny_gpt2, True),
    "llama": (tiny_llama, True),
    "biases": (lambda: tiny_llama(attention_bias=True, mlp_bias=True), True),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), True),
    "mixtral": (lambda: tiny_causal("mixtral"), True),
    "gpt_oss, adapter": (adapted, True),
    "llama4_text": (lambda: tiny_causal("llama4_text"), True),
    "jetmoe": (lambda: tiny_causal("jetmoe"), True),
    "dbrx": (lambda: tiny_causal("dbrx"), True),
    "linear experts": (lambda: with_linear_experts("gathered"), True),
    "linear experts, sorted": (lambda: with_linear_experts("sorted"), True),
    "layer of some tokens": (lambda: wrapped(Halves), False),
    "layer twice": (lambda: wrapped(Repeated), True),
    "autograd": (lambda: wrapped(Scaled), False),
    "gpt_oss": (lambda: tiny_causal("gpt_oss"), False),
    "mamba": (lambda: tiny_causal("mamba"), False),
}


def sketcher_of(kind: str, *, scaled: bool) -> GradientSketcher:
    model = MODELS[kind][0]()
    adapter = "adapter" in kind
    trained = LoadedModel.of(model, None).trained if adapter else None
    targets = find_targets(model, trained=trained, include=() if adapter else ["*"])
    torch.manual_seed(2)
    table = {t.name: Scale(*(torch.randn(n).exp() for n in t.matrix)) for t in targets}
    return GradientSketcher(
        model, targets, width=WIDTH, seed=SEED, preconditioner=Preconditioner([table]) if scaled else None
    )


def formed(sketcher: GradientSketcher, text: Any) -> list[Tensor]:
    """The gradient of each target by autograd, preconditioned, [E, O, I] float64."""
    own, found = own_gradients(sketcher.model, text), []
    for target in sketcher.targets:
        grad = own.get(target.name, torch.zeros(target.shape)).double()
        grad = grad.reshape(target.stack or 1, *target.matrix)
        if sketcher.preconditioner is not None:
            scale = sketcher.preconditioner.points[0][target.name]
            grad = grad * scale.rows[:, None] * scale.columns
        found.append(grad)
    return found


def batch_of(text: Any) -> TokenBatch:
    """A batch in which the output head sees all positions."""
    return replace(TokenBatch.of([text]), first=0)


def assert_near(got: Tensor, want: Tensor, size: Tensor) -> None:
    """Equal but for rounding: of gradients of these sizes, or of a hundred thousandth of the largest."""
    error = (got - want).abs() / (size + 1e-5 * size.max())
    assert float(error.max()) < 1e-4


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_lengths_and_products_are_those_of_autograd(kind: str, scaled: bool) -> None:
    sketcher = sketcher_of(kind, scaled=scaled)
    chosen = texts()[:4]
    exact = [sketcher.exact(TokenBatch.of([text])) for text in chosen]
    own = [formed(sketcher, text) for text in chosen]
    lengths = torch.tensor([[float(g.norm()) for g in of_text] for of_text in own]).double()
    difference = torch.tensor(
        [
            [float((a.as_formed().double().view(b.shape) - b).norm()) for a, b in zip(*both, strict=True)]
            for both in zip(exact, own, strict=True)
        ]
    )
    for n, gradients in enumerate(exact):
        assert_near(difference[n], torch.zeros(len(gradients)), lengths[n])
        assert_near(lengths_of(gradients), lengths[n], lengths[n])
    # One query, whose gradient may be formed or not, and several.
    for queries in (exact[:1], exact[1:3]):
        first = 0 if len(queries) == 1 else 1
        compared = ExactQueries(queries)
        for n, gradients in enumerate(exact):
            for m, gradient in enumerate(gradients):
                want = torch.stack([(own[first + q][m] * own[n][m]).sum() for q in range(len(queries))])
                size = lengths[first : first + len(queries), m] * lengths[n, m]
                if float(lengths[:, m].max()) < 1e-5 * float(lengths.max()):
                    continue  # rounding, as the gradients of the biases of attention's keys
                torch.testing.assert_close(
                    compared.products(m, gradient), want, rtol=0, atol=float(1e-4 * size.max() + 1e-12)
                )


@pytest.mark.parametrize("kind", MODELS)
def test_products_of_positions(kind: str) -> None:
    sketcher = sketcher_of(kind, scaled=True)
    batches = [batch_of(text) for text in texts()[1:3]]
    if not MODELS[kind][1]:
        with pytest.raises(TypeError, match="does not come token by token"):
            sketcher.exact(batches[0], by_position=True)
        return
    queries = ExactQueries([sketcher.exact(batch) for batch in batches])
    for batch in batches:
        whole, positions = sketcher.exact(batch), sketcher.exact(batch, by_position=True)
        for m, (gradient, by_position) in enumerate(zip(whole, positions, strict=True)):
            products = queries.position_products(m, by_position, batch.length)
            assert products.shape == (2, batch.length)
            want = queries.products(m, gradient)
            size = float(products.abs().sum(1).max())
            torch.testing.assert_close(products.sum(1), want, rtol=1e-3, atol=1e-5 * size)


def test_a_position_has_its_own_part() -> None:
    """Against the products with the parts of single tokens of a stack of experts, row by row."""
    sketcher = sketcher_of("mixtral", scaled=False)
    batch, other = (batch_of(text) for text in texts()[1:3])
    queries = ExactQueries([sketcher.exact(other)])
    for m, gradient in enumerate(sketcher.exact(batch, by_position=True)):
        if not sketcher.targets[m].stack:
            continue
        factors, query = gradient.factors, sketcher.exact(other)[m].as_formed()
        assert factors is not None
        assert factors.columns is not None
        assert factors.experts is not None
        assert factors.tokens is not None
        want = torch.zeros(batch.length)
        for row, column, expert, token in zip(
            factors.rows, factors.columns, factors.experts, factors.tokens, strict=True
        ):
            want[token] += row @ query[expert] @ column
        got = queries.position_products(m, gradient, batch.length)[0].float()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "tied", "biases", "linear experts"])
def test_factors_become_float32_once(kind: str) -> None:
    sketcher = sketcher_of(kind, scaled=False)
    sketcher.model.to(torch.bfloat16)
    for gradient in sketcher.exact(batch_of(texts()[0])):
        kept = [gradient.formed]
        if gradient.factors is not None:
            kept += [gradient.factors.columns, gradient.factors.rows]
        assert {each.dtype for each in kept if each is not None} == {torch.float32}


def test_what_takes_fewer_numbers_is_kept() -> None:
    few, many = 2, 40
    for rows in (few, many):
        factors = RowFactors(torch.randn(rows, 8), torch.randn(rows, 12), None, torch.arange(rows) % 3)
        gradient = ExactGradient((3, 12, 8), None, factors)
        kept = gradient.smallest()
        assert kept.elements == min(rows * 20, 3 * 12 * 8)
        assert (kept.formed is None) == (rows == few)
        torch.testing.assert_close(kept.as_formed(), gradient.as_formed())
        assert kept.length() == pytest.approx(gradient.length(), rel=1e-5)


def test_a_batch_of_several_examples_is_refused() -> None:
    sketcher = sketcher_of("llama", scaled=False)
    with pytest.raises(ValueError, match="one example"):
        sketcher.exact(TokenBatch.of(texts()))
