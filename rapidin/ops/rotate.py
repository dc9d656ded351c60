"""rotate, unit_blocks: what is done to the blocks of sketches before they are packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapidin.ops.backends import find
from rapidin.ops.checks import SKETCHED, check_same_device, check_sketch, check_tensor

ROTATION = 16  # the stream of the keyed hash in docs/reference/sketch.md; the sketches use the streams below
WIDEST = 8192


class Cut:
    """The numbers of rotated blocks that are kept: of block b the first counts[b], divided by size[b].

    counts: of [blocks], each at most `width`; size: [blocks] float32, None: 1; device: where blocks lie that
    are cut. kept: how many in all; begin: [blocks + 1] int64, where each block's numbers begin in a row.
    Raises ValueError on arguments that are not as above.
    """

    def __init__(
        self, counts: Sequence[int], width: int, device: torch.device, size: Tensor | None = None
    ) -> None:
        if not all(0 <= count <= width for count in counts):
            raise ValueError(f"Cut: counts must be from 0 to the width {width}, got {list(counts)}")
        if size is not None and (size.shape != (len(counts),) or size.device != device):
            raise ValueError(
                f"Cut: size must be of shape {(len(counts),)} on '{device}', "
                f"got {tuple(size.shape)} on '{size.device}'"
            )
        self.counts, self.width, self.size, self.kept = tuple(counts), width, size, sum(counts)
        per_block = torch.tensor(self.counts, dtype=torch.int64, device=device)
        begin = torch.zeros(len(self.counts) + 1, dtype=torch.int64, device=device)
        torch.cumsum(per_block, 0, out=begin[1:])
        self.begin = begin
        # The block of each kept number, and its position among all.
        self.owner = torch.repeat_interleave(per_block, output_size=self.kept)
        self.positions = torch.arange(self.kept, device=device) - begin[self.owner] + self.owner * width
        self.divisor = None if size is None else size[self.owner]

    def of(self, rotated: Tensor) -> Tensor:
        """[n, blocks, width] -> what is kept of it, [n, kept]."""
        alike = set(self.counts)
        numbers = (
            rotated[:, :, : alike.pop()].flatten(1)
            if len(alike) == 1
            else rotated.flatten(1)[:, self.positions]
        )
        return numbers if self.divisor is None else numbers / self.divisor


def rotate(
    x: Tensor,
    *,
    seed: int,
    inverse: bool = False,
    mean: Tensor | None = None,
    cut: Cut | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each block rotated by an orthogonal matrix of its own: random signs, then the Hadamard transform.

    x: [n, blocks, width] float32, width a power of two (on a GPU at most 8,192) -> the same, float32
    inverse: whether to apply the inverse rotation; mean: [blocks, width] float32, subtracted first
    cut: what is kept of the rotated blocks: -> [n, kept] float32

    The rotation depends on the seed, the block's number and the width alone.
    Raises TypeError or ValueError on arguments that are not as above.
    """
    op = "rotate"
    check_sketch(op, 1, seed)
    check_tensor(op, "x", x, (torch.float32,), ndim=3)
    blocks, width = x.shape[1:]
    if width < 1 or width & (width - 1):
        raise ValueError(f"{op}: the width must be a power of two, got {width}")
    if mean is not None:
        check_tensor(op, "mean", mean, (torch.float32,), ndim=2)
        if mean.shape != (blocks, width):
            raise ValueError(f"{op}: mean must be {(blocks, width)}, got {tuple(mean.shape)}")
    if cut is not None and (len(cut.counts), cut.width) != (blocks, width):
        raise ValueError(
            f"{op}: cut must be of {blocks} blocks of {width}, got {len(cut.counts)} of {cut.width}"
        )
    device = check_same_device(op, {"x": x, "mean": mean, "cut": None if cut is None else cut.begin})
    rotated: Tensor = find(op, backend, device)(x.detach(), seed=seed, inverse=inverse, mean=mean, cut=cut)
    return rotated


def unit_blocks(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Blocks scaled to length 1, and their lengths.

    x: [..., blocks, width] float32, float16 or bfloat16 -> the same shape, and [..., blocks], float32

    Sums are in float64: the squares of small gradients leave float32's range. A block of zeros stays zero,
    with length 0; one with NaN or Inf has such a length and NaN in it. Raises TypeError or ValueError on
    another argument.
    """
    op = "unit_blocks"
    check_tensor(op, "x", x, SKETCHED)
    if x.ndim < 1:
        raise ValueError(f"{op}: x must have at least 1 axis, got shape {tuple(x.shape)}")
    unit, length = find(op, backend, x.device)(x.detach())
    return unit, length
