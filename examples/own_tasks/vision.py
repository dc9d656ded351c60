"""Which training images made a vision classifier say what it says?

    python examples/own_tasks/vision.py

A small convolutional net learns to tell horizontal from vertical bars on made-up images, of which a few have
the wrong label. The cache of its training images answers three questions: which images are behind a
prediction, which labels look wrong, and which images help a set of test images. Takes some seconds.
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

from rapidin import Attributor, self_influence
from rapidin.data.generations import Generation
from rapidin.tasks import Batch, Example, Task

CLASSES = ("horizontal", "vertical")


class Images(Task):
    """An image [1, H, W] and its class."""

    name = "images"

    def example(self, record: dict[str, Any]) -> Example:
        return Example({"image": record["image"], "label": record["label"]})

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    def generation(self, model: nn.Module, record: dict[str, Any], max_new_tokens: int) -> Generation:
        """Optional: a query without a label is explained by what the model says, and shown by name."""
        said = record.get("label")
        if said is None:
            with torch.no_grad():
                said = int(model(record["image"][None]).argmax())
        return Generation(
            "an image", CLASSES[said], "label" not in record, self.example(record | {"label": said})
        )


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, len(CLASSES)),
    )


def make_images(count: int, seed: int, wrong: float = 0.0) -> list[dict[str, Any]]:
    """Images of a bar in noise; a share of them has the wrong label."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for n in range(count):
        image = 0.4 * torch.randn(1, 12, 12, generator=generator)
        at, label = int(torch.randint(2, 10, (), generator=generator)), n % 2
        image[0, at, 1:11] += 1.5
        image = image.mT.contiguous() if label else image
        flipped = bool(torch.rand((), generator=generator) < wrong)
        records.append({"image": image, "label": 1 - label if flipped else label, "flipped": flipped})
    return records


def train(model: nn.Module, task: Task, records: Sequence[dict[str, Any]], epochs: int = 6) -> None:
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
    parser.add_argument("--images", type=int, default=200, help="training images")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    records, tests = make_images(options.images, 1, wrong=0.1), make_images(20, 2)
    model = make_net()
    train(model, Images(), records)

    attributor = Attributor(model, task=Images())
    with tempfile.TemporaryDirectory() as folder:
        cache = attributor.cache(records, Path(folder) / "cache")
        result = attributor.query(cache, [{"image": tests[0]["image"]}], examples=records)[0]
        same = sum(hit.example["label"] == tests[0]["label"] for hit in result.top if hit.example)
        print(f"said '{result.completion}'; {same} of the {len(result.top)} most helpful images are of it")

        found = self_influence(cache, normalize="none")
        flipped = torch.tensor([record["flipped"] for record in records])
        suspects = found.argsort(descending=True)[: int(flipped.sum())]
        right = int(flipped[suspects].sum())
        print(f"{right} of the {len(suspects)} images with the largest self-influence have a wrong label")

        scores = attributor.scores(cache, tests, together=True)[0]
        hurting = scores.argsort()[: int(flipped.sum())]
        right = int(flipped[hurting].sum())
        print(f"{right} of the {len(hurting)} images that hurt the test images most have a wrong label")


if __name__ == "__main__":
    main()
