"""Normalisations: the lengths that gradients are divided by before they are compared.

    none     1         the gradients as they are
    layer    |g_b|     each block g_b at length 1
    cosine   |g|       the whole gradient g at length 1

With `layer` a score is the mean of the products of blocks, with the others it is their sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapidin import ops
from rapidin.attribution.options import NORMALIZE as NORMALIZE


def divide(x: Tensor | float, lengths: Tensor) -> Tensor:
    """x / lengths, 0 where a length is 0."""
    return torch.where(lengths > 0, x / lengths, 0.0)


def whole_lengths(lengths: Tensor) -> Tensor:
    """The lengths of whole gradients [..., 1] float64, from those of their blocks [..., blocks]."""
    # In float64: the squares of small lengths leave float32's range.
    whole: Tensor = lengths.double().norm(dim=-1, keepdim=True)
    return whole


def divisors(lengths: Tensor, normalize: str) -> Tensor:
    """What blocks with these lengths [..., blocks] float64 are divided by: the same shape."""
    if normalize == "none":
        return torch.ones_like(lengths)
    return whole_lengths(lengths).expand_as(lengths) if normalize == "cosine" else lengths


def score_divisor(blocks: int, normalize: str) -> int:
    """What the sum of the products of all blocks is divided by to give the score."""
    return blocks if normalize == "layer" else 1


# --------------------------------------------------------------------------------- rows and queries of a scan


def row_scales(lengths: Tensor, normalize: str) -> Tensor:
    """What the unit blocks of rows are multiplied by, from their lengths [n, blocks]: the same shape,
    float32; with `layer` 1, or 0 for a block with zero gradient."""
    if normalize == "layer":
        return (lengths > 0).float()
    return divide(lengths, whole_lengths(lengths)).float() if normalize == "cosine" else lengths


def query_vectors(sketch: Tensor, normalize: str) -> Tensor:
    """The normalised vectors of query sketches [Q, blocks, width]: the same shape, float32.

    Their products with normalised rows, summed over all blocks, are the scores.
    """
    if normalize == "none":
        return sketch.float()
    unit, lengths = ops.unit_blocks(sketch)
    if normalize == "layer":
        return unit / score_divisor(sketch.shape[1], normalize)
    return divide(sketch, whole_lengths(lengths)[:, :, None]).float()


def target_vectors(targets: Tensor, whole: Tensor, normalize: str) -> Tensor:
    """The vectors of targets' sketches [targets, blocks, width], divided by the lengths of the whole queries'
    sketches that each belongs to (the same shape): the same shape, float32.

    The vectors of targets that sum to a query's sketch sum to the query's vector.
    """
    if normalize == "none":
        return targets.float()
    scales = divide(1.0, divisors(ops.unit_blocks(whole)[1].double(), normalize))
    return (targets * (scales / score_divisor(whole.shape[1], normalize))[:, :, None]).float()


# ------------------------------------------------------------------------------------ errors of normalised
# scores


def squared_directions(x: Tensor, normalize: str) -> Tensor:
    """The squares of the numbers of vectors [..., blocks, width] at length 1, in each block with `layer`, in
    all blocks together with `cosine`."""
    squares = x.square()
    dims = (-2, -1) if normalize == "cosine" else (-1,)
    return squares.div_(squares.sum(dims, keepdim=True).clamp(min=1e-38))


def products_of_directions(products: Tensor, normalize: str) -> Tensor:
    """The products of what has length 1, from those of all blocks [n, blocks]: the same with `layer`, their
    sum [n, 1] with `cosine`."""
    return products.sum(1, keepdim=True) if normalize == "cosine" else products
