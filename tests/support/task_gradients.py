"""The sketches of a source against plain autograd, one example at a time with nothing of rapidin's in the
loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from own_gradients import relative_error
from torch import Tensor

from rapidin import ops
from rapidin.gradients.parameters import block_seed
from rapidin.gradients.source import GradientSource


def autograd_sketches(source: GradientSource, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
    """[n, targets, width]: sketches of the gradients of losses that are computed by themselves."""
    named = dict(source.loaded.model.named_parameters())
    chosen = [named[target.name] for target in source.targets]
    before = [p.requires_grad for p in chosen]
    source.loaded.model.eval()
    for p in chosen:
        p.requires_grad_(True)
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss(), chosen, allow_unused=True)
        rows.append(
            torch.stack(
                [
                    ops.matrix_sketch(
                        (torch.zeros_like(p) if grad is None else grad).reshape(len(p), -1),
                        source.width,
                        seed=block_seed(source.settings.seed, target.name),
                        backend="reference",
                    )
                    for target, p, grad in zip(source.targets, chosen, grads, strict=True)
                ]
            )
        )
    for p, needed in zip(chosen, before, strict=True):
        p.requires_grad_(needed)
    return torch.stack(rows)


def assert_exact(
    source: GradientSource, records: Sequence[dict[str, Any]], losses: Sequence[Callable[[], Tensor]]
) -> None:
    """The source's sketches of all records together, of each alone, and beside a long one, are autograd's."""
    assert len(source.points) == 1
    with source.at(0):
        want = autograd_sketches(source, losses)
    examples = [source.example(record) for record in records]
    together, status = source.sketches(examples)
    assert not status.any()
    assert not source.batches.one_at_a_time
    alone = torch.cat([source.sketches([each])[0] for each in examples])
    assert float(want.norm(dim=-1).min()) > 1e-6
    assert relative_error(alone, want) < 1e-4
    assert relative_error(together, want) < 1e-4
