"""Gradients that are kept between the pass that fits a preconditioner and the sketches made with it.

The preconditioner is known only when all of its sample has been seen. If the sample is small, its gradients
stay in memory until then, so that their sketches take no second forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.moment_passes import MomentPass
from rapidin.gradients.passes import SketchPass, SketchTargets
from rapidin.gradients.rows import RowFactors, RowGroup
from rapidin.gradients.scale import Factors
from rapidin.tasks.task import AnyBatch

# A fixed limit: which gradients are kept must not depend on the machine's free memory, since a resumed run
# would round other rows otherwise.
KEPT_BYTES = 512 << 20


class KeptBatch:
    """The gradients of one batch, not preconditioned, unless they take more than `most_bytes`.

    bytes: memory that they take; inputs that layers share are counted for each.
    """

    def __init__(self, batch: AnyBatch, most_bytes: int) -> None:
        self.batch, self.bytes = batch, 0
        self._most_bytes = most_bytes
        self._adds: list[Callable[[SketchPass], None]] | None = []
        self._versions: list[tuple[Tensor, int]] = []

    @property
    def complete(self) -> bool:
        """Whether all gradients are kept, and none was changed in place since."""
        return self._adds is not None and all(x._version == version for x, version in self._versions)

    def keep(self, add: Callable[[SketchPass], None], *tensors: Tensor) -> None:
        """Keep what `add` gives to a pass that makes sketches; tensors: all that it refers to."""
        if self._adds is None:
            return
        for x in tensors:
            self.bytes += x.nbytes
            self._versions.append((x, x._version))
        self._adds.append(add)
        if self.bytes > self._most_bytes:
            self._adds, self._versions, self.bytes = None, [], 0

    def give(self, sketching: SketchPass) -> None:
        """Give all gradients to a pass, in the order in which they came."""
        assert self._adds is not None
        for add in self._adds:
            add(sketching)


class KeptGradients:
    """The gradients of those batches of a sample that fit into `most_bytes` together."""

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._most_bytes: int | None = most_bytes
        self._batches: list[tuple[list[int], KeptBatch]] = []

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(kept.bytes for _, kept in self._batches)

    def __len__(self) -> int:
        """Number of texts whose gradients are kept."""
        return sum(len(numbers) for numbers, _ in self._batches)

    def new_batch(self, batch: AnyBatch) -> KeptBatch | None:
        """Where the gradients of the next batch go; None if none are kept any more."""
        return None if self._most_bytes is None else KeptBatch(batch, self._most_bytes - self.bytes)

    def add(self, numbers: list[int], kept: KeptBatch) -> None:
        """Keep a batch with the texts of these numbers, if it is complete."""
        if kept.complete:
            self._batches.append((numbers, kept))

    def begin(self) -> bool:
        """Let go of all batches; whether any are kept from now on."""
        self._batches.clear()
        return self._most_bytes is not None

    def refuse(self) -> None:
        """Let go of all batches, and keep none from now on."""
        self._batches.clear()
        self._most_bytes = None

    def taken(self) -> Iterator[tuple[list[int], KeptBatch]]:
        """The numbers of the texts and the gradients of each batch, which is let go of afterwards."""
        while self._batches:
            numbers, kept = self._batches.pop(0)
            if kept.complete:
                yield numbers, kept


class KeepingPass(MomentPass):
    """Adds each gradient to the second moments, and keeps it: its factors, or formed if that is smaller."""

    def __init__(
        self, sketched: SketchTargets, batch: AnyBatch, moments: FactorMoments, kept: KeptBatch
    ) -> None:
        super().__init__(sketched, batch, moments)
        self._kept = kept

    def add_factors(self, n: int, factors: Factors) -> None:
        super().add_factors(n, factors)
        columns, rows = factors.applied()
        o, i = rows.shape[2], columns.shape[2]
        if o * i < columns.shape[1] * (o + i):
            self._keep_formed(n, torch.bmm(rows.float().mT, columns.float()))
        else:
            self._kept.keep(lambda p: p.add_factors(n, p.scaled(n, columns, rows)), columns, rows)

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        super().add_embedding(n, ids, grad)

        def add(sketching: SketchPass) -> None:
            scales = sketching.scales
            sketching.add_embedding(n, ids, scales[n].embedding(ids, grad) if scales else grad)

        self._kept.keep(add, ids, grad)

    def add_formed(self, n: int, grad: Tensor) -> None:
        super().add_formed(n, grad)
        self._keep_formed(n, grad)

    def add_rows(self, n: int, factors: RowFactors) -> None:
        super().add_rows(n, factors)
        if factors.columns is not None:  # a bias arrives as a formed gradient
            parts = (factors.columns, factors.rows, factors.tokens, factors.experts)
            self._kept.keep(lambda p: p.add_rows(n, factors), *(x for x in parts if x is not None))

    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        raise AssertionError("rows are not put together by expert")

    def _keep_formed(self, n: int, grad: Tensor) -> None:
        self._kept.keep(lambda p: p.add_raw(n, grad), grad)
