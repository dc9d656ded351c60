"""Convolutions: their weights' factors and per-example gradients against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_gradients import relative_error
from task_gradients import autograd_sketches
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin import Attributor
from rapidin.gradients.convolution import is_convolution, patches
from rapidin.gradients.parameters import find_targets
from rapidin.tasks import Example, Task

CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "1d stride": (nn.Conv1d, {"kernel_size": 4, "stride": 2, "dilation": 2}),
    "1d groups": (nn.Conv1d, {"kernel_size": 3, "groups": 2}),
    "1d depthwise": (nn.Conv1d, {"kernel_size": 3, "groups": 4, "padding": 2}),
    "2d": (nn.Conv2d, {"kernel_size": 3}),
    "2d all": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}),
    "2d groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "stride": 2, "padding": 1}),
    "2d depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 4}),
    "2d same": (nn.Conv2d, {"kernel_size": (3, 4), "padding": "same", "dilation": (2, 1)}),
    "2d valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "2d circular": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}),
    "2d no bias": (nn.Conv2d, {"kernel_size": 3, "bias": False}),
    "3d": (nn.Conv3d, {"kernel_size": (2, 3, 2), "stride": (1, 2, 1), "padding": 1}),
}


def signals(kind: type[nn.Module], n: int = 5) -> Tensor:
    size = {nn.Conv1d: (16,), nn.Conv2d: (9, 8), nn.Conv3d: (5, 6, 4)}[kind]  # type: ignore[index]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 4, *size, generator=generator)


class Net(nn.Module):
    """A convolution below another layer, so that its inputs need gradients or not, and a linear head."""

    def __init__(self, kind: type[nn.Module], options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = kind(4, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.convolution = kind(4, 6 if options.get("groups", 1) < 4 else 8, **options)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.convolution(torch.relu(self.norm(self.first(x))))).flatten(1))


class Signals(Task):
    """Signals with a class."""

    name = "signals"

    def example(self, record: dict[str, Any]) -> Example:
        return Example({"x": record["x"], "y": record["y"]})

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@pytest.mark.parametrize("case", CASES)
def test_patches_and_outputs_are_factors(case: str) -> None:
    kind, options = CASES[case]
    module = kind(4, 8, **options)
    inputs = signals(kind)
    assert is_convolution(module)
    outputs = module(inputs)
    by_position = patches(module, inputs)
    groups = options.get("groups", 1)
    weight = module.weight.flatten(1)
    columns = by_position.unflatten(2, (groups, -1))
    rows = torch.einsum("btgi,goi->btgo", columns, weight.unflatten(0, (groups, -1))).flatten(2)
    if module.bias is not None:
        rows = rows + module.bias
    torch.testing.assert_close(rows, outputs.flatten(2).mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", ["tensor", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_each_examples_gradient_is_autograds(case: str, projection: str) -> None:
    kind, options = CASES[case]
    model, inputs = Net(kind, options), signals(kind)
    model(inputs)  # sets the size of the head
    records = [{"x": x, "y": n % 3} for n, x in enumerate(inputs)]
    attributor = Attributor(
        model, task=Signals(), include=["*"], width=256, preconditioner="off", projection=projection
    )
    source = attributor.source
    assert {t.name for t in source.targets} == {name for name, _ in model.named_parameters()}
    examples = [source.example(record) for record in records]
    together, status = source.sketches(examples)
    assert not status.any()
    assert not source.batches.one_at_a_time
    alone = torch.cat([source.sketches([each])[0] for each in examples])
    assert relative_error(together, alone) < 1e-4
    if projection == "tensor":
        losses = [lambda r=r: F.cross_entropy(model(r["x"][None])[0], torch.tensor(r["y"])) for r in records]
        assert relative_error(together, autograd_sketches(source, losses)) < 1e-4


def test_convolutions_count_by_default_in_tasks_of_ones_own_alone() -> None:
    model = Net(nn.Conv2d, {"kernel_size": 3})
    model(signals(nn.Conv2d))
    assert [t.name for t in find_targets(model)] == ["head.weight"]
    assert [t.name for t in find_targets(model, convolutions=True)] == [
        "first.weight",
        "convolution.weight",
        "head.weight",
    ]


def test_a_convolution_with_another_forward_goes_by_autograd() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Other(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight * 2, bias)

    for kind in (Scaled, Other):
        model = nn.Sequential(kind(4, 3, 3), nn.Flatten())
        assert not is_convolution(model[0])
        targets = find_targets(model, include=["*"])
        assert {use.kind for target in targets for use in target.uses} <= {"autograd", "module"}


def test_kfac_and_exact_gradients_of_convolutions(tmp_path: Any) -> None:
    model = Net(nn.Conv2d, {"kernel_size": 3, "padding": 1})
    inputs = signals(nn.Conv2d, 20)
    model(inputs)
    records = [{"x": x, "y": n % 3} for n, x in enumerate(inputs)]
    attributor = Attributor(model, task=Signals(), width=1024)
    assert attributor.source.config.kind == "kfac"
    cache = attributor.cache(records, tmp_path / "cache")
    assert cache.manifest.gradient["task"] == "signals"
    results = attributor.query(cache, [records[4]], examples=records, rescore="exact", normalize="layer")
    assert results[0].top[0].row == 4
    assert results[0].top[0].score == pytest.approx(1, abs=1e-3)
    assert results[0].top[0].estimate == pytest.approx(1, abs=0.1)
