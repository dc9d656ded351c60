"""The check before caching finds gradients that hooks would take wrongly, and what is then done is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_gradients import SEED, WIDTH, own_sketches, relative_error, texts
from tiny import tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor, nn

from rapidin.data.encoding import Encoded, Status, by_length
from rapidin.gradients.calls import ChangedInputError, NotBatchedError
from rapidin.gradients.check import MOST_ELEMENTS, GradientCheck, Tolerance, check_pair
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.dropout import DropoutMask
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import find_targets
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import TokenBatch


def encoded(n: int = 5) -> list[Encoded]:
    return [Encoded(ids, target, Status.OK) for ids, target in texts(n=n)]


def source_of(model: Any, **settings: Any) -> GradientSource:
    chosen = {"width": WIDTH, "seed": SEED, "preconditioner": "off", "at": 1.0} | settings
    return GradientSource(LoadedModel.of(model, tiny_tokenizer()), GradientSettings(**chosen))


def check_of(source: GradientSource, most_elements: int = MOST_ELEMENTS) -> GradientCheck:
    check = source.checked(encoded(), most_elements)
    assert check is not None
    return check


def assert_right(source: GradientSource, check: GradientCheck) -> None:
    """After the check every text's sketches are those of plain autograd, in batches of any size."""
    expected = torch.stack([own_sketches(source.loaded.model, source.targets, text) for text in texts()])
    for n in (5, 4, 3, 2):
        sketches, status = source.with_check(check).sketches(encoded()[:n])
        assert not status.any()
        # A gradient that is zero but for rounding is as good as any other such gradient.
        wrong = (sketches - expected[:n]).norm(dim=-1) > 1e-4 * expected[:n].norm(dim=-1) + 1e-6
        assert not wrong.any(), (n, [source.targets[at].name for at in wrong.any(0).nonzero()[:, 0]])


# ------------------------------------------------------------------------------------- what is right

RIGHT: dict[str, Callable[[], GradientSource]] = {
    "llama": lambda: source_of(tiny_llama()),
    "all of llama": lambda: source_of(tiny_llama(), include=("*",)),
    "tied": lambda: source_of(tiny_llama(tie_word_embeddings=True), include=("*",)),
    "gpt2": lambda: source_of(tiny_gpt2(), include=("*",)),
    "lora": lambda: source_of(tiny_lora(tiny_llama())),
    "dropout": lambda: source_of(tiny_llama(), dropout=DropoutMask(0.3, 1)),
    "several points": lambda: source_of(tiny_lora(tiny_llama()), at=(0.1, 1.0)),
    "flat": lambda: source_of(tiny_llama(), projection="flat"),
    "rapidgrad": lambda: source_of(tiny_llama(), projection="rapidgrad", width=1024),
    # The gradient of a key's bias is zero in exact arithmetic, so all of it is rounding.
    "biases": lambda: source_of(tiny_llama(attention_bias=True, mlp_bias=True), include=("*",)),
    "bfloat16": lambda: source_of(tiny_llama().bfloat16(), include=("*",)),
    "half": lambda: source_of(tiny_llama().half(), include=("*",)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_model_passes(kind: str) -> None:
    source = RIGHT[kind]()
    check = check_of(source)
    assert not check.by_autograd
    assert not check.mixed, check.text
    assert not check.unchecked
    assert check.compared == check.total == len(source.targets)
    assert check.worst < Tolerance.of(source.loaded.model).autograd
    assert check.worst > 0 or source.settings.projection != "tensor"  # flat sketches are of the same sums
    after = source.with_check(check)
    assert not after.batches.one_at_a_time
    assert torch.equal(after.sketches(encoded())[0], source.sketches(encoded())[0])
    assert GradientCheck.from_json(check.to_json()) == check


def test_nothing_of_the_model_is_changed() -> None:
    source = source_of(tiny_llama().train())
    model = source.loaded.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    check_of(source)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# ------------------------------------------------------------------------------- layers of another kind


class Grouped(nn.Linear):
    """A linear layer of two groups, which its type does not tell: each half of the outputs sees a half of the
    inputs, as DeepSeek-V4's."""

    def forward(self, x: Tensor) -> Tensor:
        halves = x.shape[-1] // 2, self.weight.shape[0] // 2
        first = x[..., : halves[0]] @ self.weight[: halves[1], : halves[0]].T
        second = x[..., halves[0] :] @ self.weight[halves[1] :, : halves[0]].T
        return torch.cat([first, second], -1)


class Ternary(nn.Linear):
    """A weight of -1, 0 and 1 times its mean size, with a straight-through gradient that is clipped."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        weight = (self.weight / scale).clamp(-1, 1)
        rounded = weight + (weight.round() - weight).detach()
        return nn.functional.linear(x, rounded * scale, self.bias)


class ScaledWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 3.0, self.bias)


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class FirstOf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.inner(x)[0]
        return first


class GatedNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, n))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        gated = x if gate is None else x * torch.nn.functional.silu(gate)
        return gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Gating(nn.Module):
    """Gives a norm its gate by name."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = GatedNorm(n)
        self.gate = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, gate=self.gate(x))


class Direct(nn.Module):
    """Uses the weight of a linear layer that it never calls, as Mamba does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T


class Halfway(Direct):
    """Calls the layer and uses its weight once more beside."""

    def forward(self, x: Tensor) -> Tensor:
        called: Tensor = self.inner(x)
        return called + 0.5 * (x @ self.inner.weight.T)


def replaced(kind: Any, bias: bool = False) -> Any:
    """A tiny Llama whose first output projection is a layer of another kind."""
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    layer = kind(32, 32, bias=bias)
    layer.load_state_dict(attention.o_proj.state_dict(), strict=False)
    attention.o_proj = layer
    return model


def wrapped(wrapper: Any, kind: Any = None) -> Any:
    model = tiny_llama() if kind is None else replaced(kind)
    attention = model.model.layers[0].self_attn
    attention.o_proj = wrapper(attention.o_proj)
    return model


O_PROJ = "model.layers.0.self_attn.o_proj"
WRONG = {
    "grouped": lambda: (replaced(Grouped), [f"{O_PROJ}.weight"]),
    "ternary": lambda: (replaced(Ternary), [f"{O_PROJ}.weight"]),
    "scaled": lambda: (replaced(ScaledWeight, bias=True), [f"{O_PROJ}.weight"]),
    "called and used directly": lambda: (wrapped(Halfway), [f"{O_PROJ}.inner.weight"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_layer_with_another_gradient_goes_by_autograd(kind: str) -> None:
    model, names = WRONG[kind]()
    source = source_of(model)
    check = check_of(source)
    assert list(check.by_autograd) == names
    assert all(error > 0.1 for error in check.by_autograd.values())
    assert names[0] in check.text
    after = source.with_check(check)
    assert after.sketcher.single_names == names
    assert after.batches.one_at_a_time
    assert names[0] in after.batches.why_one_at_a_time
    assert_right(source, check)


def test_without_the_check_such_a_layer_would_be_wrong() -> None:
    source = source_of(WRONG["grouped"]()[0])
    with pytest.raises(AssertionError, match="o_proj"):
        assert_right(source, GradientCheck())


def test_a_gated_norm_runs_again_with_its_gate() -> None:
    model = tiny_llama()
    model.model.layers[0].post_attention_layernorm = Gating(32)
    source = source_of(model, include=("norm",))
    check = check_of(source)
    assert not check.by_autograd
    assert not check.mixed, check.text
    assert_right(source, check)


def test_the_sample_of_a_large_model_stands_for_its_kinds() -> None:
    model = tiny_llama(num_hidden_layers=5)
    check = check_of(source_of(model), 1000)
    assert (check.compared, check.total) == (21, 35)
    assert "21 of 35 parameters" in check.text
    for layer in model.model.layers:
        attention = layer.self_attn
        grouped = Grouped(32, 32, bias=False)
        grouped.load_state_dict(attention.o_proj.state_dict())
        attention.o_proj = grouped
    source = source_of(model)
    check = check_of(source, 1000)
    assert len(check.by_autograd) == 5  # the others of that kind are compared as well
    assert check.compared == 23
    assert_right(source, check)


# --------------------------------------------------------------------------------------------- batches


class TimeFirst(nn.Module):
    """Runs a layer on [T, B, F], or with `flat` on [T * B, F]."""

    def __init__(self, inner: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.inner, self.flat = inner, flat

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        if self.flat:
            return self.inner(turned.reshape(-1, x.shape[-1])).view(*turned.shape[:2], -1).transpose(0, 1)
        output: Tensor = self.inner(turned).transpose(0, 1)
        return output


class BatchNorm(nn.Module):
    """Centres features over all tokens of the batch, as batch norm does when it is trained."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y - y.mean((0, 1), keepdim=True)


class DenseExperts(nn.Module):
    """Experts that all see every token: [E, B * T, F]."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32, bias=False)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, experts)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        copies = x.reshape(1, -1, x.shape[-1]) * self.scale
        output: Tensor = self.mix(copies).mean(0)
        return output.view(x.shape)


class ChunksFirst(nn.Module):
    """Runs a layer on chunks of 4 tokens, [chunks, B, 4, F]: of some batches there are B chunks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        rows, length, size = x.shape
        padded = nn.functional.pad(x, (0, 0, 0, -length % 4))
        chunks = padded.view(rows, -1, 4, size).transpose(0, 1)
        output: Tensor = self.inner(chunks).transpose(0, 1).reshape(rows, -1, size)
        return output[:, :length]


MIXED: dict[str, Callable[[], Any]] = {
    "time first, flat": lambda: wrapped(lambda inner: TimeFirst(inner, flat=True)),
    "batch norm": lambda: wrapped(BatchNorm),
    "chunks first": lambda: wrapped(ChunksFirst),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_layer_that_mixes_examples_has_them_one_at_a_time(kind: str) -> None:
    source = source_of(MIXED[kind]())
    check = check_of(source)
    assert not check.by_autograd
    assert check.mixed
    assert check.mixed in check.why_single
    after = source.with_check(check)
    assert after.batches.one_at_a_time
    assert check.mixed in after.batches.why_one_at_a_time
    assert_right(source, check)


ELSEWHERE: dict[str, Callable[[], Any]] = {
    "two outputs": lambda: wrapped(FirstOf, TwoOutputs),
    "weight used directly": lambda: wrapped(Direct),
    "time first": lambda: wrapped(TimeFirst),
    "two dense experts": lambda: wrapped(lambda _: DenseExperts(2)),
    "three dense experts": lambda: wrapped(lambda _: DenseExperts(3)),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_layer_is_right_whose_products_or_tokens_are_followed(kind: str) -> None:
    source = source_of(ELSEWHERE[kind]())
    check = check_of(source)
    assert not check.by_autograd
    assert not check.mixed, check.text
    assert not source.with_check(check).batches.one_at_a_time
    assert_right(source, check)


def test_no_batch_has_as_many_examples_as_tokens() -> None:
    model = wrapped(TimeFirst)
    sketcher = GradientSketcher(model, find_targets(model), width=WIDTH, seed=SEED)
    square = [(list(range(5, 10)), [False] + [True] * 4)] * 5
    with pytest.raises(NotBatchedError):  # the axes could be taken for each other
        sketcher(TokenBatch.of(square))
    alike = [Encoded(ids, target, Status.OK) for ids, target in square]
    for budget in range(1, 200):
        for n in (1, 2, 4, 5, 6, 11, 30):
            batches = by_length(range(n), alike * 6, budget)
            assert sorted(number for batch in batches for number in batch) == list(range(n))
            assert all(len(batch) != 5 for batch in batches)
            assert all(len(batch) * 5 <= max(budget, 5) for batch in batches)
    assert by_length(range(3), [Encoded([1], [True], Status.OK)] * 3, 1) == [[0], [1], [2]]


# ------------------------------------------------------------------------- what autograd cannot give


class Packed(nn.Linear):
    """A weight in int8, whose scale the layer knows."""

    def pack(self) -> Packed:
        self.scale = float(self.weight.detach().abs().max()) / 127
        packed = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_a_packed_layer_is_named_and_has_the_gradient_of_the_unpacked_one() -> None:
    model = replaced(Packed)
    attention = model.model.layers[0].self_attn
    attention.o_proj.pack()
    source = source_of(model)
    check = check_of(source)
    assert check.unchecked == (f"{O_PROJ}.weight",)
    assert f"1 not checked, such as '{O_PROJ}.weight'" in check.text
    assert not check.by_autograd
    plain = replaced(nn.Linear)
    plain.model.layers[0].self_attn.o_proj.weight.data = attention.o_proj.weight * attention.o_proj.scale
    expected, _ = source_of(plain).sketches(encoded())
    got, _ = source.with_check(check).sketches(encoded())
    assert relative_error(got, expected) < 1e-4


class InPlace(nn.Module):
    """Changes the input of a layer after the layer has read it. Autograd needs the input for the gradient
    of the weight, and refuses; without that gradient nobody would notice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        output: Tensor = self.inner(x)
        x.mul_(2.0)
        return output + 0.1 * x


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    source = source_of(wrapped(InPlace))
    with pytest.raises(ChangedInputError, match=r"changes the input of '.*o_proj.inner.weight' in place"):
        source.sketches(encoded())
    with pytest.raises(ChangedInputError, match=r"o_proj.inner.weight' in place .* used; leave it out with"):
        check_of(source)


class InPlaceNorm(nn.Module):
    """A norm that computes in another format, so that autograd keeps a copy of the input that is changed."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, n))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


def test_an_input_that_is_changed_in_place_goes_by_autograd_where_that_works() -> None:
    model = tiny_llama()
    model.model.layers[0].post_attention_layernorm = InPlace(InPlaceNorm(32))
    source = source_of(model, include=("norm",))
    check = check_of(source)
    assert list(check.by_autograd) == ["model.layers.0.post_attention_layernorm.inner.weight"]
    assert_right(source, check)


# ------------------------------------------------------------------------- parameters that are not reached


class Sometimes(nn.Module):
    """A layer that only long texts reach."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rare = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output + self.rare(x) if x.shape[1] > 12 else output


def test_a_parameter_that_an_example_does_not_reach_has_no_gradient_there() -> None:
    source = source_of(wrapped(Sometimes))
    lengths = [len(text.ids) for text in encoded()]
    assert min(lengths) <= 12 < max(lengths)
    shortest = [text for text in encoded() if len(text.ids) <= 12][:1]
    before, _ = source.sketches(shortest)
    check = check_of(source)
    source = source.with_check(check)
    rare = next(n for n, t in enumerate(source.targets) if "rare" in t.name)
    assert not before[:, rare].any()
    for text in encoded():
        sketch, _ = source.sketches([text])
        assert bool(sketch[0, rare].any()) == (len(text.ids) > 12)
        gradient = source.sketcher.exact(TokenBatch.of([(text.ids, text.target)]))[rare]
        assert (gradient.length() > 0) == (len(text.ids) > 12)


# --------------------------------------------------------------------------------------- the texts


@pytest.mark.parametrize("lengths", [[1000], [5], [3, 1000], [40, 50, 60, 70], [30, 30], [2, 2, 2]])
def test_the_texts_of_the_check_are_short_and_of_two_lengths(lengths: list[int]) -> None:
    made = [Encoded(list(range(n)), [False] * (n - 1) + [True], Status.OK) for n in lengths]
    made.append(Encoded([], [], Status.EMPTY))
    pair = check_pair(made, 128)
    assert pair is not None
    short, long = pair
    assert 2 < len(short.ids) < len(long.ids) <= 64
    for text in pair:
        assert any(text.target)
        assert not text.target[0]
        assert text.status == Status.OK
    assert check_pair(made[-1:], 128) is None


def test_the_texts_of_the_check_fit_into_a_short_context() -> None:
    made = [Encoded([5, 6, 7], [False, True, True], Status.OK)]
    for most in (2, 3, 5):
        pair = check_pair(made, most)
        assert pair is not None
        assert max(len(text.ids) for text in pair) <= most
    assert source_of(tiny_llama(), max_length=2).checked(made) is not None
