"""Copies of a text share the forward pass of their linear layers, and each gets its own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rapidin.data.encoding import Encoded, Status
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.parameters import find_targets
from rapidin.gradients.shared_rows import SharedRows
from rapidin.tasks.causal import Causal, TokenBatch, _as_one_text

WIDTH, SEED = 64, 3
IDS = [5, 9, 2, 30, 7, 7, 11, 4, 21, 3]


def prefixes(ids: list[int] = IDS, first: int = 3) -> list[Encoded]:
    """A text for each token from `first` on, which ends with it and has the loss of it alone."""
    return [
        Encoded(ids[: end + 1], [n == end for n in range(end + 1)], Status.OK)
        for end in range(first, len(ids))
    ]


def batch_of(texts: list[Encoded]) -> TokenBatch:
    return TokenBatch.of(_as_one_text(texts))


def sketcher_of(model: Any, **options: Any) -> GradientSketcher:
    return GradientSketcher(model, find_targets(model), width=WIDTH, seed=SEED, **options)


@pytest.mark.parametrize("projection", ["tensor", "flat"])
@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_each_token_has_the_gradient_that_it_has_alone(model: Callable[[], Any], projection: Any) -> None:
    sketcher = sketcher_of(model(), projection=projection)
    texts = prefixes()
    batch = batch_of(texts)
    assert batch.alike
    assert batch.ids.tolist() == [IDS] * len(texts)
    together, losses = sketcher(batch)
    for n, text in enumerate(texts):
        alone, loss = sketcher(TokenBatch.of([(text.ids, text.target)]))
        torch.testing.assert_close(losses[n : n + 1], loss)
        torch.testing.assert_close(
            together[n : n + 1], alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max())
        )


class Counted(TorchFunctionMode):
    """Keeps the number of rows of each input of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[0].ndim == 3:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_linear_layers_run_once() -> None:
    model, texts = tiny_llama(), prefixes()
    with Counted() as counted:
        sketcher_of(model)(batch_of(texts))
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert counted.rows == [1] * len(linear)


def test_other_texts_have_their_own_forward_pass() -> None:
    texts = [Encoded([1, 2, 3], [False, False, True], Status.OK), Encoded([1, 4], [False, True], Status.OK)]
    batch = batch_of(texts)
    assert not batch.alike
    assert batch.mask.tolist() == [[True] * 3, [True, True, False]]
    with Counted() as counted:
        sketcher_of(tiny_llama())(batch)
    assert set(counted.rows) == {2}
    assert not batch_of(prefixes()[:1]).alike  # nothing to share
    pair = [(IDS, [False] * 9 + [True])] * 2
    assert not TokenBatch.of(pair, parts=2).alike  # two texts of one example


@pytest.mark.full
def test_a_compiled_model_is_not_shared() -> None:
    model, texts = tiny_llama(), prefixes()
    sketcher = sketcher_of(model)
    want, _ = sketcher(batch_of(texts))
    for name, module in (("whole", model), ("part", model.model.layers[0])):
        module.compile(backend="eager")
        compiled = sketcher_of(model)
        assert not compiled.shares_rows, name
        got, _ = compiled(batch_of(texts))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_a_model_whose_rows_differ_is_not_shared() -> None:
    """Such as one with experts that have room for so many tokens of a batch."""
    model, plain = tiny_llama(), tiny_llama()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):

        def by_row(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * (1 + torch.arange(len(output))[:, None, None])

        each.model.layers[0].mlp.register_forward_hook(by_row)
    texts = prefixes()
    sketcher = sketcher_of(model)
    got, losses = sketcher(batch_of(texts))
    assert not sketcher.shares_rows
    want, want_losses = sketcher_of(plain)(TokenBatch.of([(text.ids, text.target) for text in texts]))
    torch.testing.assert_close(losses, want_losses)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_a_model_may_change_its_hidden_states_in_place() -> None:
    model = tiny_llama()

    def in_place(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.mul_(2.0)

    model.model.layers[0].mlp.down_proj.register_forward_hook(in_place)
    texts = prefixes()
    sketcher = sketcher_of(model)
    got, _ = sketcher(batch_of(texts))
    for n, text in enumerate(texts):
        alone, _ = sketcher(TokenBatch.of([(text.ids, text.target)]))
        torch.testing.assert_close(got[n : n + 1], alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_differ_are_found(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 30, dtype=dtype)
    x = torch.randn(1, 5, 30, dtype=dtype).repeat(6, 1, 1)
    x[:, 0] *= 1000  # a token with large numbers hides no other
    with SharedRows(6) as share:
        got = F.linear(x, weight)
    assert not share.differ
    want = F.linear(x, weight)
    torch.testing.assert_close(got, want, rtol=0, atol=0.01 * float(want.abs().max()))
    for change in (0.05 * x[3, 2], torch.full((30,), torch.nan, dtype=dtype)):
        other = x.clone()
        other[3, 2] += change
        with SharedRows(6) as share:
            F.linear(other, weight)
        assert share.differ


@pytest.mark.parametrize(
    "case", ["gradient of the weight", "keyword", "two axes", "one row more", "autocast", "format"]
)
def test_what_is_left_alone(case: str) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3), requires_grad=case == "gradient of the weight")
    x = torch.randn(7 if case == "one row more" else 6, 5, 3).requires_grad_()  # rows are not the same
    if case == "two axes":
        x = x.detach()[:, 0].requires_grad_()
    if case == "format":
        weight = torch.nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    with (
        SharedRows(6) as share,
        torch.autocast("cpu", torch.bfloat16, enabled=case in ("autocast", "format")),
    ):
        got = F.linear(x, weight=weight) if case == "keyword" else F.linear(x, weight)
    assert not share.differ
    torch.testing.assert_close(got.float(), x @ weight.float().T, rtol=0.05, atol=0.05)
    (grad,) = torch.autograd.grad(got.float().sum(), x)
    torch.testing.assert_close(grad, weight.detach().float().sum(0).expand_as(x), rtol=0.02, atol=0.02)


def test_the_task_completes_beginnings() -> None:
    encoder: Any = None
    batch = Causal(encoder).batch(prefixes(), torch.device("cpu"))
    assert batch.alike
    assert batch.target.sum(1).tolist() == [1] * len(prefixes())
    assert batch.first == 2
