"""DataInf: the inverse Hessian of each layer in closed form (Kwon et al., ICLR 2024, eq. 5).

    H_b^-1 = 1/(n lambda_b) sum_n (I - y_nb y_nb^T / (lambda_b + |y_nb|^2))
    lambda_b = damping * mean_n |y_nb|^2 / d_b,    d_b: numbers in the parameter, damping: 0.1 in the paper

DataInf swaps the mean over examples with the inverse, so it needs only inner products within a layer, which
sketches estimate. The paper uses the gradients as they are (`none`); with the other normalizations y are the
normalized gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from rapidin.attribution.methods.moment import Moment, moment, squares, summed
from rapidin.attribution.methods.vectors import DEFAULT_LIMITS, Limits, block_groups, count, vectors_of
from rapidin.cache import Cache

DAMPING = 0.1


def precondition_query(
    cache: Cache, vectors: Tensor, normalize: str, damping: float, limits: Limits = DEFAULT_LIMITS
) -> Tensor:
    """H_b^-1 v_b of query vectors [Q, blocks, width]: the same shape, float64, from one pass over the cache
    for the lengths and one for the products.

    Collective: each process reads its share of the shards, and all get the same bits, for any number of
    processes.
    """
    n, damped, _ = _damped(cache, normalize, damping, vectors.device)
    v, weights = vectors.double(), _weights(damped)

    def weighted_products(within: tuple[int, int]) -> Tensor:
        total = torch.zeros_like(v)
        for _, y, _ in vectors_of(cache, normalize, vectors.device, within=within):
            y = y.double()
            weight = torch.einsum("qbk,nbk->qnb", v, y) * weights(y.square().sum(2))
            total += torch.einsum("qnb,nbk->qbk", weight, y)
        return total

    mean = summed(cache, v, weighted_products, limits.sent_bytes) / max(1, n)
    return _inverse(v, mean, damped)


def block_inverses(
    cache: Cache, normalize: str, damping: float, device: torch.device, limits: Limits = DEFAULT_LIMITS
) -> Iterator[tuple[Callable[[Tensor], Tensor], slice]]:
    """(the map y [n, blocks, width] -> H_b^-1 y_b float64, its blocks), for all blocks in groups."""
    n, damped, mean_square = _damped(cache, normalize, damping, device)
    width = cache.manifest.width
    block_bytes = 4 * width * min(width, count(cache))
    for blocks in block_groups(len(cache.layers), block_bytes, limits.block_bytes):
        lambdas = damped[blocks]
        weighted = moment(cache, normalize, blocks, mean_square[blocks], device, weights=_weights(lambdas))

        def solve(y: Tensor, weighted: Moment = weighted, lambdas: Tensor = lambdas) -> Tensor:
            return _inverse(y.double(), weighted.times(y) / max(1, n), lambdas)

        yield solve, blocks


def _damped(cache: Cache, normalize: str, damping: float, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """The number of rows; lambda_b and the mean of |y_nb|^2, each [blocks] float64."""
    n, mean_square = squares(cache, normalize, device)
    numbers = torch.tensor([prod(block.shape) for block in cache.layers], device=device)
    return n, damping * mean_square / numbers, mean_square


def _weights(damped: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda square: torch.where(square > 0, 1 / (damped + square), 0.0)


def _inverse(v: Tensor, mean: Tensor, damped: Tensor) -> Tensor:
    """(v - mean) / lambda; 0 in a block in which all rows have zero gradient."""
    live = (damped > 0)[:, None]
    return torch.where(live, (v - mean) / torch.where(live, damped[:, None], 1.0), 0.0)
