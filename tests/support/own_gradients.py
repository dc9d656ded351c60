"""The gradient of each text by itself, from autograd, that the hooks' sketches are held against."""

from __future__ import annotations

from typing import Any

import torch

from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.parameters import Target, block_seed
from rapidin.ops import reference
from rapidin.tasks.causal import TokenBatch, example_losses

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
    example_losses(model, TokenBatch.of([text]), loss).sum().backward()  # type: ignore[arg-type]
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
    return torch.stack([reference_sketch(t, grads.get(t.name)) for t in targets])


def reference_sketch(target: Target, grad: torch.Tensor | None) -> torch.Tensor:
    """[WIDTH]: the reference sketch of a gradient, None for none."""
    if grad is None:
        return torch.zeros(WIDTH)
    seed = block_seed(SEED, target.name)
    if target.stack:
        sketch = reference.stack_sketch(grad.view(target.stack, *target.matrix), WIDTH, seed=seed)
    else:
        sketch = reference.matrix_sketch(grad.reshape(target.matrix), WIDTH, seed=seed)
    return sketch.float()


def exact_gradients(
    sketcher: GradientSketcher, text: tuple[list[int], list[bool]], point: int | None = None
) -> list[torch.Tensor]:
    """The gradient of each target for one text as the sketcher takes it, as a matrix [O, I]."""
    return [gradient.as_formed().flatten(0, 1) for gradient in sketcher.exact(TokenBatch.of([text]), point)]


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
