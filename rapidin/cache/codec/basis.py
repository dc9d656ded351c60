"""The basis of a packed codec: the mean and the directions in which rows are expressed, as a file keeps
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from rapidin import ops
from rapidin.cache.codec.fit import RowShape
from rapidin.cache.codec.learn import LearnedBasis

# Squared error of one packed number of variance 1, by dtype, over that of an unpacked one: pi / 2 for one
# bit.
_PACKING_LOSS = {"sign": 1.57, "int4": 1.012, "int8": 1.0}

# Names of the tensors in a basis file, which are part of the format, by the fields that they hold.
_TENSOR_NAMES = {
    "mean": "mean",
    "shared": "head",
    "per_layer": "tail",
    "per_layer_rms": "tail_size",
    "residual_rms": "rest_size",
    "residual_weight": "rest_weight",
    "log_length_mean": "length_mean",
}


@dataclass(frozen=True)
class Basis:
    """The part of a `LearnedBasis` that a packed codec of a certain shape uses.

    mean: [blocks, width]; shared: [blocks * width, r], the shared basis; per_layer: [width, p_b] for each
    block, its own basis, randomly rotated; per_layer_rms: [sum p_b] and residual_rms: [blocks], root mean
    squares of coordinates of unseen examples; residual_weight: [], the Wiener weight of products of two
    residuals; log_length_mean: [blocks], the mean of the logarithms of the blocks' lengths.
    """

    mean: Tensor
    shared: Tensor
    per_layer: list[Tensor]
    per_layer_rms: Tensor
    residual_rms: Tensor
    residual_weight: Tensor
    log_length_mean: Tensor

    @staticmethod
    def empty(blocks: int, width: int) -> Basis:
        """A basis without directions, on the CPU."""
        empty = torch.zeros(0, device="cpu")
        return Basis(
            empty.new_zeros(()).expand(blocks, width),  # takes no memory
            empty.new_zeros(blocks * width, 0),
            [empty.new_zeros(width, 0)] * blocks,
            empty,
            empty.new_ones(blocks),
            empty.new_ones(()),
            empty.new_zeros(blocks),
        )

    @staticmethod
    def of(learned: LearnedBasis, shape: RowShape, lengths: Tensor, seed: int) -> Basis:
        """The basis of a codec of this shape, on the CPU like its arguments.

        lengths: [m, blocks] of the sample's blocks; seed: of the rotations.
        """
        generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        width = learned.mean.shape[1]
        # Where the sample leaves no energy, another example may still have much: scales are float16, which a
        # division by a tiny root mean square would overflow.
        smallest_rms = 0.01 / width**0.5
        per_layer, rms = [], []
        for axes, energy, p in zip(learned.per_layer, learned.per_layer_energy, shape.per_layer, strict=True):
            # A random rotation spreads the energy evenly, so that each bit carries as much as any other.
            random = torch.randn(p, p, generator=generator, device=axes.device)
            per_layer.append(axes[:, :p] @ (torch.linalg.qr(random)[0] if p else random))
            rms.append(energy[:p].mean().sqrt().clamp(min=smallest_rms).expand(p) if p else energy[:0])
        residual = torch.stack(
            [
                r + e[p:].sum()
                for r, e, p in zip(
                    learned.residual_energy, learned.per_layer_energy, shape.per_layer, strict=True
                )
            ]
        )
        dims = torch.tensor([max(1, width - p) for p in shape.per_layer], device=residual.device)
        live = lengths > 0
        logs = torch.where(live, lengths.clamp(min=1e-38).log(), 0.0).sum(0) / live.sum(0).clamp(min=1)
        return Basis(
            learned.mean,
            learned.shared[:, : shape.shared].contiguous(),
            per_layer,
            torch.cat(rms),
            (residual / dims).sqrt().clamp(min=smallest_rms),
            _residual_weight(learned, per_layer, residual, shape),
            logs,
        )

    def to(self, device: torch.device) -> Basis:
        """The same basis on a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "per_layer"}
        return Basis(per_layer=[axes.to(device) for axes in self.per_layer], **moved)

    # ------------------------------------------------------------------------- the per-layer bases

    def project(self, x: Tensor) -> Tensor:
        """Coordinates of each block in its own basis: [n, blocks, width] -> [n, sum p_b]."""
        if x.device.type == "cpu":
            return torch.cat([ops.matmul(x[:, b], axes) for b, axes in enumerate(self.per_layer)], 1)
        return self.project_batched(x)

    def project_batched(self, x: Tensor) -> Tensor:
        """The same by few large products, which a GPU does faster than one per block."""
        coordinates = [
            torch.bmm(x[:, group.blocks].transpose(0, 1), group.axes).transpose(0, 1).flatten(1)
            for group in self.groups
        ]
        return torch.cat(coordinates, 1)[:, self._order] if coordinates else x.new_zeros(len(x), 0)

    def lift(self, coordinates: Tensor) -> Tensor:
        """The blocks with these coordinates, the inverse of `project` on what the bases span."""
        if coordinates.device.type == "cpu":
            pieces = torch.split(coordinates, [axes.shape[1] for axes in self.per_layer], 1)
            return torch.stack([x @ axes.T for x, axes in zip(pieces, self.per_layer, strict=True)], 1)
        return self.lift_batched(coordinates)

    def lift_batched(self, coordinates: Tensor) -> Tensor:
        """The same by few large products, which a GPU does faster than one per block."""
        # One zero more, for the padding of blocks with fewer directions than their group has columns.
        padded = torch.nn.functional.pad(coordinates, (0, 1))
        out = coordinates.new_zeros(len(coordinates), *self.mean.shape)
        for group in self.groups:
            in_group = padded[:, group.columns].transpose(0, 1)
            out[:, group.blocks] = torch.bmm(in_group, group.axes.transpose(1, 2)).transpose(0, 1)
        return out

    @cached_property
    def groups(self) -> list[_Group]:
        """Blocks grouped by their numbers of directions, for products that a GPU does at once."""
        device, counts = self.mean.device, [axes.shape[1] for axes in self.per_layer]
        begin = [0, *accumulate(counts)]
        groups = []
        for size in sorted({_padded(p) for p in counts if p}):
            blocks = [b for b, p in enumerate(counts) if p and _padded(p) == size]
            axes = self.mean.new_zeros(len(blocks), self.mean.shape[1], size)
            columns = torch.full((len(blocks), size), begin[-1], dtype=torch.int64, device="cpu")
            for row, b in enumerate(blocks):
                axes[row, :, : counts[b]] = self.per_layer[b]
                columns[row, : counts[b]] = torch.arange(begin[b], begin[b + 1], device="cpu")
            groups.append(_Group(torch.tensor(blocks, device=device), axes, columns.to(device)))
        return groups

    @cached_property
    def _order(self) -> Tensor:
        """Where each direction is among the concatenated products of the groups: [sum p_b]."""
        columns = torch.cat([group.columns.flatten() for group in self.groups])
        return torch.argsort(columns, stable=True)[: len(self.per_layer_rms)]

    # ------------------------------------------------------------------------------ the shared basis

    def unexplained(self, unit: Tensor) -> Tensor:
        """Share of each example's energy about the mean that lies outside the shared basis: [n], 0 to 1."""
        centred = (unit - self.mean).flatten(1)
        explained = (centred @ self.shared).square().sum(1)
        return 1 - explained / centred.square().sum(1).clamp(min=1e-30)

    # -------------------------------------------------------------------------------------- the file

    def rounded(self) -> Basis:
        """The basis as a file gives it back, so that a first run and a resumed one encode alike."""
        return replace(
            self,
            shared=self.shared.half().float(),
            per_layer=[axes.half().float() for axes in self.per_layer],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the basis file: matrices in float16, the rest in float32."""
        values = {name: getattr(self, name) for name in _TENSOR_NAMES}
        values["shared"] = self.shared.half()
        values["per_layer"] = torch.cat([axes.flatten() for axes in self.per_layer]).half()
        return {_TENSOR_NAMES[name]: value for name, value in values.items()}

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor], shape: RowShape, width: int) -> Basis:
        """The basis that `tensors` gave; ValueError if the sizes or numbers are not those of a basis."""
        blocks = len(shape.per_layer)
        sizes = {
            "mean": (blocks, width),
            "shared": (blocks * width, shape.shared),
            "per_layer": (width * sum(shape.per_layer),),
            "per_layer_rms": (sum(shape.per_layer),),
            "residual_rms": (blocks,),
            "residual_weight": (),
            "log_length_mean": (blocks,),
        }
        values = {}
        for field, name in _TENSOR_NAMES.items():
            if name not in tensors or tuple(tensors[name].shape) != sizes[field]:
                raise ValueError(f"'{name}' is not of shape {sizes[field]}")
            if not tensors[name].is_floating_point() or not bool(tensors[name].isfinite().all()):
                raise ValueError(f"'{name}' holds values that are not finite numbers")
            values[field] = tensors[name].float()
        pieces = torch.split(values.pop("per_layer"), [width * p for p in shape.per_layer])
        per_layer = [piece.view(width, p) for piece, p in zip(pieces, shape.per_layer, strict=True)]
        return Basis(per_layer=per_layer, **values)


@dataclass(frozen=True)
class _Group:
    """Blocks with at most P directions.

    blocks: [g] int64; axes: [g, width, P], zero in columns beyond a block's directions; columns: [g, P]
    int64, the index of each direction among those of all blocks, and the number of these in the padding.
    """

    blocks: Tensor
    axes: Tensor
    columns: Tensor


def _padded(directions: int) -> int:
    """A power of two, so that few products serve all blocks and at most half of each is padding."""
    return max(16, 1 << (directions - 1).bit_length())


def _residual_weight(
    learned: LearnedBasis, per_layer: list[Tensor], residual: Tensor, shape: RowShape
) -> Tensor:
    """The Wiener weight of the product of two encoded residuals: signal / (signal + noise).

    signal: the mean square of products of the sample's residuals, less what the sketch's own error of
    1 / width a block adds to it. noise: the mean square error of products of encoded residuals.
    per_layer: the per-layer bases; residual: [blocks], the energy of the residuals.
    """
    device = learned.mean.device
    kept = torch.tensor(shape.residual, device=device).double()
    if not float(kept.sum()):
        return torch.ones((), device=device)
    m, width = len(learned.explained), learned.mean.shape[1]
    gram, sketch_error = learned.mean.new_zeros(m, m), learned.mean.new_zeros(())
    for b, axes in enumerate(per_layer):
        x = learned.cross_fitted(b)
        x = x - ops.matmul(ops.matmul(x, axes), axes.T)
        gram += ops.matmul(x, x.T)
        sketch_error += x.square().sum(1).mean() ** 2 / width
    off_diagonal = gram.square().sum() - gram.diagonal().square().sum()
    signal = (off_diagonal / max(1, m * (m - 1)) - sketch_error).clamp(min=0)
    loss, energy = _PACKING_LOSS[shape.dtype], residual.double()
    noise = (loss * energy**2 / kept.clamp(min=1) - energy**2 / width).clamp(min=0).sum()
    return (signal / (signal + noise).clamp(min=1e-30)).float()
