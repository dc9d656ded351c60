"""The kinds of passes: what becomes of each gradient that the hooks of `GradientSketcher` hand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin import ops
from rapidin.errors import UserError, is_out_of_memory
from rapidin.gradients.calls import Call, NotBatchedError
from rapidin.gradients.parameters import Target, matrix_shape
from rapidin.gradients.rows import RowFactors, RowGroup, by_example, by_expert
from rapidin.gradients.scale import Factors, Scale
from rapidin.tasks.task import AnyBatch

_POSITIONS_BYTES = 64 << 20  # of formed gradients that are held at a time


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
        self.rows, self.length, self.pooled = batch.rows, batch.length, batch.pooled
        self.input_rows = batch.rows * batch.parts
        self.device = batch.device
        self.seen: set[int] = set()  # targets that take part in the forward pass
        self.calls: Counter[int] = Counter()  # of each target's modules, in the forward pass
        self.changed: set[int] = set()  # targets whose module's input was changed in place after the call
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
        """Add a formed, preconditioned gradient [B, O, I], or [B, E, O, I] of a stack."""

    @abstractmethod
    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        """Add the gradients of some matrices of some examples' stacks; `factors` are those of the group's
        pairs, and may leave part of the preconditioner to be applied."""

    def add_rows(self, n: int, factors: RowFactors) -> None:
        """Add a gradient whose rows come in any order, not preconditioned yet."""
        if factors.experts is None:
            columns, rows = by_example(factors, self.rows, self.length)
            if columns is None:
                self.add_bias(n, rows)
            else:
                self.add_factors(n, self.scaled(n, columns, rows))
            return
        for group in by_expert(factors, self.targets[n].stack, self.length):
            self.add_group(n, self.scaled(n, group.columns, group.rows), group)

    def scaled(self, n: int, columns: Tensor, rows: Tensor) -> Factors:
        """Factors of a target's gradient, to be preconditioned if there is a preconditioner."""
        return self.scales[n].factors(columns, rows) if self.scales else Factors(columns, rows)

    def add_bias(self, n: int, grad: Tensor) -> None:
        """Add the gradient of a bias, given that of the layer's outputs [B, T, O]."""
        self.add_raw(n, grad.float().sum(1)[:, :, None])

    def add_module(self, module: nn.Module, numbers: Sequence[int], call: Call, grad: Tensor) -> None:
        """Add the gradients of a norm's (or the like) own parameters, the targets `numbers`: the module runs
        again for each example."""
        rows = (self.input_rows,)
        if self.rows > 1 and (call.inputs.shape[:1] != rows or grad.shape[:1] != rows):
            raise NotBatchedError(self.targets[numbers[0]].name)
        calls = [call.of_example(row, self.rows) for row in range(self.rows)]
        for n, grads in self.module_gradients(module, numbers, calls, grad):
            self.add_raw(n, grads)

    def add_parameter_gradient(self, n: int, grad: Tensor) -> None:
        """Add the gradient of the parameter itself, of one example, as autograd gives it."""
        self.add_raw(n, grad.reshape(1, *matrix_shape(grad.shape)))

    def add_raw(self, n: int, grad: Tensor) -> None:
        """Add a formed gradient [B, O, I] that is not preconditioned yet; a stack's may have any shape
        [B, ...]."""
        self.seen.add(n)
        target = self.targets[n]
        if target.stack:
            grad = grad.reshape(len(grad), target.stack, *target.matrix)
        self.add_formed(n, self.scales[n].formed(grad) if self.scales else grad)

    def module_gradients(
        self, module: nn.Module, numbers: Sequence[int], calls: Sequence[Call], grad: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """(n, gradients [examples, O, 1]) of each target among a module's own parameters.

        calls: of each example; grad: of the outputs of all examples, [examples * x, ..., O].
        """
        each = len(grad) // len(calls) if grad.ndim else 1
        named = dict(module.named_parameters(recurse=False))
        number_of = {id(self.sketched.parameters[self.targets[n].name]): n for n in numbers}
        roles = {role: number_of[id(p)] for role, p in named.items() if id(p) in number_of}
        grads: list[tuple[Tensor, ...]] = []
        for row, call in enumerate(calls):
            with torch.enable_grad():
                copies = {role: p.detach().requires_grad_() for role, p in named.items()}
                self.recomputing = True
                try:
                    output = torch.func.functional_call(module, copies, call.args, dict(call.kwargs))
                except RuntimeError as error:
                    if len(calls) == 1 or is_out_of_memory(error):
                        raise
                    # Some modules keep a state of the whole batch.
                    raise NotBatchedError(self.targets[numbers[0]].name) from None
                finally:
                    self.recomputing = False
                found: tuple[Tensor | None, ...] = (None,) * len(roles)
                if output.requires_grad:  # else the module uses none of them
                    of_example = grad[row * each : (row + 1) * each] if len(calls) > 1 else grad
                    found = torch.autograd.grad(
                        output, [copies[role] for role in roles], of_example, allow_unused=True
                    )
            grads.append(
                tuple(
                    torch.zeros_like(copies[role]) if g is None else g
                    for role, g in zip(roles, found, strict=True)
                )
            )
        for n, of_examples in zip(roles.values(), zip(*grads, strict=True), strict=True):
            yield n, torch.stack(of_examples)[:, :, None]

    def module_positions(
        self, module: nn.Module, numbers: Sequence[int], call: Call, grad: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """`module_gradients` of each position of each text of the batch, [B * T, O, 1]. Raises TypeError if
        they do not sum to the gradients."""
        # A norm treats each position by itself, so each may be an example of one token.
        leading = (self.rows, self.length)
        if call.inputs.shape[:2] != leading or grad.shape[:2] != leading:
            raise self.no_positions(numbers[0])
        texts = [call.of_example(row, self.rows) for row in range(self.rows)]
        positions = [text.mapped(partial(self._at_position, t)) for text in texts for t in range(self.length)]
        alone = self.module_gradients(module, numbers, positions, grad.flatten(0, 1)[:, None])
        together = self.module_gradients(module, numbers, texts, grad)
        for (n, grads), (_, whole) in zip(alone, together, strict=True):
            sums = grads.float().view(*leading, -1).sum(1)
            whole = whole.float().flatten(1)
            if not bool(((sums - whole).norm(dim=1) <= 0.01 * whole.norm(dim=1) + 1e-30).all()):
                raise self.no_positions(n)
            yield n, grads

    def _at_position(self, t: int, x: Tensor) -> Tensor:
        return x[:, t : t + 1] if x.shape[:2] == (1, self.length) else x

    def no_positions(self, n: int) -> TypeError:
        """The error for a gradient that does not come position by position."""
        return TypeError(f"the gradient of '{self.targets[n].name}' does not come token by token")


class SketchPass(GradientPass):
    """Sketches each gradient from its factors (TensorSketch) as soon as they arrive.

    sketches: [B, targets, width] float32.
    """

    def __init__(self, sketched: SketchTargets, batch: AnyBatch, scales: Sequence[Scale] | None) -> None:
        super().__init__(sketched, batch, scales)
        self.sketches = torch.zeros(self.rows, len(self.targets), sketched.width, device=self.device)

    def blocks(self, whole: bool) -> Tensor:
        """The sketches in blocks [B, blocks, width]: one for each target, or, if `whole`, one for all, the
        sum of theirs, each scaled to length 1 first."""
        if not whole:
            return self.sketches
        return F.normalize(self.sketches, dim=-1, eps=1e-30).sum(1, keepdim=True)

    def add_factors(self, n: int, factors: Factors) -> None:
        self._accumulate(n, self.sketch_factors(n, factors))

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._accumulate(n, self.sketch_embedding(n, ids.to(grad.device), grad))

    def add_formed(self, n: int, grad: Tensor) -> None:
        self._accumulate(n, self.sketch_formed(n, grad))

    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        self._accumulate(n, self.sketch_group(n, factors, group.experts, group.examples, self.rows))

    def sketch_group(self, n: int, factors: Factors, experts: Tensor, owners: Tensor, count: int) -> Tensor:
        """[count, width] of the factors of P matrices, which are parts of the stacks of some of `count`
        owners."""
        sketches = self.sketch_factors(n, factors)
        seed, stack = self.sketched.seeds[n], self.targets[n].stack
        return ops.stack_sketch(sketches, experts, owners, seed=seed, count=stack, examples=count)

    def sketch_factors(self, n: int, factors: Factors) -> Tensor:
        """[B, width] of the factors of B examples."""
        return factors.sketch(self.sketched.width, self.sketched.seeds[n])

    def sketch_embedding(self, n: int, ids: Tensor, grad: Tensor) -> Tensor:
        """[B, width] of ids [B, T] and gradients [B, T, E]."""
        # The model has looked these ids up, so they are in its vocabulary; a check would wait for the GPU.
        width, vocabulary = self.sketched.width, self.targets[n].shape[0]
        return ops.embedding_sketch(ids, grad, width, seed=self.sketched.seeds[n], vocabulary=vocabulary)

    def sketch_formed(self, n: int, grad: Tensor) -> Tensor:
        """[B, width] of formed gradients [B, O, I] or [B, E, O, I]."""
        width, seed, stack = self.sketched.width, self.sketched.seeds[n], self.targets[n].stack
        sketches = ops.matrix_sketch(grad.float(), width, seed=seed)
        if not stack:
            return sketches
        pairs = torch.arange(len(grad) * stack, device=grad.device)
        return ops.stack_sketch(
            sketches.flatten(0, 1), pairs % stack, pairs // stack, seed=seed, count=stack, examples=len(grad)
        )

    def _accumulate(self, n: int, sketch: Tensor) -> None:
        self.sketches[:, n] += sketch.to(self.device)  # a device map may have put this layer elsewhere


class FlatSketchPass(SketchPass):
    """Forms each gradient and makes the flat sketch of it."""

    def sketch_factors(self, n: int, factors: Factors) -> Tensor:
        columns, rows = factors.applied()
        return self.sketch_formed(n, torch.bmm(rows.float().mT, columns.float()))

    def sketch_group(self, n: int, factors: Factors, experts: Tensor, owners: Tensor, count: int) -> Tensor:
        columns, rows = factors.applied()
        formed = torch.bmm(rows.float().mT, columns.float())
        stack = formed.new_zeros(self.targets[n].stack, *formed.shape[1:])
        sketches = formed.new_zeros(count, self.sketched.width)
        for owner in torch.unique(owners).tolist():
            own = owners == owner
            stack[experts[own]] = formed[own]
            sketches[owner] = self.sketch_formed(n, stack[None])[0]
            stack.zero_()
        return sketches

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
    """Sketches each position of each text by itself, and keeps the products with vectors.

    vectors: [Q, targets, width]; products: [B * T, Q, targets] float32. Raises TypeError for a gradient that
    does not come position by position.
    """

    def __init__(
        self, sketched: SketchTargets, batch: AnyBatch, scales: Sequence[Scale] | None, vectors: Tensor
    ) -> None:
        super().__init__(sketched, batch, scales)
        self._vectors = vectors
        self._positions = self.rows * self.length
        self.products = self.sketches.new_zeros(self._positions, len(vectors), len(self.targets))

    def add_factors(self, n: int, factors: Factors) -> None:
        def sketch(n: int, columns: Tensor, rows: Tensor) -> Tensor:
            return self.sketch_factors(n, replace(factors, columns=columns, rows=rows))

        parts = (x.flatten(0, 1)[:, None] for x in (factors.columns, factors.rows))
        self._add_positions(n, sketch, *parts)

    def add_rows(self, n: int, factors: RowFactors) -> None:
        tokens, experts, columns = factors.tokens, factors.experts, factors.columns
        if tokens is None:
            raise self.no_positions(n)
        if columns is None:
            grad = torch.zeros(self._positions, factors.rows.shape[1], device=tokens.device)
            self.add_bias(n, ops.add_at(grad, tokens, factors.rows.float()).view(self.rows, self.length, -1))
            return

        def sketch(n: int, columns: Tensor, rows: Tensor, experts: Tensor | None = None) -> Tensor:
            scaled = self.scaled(n, columns, rows)
            if experts is None:
                return self.sketch_factors(n, scaled)
            each = torch.arange(len(experts), device=experts.device)
            return self.sketch_group(n, scaled, experts, each, len(experts))

        parts = [columns[:, None], factors.rows[:, None], *([] if experts is None else [experts])]
        self._add_positions(n, sketch, *parts, tokens=tokens)

    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        raise AssertionError("rows are not put together by expert")

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        parts = (x.flatten(0, 1)[:, None] for x in (ids.to(grad.device), grad))
        self._add_positions(n, self.sketch_embedding, *parts)

    def add_formed(self, n: int, grad: Tensor) -> None:
        raise self.no_positions(n)

    def add_bias(self, n: int, grad: Tensor) -> None:
        self._add_raw_positions(n, grad.float().flatten(0, 1)[:, :, None])

    def add_module(self, module: nn.Module, numbers: Sequence[int], call: Call, grad: Tensor) -> None:
        for n, grads in self.module_positions(module, numbers, call, grad):
            self._add_raw_positions(n, grads)

    def _add_raw_positions(self, n: int, grads: Tensor) -> None:
        """Add the formed gradient of each position, [B * T, O, I], not preconditioned yet."""
        self._add_positions(n, self.sketch_formed, self.scales[n].formed(grads) if self.scales else grads)

    def _add_positions(
        self, n: int, sketch: Callable[..., Tensor], *positions: Tensor, tokens: Tensor | None = None
    ) -> None:
        """Sketch positions, each of `positions` [N, ...], some at a time: each may take a formed gradient.

        tokens: the token ``b * T + t`` of each, by default all in their order.
        """
        o, i = self.targets[n].matrix
        formed = o * i if isinstance(self, FlatSketchPass) else 0
        size = max(1, _POSITIONS_BYTES // (4 * max(formed, self.sketched.width)))
        if tokens is None:
            if len(positions[0]) != self._positions:  # an expert of some tokens, say
                raise self.no_positions(n)
            tokens = torch.arange(self._positions, device=self.device)
        vectors, products = self._vectors[:, n].to(positions[0].device), self.products[:, :, n]
        for start in range(0, len(tokens), size):
            sketches = sketch(n, *(x[start : start + size] for x in positions))
            at = tokens[start : start + size].to(self.device)
            ops.add_at(products, at, (sketches @ vectors.T).to(self.device))
            ops.add_at(self.sketches[:, n], at // self.length, sketches.to(self.device))


class FlatPositionPass(PositionPass, FlatSketchPass):
    """`PositionPass` with flat sketches."""


def backward(losses: Tensor) -> None:
    """The backward pass of all losses. Raises UserError if the model has changed what it needs."""
    try:
        torch.autograd.backward(losses.sum())
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise UserError(
            "the model changes its parameters in place when it runs, so gradients cannot be computed",
            "use the parameters that count by default, or leave more out with `exclude`",
        ) from error
