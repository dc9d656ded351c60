"""The error of a sketch when the directions of a LowRank are rounded, with massive activations.

    python studies/low_rank_error/low_rank_error.py    # the table of docs/reference/kernels.md; --write puts
    it there

One input feature is a thousand times the others, or three of them at once are, as a few features of large
models are, and K-FAC's directions know it: `x` and `U diag(gain) U^T x` cancel to a hundredth. Roundings are
simulated in float64, on the CPU, where everything else is exact; the last row is what the kernel gives, on
the same factors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rapidin import ops
from rapidin.gradients.kfac import SideMoment, Spectrum, kfac_scale
from rapidin.gradients.preconditioner import EXPONENT, RANK
from rapidin.ops import tables

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables

DIMS = (512, 1024, 4096)
MASSIVE_FEATURES = ((3,), (3, 40, 700))
CASES = [(massive, dim) for massive in MASSIVE_FEATURES for dim in DIMS]
BATCH, TOKENS, N_IN, N_OUT = 2, 48, 1024, 512
DAMPING = 0.1  # of a side; the stronger the preconditioner, the larger the errors
SAMPLED = 4096  # vectors that K-FAC's directions are learnt from
SIZE = 1000.0  # of a massive feature
SEED = 1

Rounding = Callable[[Tensor], Tensor]


class Factors(NamedTuple):
    """bfloat16 factors of a layer, and what K-FAC does to each side."""

    inputs: Tensor
    grads: Tensor
    inputs_low_rank: ops.LowRank
    grads_low_rank: ops.LowRank


def exact(x: Tensor) -> Tensor:
    return x.double()


def bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def two_bfloat16(x: Tensor) -> Tensor:
    high = bfloat16(x)
    return high + bfloat16(x.double() - high)


def tf32(x: Tensor) -> Tensor:
    """Ten bits after the leading one, the nearest."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.round(mantissa * 2.0**11), exponent - 11)


@cache
def factors(massive: tuple[int, ...]) -> Factors:
    """Made factors whose inputs have these massive features, which come and go together."""
    sides, low_ranks = [], []
    for n, large in ((N_IN, massive), (N_OUT, ())):
        x = torch.randn(SAMPLED, n, generator=torch.Generator().manual_seed(n))
        x *= torch.linspace(3.0, 0.5, n)  # features are of different sizes
        if large:
            together = 1 + 0.1 * x[:, large[0]]
            for place, feature in enumerate(large):
                x[:, feature] += SIZE * (0.9 - 0.25 * place) * together
        moment = SideMoment(n, RANK, SEED, torch.device("cpu"))
        moment.add(x)
        spectrum = moment.spectrum(SAMPLED)
        assert isinstance(spectrum, Spectrum)
        low_rank = kfac_scale((spectrum, spectrum), (n, n), EXPONENT, DAMPING, 0.0).column_low_rank
        assert low_rank is not None
        low_ranks.append(low_rank)
        sides.append(x[: BATCH * TOKENS].view(BATCH, TOKENS, n).bfloat16())
    return Factors(*sides, *low_ranks)


def count_sketch(x: Tensor, side: tuple[int, int], dim: int) -> Tensor:
    """[..., n] -> [..., dim] float64"""
    entries = tables.rows(SEED, side, x.shape[-1], dim)
    bins, signs = (entries & 0x7FFFFFFF).long(), torch.where(entries < 0, -1.0, 1.0).double()
    return torch.zeros(*x.shape[:-1], dim).double().index_add_(-1, bins, x.double() * signs)


def sketch(
    massive: tuple[int, ...],
    dim: int,
    of_basis: Rounding = exact,
    of_terms: Rounding = exact,
    of_features: Rounding | None = None,
) -> Tensor:
    """[B, dim] float64. of_basis: the rounding of U in ``U^T x``; of_terms: of both factors of ``CS(U) c``;
    of_features: of what is preconditioned before it is sketched, in place of adding ``CS(U) c``."""
    f = factors(massive)
    spectra = []
    for x, low_rank, side in (
        (f.inputs.double(), f.inputs_low_rank, tables.IN),
        (f.grads.double(), f.grads_low_rank, tables.OUT),
    ):
        c = (x @ of_basis(low_rank.basis)) * low_rank.gain
        if of_features is not None:
            sketched = count_sketch(of_features(x + c @ low_rank.basis.T.double()), side, dim)
        else:
            terms = of_terms(c) @ of_terms(count_sketch(low_rank.basis.T, side, dim))
            sketched = count_sketch(x, side, dim) + terms
        spectra.append(torch.fft.rfft(sketched))
    return torch.fft.irfft((spectra[0] * spectra[1]).sum(1), n=dim)


def error(got: Tensor, wanted: Tensor) -> float:
    """The larger relative error of the sketches of the examples."""
    return float(((got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def by_op(massive: tuple[int, ...], dim: int, backend: str) -> Tensor:
    f = factors(massive)
    return ops.linear_sketch(
        f.inputs,
        f.grads,
        dim,
        seed=SEED,
        inputs_low_rank=f.inputs_low_rank,
        grads_low_rank=f.grads_low_rank,
        backend=backend,
    )


WAYS: dict[str, Callable[[tuple[int, ...], int], Tensor]] = {
    "`U` in `U^T x` as two bfloat16": lambda m, dim: sketch(m, dim, of_basis=two_bfloat16),
    "`U` in `U^T x` as TF32": lambda m, dim: sketch(m, dim, of_basis=tf32),
    "`U` in `U^T x` as one bfloat16": lambda m, dim: sketch(m, dim, of_basis=bfloat16),
    "`CS(U)` and `c` as two bfloat16 each": lambda m, dim: sketch(m, dim, of_terms=two_bfloat16),
    "`CS(U)` and `c` as TF32": lambda m, dim: sketch(m, dim, of_terms=tf32),
    "`CS(U)` and `c` as one bfloat16 each": lambda m, dim: sketch(m, dim, of_terms=bfloat16),
    "two bfloat16 everywhere": lambda m, dim: sketch(m, dim, two_bfloat16, two_bfloat16),
    "one bfloat16 everywhere": lambda m, dim: sketch(m, dim, bfloat16, bfloat16),
    "preconditioned features rounded to bfloat16": lambda m, dim: sketch(m, dim, of_features=bfloat16),
    "the CPU kernel": lambda m, dim: by_op(m, dim, "cpu"),
}


@cache
def errors() -> dict[str, list[float]]:
    """By way, the relative error of each of CASES."""
    wanted = [sketch(*case) for case in CASES]
    return {
        name: [error(way(*case), exactly) for case, exactly in zip(CASES, wanted, strict=True)]
        for name, way in WAYS.items()
    }


def table() -> str:
    rows = [[name, *(f"{e:.1e}" for e in found)] for name, found in errors().items()]
    header = [f"{'one' if len(massive) == 1 else 'three'}, {dim:,}" for massive, dim in CASES]
    return doc_tables.table(["what is rounded", *header], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="Put the table into docs/reference/kernels.md.")
    if parser.parse_args().write:
        doc_tables.write(doc_tables.DOCS / "reference" / "kernels.md", "rounding of a LowRank", table())
    print(table(), end="")
