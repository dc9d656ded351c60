"""K-FAC's preconditioner: second moments of the two factors of a gradient, and the scales made of them.

The gradient of a linear layer is ``sum_t g_t a_t^T``. K-FAC (Martens & Grosse, ICML 2015; for language models
Grosse et al., 2023, section 3.1) approximates its second moment by the Kronecker product of those of the two
factors,

    F ~ S (x) A,    S = E[g g^T] [O, O],    A = E[a a^T] [I, I],

so that a root of its inverse is a matrix on each side. Few examples suffice to estimate both, as every token
is a sample. Of a side with many features only the leading eigenvectors are kept, from a random sketch of the
moment in one pass (a Nystrom approximation: Tropp et al., NeurIPS 2017, algorithm 3), so that no [I, I]
matrix is held; the remaining eigenvalues are taken to be equal.

A gradient that arrives formed, without factors, has the moments of its rows and of its columns, as in Shampoo
(Gupta et al., ICML 2018), scaled so that their product is in the same units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.gradients.parameters import Target, block_seed
from rapidin.gradients.scale import Scale
from rapidin.ops import LowRank, matmul

_TOGETHER = 16  # directions
OVERSAMPLING = 32  # columns of the random sketch beyond the rank that is kept
_NOISE = 1e-5  # a token's gradient is rounding error below this share of the largest in its example


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a side's second moment, on the CPU in float64.

    mean: of all n eigenvalues; leading: [r] the largest, descending; trailing: the value that each of the
    others is taken to have; eigenvectors: [n, r] of the leading ones.
    """

    mean: float
    leading: Tensor
    trailing: float
    eigenvectors: Tensor

    def mean_of_rest(self, r: int) -> float:
        """The mean of the eigenvalues after the leading r, 0 if there are none."""
        n, known = self.eigenvectors.shape
        total = float(self.leading[r:].sum()) + (n - known) * self.trailing
        return total / (n - r) if r < n else 0.0


class SideMoment:
    """``sum x x^T`` of one side's vectors [n], or a sketch of it.

    rank: eigenvectors to keep; all n are kept if that is no more work. diagonal: keep the diagonal alone,
    which is all there is for one-hot vectors. seed: of the random sketch.
    """

    def __init__(self, n: int, rank: int, seed: int, device: torch.device, *, diagonal: bool = False) -> None:
        self.n, self.diagonal = n, diagonal
        self.rank = n if n <= 2 * rank else rank
        self._test: Tensor | None = None
        columns = n
        if not diagonal and n > 2 * (rank + OVERSAMPLING):
            # On the CPU, for the same numbers on every device.
            generator = torch.Generator().manual_seed(seed % 2**63)
            drawn = torch.randn(
                n, rank + OVERSAMPLING, generator=generator, dtype=torch.float64, device="cpu"
            )
            self._test = torch.linalg.qr(drawn).Q.to(device)
            columns = rank + OVERSAMPLING
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
        right = x if self._test is None else matmul(x, self._test.float())
        self._sum += matmul(x.T, right).double() * scale

    def add_counts(self, counts: Tensor) -> None:
        """Add one-hot vectors, given the number of each, [n] float64."""
        self._sum += counts
        self._trace += counts.sum()

    def spectrum(self, divisor: float) -> Spectrum | None:
        """The spectrum of the sum divided by `divisor`; None if nothing but zeros was added."""
        trace = float(self._trace) / divisor
        if not trace > 0:
            return None
        moment = self._sum.cpu() / divisor
        if self._test is None:
            values, vectors = torch.linalg.eigh(moment)
        else:
            values, vectors = _nystrom(moment, self._test.cpu())
        order = values.argsort(descending=True)[: self.rank]
        leading = values[order].clamp(min=0.0)
        others = self.n - self.rank
        trailing = max(0.0, trace - float(leading.sum())) / others if others else 0.0
        return Spectrum(trace / self.n, leading, trailing, vectors[:, order])

    def diagonal_over(self, divisor: float) -> Tensor:
        """The diagonal of the sum divided by `divisor`: [n] float64, on the CPU."""
        return self._sum.cpu() / divisor


def _nystrom(sketch: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues [l], eigenvectors [n, l]) of the approximation ``Y (W^T Y)^-1 Y^T`` of a matrix A, given
    its
    sketch Y = A W [n, l] with the test matrix W [n, l], whose columns are orthonormal."""
    shift = torch.finfo(torch.float32).eps * float(sketch.norm())
    shifted = sketch + shift * test
    core = test.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    root = vectors / values.clamp(min=shift).sqrt()
    left, singular, _ = torch.linalg.svd(shifted @ root, full_matrices=False)
    return (singular.square() - shift).clamp(min=0.0), left


class FactorMoments:
    """The second moments of both factors of each target, gathered batch by batch.

    Tokens with a factor that is not finite are left out, and so are tokens that no gradient reaches but for
    rounding (`_token_weights`), such as padding.
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
            o, i = target.matrix
            # The rows of an embedding are token ids: one-hot vectors, whose moment is diagonal.
            lookup = any(use.kind == "embedding" for use in target.uses)
            target_seed = block_seed(seed, target.name)
            self.rows.append(SideMoment(o, rank, target_seed, device, diagonal=lookup))
            self.columns.append(SideMoment(i, rank, target_seed + 1, device))

    def add_factors(self, n: int, columns: Tensor, rows: Tensor) -> None:
        """Add a batch's tokens: columns [B, T, I], rows [B, T, O]."""
        weight = _token_weights(columns, rows)
        root = weight.sqrt()[..., None]
        for side, x in ((self.columns[n], columns), (self.rows[n], rows)):
            side.add(torch.where(root > 0, x.float() * root, 0.0).flatten(0, 1))
        self._tokens[n] += weight.sum(dtype=torch.float64)

    def add_embedding(self, n: int, ids: Tensor, grads: Tensor) -> None:
        """Add the gradients [B, T, E] of the embedding's rows for tokens ids [B, T]."""
        weight = _token_weights(grads)
        root = weight.sqrt()[..., None]
        counts = torch.zeros(self.rows[n].n, dtype=torch.float64, device=ids.device)
        self.rows[n].add_counts(counts.index_add_(0, ids.flatten(), weight.flatten().double()))
        self.columns[n].add(torch.where(root > 0, grads.float() * root, 0.0).flatten(0, 1))
        self._tokens[n] += weight.sum(dtype=torch.float64)

    def add_formed(self, n: int, grad: Tensor) -> None:
        """Add formed gradients [B, O, I]."""
        grad = torch.where(grad.isfinite().flatten(1).all(1)[:, None, None], grad, 0.0)
        self.rows[n].add(grad.mT.flatten(0, 1))
        self.columns[n].add(grad.flatten(0, 1))
        self._formed[n] = True

    def spectra(self, n: int) -> tuple[Spectrum | Tensor, Spectrum] | None:
        """The spectra of a target's rows and columns; the rows of an embedding have the elements of the
        diagonal [O] float64 instead. None if no example had a gradient."""
        # One side is the mean over examples and the other the mean over tokens: their product is then, like
        # the moment of a formed gradient, that of whole examples.
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
        # The matrices of a stack share their moments: the mean of what each would have.
        rows = self.rows[n].spectrum(self.examples * max(1, self.targets[n].stack))
        return None if rows is None else (rows, columns)


def _token_weights(*factors: Tensor) -> Tensor:
    """How much each token counts, from 0 to 1: [B, T] float32, given the factors [B, T, F] of its gradient.

    The size of a token's gradient (the product of its factors' lengths) is compared with the largest of its
    own example, so that the rest of the batch does not matter. Attention leaves rounding errors where there
    is no gradient (of a query that sees one key, say), and they differ with the batch, as does which of them
    are zero; far below `_NOISE` tokens count as nothing, far above as one. The change between is smooth: at
    a hard threshold a rounding error would move a whole token.
    """
    noise = max(_NOISE, max(torch.finfo(x.dtype).eps for x in factors) / 8)
    size = torch.ones(factors[0].shape[:2], device=factors[0].device)
    for x in factors:
        x = x.to(size.device).float()
        finite = x.isfinite().all(2)
        x = torch.where(finite[..., None], x, 0.0)
        peak = x.abs().amax((1, 2), keepdim=True) if x.numel() else x.new_ones(())
        # Divided first, since squares of small gradients leave float32's range.
        size = torch.where(finite, size * (x / torch.where(peak == 0, 1.0, peak)).norm(dim=2), 0.0)
    largest = size.amax(1, keepdim=True) if size.numel() else size
    ratio = (size / (noise * torch.where(largest == 0, 1.0, largest))).pow(4)
    return torch.where(ratio.isinf(), 1.0, ratio / (ratio + 1.0))


def kfac_scales(
    moments: FactorMoments, exponent: float, damping: float, tolerance: float
) -> dict[str, Scale]:
    """K-FAC's scale of each target, on the CPU; targets that no gradient reached are left as they are."""
    return {
        target.name: kfac_scale(moments.spectra(n), target.matrix, exponent, damping, tolerance)
        for n, target in enumerate(moments.targets)
    }


def kfac_scale(
    spectra: tuple[Spectrum | Tensor, Spectrum] | None,
    shape: tuple[int, int],
    exponent: float,
    damping: float,
    tolerance: float,
) -> Scale:
    """K-FAC's scale of a parameter of this shape (O, I), given what `FactorMoments.spectra` returns.

    tolerance: see `needed_directions`; 0 keeps all known directions.
    """
    if spectra is None:
        return Scale(torch.ones(shape[0], device="cpu"), torch.ones(shape[1], device="cpu"))
    rows, (column_scale, column_low_rank) = spectra[0], _damped_root(spectra[1], exponent, damping, tolerance)
    if isinstance(rows, Spectrum):
        row_scale, row_low_rank = _damped_root(rows, exponent, damping, tolerance)
        return Scale(row_scale, column_scale, row_low_rank, column_low_rank)
    row_scale = (rows + damping * rows.mean()).pow(-exponent).float()
    return Scale(row_scale, column_scale, None, column_low_rank)


def needed_directions(spectrum: Spectrum, exponent: float, damping: float, tolerance: float) -> int:
    """The fewest leading directions of a side with n features that its damped root needs.

    With r of them kept, the others share the root of their mean eigenvalue. The expected squared length of
    the change of a preconditioned vector, over that of the vector, is then

        sum_{j > r} l_j (s(l_j) - s(mean_{j > r} l))^2 / sum_j l_j s(l_j)^2,    s(l) = (l / m + d)^-p

    and must be at most `tolerance`. A multiple of 16 or all that are known, since tensor cores multiply 16
    at a time.
    """
    n, known = spectrum.eigenvectors.shape
    if not tolerance:
        return known
    leading, trailing = spectrum.leading / spectrum.mean, spectrum.trailing / spectrum.mean
    each = torch.cat((leading, leading.new_full((1,), trailing)))
    counts = torch.ones_like(each)
    counts[-1] = n - known
    roots = (each + damping).pow(-exponent)
    most = tolerance * float((counts * each * roots.square()).sum())
    for r in range(0, known, _TOGETHER):
        root_of_rest = (spectrum.mean_of_rest(r) / spectrum.mean + damping) ** -exponent
        changes = (roots[r:] - root_of_rest).square()
        if float((counts[r:] * each[r:] * changes).sum()) <= most:
            return r
    return known


def _damped_root(
    spectrum: Spectrum, exponent: float, damping: float, tolerance: float
) -> tuple[Tensor, LowRank | None]:
    """``(M / mean + damping)^-p mean^-p`` of a side with n features, as a scale [n] and a low-rank map."""
    n = len(spectrum.eigenvectors)
    r = needed_directions(spectrum, exponent, damping, tolerance)
    trailing = spectrum.mean_of_rest(r) / spectrum.mean + damping
    leading = (spectrum.leading[:r] / spectrum.mean + damping).pow(-exponent)
    scale = torch.full((n,), (trailing * spectrum.mean) ** -exponent, dtype=torch.float32, device="cpu")
    if not r:
        return scale, None
    gain = leading / trailing**-exponent - 1
    return scale, LowRank(spectrum.eigenvectors[:, :r].float().contiguous(), gain.float())
