"""The kinds of passes: what becomes of each gradient that the hooks of `GradientSketcher` hand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rapidin import ops
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.parameters import Target, matrix_shape
from rapidin.gradients.scale import Factors, Scale
from rapidin.gradients.squares import (
    Squares,
    as_factors,
    embedding_squares,
    factor_squares,
    formed_squares,
    joined,
)
from rapidin.tasks.task import AnyBatch

_POSITIONS_BYTES = 64 << 20  # of formed gradients that are held at a time


class NotBatchedError(Exception):
    """A layer mixes the examples of a batch, so each example needs a pass of its own."""


@dataclass(frozen=True, slots=True)
class SketchTargets:
    """The parameters whose gradients a pass takes, each known by its number n in `targets`.

    seeds: the seed of each target's sketch; width: the sketch dimension of a target; parameters: the
    model's parameters by name.
    """

    targets: Sequence[Target]
    seeds: Sequence[int]
    width: int
    parameters: Mapping[str, nn.Parameter]


class GradientPass(ABC):
    """What the hooks of one pass write to.

    A kind of pass says what is done with a gradient that arrives as factors, from an embedding, or formed.
    scales: the preconditioner of each target, which is applied first; None for none.
    """

    def __init__(
        self, sketched: SketchTargets, batch: AnyBatch, scales: Sequence[Scale] | None = None
    ) -> None:
        self.sketched = sketched
        self.targets = sketched.targets
        self.scales = scales
        self.rows, self.parts, self.length = batch.rows, batch.parts, batch.length
        self.pooled = batch.pooled
        self.device = batch.device
        self.seen: set[int] = set()  # targets that take part in the forward pass
        self.calls: Counter[int] = Counter()  # of each target's modules, in the forward pass
        self.recomputing = False  # a module runs again for its own parameters, and is not hooked then

    # ------------------------------------------------------------------------------- kinds of passes

    @abstractmethod
    def add_factors(self, n: int, factors: Factors) -> None:
        """Add the gradient of a linear layer's weight; `factors` may leave part of the preconditioner to be
        applied."""

    @abstractmethod
    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        """Add the preconditioned gradient of an embedding's [V, E] weight; ids: [B, T], grad: [B, T, E]."""

    @abstractmethod
    def add_formed(self, n: int, grad: Tensor) -> None:
        """Add a formed, preconditioned gradient [B, O, I]."""

    def add_bias(self, n: int, grad: Tensor) -> None:
        """Add the gradient of a bias, given that of the layer's outputs [B, T, O]."""
        self.add_raw(n, grad.float().sum(1)[:, :, None])

    def add_module(self, module: nn.Module, numbers: Sequence[int], inputs: Tensor, grad: Tensor) -> None:
        """Add the gradients of a norm's (or the like) own parameters, the targets `numbers`: the module runs
        again for each example."""
        if self.rows > 1 and inputs.shape[0] != self.rows * self.parts:
            raise NotBatchedError
        for n, grads in self.module_gradients(module, numbers, inputs, grad, self.rows):
            self.add_raw(n, grads)

    def add_raw(self, n: int, grad: Tensor) -> None:
        """Add a formed gradient [B, O, I] that is not preconditioned yet."""
        self.seen.add(n)
        self.add_formed(n, self.scales[n].formed(grad) if self.scales else grad)

    def module_gradients(
        self, module: nn.Module, numbers: Sequence[int], inputs: Tensor, grad: Tensor, examples: int
    ) -> Iterator[tuple[int, Tensor]]:
        """(n, gradients [examples, O, 1]) of each target among a module's own parameters.

        inputs: [B, ..., I], grad of the outputs: [B, ..., O], with B = examples, or any B for one example.
        """
        each = len(inputs) // examples
        named = dict(module.named_parameters(recurse=False))
        number_of = {id(self.sketched.parameters[self.targets[n].name]): n for n in numbers}
        roles = {role: number_of[id(p)] for role, p in named.items() if id(p) in number_of}
        grads: list[tuple[Tensor, ...]] = []
        for row in range(examples):
            with torch.enable_grad():
                copies = {role: p.detach().requires_grad_() for role, p in named.items()}
                self.recomputing = True
                example = slice(row * each, (row + 1) * each)
                output = torch.func.functional_call(module, copies, (inputs[example],))
                self.recomputing = False
                grads.append(torch.autograd.grad(output, [copies[role] for role in roles], grad[example]))
        for n, of_examples in zip(roles.values(), zip(*grads, strict=True), strict=True):
            yield n, torch.stack(of_examples)[:, :, None]


class SketchPass(GradientPass):
    """Sketches each gradient from its factors (TensorSketch) as soon as they arrive.

    sketches: [B, targets, width] float32.
    """

    def __init__(self, sketched: SketchTargets, batch: AnyBatch, scales: Sequence[Scale] | None) -> None:
        super().__init__(sketched, batch, scales)
        self.sketches = torch.zeros(self.rows, len(self.targets), sketched.width, device=self.device)

    def add_factors(self, n: int, factors: Factors) -> None:
        self._accumulate(n, self.sketch_factors(n, factors))

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._accumulate(n, self.sketch_embedding(n, ids.to(grad.device), grad))

    def add_formed(self, n: int, grad: Tensor) -> None:
        self._accumulate(n, self.sketch_formed(n, grad))

    def sketch_factors(self, n: int, factors: Factors) -> Tensor:
        """[B, width] of the factors of B examples."""
        return factors.sketch(self.sketched.width, self.sketched.seeds[n])

    def sketch_embedding(self, n: int, ids: Tensor, grad: Tensor) -> Tensor:
        """[B, width] of ids [B, T] and gradients [B, T, E]."""
        # The model has looked these ids up, so they are in its vocabulary; a check would wait for the GPU.
        width, vocabulary = self.sketched.width, self.targets[n].shape[0]
        return ops.embedding_sketch(ids, grad, width, seed=self.sketched.seeds[n], vocabulary=vocabulary)

    def sketch_formed(self, n: int, grad: Tensor) -> Tensor:
        """[B, width] of formed gradients [B, O, I]."""
        return ops.matrix_sketch(grad.float(), self.sketched.width, seed=self.sketched.seeds[n])

    def _accumulate(self, n: int, sketch: Tensor) -> None:
        self.sketches[:, n] += sketch.to(self.device)  # a device map may have put this layer elsewhere


class FlatSketchPass(SketchPass):
    """Forms each gradient and makes the flat sketch of it."""

    def sketch_factors(self, n: int, factors: Factors) -> Tensor:
        columns, rows = factors.applied()
        return self.sketch_formed(n, torch.bmm(rows.float().mT, columns.float()))

    def sketch_embedding(self, n: int, ids: Tensor, grad: Tensor) -> Tensor:
        vocabulary, size = self.targets[n].shape
        formed = grad.new_zeros(len(ids), vocabulary, size, dtype=torch.float32)
        return self.sketch_formed(
            n, formed.scatter_add_(1, ids[..., None].expand(-1, -1, size), grad.float())
        )

    def sketch_formed(self, n: int, grad: Tensor) -> Tensor:
        width, seed = self.sketched.width, self.sketched.seeds[n]
        return ops.flat_sketch([grad.float().flatten(1)], width, seed=seed, batched=True)


class PositionPass(SketchPass):
    """Sketches each position of a single text by itself, and keeps the products with vectors.

    vectors: [Q, targets, width]; products: [T, Q, targets] float32. Raises TypeError for a gradient that does
    not come position by position.
    """

    def __init__(
        self, sketched: SketchTargets, batch: AnyBatch, scales: Sequence[Scale] | None, vectors: Tensor
    ) -> None:
        super().__init__(sketched, batch, scales)
        if self.rows != 1:
            raise ValueError(f"the batch must have one text, got {self.rows}")
        self._vectors = vectors
        self.products = self.sketches.new_zeros(self.length, len(vectors), len(self.targets))

    def add_factors(self, n: int, factors: Factors) -> None:
        def sketch(n: int, columns: Tensor, rows: Tensor) -> Tensor:
            return self.sketch_factors(n, replace(factors, columns=columns, rows=rows))

        self._add_positions(n, sketch, factors.columns[0, :, None], factors.rows[0, :, None])

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._add_positions(n, self.sketch_embedding, ids.to(grad.device)[0, :, None], grad[0, :, None])

    def add_formed(self, n: int, grad: Tensor) -> None:
        raise self._no_positions(n)

    def add_bias(self, n: int, grad: Tensor) -> None:
        self._add_raw_positions(n, grad.float()[0, :, :, None])

    def add_module(self, module: nn.Module, numbers: Sequence[int], inputs: Tensor, grad: Tensor) -> None:
        # A norm treats each position by itself, so each may be an example of one token.
        if inputs.shape[:2] != (1, self.length) or grad.shape[:2] != (1, self.length):
            raise self._no_positions(numbers[0])
        alone = self.module_gradients(module, numbers, inputs[0, :, None], grad[0, :, None], self.length)
        together = self.module_gradients(module, numbers, inputs, grad, 1)
        for (n, grads), (_, whole) in zip(alone, together, strict=True):
            error = (grads.float().sum(0) - whole[0].float()).norm()
            if not bool(error <= 0.01 * whole.float().norm() + 1e-30):
                raise self._no_positions(n)
            self._add_raw_positions(n, grads)

    def _add_raw_positions(self, n: int, grads: Tensor) -> None:
        """Add the formed gradient of each position, [T, O, I], not preconditioned yet."""
        self._add_positions(n, self.sketch_formed, self.scales[n].formed(grads) if self.scales else grads)

    def _add_positions(self, n: int, sketch: Callable[..., Tensor], *positions: Tensor) -> None:
        """Sketch positions, each of `positions` [T, ...], some at a time: each may take a formed gradient."""
        o, i = matrix_shape(self.targets[n].shape)
        formed = o * i if isinstance(self, FlatSketchPass) else 0
        size = max(1, _POSITIONS_BYTES // (4 * max(formed, self.sketched.width)))
        if len(positions[0]) != self.length:  # an expert of some tokens, say
            raise self._no_positions(n)
        vectors = self._vectors[:, n].to(positions[0].device)
        for start in range(0, self.length, size):
            sketches = sketch(n, *(x[start : start + size] for x in positions))
            self.products[start : start + size, :, n] += (sketches @ vectors.T).to(self.device)
            self.sketches[0, n] += sketches.sum(0).to(self.device)

    def _no_positions(self, n: int) -> TypeError:
        return TypeError(f"the gradient of '{self.targets[n].name}' does not come token by token")


class FlatPositionPass(PositionPass, FlatSketchPass):
    """`PositionPass` with flat sketches."""


class FactorPass(GradientPass):
    """Keeps the factors of each gradient, preconditioned. Raises TypeError for other gradients.

    factors: (columns [B, T, I], rows [B, T, O]) by the target's number.
    """

    def __init__(self, sketched: SketchTargets, batch: AnyBatch, scales: Sequence[Scale] | None) -> None:
        super().__init__(sketched, batch, scales)
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}

    def add_factors(self, n: int, factors: Factors) -> None:
        # A weight that is used twice has the factors of both calls' tokens.
        self.factors[n] = joined(
            [self.factors[n], factors.applied()] if n in self.factors else [factors.applied()]
        )

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self.add_formed(n, grad)

    def add_formed(self, n: int, grad: Tensor) -> None:
        raise TypeError(f"'{self.targets[n].name}' is not the weight of a linear layer: it has no factors")


class MomentPass(GradientPass):
    """Adds each gradient, as it is, to the second moments of the factors."""

    def __init__(self, sketched: SketchTargets, batch: AnyBatch, moments: FactorMoments) -> None:
        super().__init__(sketched, batch)
        self._moments = moments

    def add_factors(self, n: int, factors: Factors) -> None:
        self._moments.add_factors(n, *factors.applied())

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._moments.add_embedding(n, ids, grad)

    def add_formed(self, n: int, grad: Tensor) -> None:
        self._moments.add_formed(n, grad)


class SquaresPass(GradientPass):
    """Sums the squares of each gradient's rows and columns, of the gradient as it is.

    Squares are taken of a parameter's whole gradient, so the contribution of each of its uses is held until
    the last one has arrived; with a single use that is at once.
    """

    def __init__(self, sketched: SketchTargets, batch: AnyBatch) -> None:
        super().__init__(sketched, batch)
        self._factors: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._embedded: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._formed: dict[int, Tensor] = {}
        self._squares: dict[int, Squares] = {}

    def finish(self) -> list[Squares]:
        """(row sums [B, O], column sums [B, I]) of each target, float64; zeros if no gradient arrived."""
        for n in {*self._factors, *self._embedded, *self._formed}:
            self._square(n)  # a call whose output took no part in the loss brought nothing
        zero = torch.zeros(self.rows, 1, dtype=torch.float64, device=self.device)
        shapes = [matrix_shape(target.shape) for target in self.targets]
        return [
            self._squares.get(n, (zero.expand(-1, o), zero.expand(-1, i))) for n, (o, i) in enumerate(shapes)
        ]

    def add_factors(self, n: int, factors: Factors) -> None:
        self._factors.setdefault(n, []).append(factors.applied())
        self._call_done(n)

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._embedded.setdefault(n, []).append((ids, grad))
        self._call_done(n)

    def add_formed(self, n: int, grad: Tensor) -> None:
        self._formed[n] = self._formed[n] + grad if n in self._formed else grad
        self._call_done(n)

    def _call_done(self, n: int) -> None:
        self.calls[n] -= 1
        if self.calls[n] <= 0:
            self._square(n)

    def _square(self, n: int) -> None:
        """Square what has arrived of a target's gradient, and let go of it."""
        factors, embedded = self._factors.pop(n, []), self._embedded.pop(n, [])
        formed = self._formed.pop(n, None)
        vocabulary = self.targets[n].shape[0] if embedded else 0
        if embedded and not factors and formed is None:
            self._squares[n] = embedding_squares(*joined(embedded), vocabulary)
            return
        factors += [as_factors(ids, grad, vocabulary) for ids, grad in embedded]
        if formed is None:
            self._squares[n] = factor_squares(*joined(factors))
            return
        if factors:
            columns, outputs = joined(factors)
            formed = formed + torch.bmm(outputs.float().mT, columns.float())
        self._squares[n] = formed_squares(formed)
