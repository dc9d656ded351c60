"""The codec that stores sketches in few bits: int8, int4 or one bit per number, with a basis from a sample.

`PackedCodec` stores a row u (all its blocks in one vector) in up to three parts:

    shared      P^T (u - mean), int8               coordinates in a basis of all layers together
    per-layer   (V_b rotated)^T r_b, one bit each  coordinates of r = u - mean - P shared, in a basis per
    block residual    rotated remainder of r_b, cut      a random subset of what neither basis spans

each with one scale per row that makes the row's inner product with its own code exact (RaBitQ, Gao & Long,
SIGMOD 2024, section 3.2). Without a sample there is the residual alone. Lengths of blocks are stored as
quantized logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import get_args

import torch
from torch import Tensor

from rapidin import ops
from rapidin.cache.codec.basis import Basis
from rapidin.cache.codec.fit import RowShape
from rapidin.cache.codec.plan import PreparedQuery, ScanPlan, TensorSpecs, from_lengths, spec_bytes
from rapidin.ops.packed import PackedDtype

# The parts of a row by the names that their tensors have in a shard, which are part of the format; the scale
# of each is in the column of `scale` of the same order.
SHARED, PER_LAYER, RESIDUAL = "head", "tail", "rest"

_LENGTH_STEPS = {8: (1 / 16, 128), 4: (0.2, 8)}  # by bits: nats per step of a log length, and the code of 0


class PackedCodec:
    """Stores the three parts of a row in few bits; see the top of this module.

    shape: sizes of the parts; width: of a block, a power of two; seed: of the rotation; basis: None for a
    codec that was not fitted to a sample.
    """

    def __init__(
        self,
        shape: RowShape,
        width: int,
        seed: int,
        basis: Basis | None = None,
    ) -> None:
        self.shape, self.width, self.seed = shape, width, seed
        self.blocks = len(shape.per_layer)
        self.basis = basis if basis is not None else Basis.empty(self.blocks, width)
        self._on_device: dict[torch.device, PackedCodec] = {}
        assert shape.dtype in get_args(PackedDtype)
        self._residual_dtype: PackedDtype = shape.dtype  # type: ignore[assignment]

    def to(self, device: torch.device) -> PackedCodec:
        if device == self.basis.mean.device:
            return self
        if device not in self._on_device:
            self._on_device[device] = PackedCodec(self.shape, self.width, self.seed, self.basis.to(device))
        return self._on_device[device]

    @cached_property
    def row_bytes(self) -> int:
        return spec_bytes(self.tensor_specs())

    def tensor_specs(self) -> TensorSpecs:
        shape = self.shape
        specs: TensorSpecs = {}
        if shape.shared:
            specs[SHARED] = (torch.int8, (shape.shared,))
        if sum(shape.per_layer):
            specs[PER_LAYER] = (torch.uint8, (ops.packed_bytes(sum(shape.per_layer), "sign"),))
        if sum(shape.residual):
            dtype = torch.int8 if shape.dtype == "int8" else torch.uint8
            specs[RESIDUAL] = (dtype, (ops.packed_bytes(sum(shape.residual), self._residual_dtype),))
        specs["scale"] = (torch.float16, (3,))
        specs["size"] = (torch.float32, ())
        if shape.length_bits:
            specs["length"] = (torch.uint8, (-(-self.blocks * shape.length_bits // 8),))
        return specs

    # ------------------------------------------------------------------------------------ encoding

    def encode(self, unit: Tensor, length: Tensor) -> dict[str, Tensor]:
        n, basis, shape = len(unit), self.basis, self.shape
        tensors: dict[str, Tensor] = {}
        scales = unit.new_zeros(n, 3)
        # With a basis, the remainder of the blocks is needed before the rotation.
        has_basis = shape.shared or sum(shape.per_layer)
        remainder = unit - basis.mean if has_basis else unit
        if shape.shared:
            shared = ops.pack(ops.matmul(remainder.flatten(1), basis.shared), "int8")
            tensors[SHARED], scales[:, 0] = shared.codes, _scale(shared)
            decoded = ops.matmul(ops.unpack(_rounded(shared)), basis.shared.T)
            remainder = remainder - decoded.view_as(remainder)
        if sum(shape.per_layer):
            coordinates = basis.project(remainder)
            per_layer = ops.pack(coordinates / basis.per_layer_rms, "sign")
            tensors[PER_LAYER], scales[:, 1] = per_layer.codes, _scale(per_layer)
            remainder = remainder - basis.lift(coordinates)
        if sum(shape.residual):
            mean = None if has_basis else basis.mean
            rotated = ops.rotate(remainder, seed=self.seed, mean=mean, cut=self._normalized_cut)
            residual = ops.pack(rotated, self._residual_dtype)
            tensors[RESIDUAL], scales[:, 2] = residual.codes, _scale(residual)
        zero = (length == 0).all(1)
        scales.masked_fill_(zero[:, None], 0.0)  # a row of zero gradient must not decode to the bits of zeros
        tensors["scale"] = scales.half()
        tensors["size"], codes = self._encode_lengths(length)
        if codes is not None:
            tensors["length"] = codes
        return tensors

    @cached_property
    def cut(self) -> ops.Cut:
        """The numbers of a rotated remainder that are stored."""
        return ops.Cut(self.shape.residual, self.width, self.basis.mean.device)

    @cached_property
    def _normalized_cut(self) -> ops.Cut:
        """The same, each divided by the root mean square of its block, so that one scale a row serves all."""
        return ops.Cut(self.shape.residual, self.width, self.basis.mean.device, self.basis.residual_rms)

    @cached_property
    def residual_rms(self) -> Tensor:
        """Root mean square of each stored number of the residual, by its block: [sum of residual]."""
        return self.basis.residual_rms[self.cut.owner]

    def _encode_lengths(self, length: Tensor) -> tuple[Tensor, Tensor | None]:
        """The row's typical length, [n] float32, and codes of its blocks' lengths over that, or None."""
        live = length > 0
        logs = torch.where(live, length.clamp(min=1e-38).log() - self.basis.log_length_mean, 0.0)
        mean = logs.sum(1) / live.sum(1).clamp(min=1)
        size = torch.where(live.any(1), mean.exp(), 0.0)
        bits = self.shape.length_bits
        if not bits:
            return size, None
        step, middle = _LENGTH_STEPS[bits]
        codes = ((logs - mean[:, None]) / step).round().clamp(1 - middle, middle - 1) + middle
        codes = torch.where(live, codes, 0.0).to(torch.uint8)  # 0: zero gradient in this block
        if bits == 8:
            return size, codes
        if self.blocks % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return size, codes[:, ::2] | codes[:, 1::2] << 4

    # ------------------------------------------------------------------------------------ decoding

    def typical_lengths(self, tensors: Mapping[str, Tensor], zero_gradient: bool | None = None) -> Tensor:
        logs = self.basis.log_length_mean  # the sizes are relative to those of the blocks with gradient
        if zero_gradient is None:
            zero_gradient = self.has_zero_gradient(tensors)
        if not zero_gradient:
            return tensors["size"] * logs.mean().exp()
        live = (self._length_codes(tensors) > 0).float()
        return tensors["size"] * ((live @ logs) / live.sum(1).clamp(min=1)).exp()

    def lengths(self, tensors: Mapping[str, Tensor]) -> Tensor:
        size = tensors["size"][:, None]
        bits = self.shape.length_bits
        if not bits:
            return size * self.basis.log_length_mean.exp()
        codes = self._length_codes(tensors)
        step, middle = _LENGTH_STEPS[bits]
        value = ((codes.float() - middle) * step + self.basis.log_length_mean).exp() * size
        return torch.where(codes > 0, value, 0.0)

    def has_zero_gradient(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether some block of some row has zero gradient."""
        return self.shape.length_bits > 0 and bool((self._length_codes(tensors) == 0).any())

    def _length_codes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[n, blocks] uint8, 0 for a block of zero gradient."""
        codes = tensors["length"]
        if self.shape.length_bits == 8:
            return codes
        return torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, : self.blocks]

    def packed_parts(self, tensors: Mapping[str, Tensor]) -> dict[str, ops.Packed]:
        """The packed parts that the codec stores, of `SHARED`, `PER_LAYER` and `RESIDUAL`."""
        scale, shape = tensors["scale"], self.shape
        parts: list[tuple[str, PackedDtype, int]] = [
            (SHARED, "int8", shape.shared),
            (PER_LAYER, "sign", sum(shape.per_layer)),
            (RESIDUAL, self._residual_dtype, sum(shape.residual)),
        ]
        return {
            name: ops.Packed(tensors[name], dtype, width, scale[:, column].contiguous())
            for column, (name, dtype, width) in enumerate(parts)
            if width
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts, basis = self.packed_parts(tensors), self.basis
        n = len(tensors["scale"])
        out = basis.mean.expand(n, -1, -1).clone()
        if SHARED in parts:
            out += ops.matmul(ops.unpack(parts[SHARED]), basis.shared.T).view_as(out)
        coordinates: Tensor | None = None  # in the bases of the layers
        if PER_LAYER in parts:
            coordinates = ops.unpack(parts[PER_LAYER]) * basis.per_layer_rms
        if RESIDUAL in parts:
            rotated = out.new_zeros(n, self.blocks * self.width)
            stored = ops.unpack(parts[RESIDUAL])
            rotated[:, self.cut.positions] = stored * self.residual_rms * self.residual_gain
            residual = ops.rotate(rotated.view_as(out), seed=self.seed, inverse=True)
            out += residual
            within = basis.project(residual)  # what the bases span is no part of it
            coordinates = -within if coordinates is None else coordinates - within
        if coordinates is not None:
            out += basis.lift(coordinates)
        return torch.where((self.lengths(tensors) > 0)[:, :, None], out, 0.0)

    @cached_property
    def residual_gain(self) -> Tensor:
        """Factor of each stored number of the residual, which stands for those of its block that are not
        stored too, times the Wiener weight: [sum of residual]."""
        device = self.basis.mean.device
        stored = torch.tensor(self.shape.residual, device=device).double()
        dims = self.width - torch.tensor(self.shape.per_layer, device=device).double()
        return (dims / stored.clamp(min=1)).float()[self.cut.owner] * self.basis.residual_weight

    # ------------------------------------------------------------------------------------- queries

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        return _PackedQuery(self, vectors.float())


class _PackedQuery:
    """Queries as the parts of a packed codec. coordinates: [Q, size of the part] of each part."""

    def __init__(self, codec: PackedCodec, vectors: Tensor) -> None:
        self.codec, self.vectors = codec, vectors
        basis, shape = codec.basis, codec.shape
        self.constant = vectors.flatten(1) @ basis.mean.flatten()
        remainder = vectors
        self.coordinates: dict[str, Tensor] = {}
        if shape.shared:
            self.coordinates[SHARED] = ops.matmul(vectors.flatten(1), basis.shared)
        if sum(shape.per_layer):
            coordinates = basis.project(remainder)
            remainder = remainder - basis.lift(coordinates)
            self.coordinates[PER_LAYER] = coordinates * basis.per_layer_rms
        if sum(shape.residual):
            rotated = ops.rotate(remainder, seed=codec.seed, cut=codec.cut)
            self.coordinates[RESIDUAL] = rotated * codec.residual_rms * codec.residual_gain

    def plan(
        self, tensors: Mapping[str, Tensor], scales: Tensor | None, zero_gradient: bool | None = None
    ) -> ScanPlan:
        codec, parts = self.codec, self.codec.packed_parts(tensors)
        if scales is None or scales.shape[1] == 1:
            if zero_gradient is None:
                zero_gradient = codec.has_zero_gradient(tensors)
            if not zero_gradient:
                return self._whole_plan(parts, scales)
            live = from_lengths(lambda some: (codec.lengths(some) > 0).float(), tensors)
            scales = live if scales is None else live * scales
        base = scales @ self._mean_by_block.T
        if SHARED in parts:
            shared = ops.unpack(parts.pop(SHARED))
            # sum_b scales[n, b] <q_b, (P shared_n)_b>: the shared part of a row is not divided into blocks.
            base += torch.stack(
                [((scales @ by_block) * shared).sum(1) for by_block in self._shared_by_block], 1
            )
        if not parts:
            return ScanPlan(
                [base.new_zeros(len(base), 0)], self._no_queries, self._zeros, base.T.contiguous()
            )
        shape = codec.shape
        widths = [w for name in parts for w in (shape.per_layer if name == PER_LAYER else shape.residual)]
        return ScanPlan(
            list(parts.values()),
            self._queries_by_block,
            self._zeros,
            base.T.contiguous(),
            scales.repeat(1, len(parts)) if len(parts) > 1 else scales,
            [0, *accumulate(widths)],
        )

    def _whole_plan(self, parts: Mapping[str, ops.Packed], scales: Tensor | None) -> ScanPlan:
        """The scan of rows whose blocks all have the same scale, [n, 1], or none."""
        if scales is None:
            return ScanPlan(list(parts.values()), self._queries, self.constant)
        scaled: list[Tensor | ops.Packed] = [
            replace(part, scale=_scale(part).float() * scales[:, 0]) for part in parts.values()
        ]
        return ScanPlan(scaled, self._queries, self._zeros, self.constant[:, None] * scales.T)

    # These are the same tensors for each shard, so that a scan prepares them once.

    @cached_property
    def _queries(self) -> Tensor:
        return torch.cat(list(self.coordinates.values()), 1)

    @cached_property
    def _queries_by_block(self) -> Tensor:
        """Coordinates in the parts that are divided into blocks."""
        return torch.cat([x for name, x in self.coordinates.items() if name != SHARED], 1)

    @cached_property
    def _no_queries(self) -> Tensor:
        return self.vectors.new_zeros(len(self.vectors), 0)

    @cached_property
    def _zeros(self) -> Tensor:
        return self.vectors.new_zeros(len(self.vectors))

    @cached_property
    def _mean_by_block(self) -> Tensor:
        return (self.vectors * self.codec.basis.mean).sum(2)

    @cached_property
    def _shared_by_block(self) -> Tensor:
        basis, shape = self.codec.basis, self.codec.shape
        blocks = basis.shared.view(self.codec.blocks, self.codec.width, shape.shared)
        return torch.einsum("qbw,bwr->qbr", self.vectors, blocks)


def _scale(packed: ops.Packed) -> Tensor:
    assert packed.scale is not None
    return packed.scale


def _rounded(packed: ops.Packed) -> ops.Packed:
    """With the scale as it is stored, so that the parts that follow correct for its rounding."""
    return ops.Packed(packed.codes, packed.dtype, packed.width, _scale(packed).half())
