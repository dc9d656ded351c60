"""Methods and normalisations: what becomes of a query's sketch before the scan.

A score is ``sum_b scale[n, b] <q_b, x_nb>`` over the blocks b, where x_nb is the unit block of row n that
the cache holds. With l_nb the length that the block had:

    layer    q_b / (|q_b| B), no scale          mean over the B layers of the cosine: -1 .. 1 (RapidIn,
    section 3) cosine   q / |q|, scale l_nb / |l_n|        cosine of the whole gradients: -1 .. 1
    none     q, scale l_nb                      gradient dot product: TracIn at one checkpoint (Pruthi et
    al., 2020, eq. 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import ops
from rapidin.errors import UserError
from rapidin.pack import Code

METHODS = ("dot",)
NORMALIZE = ("layer", "none", "cosine")


@dataclass(frozen=True, slots=True)
class ScanQuery:
    """What the scan needs. vectors: [Q, blocks, width] float32; normalize: how rows are scaled."""

    vectors: Tensor
    normalize: str

    def scales(self, code: Code, fields: Mapping[str, Tensor]) -> Tensor | None:
        """Scale of each row's blocks, from their lengths: [n, blocks] float32, or None for none."""
        if self.normalize == "layer":
            return None
        lengths = code.lengths(fields)
        if self.normalize == "none":
            return lengths
        # In float64: the squares of small lengths leave float32's range.
        total = lengths.double().norm(dim=1, keepdim=True)
        return torch.where(total > 0, lengths / total, 0.0).float()


def prepare(sketch: Tensor, *, method: str = "dot", normalize: str = "layer") -> ScanQuery:
    """Turn query sketches [Q, blocks, width] into what is scanned for. UserError for an unknown name."""
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", f"known: {', '.join(METHODS)}")
    if normalize not in NORMALIZE:
        raise UserError(f"unknown normalize '{normalize}'", f"known: {', '.join(NORMALIZE)}")
    unit, length = ops.unit_blocks(sketch)
    if normalize == "layer":
        vectors = unit / sketch.shape[1]
    elif normalize == "cosine":
        total = length.double().norm(dim=1)[:, None, None]
        vectors = (sketch / torch.where(total > 0, total, 1.0)).float()
    else:
        vectors = sketch.float()
    return ScanQuery(vectors.contiguous(), normalize)
