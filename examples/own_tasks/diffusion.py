"""Which training images taught a diffusion model what it draws?

    python examples/own_tasks/diffusion.py

A small U-Net learns to remove noise from made-up pictures of two kinds, blobs and rings (the loss of Ho et
al., NeurIPS 2020, eq. 14). The cache of its training pictures finds those behind a picture. The noise and the
steps at which an example's loss is taken are drawn by a hash of the picture, so that the loss is the same
each time; several steps make the loss less of an accident. They are *parts* of the example: rows of the
model's input that belong to one loss. Takes about a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin import Attributor
from rapidin.data.records import record_hash
from rapidin.tasks import Batch, Example, Task

STEPS = 100  # of the diffusion
PARTS = 8  # steps at which an example's loss is taken


class Denoising(Task):
    """A picture [1, H, W]: the mean squared error of its noise at `PARTS` steps."""

    name = "denoising"

    def __init__(self) -> None:
        self.kept = torch.cumprod(1 - torch.linspace(1e-3, 0.12, STEPS), 0)  # share of the picture at a step

    def example(self, record: dict[str, Any]) -> Example:
        picture: Tensor = record["picture"]
        generator = torch.Generator().manual_seed(record_hash({"picture": picture}) % 2**63)
        noise = torch.randn(PARTS, *picture.shape, generator=generator)
        step = (torch.arange(PARTS) + torch.rand(PARTS, generator=generator)) * STEPS / PARTS
        return Example({"picture": picture, "noise": noise, "step": step.long()}, length=PARTS)

    def batch(self, examples: Sequence[Example], device: torch.device) -> Batch:
        stacked = super().batch(examples, device).inputs
        step, noise = stacked["step"].flatten(0, 1), stacked["noise"].flatten(0, 1)
        kept = self.kept.to(device)[step][:, None, None, None]
        noisy = kept.sqrt() * stacked["picture"].repeat_interleave(PARTS, 0) + (1 - kept).sqrt() * noise
        return Batch({"noisy": noisy, "noise": noise, "step": step}, len(examples), PARTS, PARTS)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        error = (model(batch["noisy"], batch["step"]) - batch["noise"]).square()
        return error.view(batch.rows, -1).mean(1)


class UNet(nn.Module):
    """Two scales with a skip between them, told the step by an embedding."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.steps = nn.Embedding(STEPS, width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Sequential(
            nn.GroupNorm(4, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        )
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.last = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        high = F.silu(self.first(x) + self.steps(step)[:, :, None, None])
        low = F.silu(self.down(high))
        low = low + self.middle(low)
        raised = F.silu(self.up(F.interpolate(low, scale_factor=2.0)))
        return self.last(F.silu(self.norm(torch.cat([high, raised], 1))))


def make_pictures(count: int, seed: int) -> list[dict[str, Any]]:
    """Blobs (kind 0) and rings (kind 1) at random places."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(12.0)
    records = []
    for n in range(count):
        x, y = (3.5 + 5 * torch.rand(2, generator=generator)).tolist()
        away = ((axis[:, None] - x).square() + (axis[None] - y).square()).sqrt()
        shape = (-away.square() / 3).exp() if n % 2 == 0 else (-(away - 3).square()).exp()
        records.append({"picture": 2 * shape[None] - 1, "kind": n % 2})
    return records


def train(model: nn.Module, task: Task, records: Sequence[dict[str, Any]], epochs: int) -> None:
    """Trains on the losses that gradients are later taken of."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    examples = [task.example(record) for record in records]
    for _ in range(epochs):
        for chosen in torch.randperm(len(examples)).split(16):
            batch = task.batch([examples[int(n)] for n in chosen], torch.device("cpu"))
            optimizer.zero_grad()
            task.losses(model, batch).mean().backward()
            optimizer.step()
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100, help="training pictures")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    records, tests = make_pictures(options.pictures, 1), make_pictures(10, 2)
    model = UNet()
    train(model, Denoising(), records, options.epochs)

    # Every parameter counts: convolutions, norms, and the embedding of the steps.
    attributor = Attributor(model, task=Denoising(), include=["*"])
    with tempfile.TemporaryDirectory() as folder:
        cache = attributor.cache(records, Path(folder) / "cache")
        results = attributor.query(cache, tests, examples=records)
    same = [
        hit.example["kind"] == test["kind"]
        for test, result in zip(tests, results, strict=True)
        for hit in result.top
        if hit.example
    ]
    print(f"{sum(same)} of the {len(same)} most helpful pictures are of the kind of the picture asked about")


if __name__ == "__main__":
    main()
