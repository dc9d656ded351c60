"""The preconditioner of one parameter's gradient: a scale for each row and column, and for K-FAC a low-rank
map
of each side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import ops
from rapidin.ops import LowRank


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a linear layer's gradient ``sum_t rows_t columns_t^T``, and what is still to be applied
    to
    them.

    columns: [B, T, I], rows: [B, T, O], of any float dtype; column_low_rank, row_low_rank: maps of each side,
    which the sketch can apply itself (`ops.linear_sketch`); column_scale, row_scale: numbers that multiply
    each side, or the sketch.
    """

    columns: Tensor
    rows: Tensor
    column_low_rank: LowRank | None = None
    row_low_rank: LowRank | None = None
    column_scale: float = 1.0
    row_scale: float = 1.0

    def applied(self) -> tuple[Tensor, Tensor]:
        """(columns, rows), preconditioned and scaled; a side with a LowRank becomes float32."""
        columns = self.columns if self.column_low_rank is None else self.column_low_rank(self.columns)
        rows = self.rows if self.row_low_rank is None else self.row_low_rank(self.rows)
        return _times(columns, self.column_scale), _times(rows, self.row_scale)

    def sketch(self, dim: int, seed: int) -> Tensor:
        """The gradient's sketch, [B, dim] float32: `ops.linear_sketch`."""
        sketch = ops.linear_sketch(
            self.columns,
            self.rows,
            dim,
            seed=seed,
            inputs_low_rank=self.column_low_rank,
            grads_low_rank=self.row_low_rank,
        )
        return _times(sketch, self.column_scale * self.row_scale)


@dataclass(frozen=True, slots=True)
class Scale:
    """A root ``V^-p`` of one parameter's second moment: rows [O] and columns [I], float32, multiply each side
    of its gradient.

    row_low_rank, column_low_rank: K-FAC's map of each side, which is applied before the scale; None for none.
    row_constant, column_constant: the one value of a side's scale, None if values differ. Both are determined
    when a scale is made on the CPU, since reading a value from a GPU would wait for it.
    """

    rows: Tensor
    columns: Tensor
    row_low_rank: LowRank | None = None
    column_low_rank: LowRank | None = None
    row_constant: float | None = None
    column_constant: float | None = None

    def __post_init__(self) -> None:
        for name, side in (("row_constant", self.rows), ("column_constant", self.columns)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, _constant(side))

    @staticmethod
    def of(row_means: Tensor, column_means: Tensor, exponent: float, floor: float) -> Scale:
        """Adam's scale for row means [O] and column means [I] of a second moment, all at least 0.

        Means below `floor` times the mean of all count as that, so that rows and columns without gradient
        neither explode nor give NaN. A parameter without any gradient is left as it is.
        """
        r, c = row_means.double(), column_means.double()
        mean = float(r.mean())
        if not mean > 0:
            return Scale(torch.ones_like(r, dtype=torch.float32), torch.ones_like(c, dtype=torch.float32))
        # In most layers the rows are those of the output gradient, which is small. The scale of the rows
        # takes up that size, and inputs stay as large as they are.
        rows, columns = r.clamp(min=floor * mean), (c / mean).clamp(min=floor)
        return Scale(rows.pow(-exponent).float(), columns.pow(-exponent).float())

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> Scale:
        """The scale with these `tensors`; raises KeyError or ValueError if they are not those of a scale."""
        unused = dict(tensors)
        row_low_rank, column_low_rank = (
            LowRank(unused.pop(f"{side}_basis"), unused.pop(f"{side}_gain"))
            if f"{side}_basis" in unused
            else None
            for side in ("rows", "columns")
        )
        scale = Scale(unused.pop("rows"), unused.pop("columns"), row_low_rank, column_low_rank)
        if unused:
            raise ValueError(f"'{next(iter(unused))}' is not a tensor of a preconditioner")
        _ = scale.shape  # checks that the sizes fit together
        return scale

    @property
    def tensors(self) -> dict[str, Tensor]:
        """``rows`` and ``columns``, and with low-rank maps ``rows_basis``, ``rows_gain`` and so on, on the
        CPU."""
        tensors = {}
        for side, scale, low_rank in (
            ("rows", self.rows, self.row_low_rank),
            ("columns", self.columns, self.column_low_rank),
        ):
            tensors[side] = scale.cpu().contiguous()
            if low_rank is not None:
                tensors[f"{side}_basis"] = low_rank.basis.cpu().contiguous()
                tensors[f"{side}_gain"] = low_rank.gain.cpu().contiguous()
        return tensors

    def factors(self, columns: Tensor, rows: Tensor) -> Factors:
        """The factors of a gradient, columns [B, T, I] and rows [B, T, O], to be preconditioned by this
        scale.

        A side whose scale varies is preconditioned here. A side whose scale is one number is left as it is:
        the sketch is linear and applies that number itself.
        """
        column_low_rank, row_low_rank, column_scale, row_scale = None, None, 1.0, 1.0
        if self.column_constant is None:
            columns = _preconditioned(columns, self.columns, self.column_low_rank)
        else:
            column_low_rank, column_scale = _on_device_of(self.column_low_rank, columns), self.column_constant
        if self.row_constant is None:
            rows = _preconditioned(rows, self.rows, self.row_low_rank)
        else:
            row_low_rank, row_scale = _on_device_of(self.row_low_rank, rows), self.row_constant
        return Factors(columns, rows, column_low_rank, row_low_rank, column_scale, row_scale)

    def embedding(self, ids: Tensor, grads: Tensor) -> Tensor:
        """The preconditioned gradients [B, T, E] of an embedding's rows ids [B, T]."""
        return scaled(_preconditioned(grads, self.columns, self.column_low_rank), self.rows[ids][..., None])

    def formed(self, grads: Tensor) -> Tensor:
        """Formed gradients [B, O, I], preconditioned, in float32."""
        grads = grads.float()
        if self.column_low_rank is not None:
            grads = self.column_low_rank.to(grads.device)(grads)
        if self.row_low_rank is not None:
            grads = self.row_low_rank.to(grads.device)(grads.mT).mT
        return scaled(grads, self.rows[:, None] * self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I). Raises ValueError if a low-rank map and its side's scale differ in size."""
        for side, low_rank in ((self.rows, self.row_low_rank), (self.columns, self.column_low_rank)):
            if low_rank is not None and len(low_rank.basis) != len(side):
                raise ValueError(f"a basis has {len(low_rank.basis)} rows, its side's scale {len(side)}")
        return len(self.rows), len(self.columns)

    def to(self, device: torch.device) -> Scale:
        """The same on a device."""
        return Scale(
            self.rows.to(device),
            self.columns.to(device),
            self.row_low_rank and self.row_low_rank.to(device),
            self.column_low_rank and self.column_low_rank.to(device),
            self.row_constant,
            self.column_constant,
        )


def _preconditioned(x: Tensor, scale: Tensor, low_rank: LowRank | None) -> Tensor:
    return scaled(x, scale) if low_rank is None else low_rank.to(x.device)(x).mul_(scale.to(x.device))


def _on_device_of(low_rank: LowRank | None, x: Tensor) -> LowRank | None:
    """The LowRank on x's device: a device map may have put this layer elsewhere."""
    return low_rank and low_rank.to(x.device)


def _constant(scale: Tensor) -> float | None:
    """The one value of a scale; None if values differ, or are not on the CPU."""
    if scale.device.type != "cpu" or not len(scale) or not bool((scale == scale[0]).all()):
        return None
    return float(scale[0])


def _times(x: Tensor, scale: float) -> Tensor:
    """x times a number; float16, whose range is small, becomes float32."""
    if scale == 1.0:
        return x
    return (x.float() if x.dtype == torch.float16 else x) * scale


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x times a float32 scale, in one pass; float16, whose range is small, becomes float32."""
    scale = scale.to(x.device)  # a device map may have put this layer elsewhere
    if x.dtype == torch.float16:
        return x * scale
    return torch.mul(x, scale, out=torch.empty_like(x))
