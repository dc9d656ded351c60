"""What a row stores: the codec that is asked for, and its shape as fitted to a budget of bytes per
example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rapidin.cache.codec.learn import LearnedBasis
from rapidin.errors import UserError
from rapidin.ops.packed import BITS

FLOATS = {"float16": 2, "float32": 4}  # bytes of a number
PACKED = tuple(BITS)
DTYPES = (*FLOATS, *PACKED)

# Each row also has its line number (8), status (1), truncation (1) and the hash of its record (8).
ROW_OVERHEAD = 18
_SCALE_BYTES = 3 * 2 + 4  # scales of the three parts, float16; the row's typical length, float32
_MIN_SKETCH_BYTES = 64

DEFAULT_SAMPLE = 1024  # examples that a basis is learned from, if the data has as many
_MAX_SHARED = 256  # directions of the shared basis, at most
_MIN_SHARED = 32
_SHARED_FRACTION = 8  # one in so many bytes goes to the shared part (docs/measured/fidelity.md)
_MIN_RESIDUAL = 0.1  # least share of the bits for the residual, which tells near-duplicates apart


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """The codec that is asked for.

    dtype: of the numbers outside the learned bases; bytes: the budget per example, None to store all numbers
    of the sketch; sample: number of examples to learn a basis from, 0 for none.
    """

    dtype: str
    bytes: int | None = None
    sample: int = 0

    def to_json(self) -> dict[str, Any]:
        """The config as the manifest stores it."""
        return asdict(self)

    def shape(self, blocks: int, width: int) -> RowShape:
        """The shape of a row without a learned basis."""
        return fit_shape(self, blocks, width, None)

    def row_bytes(self, blocks: int, width: int) -> int:
        """Bytes of a row in total; of a codec that is yet to be fitted to a budget, the most."""
        if self.dtype in FLOATS:
            return blocks * (width * FLOATS[self.dtype] + 4) + ROW_OVERHEAD
        return self.bytes or self.shape(blocks, width).row_bytes

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> CodecConfig:
        """The config that `to_json` wrote; ValueError if it is not one."""
        dtype, budget, sample = value["dtype"], value["bytes"], value["sample"]
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}")
        if not (budget is None or isinstance(budget, int)) or not isinstance(sample, int) or sample < 0:
            raise ValueError("the codec's budget or sample is not a count")
        return CodecConfig(dtype, budget, sample)


@dataclass(frozen=True, slots=True)
class RowShape:
    """The sizes of a packed row.

    shared: directions of the shared basis, int8; per_layer: directions of each block's own basis, one bit
    each; residual: stored numbers of each block's rotated remainder, in `dtype`; length_bits: 8, 4 or 0 bits
    for a block's length.
    """

    dtype: str
    shared: int
    per_layer: tuple[int, ...]
    residual: tuple[int, ...]
    length_bits: int

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> RowShape:
        """The shape that `asdict` gave; ValueError if it is not one."""
        shape = RowShape(
            str(value["dtype"]), int(value["shared"]), tuple(map(int, value["per_layer"])),
            tuple(map(int, value["residual"])), int(value["length_bits"]),
        )  # fmt: skip
        sizes = (shape.shared, *shape.per_layer, *shape.residual)
        if shape.dtype not in PACKED or shape.length_bits not in (0, 4, 8) or min(sizes) < 0:
            raise ValueError("the shape of a row is not valid")
        return shape

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row in total."""
        blocks = len(self.per_layer)
        return (
            ROW_OVERHEAD
            + _SCALE_BYTES
            + self.shared
            + -(-sum(self.per_layer) // 8)
            + -(-sum(self.residual) * BITS[self.dtype] // 8)
            + -(-blocks * self.length_bits // 8)
        )


def min_row_bytes() -> int:
    """The smallest budget that a codec can be fitted to."""
    return ROW_OVERHEAD + _SCALE_BYTES + _MIN_SKETCH_BYTES


def shared_size(config: CodecConfig, blocks: int) -> int:
    """Directions of the shared basis that a codec of this budget is to learn, 0 without a budget.

    No more of them are learned than are stored, since the per-layer bases are learned from what all of them
    leave. Raises UserError if the budget is too small for any codec.
    """
    if config.bytes is None:
        return 0
    room, _ = _sketch_bytes(config.bytes, blocks, has_basis=True)
    return min(_MAX_SHARED, max(_MIN_SHARED, room // _SHARED_FRACTION))


def _length_bits(budget: int, blocks: int, has_basis: bool) -> int:
    """Bits of a block's length: the most of 8, 4 and 0 that take no more than an eighth of the budget."""
    return next((bits for bits in ((8, 4) if has_basis else (8,)) if blocks * bits <= budget), 0)


def _sketch_bytes(budget: int, blocks: int, has_basis: bool) -> tuple[int, int]:
    """(bytes that a budget leaves for a sketch, bits of a block's length). Raises UserError if too few."""
    length_bits = _length_bits(budget, blocks, has_basis)
    room = budget - ROW_OVERHEAD - _SCALE_BYTES - -(-blocks * length_bits // 8)
    if room < _MIN_SKETCH_BYTES:
        raise UserError(
            f"{budget} bytes per example leave no room for a sketch",
            f"the budget must be at least {min_row_bytes()} bytes, and more with many layers",
        )
    return room, length_bits


def fit_shape(config: CodecConfig, blocks: int, width: int, learned: LearnedBasis | None) -> RowShape:
    """The shape of a packed row: the whole shared basis that was learned, and what else the budget holds.

    Raises UserError if the budget is too small for any codec, ValueError if it is for the shared basis.
    """
    bits = BITS[config.dtype]
    if config.bytes is None:
        return RowShape(config.dtype, 0, (0,) * blocks, (width,) * blocks, 8)
    room, length_bits = _sketch_bytes(config.bytes, blocks, learned is not None)
    if learned is None:
        per_block = min(width, room * 8 // bits // blocks)
        if not per_block:
            raise UserError(
                f"{config.bytes} bytes per example are less than one number for each of {blocks} layers",
                "raise `bytes`, or learn a basis with `sample`",
            )
        return RowShape(config.dtype, 0, (0,) * blocks, (per_block,) * blocks, length_bits)
    shared = learned.shared.shape[1]
    if shared > room:
        raise ValueError(f"{shared} directions of the shared basis do not fit in {room} bytes")
    per_layer, residual = _allocate(learned, (room - shared) * 8, bits)
    return RowShape(config.dtype, shared, per_layer, residual, length_bits)


def _allocate(learned: LearnedBasis, bits: int, bits_each: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(directions of each block's basis that are kept, stored numbers of each block's residual).

    A bit goes where it carries most energy of an unseen example (reverse water-filling, all bits alike): to
    the per-layer directions first, as far as they carry more than any direction of the residual does.
    bits: in total, after the shared part; bits_each: of a number of the residual.
    """
    blocks, width = learned.mean.shape
    energy = torch.cat(learned.per_layer_energy)
    device = energy.device
    owner = torch.cat(
        [torch.full((len(e),), b, device=device) for b, e in enumerate(learned.per_layer_energy)]
    )
    residual_dims = torch.tensor([max(1, width - len(e)) for e in learned.per_layer_energy], device=device)
    worth_keeping = energy > (learned.residual_energy / residual_dims)[owner]
    order = torch.argsort(torch.where(worth_keeping, energy, -1.0), descending=True, stable=True)
    most = int(bits * (1 - _MIN_RESIDUAL)) // 8 * 8
    chosen = order[: min(most, int(worth_keeping.sum()))]
    per_layer = torch.bincount(owner[chosen], minlength=blocks)
    remaining = torch.stack(
        [
            learned.residual_energy[b] + learned.per_layer_energy[b][int(per_layer[b]) :].sum()
            for b in range(blocks)
        ]
    ).double()
    left = bits - -(-int(per_layer.sum()) // 8) * 8
    residual = _split_by_energy(left // bits_each // 8 * 8, remaining, width - per_layer)
    return tuple(per_layer.tolist()), tuple(residual.tolist())


def _split_by_energy(numbers: int, energy: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """About `numbers` split over blocks in proportion to their energy, at most `limit` each: [blocks] int64.

    Blocks that reach their limit leave their share to the others.
    """
    split = torch.zeros(len(energy), dtype=torch.int64, device=energy.device)
    open_ = torch.ones(len(energy), dtype=torch.bool, device=energy.device)
    while numbers > int(split.sum()) and bool(open_.any()):
        share = torch.where(open_, energy, 0.0)
        more = (share / share.sum().clamp(min=1e-300) * (numbers - int(split.sum()))).floor().long()
        if not int(more.sum()):
            break
        split = torch.minimum(split + more, limit)
        open_ = split < limit
    return split
