"""The codec that stores sketches as float16 or float32 numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.cache.codec.plan import PreparedQuery, ScanPlan, TensorSpecs, spec_bytes, typical_length


@dataclass(frozen=True)
class FloatCodec:
    """Stores blocks and lengths as they are. dtype: "float16" or "float32", of the blocks."""

    dtype: str
    blocks: int
    width: int

    @property
    def row_bytes(self) -> int:
        return spec_bytes(self.tensor_specs())

    def tensor_specs(self) -> TensorSpecs:
        sketch = torch.float16 if self.dtype == "float16" else torch.float32
        return {"sketch": (sketch, (self.blocks * self.width,)), "length": (torch.float32, (self.blocks,))}

    def encode(self, unit: Tensor, length: Tensor) -> dict[str, Tensor]:
        return {"sketch": unit.flatten(1).to(self.tensor_specs()["sketch"][0]), "length": length}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["sketch"].float().view(-1, self.blocks, self.width)

    def lengths(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["length"]

    def typical_lengths(self, tensors: Mapping[str, Tensor], zero_gradient: bool | None = None) -> Tensor:
        return typical_length(tensors["length"])

    def to(self, device: torch.device) -> FloatCodec:
        return self

    def has_zero_gradient(self, tensors: Mapping[str, Tensor]) -> bool:
        return False  # such blocks are stored as zeros, which need no scale

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        return _FloatQuery(vectors.flatten(1).contiguous(), self.width)


@dataclass(frozen=True)
class _FloatQuery:
    vectors: Tensor
    width: int

    def plan(
        self, tensors: Mapping[str, Tensor], scales: Tensor | None, zero_gradient: bool | None = None
    ) -> ScanPlan:
        dim = self.vectors.shape[1]
        offsets = None
        if scales is not None:
            offsets = [0, dim] if scales.shape[1] == 1 else list(range(0, dim + 1, self.width))
        constant = self.vectors.new_zeros(len(self.vectors))
        return ScanPlan([tensors["sketch"]], self.vectors, constant, scales=scales, offsets=offsets)
