"""Methods: how a query's sketch is preconditioned before the scan, and its scores.

A normalization (`rapidin.attribution.normalization`) says what vectors are compared, a method by which inner
product. With x_nb the unit block b of row n that the cache holds and l_nb its length, the vectors of rows are
``y_nb = s_nb x_nb``:

    weighted s = r_n / mean(r)    r_n = t_n^(1/4), t_n the geometric mean of the lengths l_nb
    layer    s = 1                each layer's gradient at length 1 (RapidIn, Lin et al., ACL 2024, section 3)
    none     s = l_nb             the gradients themselves
    cosine   s = l_nb / |l_n|     the whole gradient at length 1

and the query v likewise, but that the lengths of its blocks are divided by their sum with `weighted`. With
`layer` the score is the mean over the B blocks, else the sum:

    dot      sum_b <v_b, y_nb>                    TracIn at one checkpoint (Pruthi et al., 2020, eq. 1)
    datainf  sum_b <H_b^-1 v_b, y_nb>             `rapidin.attribution.methods.datainf`
    fisher   sum_b <(F_b + d m_b)^-1 v_b, y_nb>   `rapidin.attribution.methods.fisher`

DataInf is of Kwon et al. (ICLR 2024); F_b is the second moment of the other rows' y. A method preconditions
the query, so that one scan of one cache serves all methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapidin.attribution.methods import datainf, fisher
from rapidin.attribution.methods.vectors import (
    DEFAULT_LIMITS,
    Limits,
    ScanQuery,
    counted,
    known_normalization,
    mean_factor,
    vectors_of,
)
from rapidin.attribution.normalization import NORMALIZE, query_vectors, score_divisor, target_vectors
from rapidin.attribution.options import METHODS
from rapidin.cache import Cache
from rapidin.errors import UserError

DAMPED = ("datainf", "fisher")

__all__ = [
    "METHODS",
    "NORMALIZE",
    "Limits",
    "ScanQuery",
    "check",
    "counted",
    "default_damping",
    "prepare",
    "self_influence",
]


def check(method: str, normalize: str, damping: float | None = None) -> None:
    """Raises UserError for an unknown name, or a damping that the method does not take."""
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", f"known: {', '.join(METHODS)}")
    if normalize not in NORMALIZE:
        raise UserError(f"unknown normalize '{normalize}'", f"known: {', '.join(NORMALIZE)}")
    if damping is None:
        return
    if method not in DAMPED:
        raise UserError(f"the method '{method}' takes no `damping`", f"{' and '.join(DAMPED)} do")
    if not 0 < damping < float("inf"):
        raise UserError(f"`damping` must be above 0, got {damping:g}", "leave it out for the default")


def default_damping(method: str, cache: Cache) -> float:
    """The damping that a method uses on this cache if none is given."""
    if method == "datainf":
        return datainf.DAMPING
    kfac = (cache.manifest.preconditioner or {}).get("kind") == "kfac"
    return fisher.WHITE_DAMPING if kfac else fisher.DAMPING


def prepare(
    sketch: Tensor,
    cache: Cache | None = None,
    *,
    method: str = "dot",
    normalize: str = "weighted",
    damping: float | None = None,
    targets: tuple[Tensor, Sequence[int]] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> ScanQuery:
    """What a cache is scanned for, from query sketches [Q, blocks, width].

    cache: needed by all methods but `dot`; without it `weighted` scores are not divided by the mean over
    the rows. damping: of `datainf` and `fisher`, by default `default_damping`.
    targets: sketches [targets, blocks, width] of targets, and the number of the query that each belongs to;
    their vectors come after those of the queries. limits: how much is read and held at a
    time. Raises UserError for an unknown name.
    """
    check(method, normalize, damping)
    if cache is not None:
        normalize = known_normalization(cache, normalize)
    vectors, factors = query_vectors(sketch, normalize), None
    if targets is not None and len(targets[0]):
        of_targets = target_vectors(targets[0], sketch[list(targets[1])], normalize)
        vectors = torch.cat([vectors.float(), of_targets])
    if cache is None:
        if method != "dot":
            raise TypeError(f"the method '{method}' needs the cache")
        return ScanQuery(vectors.float().contiguous(), normalize)
    vectors = vectors / mean_factor(cache, normalize)
    if method in DAMPED:
        damping = damping or default_damping(method, cache)
        if method == "datainf":
            vectors = datainf.precondition_query(cache, vectors, normalize, damping, limits)
        else:
            vectors, factors = fisher.precondition_query(cache, vectors, normalize, damping, limits)
    return ScanQuery(vectors.float().contiguous(), normalize, factors)


def self_influence(
    cache: Cache,
    *,
    method: str = "dot",
    normalize: str = "none",
    damping: float | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The influence of each training example on itself: [rows] float32, NaN for rows that do not count.

    It is large for examples that the others do not explain: mislabelled, rare or odd ones (Koh & Liang, ICML
    2017, section 5.4; TracIn, section 3.2). Needs no model. With `dot` it is |y_n|^2, which is the same for
    all examples with the other normalizations; with the other methods it is ``y_n^T H^-1 y_n``.
    """
    check(method, normalize, damping)
    device = torch.empty(0, device=device).device
    if normalize == "weighted":
        raise UserError("'weighted' is relative to a query, and self-influence has none", "use 'layer'")
    if method == "dot" and normalize != "none":
        raise UserError(
            f"'{normalize}' makes every gradient equally long, so all would have the same self-influence",
            "use `normalize='none'`, or another `method`",
        )
    rows = cache.table_rows(8)
    if method == "dot":
        scores = torch.full((rows,), torch.nan, dtype=torch.float64, device="cpu")
        for first, shard in cache.shards(ahead=True):
            squares = cache.codec.lengths(shard.tensors).double().square().sum(1)
            scores[first : first + len(squares)] = torch.where(shard.status == 0, squares, torch.nan)
        return scores.float()
    block_inverses = datainf.block_inverses if method == "datainf" else fisher.block_inverses
    damping = damping or default_damping(method, cache)
    scores = torch.zeros(rows, dtype=torch.float64, device="cpu")
    for solve, blocks in block_inverses(cache, normalize, damping, device):
        for numbers, y, _ in vectors_of(cache, normalize, device, blocks=blocks):
            scores[numbers] += (y.double() * solve(y)).sum((1, 2)).cpu()
    scores /= score_divisor(len(cache.layers), normalize)
    return torch.where(counted(cache), scores, torch.nan).float()
