"""Bins and signs as the kernels read them, kept between calls on each device."""

from collections.abc import Callable

import torch
from torch import Tensor

from rapidin.ops import _cpu
from rapidin.ops.lifetimes import Kept

# A model of 7 billion parameters has some 450 sides of layers of 4,096 to 14,336 elements, at most two tables
# each: 30 MB, even where each layer has a seed of its own. The rest is for vocabularies.
LIMIT_BYTES = 256 << 20

OUT, IN = (0, 1), (2, 3)  # streams of (bins, signs) of a matrix's two sides
STACK = (4, 5)  # of the matrices of a stack
FLAT = (8, 8)  # the stream of a flat sketch's permutations

CPU = torch.device("cpu")

Change = Callable[[Tensor], Tensor]

kept_tables = Kept(LIMIT_BYTES)


def rows(seed: int, side: tuple[int, int], n: int, k: int, device: torch.device = CPU) -> Tensor:
    """-> [n] int32: each index's bin, and its sign in the top bit."""
    return _get("rows", seed, side, n, k, device)


def columns(
    seed: int,
    side: tuple[int, int],
    n: int,
    k: int,
    device: torch.device = CPU,
    change: Change | None = None,
) -> Tensor:
    """-> [ceil(n / k) * k] int32: by chunk and bin, the index in the chunk, and its sign in the top bit.

    change: converts the table to a kernel's layout, on the CPU; part of the key, so pass the same function.
    """
    return _get("columns", seed, side, n, k, device, change)


def inverse_permutations(seed: int, groups: int, device: torch.device = CPU) -> Tensor:
    """-> [16, groups] int32: the inverses of a flat sketch's 16 permutations: by group, the position
    in the chunk."""
    return _get("inverse_permutations", seed, FLAT, 16 * groups, groups, device).view(16, groups)


def _get(
    kind: str,
    seed: int,
    side: tuple[int, int],
    n: int,
    k: int,
    device: torch.device,
    change: Change | None = None,
) -> Tensor:

    def make() -> Tensor:
        if kind == "inverse_permutations":
            return _inverse_permutations(seed, n // k, k)
        build = _cpu.row_table if kind == "rows" else _cpu.column_table
        table = torch.empty(n if kind == "rows" else -(-n // k) * k, dtype=torch.int32, device=CPU)
        build(seed, *side, n, k, table.data_ptr())
        return table if change is None else change(table)

    return kept_tables.get((kind, seed, side, n, k, change), device, make)


def _inverse_permutations(seed: int, count: int, groups: int) -> Tensor:
    """The inverses of the permutations that begin at t * groups, t = 0 .. count - 1, one after another."""
    table = torch.empty(count * groups, dtype=torch.int32, device=CPU)
    ranks = torch.empty(groups, dtype=torch.int32, device=CPU)
    position = torch.arange(groups, dtype=torch.int32, device=CPU)
    for t in range(count):
        _cpu.permutation(seed, FLAT[0], t * groups & 0xFFFFFFFF, groups, ranks.data_ptr())
        table[t * groups : (t + 1) * groups][ranks.long()] = position
    return table
