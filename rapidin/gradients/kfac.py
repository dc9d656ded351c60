"""Second moments of the two factors of a gradient, token by token, and the strongest directions of each.

The gradient of a linear layer is ``sum_t g_t a_t^T``. K-FAC (Martens & Grosse, ICML 2015; for language models
Grosse et al., 2023, section 3.1) takes its second moment to be that of the two factors apart,

    F ~ S (x) A,    S = E[g g^T] [O, O],    A = E[a a^T] [I, I],

so that a root of its inverse is a matrix on each side. Both are known well from few examples, as every token
is a sample of them. Of a side with many features only the strongest directions are kept, by a random sketch
of the moment in one pass (a Nystrom approximation: Tropp et al., NeurIPS 2017, algorithm 3), so that no
[I, I] matrix is held; what lies outside of them counts as alike in all directions.

A gradient that comes formed, without factors, has the moments of its rows and of its columns, as Shampoo has
them (Gupta et al., ICML 2018), scaled so that their product is in the same units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.gradients.parameters import Target, block_seed, matrix_shape

OVERSAMPLED = 32  # directions that the sketch has more than are kept


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a side's moment, on the CPU in float64.

    mean: their mean; strong: [r] the largest, descending; rest: what each of the others is taken to be;
    basis: [n, r] the eigenvectors of the strong ones.
    """

    mean: float
    strong: Tensor
    rest: float
    basis: Tensor


class SideMoment:
    """``sum x x^T`` of one side's vectors [n], or what is kept of it.

    rank: directions that are wanted; all are kept where that is no more work. diagonal: only the diagonal is
    kept, which is all there is of one-hot vectors. seed: of the random sketch.
    """

    def __init__(self, n: int, rank: int, seed: int, device: torch.device, *, diagonal: bool = False) -> None:
        self.n, self.diagonal = n, diagonal
        self.rank = n if n <= 2 * rank else rank
        self._test: Tensor | None = None
        columns = n
        if not diagonal and n > 2 * (rank + OVERSAMPLED):
            # On the CPU, for the same numbers on every device.
            generator = torch.Generator().manual_seed(seed % 2**63)
            drawn = torch.randn(n, rank + OVERSAMPLED, generator=generator, dtype=torch.float64, device="cpu")
            self._test = torch.linalg.qr(drawn).Q.to(device)
            columns = rank + OVERSAMPLED
        shape = (n,) if diagonal else (n, columns)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._trace = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add vectors [m, n] of any float dtype, all finite."""
        x = x.to(self._sum.device).float()
        peak = x.abs().amax() if x.numel() else x.new_ones(())
        peak = torch.where(peak == 0, 1.0, peak)
        x = x / peak  # squares of small gradients leave float32's range
        scale = peak.double().square()
        squares = x.square().sum(0, dtype=torch.float64) * scale
        self._trace += squares.sum()
        if self.diagonal:
            self._sum += squares
            return
        right = x if self._test is None else x @ self._test.float()
        self._sum += (x.T @ right).double() * scale

    def add_counts(self, counts: Tensor) -> None:
        """Add one-hot vectors: how many of each, [n] float64."""
        self._sum += counts
        self._trace += counts.sum()

    def spectrum(self, divisor: float) -> Spectrum | None:
        """Of the sum over `divisor`; None where nothing was added, or only zeros."""
        trace = float(self._trace) / divisor
        if not trace > 0:
            return None
        found = self._sum.cpu() / divisor
        if self._test is None:
            values, vectors = torch.linalg.eigh(found)
        else:
            values, vectors = _nystrom(found, self._test.cpu())
        order = values.argsort(descending=True)[: self.rank]
        strong = values[order].clamp(min=0.0)
        others = self.n - self.rank
        rest = max(0.0, trace - float(strong.sum())) / others if others else 0.0
        return Spectrum(trace / self.n, strong, rest, vectors[:, order])

    def diagonal_over(self, divisor: float) -> Tensor:
        """The diagonal's elements over `divisor`: [n] float64, on the CPU."""
        return self._sum.cpu() / divisor


def _nystrom(sketch: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues [l], eigenvectors [n, l]) of the approximation ``Y (W^T Y)^-1 Y^T`` of a matrix of which
    Y = A W [n, l] is given, W [n, l] with orthonormal columns."""
    shift = torch.finfo(torch.float32).eps * float(sketch.norm())
    shifted = sketch + shift * test
    core = test.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    root = vectors / values.clamp(min=shift).sqrt()
    left, singular, _ = torch.linalg.svd(shifted @ root, full_matrices=False)
    return (singular.square() - shift).clamp(min=0.0), left


class FactorMoments:
    """Both sides' moments of each target, gathered batch by batch (`rapidin.gradients.collector`).

    Tokens of which a factor is not finite, and those
    that no gradient reaches, such as padding, are left out.
    """

    def __init__(
        self, targets: Sequence[Target], rank: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.targets = list(targets)
        self.examples = 0
        device = torch.device(device)
        self.rows: list[SideMoment] = []
        self.columns: list[SideMoment] = []
        self._tokens = torch.zeros(len(self.targets), dtype=torch.float64, device=device)
        self._formed = [False] * len(self.targets)
        for target in self.targets:
            o, i = matrix_shape(target.shape)
            # An embedding's rows come as token ids, so only they themselves can be scaled.
            lookup = any(use.kind == "embedding" for use in target.uses)
            own = block_seed(seed, target.name)
            self.rows.append(SideMoment(o, rank, own, device, diagonal=lookup))
            self.columns.append(SideMoment(i, rank, own + 1, device))

    def add_factors(self, n: int, columns: Tensor, rows: Tensor) -> None:
        """Add a batch's tokens: columns [B, T, I], rows [B, T, O]."""
        a, g = columns.flatten(0, 1), rows.flatten(0, 1)
        reached = (a.isfinite().all(1) & g.isfinite().all(1) & (g != 0).any(1) & (a != 0).any(1))[:, None]
        a, g = (torch.where(reached, x, 0.0) for x in (a, g))
        self.columns[n].add(a)
        self.rows[n].add(g)
        self._tokens[n] += reached.sum()

    def add_embedding(self, n: int, ids: Tensor, grads: Tensor) -> None:
        """Add what tokens [B, T] bring to the rows of an embedding: grads [B, T, E]."""
        ids, g = ids.flatten(), grads.flatten(0, 1)
        reached = g.isfinite().all(1) & (g != 0).any(1)
        g = torch.where(reached[:, None], g, 0.0)
        counts = torch.zeros(self.rows[n].n, dtype=torch.float64, device=ids.device)
        self.rows[n].add_counts(counts.index_add_(0, ids, reached.double()))
        self.columns[n].add(g)
        self._tokens[n] += reached.sum()

    def add_formed(self, n: int, grad: Tensor) -> None:
        """Add formed gradients [B, O, I]."""
        grad = torch.where(grad.isfinite().flatten(1).all(1)[:, None, None], grad, 0.0)
        self.rows[n].add(grad.mT.flatten(0, 1))
        self.columns[n].add(grad.flatten(0, 1))
        self._formed[n] = True

    def spectra(self, n: int) -> tuple[Spectrum | Tensor, Spectrum] | None:
        """Of the rows' and of the columns' side of a target; of an embedding's rows the elements of the
        diagonal [O] float64 instead of a spectrum. None where no example had a gradient."""
        # The mean over examples of one side, over tokens of the other: their product is then, like the moment
        # of a formed gradient, one of whole examples.
        tokens = float(self._tokens[n])
        if self._formed[n]:
            # Formed gradients, and with them all tokens of a parameter that has both.
            total = float(self.columns[n]._trace)
            columns = self.columns[n].spectrum(total) if total > 0 else None
        else:
            columns = self.columns[n].spectrum(max(1.0, tokens))
        if columns is None or not self.examples:
            return None
        if self.rows[n].diagonal:
            return self.rows[n].diagonal_over(self.examples), columns
        rows = self.rows[n].spectrum(self.examples)
        return None if rows is None else (rows, columns)
