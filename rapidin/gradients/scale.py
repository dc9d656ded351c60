"""The preconditioner of one parameter's gradient: a scale for each row and column, and K-FAC's directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import ops
from rapidin.gradients.kfac import Spectrum
from rapidin.ops import LowRank


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a linear layer's gradient ``sum_t rows_t columns_t^T``, and how they are preconditioned.

    columns: [B, T, I], rows: [B, T, O], of any float dtype; column_low_rank, row_low_rank: applied to each
    side, by the sketch itself (`ops.linear_sketch`); column_scale, row_scale: numbers that multiply each
    side, or in the end the sketch.
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
    """A root ``V^-p`` of one parameter: rows [O] and columns [I], float32, and for K-FAC the LowRank that is
    applied to each side before.

    row_constant, column_constant: the one value of a side's scale, None where values differ. Determined when
    a scale is made on the CPU, since reading it from a GPU would wait for it.
    """

    rows: Tensor
    columns: Tensor
    row_directions: LowRank | None = None
    column_directions: LowRank | None = None
    row_constant: float | None = None
    column_constant: float | None = None

    def __post_init__(self) -> None:
        for name, side in (("row_constant", self.rows), ("column_constant", self.columns)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, _constant(side))

    @staticmethod
    def of(row_means: Tensor, column_means: Tensor, exponent: float, floor: float) -> Scale:
        """The scale for row means [O] and column means [I] of a second moment, all at least 0.

        Rows and columns without gradient count as `floor` of the mean one, so that they neither explode nor
        give NaN; a parameter without any gradient is left as it is.
        """
        r, c = row_means.double(), column_means.double()
        mean = float(r.mean())
        if not mean > 0:
            return Scale(torch.ones_like(r, dtype=torch.float32), torch.ones_like(c, dtype=torch.float32))
        # Most layers' rows are those of the output gradient, as small as the gradient is: they take up its
        # size, and inputs stay as large as they are.
        rows, columns = r.clamp(min=floor * mean), (c / mean).clamp(min=floor)
        return Scale(rows.pow(-exponent).float(), columns.pow(-exponent).float())

    @staticmethod
    def of_spectra(
        found: tuple[Spectrum | Tensor, Spectrum] | None,
        shape: tuple[int, int],
        exponent: float,
        damping: float,
    ) -> Scale:
        """K-FAC's, of what `FactorMoments.spectra` found for a parameter of this shape (O, I)."""
        if found is None:
            return Scale(torch.ones(shape[0], device="cpu"), torch.ones(shape[1], device="cpu"))
        rows, (columns, column_directions) = found[0], _side(found[1], exponent, damping)
        if isinstance(rows, Spectrum):
            row_scale, row_directions = _side(rows, exponent, damping)
            return Scale(row_scale, columns, row_directions, column_directions)
        row_scale = (rows + damping * rows.mean()).pow(-exponent).float()
        return Scale(row_scale, columns, None, column_directions)

    def factors(self, columns: Tensor, rows: Tensor) -> Factors:
        """The factors of a gradient, columns [B, T, I] and rows [B, T, O], with this scale.

        A side whose scale is one number is left as it is: the sketch is linear and applies the scale itself.
        """
        column_low_rank, row_low_rank, column_scale, row_scale = None, None, 1.0, 1.0
        if self.column_constant is None:
            columns = _turned(columns, self.columns, self.column_directions)
        else:
            column_low_rank, column_scale = _there(self.column_directions, columns), self.column_constant
        if self.row_constant is None:
            rows = _turned(rows, self.rows, self.row_directions)
        else:
            row_low_rank, row_scale = _there(self.row_directions, rows), self.row_constant
        return Factors(columns, rows, column_low_rank, row_low_rank, column_scale, row_scale)

    def embedding(self, ids: Tensor, grads: Tensor) -> Tensor:
        """What the tokens ids [B, T] bring to an embedding's rows, [B, T, E], scaled."""
        return scaled(_turned(grads, self.columns, self.column_directions), self.rows[ids][..., None])

    def formed(self, grads: Tensor) -> Tensor:
        """Gradients [B, O, I], scaled, in float32."""
        grads = grads.float()
        if self.column_directions is not None:
            grads = self.column_directions.to(grads.device)(grads)
        if self.row_directions is not None:
            grads = self.row_directions.to(grads.device)(grads.mT).mT
        return scaled(grads, self.rows[:, None] * self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I); ValueError where the parts do not fit together."""
        for side, directions in (
            (self.rows, self.row_directions),
            (self.columns, self.column_directions),
        ):
            if directions is not None and directions.basis.shape != (len(side), len(directions.gain)):
                raise ValueError("a basis is of another side")
        return len(self.rows), len(self.columns)

    def to(self, device: torch.device) -> Scale:
        """The same on a device."""
        return Scale(
            self.rows.to(device),
            self.columns.to(device),
            self.row_directions and self.row_directions.to(device),
            self.column_directions and self.column_directions.to(device),
            self.row_constant,
            self.column_constant,
        )


def _side(spectrum: Spectrum, exponent: float, damping: float) -> tuple[Tensor, LowRank]:
    """``(M / mean + damping)^-p mean^-p`` of a side, as a scale [n] and directions."""
    n = len(spectrum.basis)
    root = (spectrum.strong / spectrum.mean + damping).pow(-exponent)
    rest = (spectrum.rest / spectrum.mean + damping) ** -exponent
    scale = torch.full((n,), rest * spectrum.mean**-exponent, dtype=torch.float32, device="cpu")
    return scale, LowRank(spectrum.basis.float().contiguous(), (root / rest - 1).float())


def _turned(x: Tensor, scale: Tensor, directions: LowRank | None) -> Tensor:
    return scaled(x, scale) if directions is None else directions.to(x.device)(x).mul_(scale.to(x.device))


def _there(low_rank: LowRank | None, x: Tensor) -> LowRank | None:
    """The LowRank on x's device: a device map may have put this layer elsewhere."""
    return low_rank and low_rank.to(x.device)


def _constant(scale: Tensor) -> float | None:
    """The one value of a scale; None where values differ, or are not on the CPU."""
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


def _scale(parts: dict[str, Tensor]) -> Scale:
    """What `Preconditioner.data` wrote of one parameter; KeyError or ValueError where it is not that."""
    row_directions, column_directions = (
        LowRank(parts.pop(f"{side}_basis"), parts.pop(f"{side}_gain")) if f"{side}_basis" in parts else None
        for side in ("rows", "columns")
    )
    scale = Scale(parts.pop("rows"), parts.pop("columns"), row_directions, column_directions)
    if parts:
        raise ValueError(f"'{next(iter(parts))}' is no part of a preconditioner")
    _ = scale.shape  # looks at the parts' sizes
    return scale
