"""LDS of exact gradients of the blocks' matrices, what a cheaper method should come near to.

    python bench/lds/exact.py

`raw` is the dot product of whole gradients; `layer` the mean over the matrices of the cosine of each matrix's
gradients; `fisher` the same with the cosine's training side multiplied, matrix by matrix, by the inverse of
the damped second moment of the training texts' unit gradients. `shared` is a bar that needs no model: how
many runs of four characters two texts share. `seeds` is Spearman's correlation between the two retrainings of
a half, the mean over the test texts: how much noise the ground truth itself has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lds import CharGPT, GroundTruth, block_matrices, sets, spearman
from torch import Tensor

DAMPING = 0.03
RUN = 4


def gradients(truth: GroundTruth, model: CharGPT, ids: Tensor) -> list[Tensor]:
    """The gradient of each text's loss for each matrix of the blocks: a tensor [texts, numbers] a matrix."""
    weights = [layer.weight for layer in block_matrices(model).values()]
    rows = [torch.autograd.grad(truth.loss(model, text[None]).sum(), weights) for text in ids]
    return [torch.stack([g.flatten() for g in layer]) for layer in zip(*rows, strict=True)]


def fisher_scores(train: Tensor, test: Tensor) -> Tensor:
    """Products [test, train] of unit gradients under the inverse of (F + damping x mean eigenvalue of F).

    F, the second moment of the n rows of `train`, is far too large to form, but by the Woodbury identity
    train (F + d)^-1 = (K / n + d)^-1 train, where K is the Gram matrix of the rows. The mean is that of the n
    eigenvalues that F and K / n share: the many others of F are zero and would make the damping nothing.
    """
    n = len(train)
    moment = (train @ train.T).double() / n
    damped = moment + DAMPING * moment.trace() / n * torch.eye(n)
    return torch.linalg.solve(damped, (train @ test.T).double()).T


def shared_runs(train: list[str], test: list[str]) -> Tensor:
    """How many runs of RUN characters, each counted once, a test and a training text share: [test, train]."""
    runs = [[{t[i : i + RUN] for i in range(len(t) - RUN + 1)} for t in texts] for texts in (test, train)]
    return torch.tensor([[len(a & b) for b in runs[1]] for a in runs[0]])


def main() -> None:
    print("set        at    raw   layer  fisher  shared  seeds")
    for folder in sets():
        truth = GroundTruth(folder)
        shared = truth.lds(shared_runs(truth.description["train"], truth.description["test"]))
        seeds = float(spearman(truth.seed_losses[:, 0], truth.seed_losses[:, 1]).mean())
        for at in (1.0, 0.5):
            model = truth.model(at)
            train, test = (gradients(truth, model, ids) for ids in truth.texts())
            unit = [(F.normalize(g), F.normalize(q)) for g, q in zip(train, test, strict=True)]
            raw = sum(q @ g.T for g, q in zip(train, test, strict=True))
            layer = sum(q @ g.T for g, q in unit)
            fisher = sum(fisher_scores(g, q) for g, q in unit)
            values = "  ".join(f"{truth.lds(scores):.3f}" for scores in (raw, layer, fisher))
            print(f"{folder.name:9s} {at:3.1f}  {values}   {shared:.3f}   {seeds:.3f}")


if __name__ == "__main__":
    main()
