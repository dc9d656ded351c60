"""LDS by the number of examples that K-FAC's moments are fitted on.

    python studies/lds/moments.py [--extra FOLDER] [--out FILE.json]

Gradients of the blocks' twelve matrices half-way from the base to the tuned model, preconditioned by K-FAC as
a cache does it, and sketched at 4,096 dimensions each; scores are the mean over the matrices of cosines. The
sample is drawn anew for each seed. A sample of 0 stands for no preconditioner.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lds import CharGPT, RetrainedSet, block_matrices, sets, text_losses
from scoring import Grams, dot
from torch import Tensor, nn

from rapidin.gradients.model import LoadedModel
from rapidin.gradients.preconditioner import PreconditionerConfig
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource
from rapidin.tasks.task import Batch, Example, Task

DAMPING = 0.1  # the default when this was measured
SAMPLES = (0, 16, 32, 64, 128, 240)
SEEDS = 3
WIDTH = 4096


class Characters(Task):
    """The mean loss of a text's characters."""

    name = "characters"

    def example(self, record: Any) -> Example:
        return Example({"ids": record}, length=len(record) - 1)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, CharGPT)
        return text_losses(model, batch["ids"])


def source_of(truth: RetrainedSet, sample: int, seed: int) -> GradientSource:
    """The source of gradients half-way, without a fitted preconditioner."""
    config = PreconditionerConfig.of("kfac" if sample else "off", nn.Module(), [])
    model = truth.model(at=0.5)
    settings = GradientSettings(
        task=Characters(),
        include=tuple(f"{name}.weight" for name in block_matrices(model)),
        width=WIDTH,
        seed=seed,
        batch_tokens=4096,
        preconditioner=replace(config, sample=sample, damping=DAMPING) if sample else config,
    )
    return GradientSource(LoadedModel.of(model, None), settings)


def measured(truth: RetrainedSet, sample: int, seed: int) -> float:
    """LDS with moments of so many training texts."""
    source = source_of(truth, sample, seed)
    train, test = ([source.example(row) for row in ids.tolist()] for ids in truth.texts())
    if sample:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        source = source.with_preconditioner(
            source.fit_preconditioner([train[n] for n in order[:sample].tolist()])
        )
    rows, queries = (source.sketches(texts)[0] for texts in (train, test))
    grams = Grams.of(rows.unbind(1), queries.unbind(1)).normalized("layer")
    return truth.lds(dot(grams))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extra", type=Path, action="append", default=[], help="another set's folder")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    results = []
    for folder in (*sets(), *options.extra):
        truth = RetrainedSet(folder)
        for sample in options.samples:
            found = [round(measured(truth, sample, seed), 4) for seed in range(options.seeds)]
            results.append({"set": folder.name, "sample": sample, "lds": found})
            print(folder.name, sample, found, flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
