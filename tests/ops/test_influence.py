"""Exact influence, the ground truth: what it foretells is what training again without an example does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rapidin.ops.reference.influence import exact_influence, gauss_newton, lissa

N, D, V, DAMPING = 200, 5, 3, 1e-2


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    test = torch.randn(6, D, generator=generator, dtype=torch.float64)
    true = torch.randn(V, D, generator=generator, dtype=torch.float64)
    y = torch.multinomial(F.softmax(x @ true.T, 1), 1, generator=generator)[:, 0]
    return x, y, test, (test @ true.T).argmax(1)


def fitted(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Softmax regression with weight decay, to the optimum by Newton's steps: [V, D]."""
    w = torch.zeros(V, D, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        losses = F.cross_entropy(x @ w.view(V, D).T, y, reduction="none")
        return (weights * losses).sum() + DAMPING / 2 * w.square().sum()

    flat = w.flatten()
    for _ in range(30):
        gradient = torch.func.grad(loss)(flat)
        flat = flat - torch.linalg.solve(torch.func.hessian(loss)(flat), gradient)
    assert float(torch.func.grad(loss)(flat).norm()) < 1e-10
    return flat.view(V, D)


def gradients(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    one = lambda a, b: torch.func.grad(lambda w: F.cross_entropy(w @ a, b))(w).flatten()  # noqa: E731
    return torch.stack([one(a, b) for a, b in zip(x, y, strict=True)])


def curvature(w: Tensor, x: Tensor) -> Tensor:
    eye = torch.eye(V, dtype=torch.float64)
    jacobian = torch.einsum("vu,td->tvud", eye, x).flatten(2)  # of logits w x
    return gauss_newton(jacobian, F.softmax(x @ w.T, 1), torch.full((len(x),), 1 / N, dtype=torch.float64))


def test_the_gauss_newton_matrix_of_a_linear_model_is_the_hessian() -> None:
    x, y, _, _ = problem()
    w = fitted(x, y, torch.full((N,), 1 / N, dtype=torch.float64))
    hessian = torch.func.hessian(lambda w: F.cross_entropy(x @ w.view(V, D).T, y))(w.flatten())
    assert float((curvature(w, x) - hessian).norm() / hessian.norm()) < 1e-12


def test_influence_foretells_training_without_an_example() -> None:
    x, y, test, label = problem()
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    w = fitted(x, y, weights)
    train = gradients(w, x, y)[::5]
    scores = exact_influence(train, gradients(w, test, label), curvature(w, x), DAMPING) / N
    before = F.cross_entropy(test @ w.T, label, reduction="none")
    after = []
    for n in range(0, N, 5):
        left = weights.clone()
        left[n] = 0
        after.append(F.cross_entropy(test @ fitted(x, y, left).T, label, reduction="none"))
    risen = torch.stack(after, 1) - before[:, None]
    plain = gradients(w, test, label) @ train.T
    for got, without, wanted in zip(scores, plain, risen, strict=True):
        assert float(torch.corrcoef(torch.stack([got, wanted]))[0, 1]) > 0.98
        assert float(torch.corrcoef(torch.stack([without, wanted]))[0, 1]) < 0.98


def test_lissa_comes_to_the_exact_product() -> None:
    x, y, test, label = problem()
    w = fitted(x, y, torch.full((N,), 1 / N, dtype=torch.float64))
    matrix, v = curvature(w, x), gradients(w, test, label)[0]
    eye = torch.eye(V * D, dtype=torch.float64)
    want = torch.linalg.solve(matrix + DAMPING * eye, v)
    scale = 1.01 * float(torch.linalg.eigvalsh(matrix).max() + DAMPING)
    errors = []
    for steps in (10, 100, 1000):
        got = lissa(lambda u: matrix @ u, v, damping=DAMPING, scale=scale, steps=steps)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
