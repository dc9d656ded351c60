"""Row and column sums of the squares of per-example gradients, from their factors.

For one example a linear layer's gradient is ``G = sum_t g_t a_t^T``. With the Gram matrix ``K = a a^T`` over
its tokens, the squares of row i sum to ``sum_tu g_ti K_tu g_ui``, and those of the columns likewise, so no
matrix larger than tokens by tokens is needed. If forming the gradient takes less work (LoRA factors, long
texts), the gradient of one example at a time is formed instead.

Squares of small gradients leave float32's range, so each example's factors are first scaled to a largest
element of 1; sums are float64. A value that is not finite makes the sums of its example not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Squares = tuple[Tensor, Tensor]  # sums over rows [B, O] and over columns [B, I], float64


def factor_squares(columns: Tensor, rows: Tensor) -> Squares:
    """The sums for gradients ``sum_t rows_t columns_t^T``; columns: [B, T, I], rows: [B, T, O], any float
    dtype -> [B, O], [B, I] float64."""
    (a, peak_a), (g, peak_g) = _peak_one(columns), _peak_one(rows)
    tokens, n_in, n_out = a.shape[1], a.shape[2], g.shape[2]
    if n_in * n_out <= 2 * tokens * (n_in + n_out):
        formed = [_sums(g_t.mT @ a_t) for g_t, a_t in zip(g, a, strict=True)]
        squares = torch.stack([s[0] for s in formed]), torch.stack([s[1] for s in formed])
    else:
        squares = _quadratic(a @ a.mT, g), _quadratic(g @ g.mT, a)
    scale = (peak_a * peak_g).square()
    return squares[0] * scale, squares[1] * scale


def embedding_squares(ids: Tensor, grads: Tensor, vocabulary: int) -> Squares:
    """The sums for an embedding's gradients [V, E], in which grads[b, t] is added to row ids[b, t]; ids: [B,
    T]
    int64, grads: [B, T, E] -> [B, V], [B, E] float64."""
    g, peak = _peak_one(grads)
    row_sums = torch.zeros(len(ids), vocabulary, dtype=torch.float64, device=grads.device)
    column_sums = []
    for b in range(len(ids)):
        # A token that occurs twice has one row: its gradients are added before they are squared.
        tokens, row_of = torch.unique(ids[b], return_inverse=True)
        r, c = _sums(g.new_zeros(len(tokens), g.shape[2]).index_add_(0, row_of, g[b]))
        row_sums[b, tokens] = r
        column_sums.append(c)
    scale = peak.square()
    return row_sums * scale, torch.stack(column_sums) * scale


def formed_squares(grads: Tensor) -> Squares:
    """The sums for formed gradients [B, O, I], any float dtype -> [B, O], [B, I] float64."""
    g, peak = _peak_one(grads)
    r, c = _sums(g)
    return r * peak.square(), c * peak.square()


def as_factors(ids: Tensor, grads: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """An embedding's gradient as the factors of a linear layer: (columns [B, T, E], rows [B, T, V],
    one-hot)."""
    hot = torch.zeros(*ids.shape, vocabulary, dtype=grads.dtype, device=grads.device)
    return grads, hot.scatter_(2, ids[..., None], 1.0)


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of [B, T, ...] tensors, concatenated along their tokens."""
    if len(pairs) == 1:
        return pairs[0]
    first, second = zip(*pairs, strict=True)
    return torch.cat(first, 1), torch.cat(second, 1)


def _peak_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in float32, scaled to a largest element of 1 in each example, and the scales [B, 1] float64."""
    x = x.float()
    peak = x.flatten(1).abs().amax(1) if x[0].numel() else x.new_zeros(len(x))
    peak = torch.where(peak == 0, 1.0, peak)
    return x / peak[:, None, None], peak.double()[:, None]


def _sums(formed: Tensor) -> Squares:
    """Row and column sums of squares of [..., O, I]."""
    squared = formed.square()
    return squared.sum(-1, dtype=torch.float64), squared.sum(-2, dtype=torch.float64)


def _quadratic(gram: Tensor, x: Tensor) -> Tensor:
    """``sum_tu x_ti gram_tu x_ui`` for each i: gram [B, T, T], x [B, T, N] -> [B, N] float64."""
    # A sum of squares that is zero may be rounded to less.
    return ((gram @ x) * x).sum(1, dtype=torch.float64).clamp(min=0.0)
