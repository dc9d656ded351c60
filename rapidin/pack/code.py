"""Codes: how the sketches of examples are kept in a cache, and how a query is put to them.

The sketch of an example is a row of blocks of length 1, and the lengths that they had. A code says which
tensors a shard keeps of it, and gives a scan what it needs: codes of rows (float tensors or `ops.Packed`)
whose inner products with prepared queries add up to the scores.

`FloatCode` keeps the blocks as they are. `PackedCode` keeps, of a row u (all its blocks in one vector):

    head   P^T (u - mean), int8             directions in which all layers vary together, from a sample
    tail   turned V_b^T r_b, one bit each   directions of what the head leaves, r = u - mean - P head, a block
    rest   turned remainder of r_b, cut     what no sample has shown, a random part of it

each with one scale a row that makes the row's own inner product with its code exact (RaBitQ, Gao & Long,
SIGMOD 2024, section 3.2). Without a sample there is the rest alone. Lengths are kept by their logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from rapidin import ops
from rapidin.pack.fit import Shape
from rapidin.pack.learn import Learnt
from rapidin.pack.turn import turn, turn_back

Fields = dict[str, Tensor]
_PackedDtype = Literal["int8", "int4", "sign"]

_STEP8, _STEP4 = 1 / 16, 0.2  # nats a step of a length's logarithm


@dataclass(frozen=True)
class ScanPlan:
    """One scan of some rows. parts: what `ops.topk_scan` reads, with queries [Q, D]; base: [Q, n] or None;
    scales and offsets: of blocks, or None; constant: [Q], the same for all rows of a query."""

    parts: list[Tensor | ops.Packed]
    queries: Tensor
    constant: Tensor
    base: Tensor | None = None
    scales: Tensor | None = None
    offsets: list[int] | None = None


class Code(Protocol):
    """What a cache keeps of sketches."""

    @property
    def row_bytes(self) -> int:
        """Bytes that the fields below take in a row."""

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of a row of each tensor of a shard."""

    def encode(self, unit: Tensor, length: Tensor) -> Fields:
        """Unit blocks [n, blocks, width] float32 and their lengths [n, blocks] -> the tensors of a shard."""

    def decode(self, fields: Mapping[str, Tensor]) -> Tensor:
        """What is known of the unit blocks: [n, blocks, width] float32."""

    def lengths(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Lengths of the blocks: [n, blocks] float32."""

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        """Query vectors [Q, blocks, width] -> what is put to each shard."""


class PreparedQuery(Protocol):
    """Queries put into the terms of a code."""

    def plan(self, fields: Mapping[str, Tensor], scales: Tensor | None) -> ScanPlan:
        """The scan of a shard's rows, their blocks scaled by `scales` [n, blocks], or not."""


# -------------------------------------------------------------------------------- float16, float32


@dataclass(frozen=True)
class FloatCode:
    """Blocks and lengths as they are. dtype: "float16" or "float32"."""

    dtype: str
    blocks: int
    width: int

    @property
    def row_bytes(self) -> int:
        return sum(_bytes(dtype, shape) for dtype, shape in self.fields().values())

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        sketch = torch.float16 if self.dtype == "float16" else torch.float32
        return {"sketch": (sketch, (self.blocks * self.width,)), "length": (torch.float32, (self.blocks,))}

    def encode(self, unit: Tensor, length: Tensor) -> Fields:
        return {"sketch": unit.flatten(1).to(self.fields()["sketch"][0]), "length": length}

    def decode(self, fields: Mapping[str, Tensor]) -> Tensor:
        return fields["sketch"].float().view(-1, self.blocks, self.width)

    def lengths(self, fields: Mapping[str, Tensor]) -> Tensor:
        return fields["length"]

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        return _FloatQuery(vectors.flatten(1).contiguous(), self.width)


@dataclass(frozen=True)
class _FloatQuery:
    vectors: Tensor
    width: int

    def plan(self, fields: Mapping[str, Tensor], scales: Tensor | None) -> ScanPlan:
        dim = self.vectors.shape[1]
        offsets = None if scales is None else list(range(0, dim + 1, self.width))
        constant = torch.zeros(len(self.vectors))
        return ScanPlan([fields["sketch"]], self.vectors, constant, scales=scales, offsets=offsets)


# -------------------------------------------------------------------------- int8, int4, one bit


class PackedCode:
    """Head, tail and rest of a row in few bits; see the top of this file.

    shape: sizes of the parts; width: of a block, a power of two; seed: of the turn; basis: None where
    nothing is learnt.
    """

    def __init__(
        self,
        shape: Shape,
        width: int,
        seed: int,
        basis: Basis | None = None,
    ) -> None:
        self.shape, self.width, self.seed = shape, width, seed
        self.blocks = len(shape.tail)
        self.basis = basis if basis is not None else Basis.empty(self.blocks, width)

    @cached_property
    def row_bytes(self) -> int:
        return sum(_bytes(dtype, shape) for dtype, shape in self.fields().values())

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        shape = self.shape
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if shape.head:
            found["head"] = (torch.int8, (shape.head,))
        if sum(shape.tail):
            found["tail"] = (torch.uint8, (ops.packed_bytes(sum(shape.tail), "sign"),))
        if sum(shape.rest):
            dtype = torch.int8 if shape.dtype == "int8" else torch.uint8
            found["rest"] = (dtype, (ops.packed_bytes(sum(shape.rest), self._rest_dtype),))
        found["scale"] = (torch.float16, (3,))
        found["size"] = (torch.float32, ())
        if shape.length_bits:
            found["length"] = (torch.uint8, (-(-self.blocks * shape.length_bits // 8),))
        return found

    @property
    def _rest_dtype(self) -> _PackedDtype:
        return self.shape.dtype  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------ encoding

    def encode(self, unit: Tensor, length: Tensor) -> Fields:
        n, basis, shape = len(unit), self.basis, self.shape
        fields: Fields = {}
        scales = torch.zeros(n, 3)
        left = unit - basis.mean
        if shape.head:
            head = ops.pack(left.flatten(1) @ basis.head, "int8")
            fields["head"], scales[:, 0] = head.codes, _scale(head)
            left = left - (ops.unpack(_rounded(head)) @ basis.head.T).view_as(left)
        if sum(shape.tail):
            along = basis.along(left)
            tail = ops.pack(along / basis.tail_size, "sign")
            fields["tail"], scales[:, 1] = tail.codes, _scale(tail)
            left = left - basis.back(along)
        if sum(shape.rest):
            rest = ops.pack(self._cut(turn(left, self.seed)) / self._rest_size, self._rest_dtype)
            fields["rest"], scales[:, 2] = rest.codes, _scale(rest)
        dead = (length == 0).all(1)
        scales[dead] = 0.0  # no gradient, no code: not the bits of zeros
        fields["scale"] = scales.half()
        fields["size"], codes = self._encode_lengths(length)
        if codes is not None:
            fields["length"] = codes
        return fields

    def _cut(self, turned: Tensor) -> Tensor:
        """The first numbers of each block, as many as are kept: [n, sum of rest]."""
        kept = set(self.shape.rest)
        if len(kept) == 1:
            return turned[:, :, : kept.pop()].flatten(1)
        return turned.flatten(1)[:, self._kept]

    @cached_property
    def _kept(self) -> Tensor:
        return torch.cat([torch.arange(m) + b * self.width for b, m in enumerate(self.shape.rest)])

    @cached_property
    def _owner(self) -> Tensor:
        """The block of each number of the rest."""
        return torch.repeat_interleave(torch.arange(self.blocks), torch.tensor(self.shape.rest))

    @cached_property
    def _rest_size(self) -> Tensor:
        """Size of a number of the rest, by its block, so that one scale a row serves all: [sum of rest]."""
        return self.basis.rest_size[self._owner]

    def _encode_lengths(self, length: Tensor) -> tuple[Tensor, Tensor | None]:
        live = length > 0
        logs = torch.where(live, length.clamp(min=1e-38).log() - self.basis.length_mean, 0.0)
        mean = logs.sum(1) / live.sum(1).clamp(min=1)
        size = torch.where(live.any(1), mean.exp(), 0.0)
        bits = self.shape.length_bits
        if not bits:
            return size, None
        step, middle = (_STEP8, 128) if bits == 8 else (_STEP4, 8)
        codes = ((logs - mean[:, None]) / step).round().clamp(1 - middle, middle - 1) + middle
        codes = torch.where(live, codes, 0.0).to(torch.uint8)  # 0: no gradient in this block
        if bits == 8:
            return size, codes
        if self.blocks % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return size, codes[:, ::2] | codes[:, 1::2] << 4

    # ------------------------------------------------------------------------------------ decoding

    def lengths(self, fields: Mapping[str, Tensor]) -> Tensor:
        size = fields["size"][:, None]
        bits = self.shape.length_bits
        if not bits:
            return size * self.basis.length_mean.exp()
        codes = self._length_codes(fields)
        step, middle = (_STEP8, 128) if bits == 8 else (_STEP4, 8)
        value = ((codes.float() - middle) * step + self.basis.length_mean).exp() * size
        return torch.where(codes > 0, value, 0.0)

    def some_dead(self, fields: Mapping[str, Tensor]) -> bool:
        """Whether some row has a block without gradient."""
        return self.shape.length_bits > 0 and bool((self._length_codes(fields) == 0).any())

    def _length_codes(self, fields: Mapping[str, Tensor]) -> Tensor:
        """[n, blocks] uint8, 0 where a block has no gradient."""
        codes = fields["length"]
        if self.shape.length_bits == 8:
            return codes
        return torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, : self.blocks]

    def parts(self, fields: Mapping[str, Tensor]) -> dict[str, ops.Packed]:
        """The packed parts that the code has, of "head", "tail" and "rest"."""
        scale, shape = fields["scale"], self.shape
        found = {}
        for number, (name, dtype, width) in enumerate(
            (
                ("head", "int8", shape.head),
                ("tail", "sign", sum(shape.tail)),
                ("rest", self._rest_dtype, sum(shape.rest)),
            )
        ):
            if width:
                found[name] = ops.Packed(fields[name], dtype, width, scale[:, number].contiguous())  # type: ignore[arg-type]
        return found

    def decode(self, fields: Mapping[str, Tensor]) -> Tensor:
        parts, basis = self.parts(fields), self.basis
        n = len(fields["scale"])
        out = basis.mean.expand(n, -1, -1).clone()
        if "head" in parts:
            out += (ops.unpack(parts["head"]) @ basis.head.T).view_as(out)
        if "tail" in parts:
            out += basis.back(ops.unpack(parts["tail"]) * basis.tail_size)
        if "rest" in parts:
            turned = torch.zeros(n, self.blocks * self.width)
            turned[:, self._kept] = ops.unpack(parts["rest"]) * self._rest_size * self._whole
            rest = turn_back(turned.view_as(out), self.seed)
            out += rest - basis.back(basis.along(rest))
        return torch.where((self.lengths(fields) > 0)[:, :, None], out, 0.0)

    @cached_property
    def _whole(self) -> Tensor:
        """Each kept number of a remainder stands for so many, as far as it is believed: [sum of rest]."""
        kept = torch.tensor(self.shape.rest).double()
        whole = self.width - torch.tensor(self.shape.tail).double()
        return (whole / kept.clamp(min=1)).float()[self._owner] * self.basis.rest_weight

    # ------------------------------------------------------------------------------------- queries

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        return _PackedQuery(self, vectors.float())


class _PackedQuery:
    def __init__(self, code: PackedCode, vectors: Tensor) -> None:
        self.code, self.vectors = code, vectors
        basis, shape = code.basis, code.shape
        self.constant = vectors.flatten(1) @ basis.mean.flatten()
        left, found = vectors, {}
        if shape.head:
            found["head"] = vectors.flatten(1) @ basis.head
        if sum(shape.tail):
            along = basis.along(left)
            left = left - basis.back(along)
            found["tail"] = along * basis.tail_size
        if sum(shape.rest):
            found["rest"] = code._cut(turn(left, code.seed)) * code._rest_size * code._whole
        self.found = found

    def plan(self, fields: Mapping[str, Tensor], scales: Tensor | None) -> ScanPlan:
        code, parts = self.code, self.code.parts(fields)
        if scales is None and code.some_dead(fields):
            scales = (code.lengths(fields) > 0).float()
        if scales is None:
            queries = torch.cat([self.found[name] for name in parts], 1)
            return ScanPlan(list(parts.values()), queries, self.constant)
        base = scales @ self._mean_by_block.T
        if "head" in parts:
            head = ops.unpack(parts.pop("head"))
            # sum_b scales[n, b] <q_b, (P head_n)_b>: the blocks of the head are not kept apart in a row
            base += torch.stack([((scales @ by_block) * head).sum(1) for by_block in self._head_by_block], 1)
        if not parts:
            empty = torch.zeros(len(base), 0)
            return ScanPlan(
                [empty],
                self.vectors.new_zeros(len(self.vectors), 0),
                torch.zeros(len(self.vectors)),
                base.T.contiguous(),
            )
        widths = [w for name in parts for w in (code.shape.tail if name == "tail" else code.shape.rest)]
        offsets = [0, *torch.tensor(widths).cumsum(0).tolist()]
        queries = torch.cat([self.found[name] for name in parts], 1)
        repeated = scales.repeat(1, len(parts))
        return ScanPlan(
            list(parts.values()), queries, torch.zeros(len(queries)), base.T.contiguous(), repeated, offsets
        )

    @cached_property
    def _mean_by_block(self) -> Tensor:
        return (self.vectors * self.code.basis.mean).sum(2)

    @cached_property
    def _head_by_block(self) -> Tensor:
        basis, shape = self.code.basis, self.code.shape
        blocks = basis.head.view(self.code.blocks, self.code.width, shape.head)
        return torch.einsum("qbw,bwr->qbr", self.vectors, blocks)


@dataclass(frozen=True)
class Basis:
    """What a packed code knows: the part of a `Learnt` that it uses.

    mean: [blocks, width]; head: [blocks * width, r]; tail: for each block [width, p_b], turned; tail_size:
    [sum p_b] and rest_size: [blocks], root mean squares on unseen examples; length_mean: [blocks].
    """

    mean: Tensor
    head: Tensor
    tail: list[Tensor]
    tail_size: Tensor
    rest_size: Tensor
    rest_weight: Tensor
    length_mean: Tensor

    @staticmethod
    def empty(blocks: int, width: int) -> Basis:
        """Nothing learnt."""
        return Basis(
            torch.zeros(blocks, width),
            torch.zeros(blocks * width, 0),
            [torch.zeros(width, 0)] * blocks,
            torch.zeros(0),
            torch.ones(blocks),
            torch.ones(()),
            torch.zeros(blocks),
        )

    @staticmethod
    def of(learnt: Learnt, shape: Shape, lengths: Tensor, seed: int) -> Basis:
        """The basis of a code of this shape; lengths: [m, blocks] of the sample."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        tail, sizes = [], []
        # Where the sample says that nothing is left, another example may still leave much: scales are
        # float16.
        least = 0.01 / learnt.mean.shape[1] ** 0.5
        for axes, energy, p in zip(learnt.tail, learnt.energy, shape.tail, strict=True):
            # Turned among themselves, so that each bit tells as much as any other.
            mixed = torch.linalg.qr(torch.randn(p, p, generator=generator))[0] if p else torch.zeros(0, 0)
            tail.append(axes[:, :p] @ mixed)
            sizes.append(energy[:p].mean().sqrt().clamp(min=least).expand(p) if p else energy[:0])
        left = torch.stack(
            [r + e[p:].sum() for r, e, p in zip(learnt.rest, learnt.energy, shape.tail, strict=True)]
        )
        spare = torch.tensor([max(1, learnt.mean.shape[1] - p) for p in shape.tail])
        live = lengths > 0
        logs = torch.where(live, lengths.clamp(min=1e-38).log(), 0.0).sum(0) / live.sum(0).clamp(min=1)
        return Basis(
            learnt.mean,
            learnt.head[:, : shape.head].contiguous(),
            tail,
            torch.cat(sizes),
            (left / spare).sqrt().clamp(min=least),
            _rest_weight(learnt, tail, left, shape),
            logs,
        )

    def along(self, x: Tensor) -> Tensor:
        """Each block along its own directions: [n, blocks, width] -> [n, sum p_b]."""
        return torch.cat([x[:, b] @ axes for b, axes in enumerate(self.tail)], 1)

    def back(self, along: Tensor) -> Tensor:
        """The inverse of `along` on what the directions span."""
        pieces = torch.split(along, [axes.shape[1] for axes in self.tail], 1)
        return torch.stack([piece @ axes.T for piece, axes in zip(pieces, self.tail, strict=True)], 1)

    def outside(self, unit: Tensor) -> Tensor:
        """Share of each example's energy about the mean that the head does not hold: [n], 0 .. 1."""
        centred = (unit - self.mean).flatten(1)
        held = (centred @ self.head).square().sum(1)
        return 1 - held / centred.square().sum(1).clamp(min=1e-30)

    def rounded(self) -> Basis:
        """As it comes back from disk, so that the first run and one that goes on pack alike."""
        return replace(self, head=self.head.half().float(), tail=[axes.half().float() for axes in self.tail])

    def tensors(self) -> Fields:
        """The basis as named tensors, matrices in float16."""
        return {
            "mean": self.mean,
            "head": self.head.half(),
            "tail": torch.cat([axes.flatten() for axes in self.tail]).half(),
            "tail_size": self.tail_size,
            "rest_size": self.rest_size,
            "rest_weight": self.rest_weight,
            "length_mean": self.length_mean,
        }

    @staticmethod
    def of_tensors(found: Mapping[str, Tensor], shape: Shape, width: int) -> Basis:
        """What `tensors` gave; ValueError where the sizes do not fit."""
        blocks = len(shape.tail)
        wanted = {
            "mean": (blocks, width),
            "head": (blocks * width, shape.head),
            "tail": (width * sum(shape.tail),),
            "tail_size": (sum(shape.tail),),
            "rest_size": (blocks,),
            "rest_weight": (),
            "length_mean": (blocks,),
        }
        for name, size in wanted.items():
            if name not in found or tuple(found[name].shape) != size:
                raise ValueError(f"'{name}' is not of shape {size}")
        pieces = torch.split(found["tail"].float(), [width * p for p in shape.tail])
        tail = [piece.view(width, p) for piece, p in zip(pieces, shape.tail, strict=True)]
        rest = {name: found[name].float() for name in set(wanted) - {"tail"}}
        return Basis(tail=tail, **rest)


def _rest_weight(learnt: Learnt, tail: list[Tensor], left: Tensor, shape: Shape) -> Tensor:
    """How far the product of two remainders may be believed: signal / (signal + noise) (Wiener).

    signal: the mean square of such products between the sample's examples, less what the sketch's own error
    of 1 / width a block puts there. noise: that of `rest` codes, 1.57 = pi / 2 for one bit a number.
    """
    kept = torch.tensor(shape.rest).double()
    if not float(kept.sum()):
        return torch.ones(())
    m, width = len(learnt.held), learnt.mean.shape[1]
    gram, own = torch.zeros(m, m), torch.zeros(())
    for b, axes in enumerate(tail):
        x = learnt.unseen(b)
        x = x - (x @ axes) @ axes.T
        gram += x @ x.T
        own += x.square().sum(1).mean() ** 2 / width
    off = gram.square().sum() - gram.diagonal().square().sum()
    signal = (off / max(1, m * (m - 1)) - own).clamp(min=0)
    loss = {"sign": 1.57, "int4": 1.012, "int8": 1.0}[shape.dtype]
    noise = (loss * left.double() ** 2 / kept.clamp(min=1) - left.double() ** 2 / width).clamp(min=0).sum()
    return (signal / (signal + noise).clamp(min=1e-30)).float()


def _scale(packed: ops.Packed) -> Tensor:
    assert packed.scale is not None
    return packed.scale


def _rounded(packed: ops.Packed) -> ops.Packed:
    """With the scale as it is kept, so that what follows corrects for its rounding."""
    return ops.Packed(packed.codes, packed.dtype, packed.width, _scale(packed).half())


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    total = dtype.itemsize
    for n in shape:
        total *= n
    return total
