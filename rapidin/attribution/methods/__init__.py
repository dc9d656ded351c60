"""Methods and normalisations: what becomes of a query's sketch before the scan.

A normalisation says which vectors are compared, a method by which inner product. With x_nb the unit block b
of row n that the cache holds and l_nb the length that it had, the vectors are ``y_nb = s_nb x_nb``:

    layer    s = 1                each layer's gradient of length 1 (RapidIn, Lin et al., ACL 2024, section 3)
    none     s = l_nb             the gradients themselves
    cosine   s = l_nb / |l_n|     the whole gradient of length 1

and the query v likewise; with `layer` the score is the mean over the B blocks, else the sum:

    dot      sum_b <v_b, y_nb>                    TracIn at one checkpoint (Pruthi et al., 2020, eq. 1)
    datainf  sum_b <H_b^-1 v_b, y_nb>             `rapidin.attribution.methods.datainf` (Kwon et al., ICLR
    2024) fisher   sum_b <(F_b + d m_b)^-1 v_b, y_nb>   `rapidin.attribution.methods.fisher`: F_b the second
    moment of the others' y

A method turns the query, so one scan of one cache serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapidin.attribution.methods import datainf, fisher
from rapidin.attribution.methods.vectors import (
    NORMALIZE,
    ScanQuery,
    counted,
    part_vectors,
    query_vectors,
    row_scales,
    vectors_of,
)
from rapidin.cache import Cache
from rapidin.errors import UserError

METHODS = ("dot", "datainf", "fisher")
DAMPED = ("datainf", "fisher")

__all__ = [
    "METHODS",
    "NORMALIZE",
    "ScanQuery",
    "check",
    "counted",
    "default_damping",
    "prepare",
    "row_scales",
    "self_influence",
]


def check(method: str, normalize: str, damping: float | None = None) -> None:
    """Raise UserError for an unknown name, or a damping that the method does not take."""
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", f"known: {', '.join(METHODS)}")
    if normalize not in NORMALIZE:
        raise UserError(f"unknown normalize '{normalize}'", f"known: {', '.join(NORMALIZE)}")
    if damping is None:
        return
    if method not in DAMPED:
        raise UserError(f"the method '{method}' takes no --damping", f"{' and '.join(DAMPED)} do")
    if not 0 < damping < float("inf"):
        raise UserError(f"--damping {damping:g} is not above 0", "leave it out for the default")


def default_damping(method: str, cache: Cache) -> float:
    """The damping that a method takes on this cache where none is said."""
    if method == "datainf":
        return datainf.DAMPING
    kfac = (cache.manifest.preconditioner or {}).get("kind") == "kfac"
    return fisher.WHITE_DAMPING if kfac else fisher.DAMPING


def prepare(
    sketch: Tensor,
    cache: Cache | None = None,
    *,
    method: str = "dot",
    normalize: str = "layer",
    damping: float | None = None,
    parts: tuple[Tensor, Sequence[int]] | None = None,
) -> ScanQuery:
    """Turn query sketches [Q, blocks, width] into what the cache is scanned for.

    cache: for all methods but `dot`. damping: of `datainf` and `fisher`, by default `default_damping`.
    parts: sketches [P, blocks, width] of parts of the queries, and the query that each belongs to, whose
    vectors come after those of the queries, and are parts of them. Raises UserError for an unknown name.
    """
    check(method, normalize, damping)
    vectors, factors = query_vectors(sketch, normalize), None
    if parts is not None and len(parts[0]):
        own = part_vectors(parts[0], sketch[list(parts[1])], normalize)
        vectors = torch.cat([vectors.float(), own])
    if cache is None:
        if method != "dot":
            raise TypeError(f"the method '{method}' needs the cache")
    elif method == "datainf":
        vectors = datainf.turn(cache, vectors, normalize, damping or default_damping(method, cache))
    elif method == "fisher":
        vectors, factors = fisher.turn(cache, vectors, normalize, damping or default_damping(method, cache))
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
    2017, section 5.4; TracIn, section 3.2). Needs no model. With `dot` it is |y_n|^2, which for `layer` and
    `cosine` is the same for all; with the other methods ``y_n^T H^-1 y_n``.
    """
    check(method, normalize, damping)
    device = torch.empty(0, device=device).device
    if method == "dot" and normalize != "none":
        raise UserError(
            f"'{normalize}' makes every gradient equally long, so all would have the same self-influence",
            "say --normalize none, or another --method",
        )
    rows = cache.table_rows(8)
    if method == "dot":
        scores = torch.full((rows,), torch.nan, dtype=torch.float64, device="cpu")
        for first, part in cache.shards(ahead=True):
            squares = cache.codec.lengths(part.tensors).double().square().sum(1)
            scores[first : first + len(squares)] = torch.where(part.status == 0, squares, torch.nan)
        return scores.float()
    own = datainf.own if method == "datainf" else fisher.own
    scores = torch.zeros(rows, dtype=torch.float64, device="cpu")
    for solve, chosen in own(cache, normalize, damping or default_damping(method, cache), device):
        for places, y, _ in vectors_of(cache, normalize, device, blocks=chosen):
            scores[places] += (y.double() * solve(y)).sum((1, 2)).cpu()
    scale = len(cache.layers) if normalize == "layer" else 1
    return torch.where(counted(cache), scores / scale, torch.nan).float()
