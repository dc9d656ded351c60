"""Exact influence for models so small that their curvature is a matrix: what approximations are judged by.

    influence(q, z) = <grad q, (G + damping)^-1 grad z>        (Koh & Liang, ICML 2017, eq. 2, up to its sign)

G is the Gauss-Newton matrix, which at a softmax output is the Hessian without the model's own second
derivatives, and the expected Fisher information (Martens, JMLR 2020, section 9).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def gauss_newton(jacobian: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t J_t^T (diag(p_t) - p_t p_t^T) J_t: [D, D] float64.

    jacobian: [T, V, D] of the logits with respect to the parameters; probabilities: [T, V] that the model
    gives; weights: [T], such as 1 / (examples times tokens of the example) for a mean over examples of means.
    """
    j, p, w = jacobian.double(), probabilities.double(), weights.double()
    mean = torch.einsum("tv,tvd->td", p, j)
    whole = torch.einsum("t,tv,tvd,tve->de", w, p, j, j)
    return whole - torch.einsum("t,td,te->de", w, mean, mean)


def exact_influence(train: Tensor, queries: Tensor, curvature: Tensor, damping: float) -> Tensor:
    """Influence of training examples on queries: [Q, N] float64, positive for helpful.

    train: [N, D] and queries: [Q, D], gradients of losses; curvature: [D, D].
    """
    eye = torch.eye(len(curvature), dtype=torch.float64)
    solved = torch.linalg.solve(curvature.double() + damping * eye, train.double().T)
    scores: Tensor = queries.double() @ solved
    return scores


def lissa(
    times: Callable[[Tensor], Tensor], v: Tensor, *, damping: float, scale: float, steps: int
) -> Tensor:
    """(C + damping)^-1 v by `steps` steps of LiSSA (Agarwal, Bullins & Hazan, JMLR 2017, section 3).

    times: the product of the curvature C with a vector [D]; scale: at least the largest eigenvalue of C +
    damping, else the series does not converge. v: [D] -> [D] float64.
    """
    v = v.double()
    found = v.clone()
    for _ in range(steps):
        found = v + found - (times(found) + damping * found) / scale
    return found / scale
