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
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal, Protocol

import torch
from torch import Tensor

from rapidin import ops
from rapidin.cache.codec.fit import Shape
from rapidin.cache.codec.learn import Learnt

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


Joined = dict[tuple[int, ...], tuple[list[Tensor], Tensor]]


def side_by_side(plans: Sequence[ScanPlan], joined: Joined | None = None) -> ScanPlan:
    """One scan whose scores are the sums of these plans' scores, all of the same rows and queries.

    joined: concatenated queries of earlier calls: the same tensors of queries give the same result tensor
    """
    if len(plans) == 1:
        return plans[0]
    joined = {} if joined is None else joined
    queries = [plan.queries for plan in plans]
    same = tuple(map(id, queries))
    if same not in joined:
        joined[same] = queries, torch.cat(queries, 1)
    widths = [plan.queries.shape[1] for plan in plans]
    # A plan without numbers has them all in its base; the one part that it needs when alone is not needed.
    parts = [part for plan, width in zip(plans, widths, strict=True) if width for part in plan.parts]
    scales, offsets = None, None
    if any(plan.scales is not None for plan in plans):
        columns, offsets = [], [0]
        for plan, width in zip(plans, widths, strict=True):
            if not width:
                continue
            start = offsets[-1]
            if plan.scales is None or plan.offsets is None:
                columns.append(plan.queries.new_ones(_rows(plan.parts[0]), 1))
                offsets.append(start + width)
            else:
                columns.append(plan.scales)
                offsets += [start + at for at in plan.offsets[1:]]
        scales = torch.cat(columns, 1) if columns else None
    bases = [plan.base for plan in plans if plan.base is not None]
    if not parts:
        parts, scales, offsets = [plans[0].parts[0]], None, None
    elif scales is None:
        offsets = None
    return ScanPlan(
        parts,
        joined[same][1],
        torch.stack([plan.constant for plan in plans]).sum(0),
        torch.stack(bases).sum(0) if bases else None,
        scales,
        offsets,
    )


def _rows(part: Tensor | ops.Packed) -> int:
    return len(part.codes if isinstance(part, ops.Packed) else part)


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

    def to(self, device: torch.device) -> Code:
        """The same code with what it knows on `device`, where the tensors given to it then have to be."""

    def some_dead(self, fields: Mapping[str, Tensor]) -> bool:
        """Whether a plan without scales needs some all the same, since a row has a block without gradient."""

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        """Query vectors [Q, blocks, width] -> what is put to each shard."""


class PreparedQuery(Protocol):
    """Queries put into the terms of a code."""

    def plan(
        self, fields: Mapping[str, Tensor], scales: Tensor | None, some_dead: bool | None = None
    ) -> ScanPlan:
        """The scan of a shard's rows, their blocks scaled by `scales` [n, blocks], or not.

        some_dead: what the code's `some_dead` says of these rows, where it is known: to ask a GPU is to wait.
        """


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

    def to(self, device: torch.device) -> FloatCode:
        return self

    def some_dead(self, fields: Mapping[str, Tensor]) -> bool:
        return False  # such blocks are zeros

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        return _FloatQuery(vectors.flatten(1).contiguous(), self.width)


@dataclass(frozen=True)
class _FloatQuery:
    vectors: Tensor
    width: int

    def plan(
        self, fields: Mapping[str, Tensor], scales: Tensor | None, some_dead: bool | None = None
    ) -> ScanPlan:
        dim = self.vectors.shape[1]
        offsets = None if scales is None else list(range(0, dim + 1, self.width))
        constant = self.vectors.new_zeros(len(self.vectors))
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
        self._elsewhere: dict[torch.device, PackedCode] = {}

    def to(self, device: torch.device) -> PackedCode:
        if device == self.basis.mean.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = PackedCode(self.shape, self.width, self.seed, self.basis.to(device))
        return self._elsewhere[device]

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
        scales = unit.new_zeros(n, 3)
        # Where something is learnt, what is left of the blocks is needed before the turn.
        learnt = shape.head or sum(shape.tail)
        left = unit - basis.mean if learnt else unit
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
            mean = None if learnt else basis.mean
            rest = ops.pack(ops.turn(left, seed=self.seed, mean=mean, cut=self._sized), self._rest_dtype)
            fields["rest"], scales[:, 2] = rest.codes, _scale(rest)
        dead = (length == 0).all(1)
        scales.masked_fill_(dead[:, None], 0.0)  # no gradient, no code: not the bits of zeros
        fields["scale"] = scales.half()
        fields["size"], codes = self._encode_lengths(length)
        if codes is not None:
            fields["length"] = codes
        return fields

    @cached_property
    def cut(self) -> ops.Cut:
        """The numbers of a turned remainder that the rest keeps."""
        return ops.Cut(self.shape.rest, self.width, self.basis.mean.device)

    @cached_property
    def _sized(self) -> ops.Cut:
        """The same, each divided by the size of a number of its block, so that one scale a row serves all."""
        return ops.Cut(self.shape.rest, self.width, self.basis.mean.device, self.basis.rest_size)

    @cached_property
    def rest_size(self) -> Tensor:
        """Size of a number of the rest, by its block: [sum of rest]."""
        return self.basis.rest_size[self.cut.owner]

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
            turned = out.new_zeros(n, self.blocks * self.width)
            turned[:, self.cut.places] = ops.unpack(parts["rest"]) * self.rest_size * self.whole
            rest = ops.turn(turned.view_as(out), seed=self.seed, back=True)
            out += rest - basis.back(basis.along(rest))
        return torch.where((self.lengths(fields) > 0)[:, :, None], out, 0.0)

    @cached_property
    def whole(self) -> Tensor:
        """Each kept number of a remainder stands for so many, as far as it is believed: [sum of rest]."""
        device = self.basis.mean.device
        kept = torch.tensor(self.shape.rest, device=device).double()
        whole = self.width - torch.tensor(self.shape.tail, device=device).double()
        return (whole / kept.clamp(min=1)).float()[self.cut.owner] * self.basis.rest_weight

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
            turned = ops.turn(left, seed=code.seed, cut=code.cut)
            found["rest"] = turned * code.rest_size * code.whole
        self.found = found

    def plan(
        self, fields: Mapping[str, Tensor], scales: Tensor | None, some_dead: bool | None = None
    ) -> ScanPlan:
        code, parts = self.code, self.code.parts(fields)
        if scales is None and (code.some_dead(fields) if some_dead is None else some_dead):
            scales = (code.lengths(fields) > 0).float()
        if scales is None:
            return ScanPlan(list(parts.values()), self._queries, self.constant)
        base = scales @ self._mean_by_block.T
        if "head" in parts:
            head = ops.unpack(parts.pop("head"))
            # sum_b scales[n, b] <q_b, (P head_n)_b>: the blocks of the head are not kept apart in a row
            base += torch.stack([((scales @ by_block) * head).sum(1) for by_block in self._head_by_block], 1)
        if not parts:
            return ScanPlan([base.new_zeros(len(base), 0)], self._nothing, self._zeros, base.T.contiguous())
        widths = [w for name in parts for w in (code.shape.tail if name == "tail" else code.shape.rest)]
        return ScanPlan(
            list(parts.values()),
            self._without_head,
            self._zeros,
            base.T.contiguous(),
            scales.repeat(1, len(parts)),
            [0, *accumulate(widths)],
        )

    # The same tensors for each shard, so that a scan prepares them once.

    @cached_property
    def _queries(self) -> Tensor:
        return torch.cat(list(self.found.values()), 1)

    @cached_property
    def _without_head(self) -> Tensor:
        return torch.cat([x for name, x in self.found.items() if name != "head"], 1)

    @cached_property
    def _nothing(self) -> Tensor:
        return self.vectors.new_zeros(len(self.vectors), 0)

    @cached_property
    def _zeros(self) -> Tensor:
        return self.vectors.new_zeros(len(self.vectors))

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
        """Nothing learnt; on the CPU."""
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
    def of(learnt: Learnt, shape: Shape, lengths: Tensor, seed: int) -> Basis:
        """The basis of a code of this shape; lengths: [m, blocks] of the sample; all of it on the CPU."""
        generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        tail, sizes = [], []
        # Where the sample says that nothing is left, another example may still leave much: scales are
        # float16.
        least = 0.01 / learnt.mean.shape[1] ** 0.5
        for axes, energy, p in zip(learnt.tail, learnt.energy, shape.tail, strict=True):
            # Turned among themselves, so that each bit tells as much as any other.
            random = torch.randn(p, p, generator=generator, device=axes.device)
            tail.append(axes[:, :p] @ (torch.linalg.qr(random)[0] if p else random))
            sizes.append(energy[:p].mean().sqrt().clamp(min=least).expand(p) if p else energy[:0])
        left = torch.stack(
            [r + e[p:].sum() for r, e, p in zip(learnt.rest, learnt.energy, shape.tail, strict=True)]
        )
        spare = torch.tensor([max(1, learnt.mean.shape[1] - p) for p in shape.tail], device=left.device)
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

    def to(self, device: torch.device) -> Basis:
        """The same on a device."""
        named = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "tail"}
        return Basis(tail=[axes.to(device) for axes in self.tail], **named)

    def along(self, x: Tensor) -> Tensor:
        """Each block along its own directions: [n, blocks, width] -> [n, sum p_b]."""
        if x.device.type == "cpu":
            return torch.cat([x[:, b] @ axes for b, axes in enumerate(self.tail)], 1)
        return self.along_at_once(x)

    def along_at_once(self, x: Tensor) -> Tensor:
        """The same by few large products, as a GPU wants it."""
        found = [
            torch.bmm(x[:, group.blocks].transpose(0, 1), group.axes).transpose(0, 1).flatten(1)
            for group in self.groups
        ]
        return torch.cat(found, 1)[:, self._order] if found else x.new_zeros(len(x), 0)

    def back(self, along: Tensor) -> Tensor:
        """The inverse of `along` on what the directions span."""
        if along.device.type == "cpu":
            pieces = torch.split(along, [axes.shape[1] for axes in self.tail], 1)
            return torch.stack([piece @ axes.T for piece, axes in zip(pieces, self.tail, strict=True)], 1)
        return self.back_at_once(along)

    def back_at_once(self, along: Tensor) -> Tensor:
        """The same by few large products, as a GPU wants it."""
        padded = torch.nn.functional.pad(
            along, (0, 1)
        )  # a zero for the directions that a block does not have
        out = along.new_zeros(len(along), *self.mean.shape)
        for group in self.groups:
            along_group = padded[:, group.columns].transpose(0, 1)
            out[:, group.blocks] = torch.bmm(along_group, group.axes.transpose(1, 2)).transpose(0, 1)
        return out

    @cached_property
    def groups(self) -> list[_Group]:
        """Blocks of like numbers of directions, for products that a GPU does at once."""
        device, counts = self.mean.device, [axes.shape[1] for axes in self.tail]
        begin = [0, *accumulate(counts)]
        found = []
        for size in sorted({_padded(p) for p in counts if p}):
            chosen = [b for b, p in enumerate(counts) if p and _padded(p) == size]
            axes = self.mean.new_zeros(len(chosen), self.mean.shape[1], size)
            columns = torch.full((len(chosen), size), begin[-1], dtype=torch.int64, device="cpu")
            for place, b in enumerate(chosen):
                axes[place, :, : counts[b]] = self.tail[b]
                columns[place, : counts[b]] = torch.arange(begin[b], begin[b + 1], device="cpu")
            found.append(_Group(torch.tensor(chosen, device=device), axes, columns.to(device)))
        return found

    @cached_property
    def _order(self) -> Tensor:
        """Where each direction is in the groups' products, side by side: [sum p_b]."""
        columns = torch.cat([group.columns.flatten() for group in self.groups])
        return torch.argsort(columns, stable=True)[: len(self.tail_size)]

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
            if not found[name].is_floating_point() or not bool(found[name].isfinite().all()):
                raise ValueError(f"'{name}' holds something else than finite numbers")
        pieces = torch.split(found["tail"].float(), [width * p for p in shape.tail])
        tail = [piece.view(width, p) for piece, p in zip(pieces, shape.tail, strict=True)]
        rest = {name: found[name].float() for name in set(wanted) - {"tail"}}
        return Basis(tail=tail, **rest)


@dataclass(frozen=True)
class _Group:
    """Blocks with at most P directions.

    blocks: [g] int64; axes: [g, width, P], zeros for those that a block does not have; columns: [g, P] int64,
    where its directions are among all, past the last one for those.
    """

    blocks: Tensor
    axes: Tensor
    columns: Tensor


def _padded(directions: int) -> int:
    """A power of two, so that few products serve all blocks and at most half of each is zeros."""
    return max(16, 1 << (directions - 1).bit_length())


def _rest_weight(learnt: Learnt, tail: list[Tensor], left: Tensor, shape: Shape) -> Tensor:
    """How far the product of two remainders may be believed: signal / (signal + noise) (Wiener).

    signal: the mean square of such products between the sample's examples, less what the sketch's own error
    of 1 / width a block puts there. noise: that of `rest` codes, 1.57 = pi / 2 for one bit a number.
    """
    device = learnt.mean.device
    kept = torch.tensor(shape.rest, device=device).double()
    if not float(kept.sum()):
        return torch.ones((), device=device)
    m, width = len(learnt.held), learnt.mean.shape[1]
    gram, own = learnt.mean.new_zeros(m, m), learnt.mean.new_zeros(())
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
