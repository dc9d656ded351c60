"""What a row is made of: fitting a code to a budget of bytes an example, all told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rapidin.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rapidin.cache.codec.learn import Learnt

FLOATS = ("float16", "float32")
PACKED = ("int8", "int4", "sign")
BITS = {"int8": 8, "int4": 4, "sign": 1}

# Every row also keeps its line number (8), status (1), truncation (1) and the hash of its record (8).
row_bytes_besides = 18
SCALES = 3 * 2 + 4  # of the three parts, float16; the row's mean length, float32

SAMPLE = 1024  # examples that a code learns from, where the data has as many
HEAD = 256  # directions of all layers together, at most
_HEAD_SHARE = 8  # of the bytes, one in so many goes to them (docs/fidelity.md)
REST_SHARE = 0.1  # of the bits, at least, for what no sample has shown: near-duplicates are told apart by it


@dataclass(frozen=True, slots=True)
class Format:
    """How rows are packed, as asked for. dtype: of the numbers for which nothing is learnt; bytes: the budget
    an example, None: all numbers of the sketch; sample: examples to learn from, 0 = nothing is learnt."""

    dtype: str
    bytes: int | None = None
    sample: int = 0

    def to_json(self) -> dict[str, Any]:
        """The format as the manifest keeps it."""
        return asdict(self)

    def shape(self, blocks: int, width: int) -> Shape:
        """The shape of a row where nothing is learnt."""
        return fit(self, blocks, width, None)

    def row_bytes(self, blocks: int, width: int) -> int:
        """Bytes of a row, all told, or at most, where a code is yet to be fitted to a budget."""
        if self.dtype in FLOATS:
            return blocks * (width * (2 if self.dtype == "float16" else 4) + 4) + row_bytes_besides
        return self.bytes or self.shape(blocks, width).row_bytes

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Format:
        """What `to_json` wrote; ValueError where it is none."""
        dtype, budget, sample = value["dtype"], value["bytes"], value["sample"]
        if dtype not in FLOATS + PACKED:
            raise ValueError(f"unknown dtype {dtype!r}")
        if not (budget is None or isinstance(budget, int)) or not isinstance(sample, int) or sample < 0:
            raise ValueError("the code's budget or sample is no count")
        return Format(dtype, budget, sample)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a packed row. head: joint directions, int8; tail: learnt directions of each block, one bit
    each; rest: numbers of each block's turned remainder in `dtype`; length_bits: 8, 4 or 0 for a block's
    length."""

    dtype: str
    head: int
    tail: tuple[int, ...]
    rest: tuple[int, ...]
    length_bits: int

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Shape:
        """What `asdict` gave; ValueError where it is none."""
        shape = Shape(
            str(value["dtype"]), int(value["head"]), tuple(map(int, value["tail"])),
            tuple(map(int, value["rest"])), int(value["length_bits"]),
        )  # fmt: skip
        sizes = (shape.head, *shape.tail, *shape.rest)
        if shape.dtype not in PACKED or shape.length_bits not in (0, 4, 8) or min(sizes) < 0:
            raise ValueError("the shape of a row is not one")
        return shape

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row, all told."""
        blocks = len(self.tail)
        return (
            row_bytes_besides
            + SCALES
            + self.head
            + -(-sum(self.tail) // 8)
            + -(-sum(self.rest) * BITS[self.dtype] // 8)
            + -(-blocks * self.length_bits // 8)
        )


def length_bits(budget: int | None, blocks: int, learnt: bool) -> int:
    """Bits of a block's length: the most of 8, 4 and 0 that take no more than an eighth of the budget."""
    if budget is None:
        return 8
    return next((bits for bits in ((8, 4) if learnt else (8,)) if blocks * bits <= budget), 0)


def width_for(blocks: int, budget: int | None = None) -> int:
    """Bins of a block that pay: about 2^17 numbers in all, 512 bins at 210 layers, 8,192 at 12.

    From a budget of 8,192 bytes an example on twice that: fewer would be what limits the code
    (docs/fidelity.md).
    """
    numbers = 3 << (16 if budget is None or budget < 8192 else 17)
    width = 512
    while width < 8192 and width * 2 * blocks <= numbers:
        width *= 2
    return width


def least_bytes() -> int:
    """The smallest budget that a code can be fitted to."""
    return row_bytes_besides + SCALES + 64


def head_for(wanted: Format, blocks: int) -> int:
    """Joint directions that pay in the budget: how many a code is to learn.

    No more than these: what the tail holds is learnt from what all of them leave. 0 where there is no budget;
    UserError where it has room for no code.
    """
    if wanted.bytes is None:
        return 0
    return min(HEAD, max(32, _room(wanted.bytes, blocks, learnt=True)[0] // _HEAD_SHARE))


def _room(budget: int, blocks: int, learnt: bool) -> tuple[int, int]:
    """(bytes that a budget leaves for a sketch, bits of a block's length). UserError where too few."""
    lengths = length_bits(budget, blocks, learnt)
    left = budget - row_bytes_besides - SCALES - -(-blocks * lengths // 8)
    if left < 64:
        raise UserError(
            f"{budget} bytes an example leave no room for a sketch",
            f"say at least {least_bytes()}",
        )
    return left, lengths


def fit(wanted: Format, blocks: int, width: int, learnt: Learnt | None) -> Shape:
    """The shape of a packed row: all joint directions that were learnt, and what else the budget holds.

    UserError where the budget has room for no code; ValueError where it has none for the joint directions.
    """
    bits = BITS[wanted.dtype]
    if wanted.bytes is None:
        return Shape(wanted.dtype, 0, (0,) * blocks, (width,) * blocks, 8)
    left, lengths = _room(wanted.bytes, blocks, learnt is not None)
    if learnt is None:
        each = min(width, left * 8 // bits // blocks)
        if not each:
            raise UserError(
                f"{wanted.bytes} bytes an example are less than a number for each of {blocks} layers",
                "give more, or let a code learn (--sample)",
            )
        return Shape(wanted.dtype, 0, (0,) * blocks, (each,) * blocks, lengths)
    head = learnt.head.shape[1]
    if head > left:
        raise ValueError(f"{head} joint directions do not fit in {left} bytes")
    tail, rest = _share(learnt, (left - head) * 8, bits)
    return Shape(wanted.dtype, head, tail, rest, lengths)


def _share(learnt: Learnt, bits: int, rest_bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Directions of each block that are kept, and numbers of each block's remainder.

    A bit goes where it carries most energy of an unseen example (reverse water-filling, all bits alike): to
    the learnt directions first, as far as they carry more than any direction of the remainder does.
    """
    import torch

    blocks, width = learnt.mean.shape
    flat = torch.cat(learnt.energy)
    device = flat.device
    owner = torch.cat([torch.full((len(e),), b, device=device) for b, e in enumerate(learnt.energy)])
    spare = torch.tensor([max(1, width - len(e)) for e in learnt.energy], device=device)
    worth = flat > (learnt.rest / spare)[owner]
    order = torch.argsort(torch.where(worth, flat, -1.0), descending=True, stable=True)
    most = int(bits * (1 - REST_SHARE)) // 8 * 8
    chosen = order[: min(most, int(worth.sum()))]
    tail = torch.bincount(owner[chosen], minlength=blocks)
    left = bits - -(-int(tail.sum()) // 8) * 8
    remaining = torch.stack(
        [learnt.rest[b] + learnt.energy[b][int(tail[b]) :].sum() for b in range(blocks)]
    ).double()
    rest = torch.zeros(blocks, dtype=torch.int64, device=device)
    numbers, open_ = left // rest_bits // 8 * 8, torch.ones(blocks, dtype=torch.bool, device=device)
    limit = width - tail
    while numbers > int(rest.sum()) and bool(open_.any()):  # blocks that are full leave their share to others
        share = torch.where(open_, remaining, 0.0)
        more = (share / share.sum().clamp(min=1e-300) * (numbers - int(rest.sum()))).floor().long()
        if not int(more.sum()):
            break
        rest = torch.minimum(rest + more, limit)
        open_ = rest < limit
    return tuple(tail.tolist()), tuple(rest.tolist())
