"""The layer table of a cache: where each parameter's block lies in a sketch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any


@dataclass(frozen=True, slots=True)
class Block:
    """One parameter's part of a sketch, at one point of the path from base to tuned model.

    name: the parameter's name in the model; shape: its shape; at: the point (0 = base, 1 = tuned);
    start, width: the block is ``sketch[start : start + width]``.
    """

    name: str
    shape: tuple[int, ...]
    at: float
    start: int
    width: int

    def to_json(self) -> dict[str, Any]:
        """The block as the manifest keeps it."""
        return asdict(self) | {"shape": list(self.shape)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Block:
        """The block that `to_json` wrote; KeyError, TypeError or ValueError where it is none."""
        return Block(
            name=str(value["name"]),
            shape=tuple(int(n) for n in value["shape"]),
            at=float(value["at"]),
            start=int(value["start"]),
            width=int(value["width"]),
        )


def layer_table(
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    points: Sequence[float],
    width: int,
    *,
    whole: bool = False,
) -> list[Block]:
    """Blocks of `width` numbers, points outermost, in the order of `shapes`.

    shapes: name and shape of each parameter; whole: one block for all parameters together.
    """
    named = [("*", (sum(prod(shape) for _, shape in shapes),))] if whole else list(shapes)
    pairs = [(at, name, shape) for at in points for name, shape in named]
    return [Block(name, shape, at, n * width, width) for n, (at, name, shape) in enumerate(pairs)]
