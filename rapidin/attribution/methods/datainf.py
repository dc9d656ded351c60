"""DataInf: the inverse Hessian of each layer in closed form (Kwon et al., ICLR 2024, eq. 5).

    H_b^-1 = 1/(n lambda_b) sum_n (I - y_nb y_nb^T / (lambda_b + |y_nb|^2))
    lambda_b = damping * mean_n |y_nb|^2 / d_b,    d_b: numbers in the parameter, damping: 0.1 in the paper

It swaps the mean over examples with the inverse, so nothing but inner products within a layer is needed, and
those the sketches give. The paper takes the gradients as they are (`none`); with the other normalisations
y are their vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from rapidin.attribution.methods.moment import moment, squares, summed
from rapidin.attribution.methods.vectors import block_groups, count, vectors_of
from rapidin.cache import Cache

DAMPING = 0.1


def turn(cache: Cache, vectors: Tensor, normalize: str, damping: float) -> Tensor:
    """H_b^-1 v_b of query vectors [Q, blocks, width]: the same shape, float64, from one pass over the cache
    for the lengths and one for the products.

    Of several processes, which all call this, each reads its part of the shards, and all get the same bits,
    those of one alone.
    """
    n, damped, _ = _damped(cache, normalize, damping, vectors.device)
    v, weights = vectors.double(), _weights(damped)

    def taken(within: tuple[int, int]) -> Tensor:
        total = torch.zeros_like(v)
        for _, y, _ in vectors_of(cache, normalize, vectors.device, within=within):
            y = y.double()
            weight = torch.einsum("qbk,nbk->qnb", v, y) * weights(y.square().sum(2))
            total += torch.einsum("qnb,nbk->qbk", weight, y)
        return total

    return _inverse(v, summed(cache, v, taken) / max(1, n), damped)


def own(
    cache: Cache, normalize: str, damping: float, device: torch.device
) -> Iterator[tuple[Callable[[Tensor], Tensor], slice]]:
    """(the map y [n, blocks, width] -> H_b^-1 y_b, float64; which blocks), for all blocks."""
    n, damped, mean_square = _damped(cache, normalize, damping, device)
    width = cache.manifest.width
    for blocks in block_groups(len(cache.layers), 4 * width * min(width, count(cache))):
        some = damped[blocks]
        found = moment(cache, normalize, blocks, mean_square[blocks], device, weights=_weights(some))

        def solve(y: Tensor, found=found, some=some) -> Tensor:  # type: ignore[no-untyped-def]
            return _inverse(y.double(), found.times(y) / max(1, n), some)

        yield solve, blocks


def _damped(cache: Cache, normalize: str, damping: float, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """How many rows, lambda_b and the mean of |y_nb|^2: [blocks] float64 each."""
    n, mean_square = squares(cache, normalize, device)
    numbers = torch.tensor([prod(block.shape) for block in cache.layers], device=device)
    return n, damping * mean_square / numbers, mean_square


def _weights(damped: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda square: torch.where(square > 0, 1 / (damped + square), 0.0)


def _inverse(v: Tensor, taken: Tensor, damped: Tensor) -> Tensor:
    """(v - taken) / lambda; zeros in a block in which no row has a gradient."""
    live = (damped > 0)[:, None]
    return torch.where(live, (v - taken) / torch.where(live, damped[:, None], 1.0), 0.0)
