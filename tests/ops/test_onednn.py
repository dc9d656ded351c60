"""Products by oneDNN: right for all layouts, with gradients, and only where they are asked for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rapidin import ops
from rapidin.errors import UserError
from rapidin.ops import onednn


class Counted(TorchDispatchMode):
    """How often oneDNN multiplies inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets RAPIDIN_ONEDNN, which is read once a process otherwise."""

    def to(value: str) -> None:
        monkeypatch.setenv("RAPIDIN_ONEDNN", value)
        onednn.onednn_is_faster.cache_clear()

    to("on")
    if not onednn.onednn_is_faster():
        pytest.skip("this torch has no oneDNN")
    yield to
    onednn.onednn_is_faster.cache_clear()


SHAPES = ((1024, 64, 40), (4, 1031, 513), (131, 129, 127), (2100, 1, 1000), (777, 2999, 1))


def close(found: Tensor, wanted: Tensor) -> None:
    largest = float(wanted.detach().abs().max())
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=2e-5, atol=2e-5 * largest)


@pytest.mark.parametrize(("rows", "features", "outputs"), SHAPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "batched"])
def test_products_are_those_of_float64(
    asked: Any, rows: int, features: int, outputs: int, layout: str
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(rows, features), torch.randn(features, outputs)
    if layout == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    if layout == "strided":
        x, y = torch.randn(rows, 3 * features)[:, ::3], torch.randn(2 * features, outputs)[::2]
    if layout == "batched":
        x = x[: rows // 2 * 2].view(2, -1, features)
    wanted, total = x.double() @ y.double(), torch.randn(*x.shape[:-1], outputs)
    with Counted() as counted:
        close(ops.matmul(x, y), wanted)
        close(onednn.addmm(total, x, y), total + wanted)
        close(onednn.linear(x, y.T, total.flatten(0, -2)[0]), wanted + total.flatten(0, -2)[0])
    worth_it = rows * features * outputs >= 1 << 21
    assert counted.count == 3 * worth_it
    assert onednn.is_worth_it(x, y.T) == worth_it


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_in_their_row(asked: Any, value: float) -> None:
    x, y = torch.randn(64, 256), torch.rand(256, 256) + 0.1
    x[3, 5] = value
    found = ops.matmul(x, y)
    assert onednn.is_worth_it(x, y.T)
    assert not found[3].isfinite().any()
    assert found[torch.arange(64) != 3].isfinite().all()


def test_other_dtypes_and_small_products_are_torch_s(asked: Any) -> None:
    large, small = torch.randn(256, 256), torch.randn(3, 8)
    half, double = large.bfloat16(), large.double()
    with Counted() as counted:
        for x, y in ((half, half), (double, double), (small, small.T)):
            assert torch.equal(ops.matmul(x, y), x @ y)
        assert ops.matmul(torch.empty(0, 256), large).shape == (0, 256)
        assert ops.matmul(torch.empty(5, 0), torch.empty(0, 7)).equal(torch.zeros(5, 7))
    assert counted.count == 0


def test_a_product_that_needs_a_graph_has_one(asked: Any) -> None:
    x, y = torch.randn(256, 256), torch.randn(256, 256, requires_grad=True)
    ops.matmul(x, y).sum().backward()
    assert y.grad is not None
    with torch.no_grad(), Counted() as counted:
        ops.matmul(x, y)
    assert counted.count == 1


# -------------------------------------------------------------------------------------- layers of models


class Layers(nn.Module):
    """Layers as models have them: with and without a bias, and GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 160), nn.Linear(160, 96, bias=False)
        self.third, self.bias = nn.Parameter(torch.randn(96, 96)), nn.Parameter(torch.randn(96))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.silu(self.first(x)))
        return torch.addmm(self.bias, x.view(-1, 96), self.third).view(x.shape).tanh()


def gradients(layers: Layers, x: Tensor, run: Any, trained: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    parameters = list(layers.parameters()) if trained else []
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters])]


@pytest.mark.parametrize("trained", [True, False])
def test_layers_have_the_gradients_of_autograd(asked: Any, trained: bool) -> None:
    torch.manual_seed(0)
    layers, x = Layers().requires_grad_(trained), torch.randn(4, 64, 96)
    exact = Layers().double().requires_grad_(trained)
    exact.load_state_dict(layers.state_dict())
    wanted = gradients(exact, x.double(), exact, trained)
    with ops.faster_linear(layers), Counted() as counted:
        found = gradients(layers, x, layers, trained)
    assert counted.count == 3 * (2 + trained)  # outputs, the inputs' gradients, the weights'
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    with Counted() as counted:
        gradients(layers, x, layers, trained)
    assert counted.count == 0, "outside the block"


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_twice(asked: Any, reentrant: bool) -> None:
    """The second forward pass, outside the block, is torch's. One that is reentrant may differ from the first
    in the last digits; one that is not must save the same tensors."""
    layers, x = Layers().requires_grad_(False), torch.randn(4, 64, 96)
    wanted = gradients(layers, x, layers, False)
    x = x.requires_grad_()
    with ops.faster_linear(layers), Counted() as counted:
        out = checkpoint(layers, x, use_reentrant=reentrant)
    assert counted.count == 3 * reentrant
    out.square().sum().backward()
    assert x.grad is not None
    close(x.grad, wanted[1])


def test_gradients_of_gradients(asked: Any) -> None:
    torch.manual_seed(0)
    layers, x = Layers(), torch.randn(4, 64, 96)
    exact = Layers().double()
    exact.load_state_dict(layers.state_dict())

    def second(run: Layers, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        with ops.faster_linear(run):
            loss = (run(x) * x).square().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad((first * first.detach()).sum(), x)[0]

    found, wanted = second(layers, x), second(exact, x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_gradients_of_several_outputs_at_once_and_forward_gradients(asked: Any) -> None:
    layers, x = Layers().requires_grad_(False), torch.randn(4, 64, 96, requires_grad=True)
    with ops.faster_linear(layers):
        out = layers(x)
        primal, tangent = torch.autograd.functional.jvp(layers, x, torch.ones_like(x))
    rows = torch.eye(3)[:, :, None].expand(3, 3, 96).unsqueeze(2) * torch.ones(1, 1, 64, 1)
    rows = torch.cat((rows, torch.zeros(3, 1, 64, 96)), 1)
    (found,) = torch.autograd.grad(out, x, rows, is_grads_batched=True, retain_graph=True)
    for one, row in zip(found, rows, strict=True):
        close(one, torch.autograd.grad(out, x, row, retain_graph=True)[0])
    close(primal, out.detach())
    close(tangent, torch.autograd.functional.jvp(layers, x, torch.ones_like(x))[1])


def test_wrong_shapes_are_torch_s_to_name(asked: Any) -> None:
    x = torch.randn(256, 256)
    for y in (torch.randn(2, 256, 256), torch.randn(256, 255)):
        with pytest.raises(RuntimeError) as wanted:
            torch.nn.functional.linear(x, y)
        with pytest.raises(RuntimeError) as found:
            onednn.linear(x, y)
        assert str(found.value) == str(wanted.value)
    with torch.inference_mode(), Counted() as counted:
        close(onednn.linear(x, x), x.double() @ x.double().T)
    assert counted.count == 1


def test_the_memory_of_many_shapes_is_bounded() -> None:
    code = """
import os, torch
from rapidin import ops
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
weight = torch.randn(576, 576)
ops.matmul(torch.randn(600, 576), weight)
before = resident()
for rows in range(601, 1001): ops.matmul(torch.randn(rows, 576), weight)
print(resident() - before)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system does not say how much memory a process has")
    environment = {**os.environ, "RAPIDIN_ONEDNN": "on", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150  # MB; without a limit of what is kept, 340


def test_the_layers_of_other_kinds_are_left_alone(asked: Any) -> None:
    layers, x = Layers(), torch.randn(4, 64, 96)
    mapped = torch.func.vmap(layers.first)(x)
    compiled = torch.compile(layers.first, backend="eager")
    with torch.no_grad(), ops.faster_linear(layers), Counted() as counted:
        with torch.autocast("cpu", torch.bfloat16):
            assert layers.first(x).dtype == torch.bfloat16
        close(torch.func.vmap(layers.first)(x), mapped)
        layers.first(x[:, :1])  # a small product
        assert layers.double().first(x.double()).dtype == torch.float64
        layers.float()
        close(F.linear(x, weight=layers.first.weight), x @ layers.first.weight.T)
        with pytest.raises(RuntimeError, match="shapes"):
            layers.second(x.repeat(8, 1, 1))
    assert counted.count == 0
    with ops.faster_linear(layers):
        close(compiled(x), layers.first(x))
    with ops.faster_linear(compiled), Counted() as counted:
        compiled(x), layers.first(x)
    assert counted.count == 0, "a compiled model"


def test_a_caching_pass_takes_it(asked: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from rapidin.gradients.collector import GradientSketcher
    from rapidin.gradients.parameters import find_targets
    from rapidin.tasks.causal import TokenBatch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    sketcher = GradientSketcher(model, find_targets(model), width=64, seed=0)
    batch = TokenBatch.of([(list(range(n, 64)), [t > 9 for t in range(64 - n)]) for n in range(3)])
    with Counted() as counted:
        found = sketcher(batch)
    assert counted.count > 20
    asked("off")
    with Counted() as counted:
        wanted = sketcher(batch)
    assert counted.count == 0
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


# --------------------------------------------------------------------------------------- where it is faster


@pytest.mark.parametrize(
    ("vendor", "family", "sets", "faster"),
    [
        ("AuthenticAMD", 0x1A, ["base", "avx2", "avx512"], True),
        ("AuthenticAMD", 0x1B, ["base", "avx2", "avx512"], False),
        ("AuthenticAMD", 0x1A, ["base", "avx2"], False),
        ("AuthenticAMD", 0x19, ["base", "avx2", "avx512"], False),
        ("GenuineIntel", 0x1A, ["base", "avx2", "avx512"], False),
        ("", 0, ["base", "neon"], False),
    ],
)
def test_the_processors_on_which_it_is_faster(
    vendor: str, family: int, sets: list[str], faster: bool
) -> None:
    assert onednn.is_faster_on(vendor, family, sets) == faster


def test_the_choice_can_be_made_by_hand(asked: Any) -> None:
    asked("off")
    assert not onednn.onednn_is_faster()
    asked("on")
    for other in (nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8, device="meta")):
        assert isinstance(ops.faster_linear(other), contextlib.nullcontext), "a model without such layers"
    asked("off")
    layer = nn.Linear(256, 256)
    with ops.faster_linear(layer), Counted() as counted:
        layer(torch.randn(64, 256))
    assert counted.count == 0
    asked("maybe")
    with pytest.raises(UserError, match="must be on, off or auto, got 'maybe'"):
        onednn.onednn_is_faster()


def test_the_processor_names_itself() -> None:
    code = "from rapidin.ops import _cpu; print(*_cpu.processor())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    vendor, _, family = found.strip().rpartition(" ")
    assert vendor.isprintable()
    assert (int(family) > 0) == bool(vendor)
    try:
        with open("/proc/cpuinfo") as file:
            lines = file.read().split("\n\n")[0].splitlines()
    except OSError:
        return
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "vendor_id" in known and known["vendor_id"].isalpha():
        assert (vendor, family) == (known["vendor_id"], known["cpu family"])
