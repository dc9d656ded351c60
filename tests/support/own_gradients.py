"""The gradient of each text by itself, from autograd, that the hooks' sketches are held against."""

from __future__ import annotations

from typing import Any

import torch

from rapidin.gradients.batch import Batch, example_losses
from rapidin.gradients.parameters import Target, block_seed
from rapidin.ops import reference

WIDTH, SEED = 128, 11


def texts(seed: int = 0, n: int = 5) -> list[tuple[list[int], list[bool]]]:
    """Texts of several lengths, some with the prompt left out of the loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(n):
        length = int(torch.randint(3, 24, (), generator=generator))
        ids = torch.randint(0, 320, (length,), generator=generator).tolist()
        start = 1 if row == 0 else int(torch.randint(1, length, (), generator=generator))
        made.append((ids, [t >= start for t in range(length)]))
    return made


def own_gradients(
    model: Any, text: tuple[list[int], list[bool]], loss: str = "mean"
) -> dict[str, torch.Tensor]:
    """Each parameter's gradient of one text's loss, by autograd, in a batch of one."""
    parameters = dict(model.named_parameters())
    model.eval()
    for p in parameters.values():
        p.requires_grad_(True)
        p.grad = None
    example_losses(model, Batch.of([text]), loss).sum().backward()  # type: ignore[arg-type]
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.requires_grad_(False)
        p.grad = None
    return found


def own_sketches(
    model: Any, targets: list[Target], text: tuple[list[int], list[bool]], loss: str = "mean"
) -> torch.Tensor:
    """[targets, WIDTH]: the reference sketches of one text's own gradients, zero where there is none."""
    grads = own_gradients(model, text, loss)
    sketches = []
    for t in targets:
        grad = grads[t.name] if t.name in grads else torch.zeros(t.shape)
        seed = block_seed(SEED, t.name)
        if t.stack:
            sketches.append(reference.stack_sketch(grad.view(t.stack, *t.matrix), WIDTH, seed=seed))
        else:
            sketches.append(reference.matrix_sketch(grad.reshape(t.matrix), WIDTH, seed=seed))
    return torch.stack(sketches).float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-12)).max())


class Scaled(torch.nn.Module):
    """A parameter that no hook knows: it must come by autograd, one example at a time."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = torch.nn.Parameter(torch.full((2, 12), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.gain.sum()
