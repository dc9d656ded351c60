"""Made-up sketches with much in common, and codes that pack them."""

from __future__ import annotations

import torch
from torch import Tensor

from rapidin.cache.codec import Basis, CodecConfig, PackedCodec, fit_shape, learn_basis

BLOCKS, WIDTH = 6, 64


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def examples(n: int, seed: int, *, kinds: int = 8, noise: float = 1.0) -> Tensor:
    """Unit blocks with a few directions in common, and much of their own."""
    common = torch.randn(kinds, BLOCKS, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(n, kinds, generator=generator) / kinds**0.5
    own = torch.randn(n, BLOCKS, WIDTH, generator=generator)
    return unit(torch.einsum("nk,kbw->nbw", mixture, common) + noise * own)


def lengths(n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, BLOCKS, generator=generator) * 0.5 + torch.arange(BLOCKS)).exp()


def packed(
    wanted: CodecConfig,
    sample: Tensor | None = None,
    head: int = 16,
    width: int = WIDTH,
    blocks: int = BLOCKS,
) -> PackedCodec:
    if sample is None:
        return PackedCodec(fit_shape(wanted, blocks, width, None), width, 3)
    learnt = learn_basis(sample, head)
    shape = fit_shape(wanted, blocks, width, learnt)
    return PackedCodec(shape, width, 3, Basis.of(learnt, shape, lengths(len(sample)), 3).rounded())
