"""LowRank: the preconditioner of one side of a layer's gradient, with the tables that kernels need.

`linear_sketch` takes one for each side. It is linear, and so is a count sketch CS:

    CS(x + U diag(gain) U^T x) = CS(x) + CS(U) c,    c = diag(gain) U^T x

A kernel that is given the coefficients c [B, T, r] and the table CS(U) [dim, r] reads the n features of x
once, as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from rapidin.ops import tables
from rapidin.ops.lifetimes import not_captured, upload
from rapidin.ops.onednn import addmm, matmul


@dataclass(frozen=True, eq=False)
class LowRank:
    """``I + U diag(gain) U^T``: scales the strong directions of a side down to the level of the others.

    basis: U [n, r] float32, orthonormal; gain: [r] float32, on the same device. Tables derived from them are
    computed once and kept with this object, so the first call comes before any capture of a CUDA graph.
    Raises TypeError or ValueError on anything else.
    """

    basis: Tensor
    gain: Tensor
    _elsewhere: dict[torch.device, LowRank] = field(default_factory=dict, init=False, repr=False)
    _tables: dict[tuple[int, tuple[int, int], int], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )
    _operands: dict[tuple[int, tuple[int, int], int], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for name, x, ndim in (("basis", self.basis, 2), ("gain", self.gain, 1)):
            if not isinstance(x, Tensor) or x.dtype != torch.float32:
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"LowRank: {name} must be a float32 tensor, got {kind}")
            if x.ndim != ndim:
                raise ValueError(f"LowRank: {name} must have {ndim} axes, got shape {tuple(x.shape)}")
        if self.basis.shape[1] != len(self.gain):
            raise ValueError(
                f"LowRank: basis must have a column for each gain, got shapes {tuple(self.basis.shape)} "
                f"and {tuple(self.gain.shape)}"
            )
        if self.basis.device != self.gain.device:
            raise ValueError(
                f"LowRank: basis and gain must be on one device, got '{self.basis.device}' "
                f"and '{self.gain.device}'"
            )

        object.__setattr__(self, "basis", self.basis.contiguous())
        object.__setattr__(self, "gain", self.gain.contiguous())

    @property
    def features(self) -> int:
        """n, the features of a token."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """r, the number of directions; n where there are few features."""
        return self.basis.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of basis and gain."""
        return self.basis.device

    def to(self, device: torch.device) -> LowRank:
        """This LowRank on a device: itself, or a copy that is made once."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            not_captured(device)
            self._elsewhere[device] = LowRank(upload(self.basis, device), upload(self.gain, device))
        return self._elsewhere[device]

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., n], of any float dtype, preconditioned, in float32: large values nearly cancel, and with
        fewer digits the small remainder would be lost."""
        if self.matrix is not None:
            return matmul(x.float(), self.matrix)
        x = x.float()
        projected = matmul(x, self.basis).mul_(self.gain)
        return addmm(x, projected, self.basis.T)

    @cached_property
    def matrix(self) -> Tensor | None:
        """[n, n] float32: the whole matrix where that takes less work, n <= 2 r; else None."""
        n, r = self.basis.shape
        if n > 2 * r:
            return None
        not_captured(self.device)
        return torch.eye(n, device=self.device) + (self.basis * self.gain) @ self.basis.T

    @cached_property
    def high_and_low(self) -> Tensor:
        """[n, 2 r] bfloat16: the basis as a sum of two bfloat16 matrices, high parts first, low parts after.

        Their sum is off by at most 2^-17 of each number.
        """
        not_captured(self.device)
        high = self.basis.bfloat16()
        return torch.cat((high, (self.basis - high.float()).bfloat16()), 1)

    def table(self, seed: int, side: tuple[int, int], dim: int) -> Tensor:
        """[dim, r] float32: the count sketches of the basis' columns; side: tables.IN or tables.OUT.

        Kept, so a captured graph may read it. The numbers of each bin are added in the order of features.
        """
        key = (seed, side, dim)
        if key not in self._tables:
            not_captured(self.device)
            self._tables[key] = self._table(*key)
        return self._tables[key]

    def operands(self, seed: int, side: tuple[int, int], dim: int) -> Tensor:
        """`table` as the CUDA kernel multiplies it: dim a multiple of 32, the rank of 16. Kept."""
        key = (seed, side, dim)
        if key not in self._operands:
            not_captured(self.device)
            self._operands[key] = _as_operands(self._table(*key))
        return self._operands[key]

    def _table(self, seed: int, side: tuple[int, int], dim: int) -> Tensor:
        # Each chunk has one feature for each bin, so this is a gather. index_add would add in any order on
        # a GPU.
        total = torch.zeros(dim, self.rank, device=self.device)
        entries = tables.columns(seed, side, self.features, dim, self.device)
        for chunk, entry in enumerate(entries.view(-1, dim)):
            feature = chunk * dim + (entry & 0x7FFFFFFF).long()
            sign = torch.where(entry < 0, -1.0, 1.0) * (feature < self.features)
            total += self.basis[feature.clamp(max=self.features - 1)] * sign[:, None]
        return total


def _as_operands(table: Tensor) -> Tensor:
    """[dim, r] float32 -> [dim / 32, r / 16, 2, 2, 32, 8] bfloat16: high and low parts as the tensor cores'
    columns (csrc/cuda/mma.h), four columns of 8 bins to 16 numbers of r, two columns to a lane's 16 bytes."""
    dim, rank = table.shape
    high = table.bfloat16()
    both = torch.stack((high, (table - high.float()).bfloat16()))
    # part, plane, column pair, column, bin of it | step, half, lane of 4, number of a word
    cut = both.view(2, dim // 32, 2, 2, 8, rank // 16, 2, 4, 2)
    return cut.permute(1, 5, 0, 2, 4, 7, 3, 6, 8).reshape(dim // 32, rank // 16, 2, 2, 32, 8).contiguous()


def coefficients(x: Tensor, low_rank: LowRank) -> Tensor:
    """``(x @ basis) * gain``; x: [B, T, n] float32, float16 or bfloat16 -> [B, T, r] float32.

    A float32 product: on a GPU, kernels take `products_with_high_and_low`.
    """
    return matmul(x.float(), low_rank.basis).mul_(low_rank.gain)


def products_with_high_and_low(x: Tensor, low_rank: LowRank) -> Tensor:
    """bfloat16 x [B, T, n] times each part of the basis, [B T, 2 r] float32, high parts first."""
    rows = x.reshape(1, -1, low_rank.features)
    both = low_rank.high_and_low[None]
    # As a batch of one: torch 2.8 has no shape rule for unbatched products with a wider result dtype.
    if x.device.type == "cuda":
        return torch.bmm(rows, both, torch.float32)[0]
    return torch.bmm(rows.float(), both.float())[0]


def applied(x: Tensor, low_rank: LowRank | None) -> Tensor:
    """x [B, T, n], preconditioned for kernels that do not do it themselves: float32 with a LowRank."""
    return x if low_rank is None else low_rank(x)


def preconditioned_dtype(dtype: torch.dtype, low_rank: LowRank | None) -> torch.dtype:
    """The dtype of `preconditioned`'s result."""
    return dtype if low_rank is None or dtype == torch.bfloat16 else torch.float32


def preconditioned(x: Tensor, low_rank: LowRank | None) -> Tensor:
    """x [B, T, n] with its LowRank, as GPU kernels sketch it: bfloat16 rounded to bfloat16 once, any other
    dtype in float32. The CUDA kernel up to 512 preconditions count sketches instead, where it can:
    docs/reference/kernels.md counts why.
    """
    if low_rank is None or preconditioned_dtype(x.dtype, low_rank) == torch.float32:
        return applied(x, low_rank)
    if low_rank.matrix is None and find_spec("triton") is not None:
        from rapidin.kernels import low_rank as kernels

        if low_rank.rank <= kernels.MOST_RANK:
            projected = products_with_high_and_low(x, low_rank)
            return kernels.add_low_rank(x, projected, low_rank.gain.contiguous(), low_rank.high_and_low)
    return low_rank(x).bfloat16()
