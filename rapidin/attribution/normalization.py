"""Normalizations: the lengths that gradients are divided by before they are compared.

    none        1              the gradients as they are
    layer       |g_b|          each block g_b at length 1
    cosine      |g|            the whole gradient g at length 1
    weighted    |g_b| / r      of a row; r = t^(1/4) for the geometric mean t of its lengths |g_b|
                s sum_b |g_b|  of a query; s: the mean of r over the rows

With `layer` a score is the mean of the products of blocks, with the others it is their sum. So `layer` is the
mean of the blocks' cosines, and `weighted` their mean weighted by the lengths of the query's blocks, times
r / s of the row. studies/damping compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapidin import ops
from rapidin.attribution.options import NORMALIZE as NORMALIZE
from rapidin.cache.codec.plan import typical_length

ROOT = 0.25  # the power of a row's typical length that `weighted` multiplies its scores by


def of_directions(normalize: str) -> str:
    """The normalization whose rows have the same directions, block by block: `layer` for `weighted`."""
    return "layer" if normalize == "weighted" else normalize


def row_factors(typical: Tensor) -> Tensor:
    """What `weighted` multiplies whole rows with these typical lengths [...] by: [..., 1]."""
    factors: Tensor = typical[..., None] ** ROOT
    return factors


def divide(x: Tensor | float, lengths: Tensor) -> Tensor:
    """x / lengths, 0 where a length is 0."""
    return torch.where(lengths > 0, x / lengths, 0.0)


def whole_lengths(lengths: Tensor) -> Tensor:
    """The lengths of whole gradients [..., 1] float64, from those of their blocks [..., blocks]."""
    # In float64: the squares of small lengths leave float32's range.
    whole: Tensor = lengths.double().norm(dim=-1, keepdim=True)
    return whole


def row_divisors(lengths: Tensor, normalize: str) -> Tensor:
    """What the blocks of rows with these lengths [..., blocks] float64 are divided by: the same shape."""
    if normalize == "none":
        return torch.ones_like(lengths)
    if normalize == "weighted":
        return divide(lengths, row_factors(typical_length(lengths)))
    return whole_lengths(lengths).expand_as(lengths) if normalize == "cosine" else lengths


def query_divisors(lengths: Tensor, normalize: str) -> Tensor:
    """The same of queries, but for the mean over the rows that `weighted` has."""
    if normalize == "weighted":
        return lengths.sum(-1, keepdim=True).expand_as(lengths)
    return row_divisors(lengths, normalize)


def score_divisor(blocks: int, normalize: str) -> int:
    """What the sum of the products of all blocks is divided by to give the score."""
    return blocks if normalize == "layer" else 1


# --------------------------------------------------------------------------------- rows and queries of a scan


def row_scales(lengths: Tensor, normalize: str) -> Tensor:
    """What the unit blocks of rows are multiplied by, from their lengths [n, blocks]: the same shape,
    float32; with `layer` 1, or 0 for a block with zero gradient."""
    if normalize == "layer":
        return (lengths > 0).float()
    if normalize == "weighted":
        return (lengths > 0) * row_factors(typical_length(lengths))
    return divide(lengths, whole_lengths(lengths)).float() if normalize == "cosine" else lengths


def query_vectors(sketch: Tensor, normalize: str) -> Tensor:
    """The normalized vectors of query sketches [Q, blocks, width]: the same shape, float32.

    Their products with normalized rows, summed over all blocks, are the scores, but for the mean over the
    rows that `weighted` has.
    """
    if normalize == "none":
        return sketch.float()
    unit, lengths = ops.unit_blocks(sketch)
    if normalize == "layer":
        return unit / score_divisor(sketch.shape[1], normalize)
    return divide(sketch, query_divisors(lengths.double(), normalize)[:, :, None]).float()


def target_vectors(targets: Tensor, whole: Tensor, normalize: str) -> Tensor:
    """The vectors of targets' sketches [targets, blocks, width], divided by the lengths of the whole queries'
    sketches that each belongs to (the same shape): the same shape, float32.

    The vectors of targets that sum to a query's sketch sum to the query's vector.
    """
    if normalize == "none":
        return targets.float()
    scales = divide(1.0, query_divisors(ops.unit_blocks(whole)[1].double(), normalize))
    return (targets * (scales / score_divisor(whole.shape[1], normalize))[:, :, None]).float()


# ------------------------------------------------------------------------------------ errors of normalized
# scores


def squared_directions(x: Tensor, normalize: str) -> Tensor:
    """The squares of the numbers of vectors [..., blocks, width] at length 1, in all blocks together with
    `cosine`, in each block with the others."""
    squares = x.square()
    dims = (-2, -1) if normalize == "cosine" else (-1,)
    return squares.div_(squares.sum(dims, keepdim=True).clamp(min=1e-38))


def products_of_directions(products: Tensor, owner: Tensor, normalize: str) -> Tensor:
    """What a score loses if a block of a vector gets longer, relative to that, since scores are divided by
    lengths; from the products of blocks [n, blocks].

    With `layer` it is the block's own product, with `cosine` the sum of all, [n, 1]. With `weighted` it is
    the share of that sum that the block has in the sum of the lengths of the query `owner` [blocks, width].
    """
    if normalize == "layer":
        return products
    whole = products.sum(1, keepdim=True)
    if normalize == "cosine":
        return whole
    lengths = owner.norm(dim=1)
    return whole * divide(lengths, lengths.sum()).to(whole)
