"""LDS of exact gradients of the blocks' matrices, what a cheaper method should come near to.

    python studies/lds/exact.py

`raw` is the dot product of whole gradients; `layer` the mean over the matrices of the cosine of each matrix's
gradients; `fisher` the same with the cosine's training side multiplied, matrix by matrix, by the inverse of
the damped second moment of the training texts' unit gradients. `shared` is a bar that needs no model: how
many runs of four characters two texts share. `seeds` is Spearman's correlation between the two retrainings of
a half, the mean over the test texts: how much noise the ground truth itself has.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from lds import CharGPT, RetrainedSet, block_matrices, sets
from scoring import Grams, dot, fisher
from torch import Tensor, nn

from rapidin.evaluate.lds import seed_agreement

DAMPING = 0.03
BATCH = 48
RUN = 4


def factors(truth: RetrainedSet, model: CharGPT, ids: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each batch of texts, for each matrix of the blocks, the two factors of the gradients of the texts'
    losses: inputs [texts, characters, in] and output gradients [texts, characters, out]."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(given[0].detach())
        outputs.append(out)

    hooks = [layer.register_forward_hook(keep) for layer in block_matrices(model).values()]
    for texts in ids.split(BATCH):
        inputs.clear()
        outputs.clear()
        loss = truth.loss(model, texts).sum()
        yield list(zip(inputs, torch.autograd.grad(loss, outputs), strict=True))
    for hook in hooks:
        hook.remove()


def gradients(truth: RetrainedSet, model: CharGPT, ids: Tensor) -> list[Tensor]:
    """The gradient of each text's loss for each matrix of the blocks: a tensor [texts, numbers] a matrix.

    Of all texts at once, from the two factors of each: the sum over the characters of output gradient times
    input.
    """
    batches = [[(g.transpose(1, 2) @ x).flatten(1) for x, g in batch] for batch in factors(truth, model, ids)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def shared_runs(train: list[str], test: list[str]) -> Tensor:
    """How many runs of RUN characters, each counted once, a test and a training text share: [test, train]."""
    runs = [[{t[i : i + RUN] for i in range(len(t) - RUN + 1)} for t in texts] for texts in (test, train)]
    return torch.tensor([[len(a & b) for b in runs[1]] for a in runs[0]])


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("set        at    raw   layer  fisher  shared  seeds")
    for folder in sets():
        truth = RetrainedSet(folder)
        shared = truth.lds(shared_runs(truth.description["train"], truth.description["test"]))
        seeds = seed_agreement(truth.seed_losses)
        for at in (1.0, 0.5):
            model = truth.model(at)
            train, test = (gradients(truth, model, ids) for ids in truth.texts())
            raw = Grams.of(train, test)
            unit = raw.normalized("layer")
            scores = (dot(raw), dot(unit), fisher(unit, DAMPING, "count"))
            values = "  ".join(f"{truth.lds(found):.3f}" for found in scores)
            print(f"{folder.name:9s} {at:3.1f}  {values}   {shared:.3f}   {seeds:.3f}")


if __name__ == "__main__":
    main()
