"""What the check before caching compares with: gradients that autograd forms, here of a sharded model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from own_gradients import SEED, WIDTH, texts
from tiny import tiny_llama
from torch import distributed, nn

from rapidin.distributed import World
from rapidin.gradients.autograd_sketches import AutogradSketches
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.fsdp import shard
from rapidin.gradients.parameters import find_targets
from rapidin.tasks.causal import TokenBatch


@pytest.fixture
def alone() -> Iterator[World]:
    """A run of this process alone, which can shard a model."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield World()
    finally:
        distributed.destroy_process_group()


def test_a_sharded_parameter_that_takes_no_part_has_no_gradient(alone: World) -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.unused = nn.Linear(8, 8)
    shard(model, alone, torch.device("cpu"))
    targets = find_targets(model, include=["unused.weight", "q_proj"])
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED, checked=True)
    batch = TokenBatch.of([texts()[0]])
    numbers = {target.name.split(".")[-2]: n for n, target in enumerate(targets)}
    assert not AutogradSketches(sketcher, batch, [numbers["unused"]]).sketches.any()
    sketches = AutogradSketches(sketcher, batch, [numbers["q_proj"]]).sketches[0]
    assert sketches.any(1).nonzero().flatten().tolist() == [numbers["q_proj"]]
