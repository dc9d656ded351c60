"""Hooks: from a batch of texts to each text's gradient sketch, with no weight gradient computed or formed.

The gradient of a linear layer for one example is ``sum_t g_t a_t^T`` (output gradient times input). Forward
hooks keep the inputs, tensor hooks see the output gradients on their way down, and `ops.linear_sketch` makes
the sketch of one from the other on the spot, so at most one layer's factors beyond the saved inputs are
held. The parameters themselves need no gradient, so autograd computes input gradients only, and only down to
the lowest layer that counts. With a preconditioner (`rapidin.gradients.preconditioner`) the factors are
preconditioned before they are sketched, or by the sketch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin import ops
from rapidin.errors import UserError
from rapidin.gradients.batch import Batch, evaluation_mode, example_losses
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.parameters import Target, Use, block_seed, matrix_shape
from rapidin.gradients.preconditioner import Preconditioner
from rapidin.gradients.scale import Factors, Scale
from rapidin.gradients.settings import LossKind, Projection
from rapidin.gradients.squares import (
    Squares,
    as_factors,
    embedding_squares,
    factor_squares,
    formed_squares,
    joined,
)


class NotBatchedError(Exception):
    """A layer does not keep the examples of a batch apart, so they must come one at a time."""


class GradientSketcher:
    """Sketches of the per-example gradients of `targets`.

    width: bins of a block. loss: see `example_losses`. projection:

    - "tensor": a block a parameter, the TensorSketch of its gradient from the factors;
    - "flat": a block a parameter, the one-permutation sketch of its formed gradient;
    - "rapidgrad": one block for all, the sum of the flat sketches, each scaled to length 1 first: the whole
      layer-normalised gradient in `width` numbers (Lin et al., ACL 2024, section 3).

    preconditioner: scales of the gradients, or None; it may be set between calls. Where it differs between
    the points of a path, calls name the point by its number.

    >>> sketcher = GradientSketcher(model, targets, width=512, seed=0)
    >>> sketch, loss = sketcher(batch)          # [B, blocks, width] float32, [B] float32
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        *,
        width: int,
        seed: int,
        projection: Projection = "tensor",
        loss: LossKind = "mean",
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self.model = model
        self.targets = list(targets)
        self.width = width
        self.projection: Projection = projection
        self.blocks = 1 if projection == "rapidgrad" else len(self.targets)
        self.loss: LossKind = loss
        self.preconditioner = preconditioner
        self.seeds = [block_seed(seed, target.name) for target in self.targets]
        self._modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._single = [
            n for n, t in enumerate(self.targets) if any(use.kind == "autograd" for use in t.uses)
        ]
        by_module: dict[str, list[tuple[int, Use]]] = {}
        for n, target in enumerate(self.targets):
            for use in target.uses if n not in self._single else ():
                by_module.setdefault(use.module, []).append((n, use))
        self._by_module = by_module
        self.one_by_one = bool(self._single)

    @property
    def needs_weights(self) -> list[str]:
        """Parameters whose gradient takes more than inputs and output gradients: their own values."""
        return [t.name for t in self.targets if any(use.kind in ("module", "autograd") for use in t.uses)]

    @property
    def single_names(self) -> list[str]:
        """Parameters for which no batched way is known: examples come one at a time because of them."""
        return [self.targets[n].name for n in self._single]

    def __call__(self, batch: Batch, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(sketches [B, blocks, width] float32, losses [B] float32), both on the model's device.

        point: the number of the point where the model stands, for the preconditioner. Raises NotBatchedError
        where a layer mixes the examples of a batch of more than one (then `one_by_one` is set, and batches of
        one will do), UserError where a parameter takes no part in the loss, and TypeError where the
        preconditioner needs a point and none is named.
        """
        kind = _Pass if self.projection == "tensor" else _FormedPass
        state = kind(self, batch, self._scales(point))
        losses = self._run(batch, state)
        if self.projection == "rapidgrad":
            return F.normalize(state.out, dim=-1, eps=1e-30).sum(1, keepdim=True), losses
        return state.out, losses

    def factors(self, batch: Batch, point: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """(columns [B, T, I], rows [B, T, O]) of each target: its gradients are ``sum_t rows_t columns_t^T``,
        scaled where there is a preconditioner.

        For exact gradients and for what single tokens bring. Raises as a call does, and TypeError for
        targets that are not the weights of linear layers.
        """
        state = _FactorPass(self, batch, self._scales(point))
        self._run(batch, state)
        return [state.factors[n] for n in range(len(self.targets))]

    def positions(self, batch: Batch, vectors: Tensor, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(products [T, Q, targets], sketches [targets, width]), float32, of a batch of one text.

        products: of vectors [Q, targets, width] with what each position brings to the sketch of a target's
        gradient: the products of ``rows_t columns_t^T`` alone; over positions they sum to those with the
        sketches, which are those of a call ("rapidgrad": before they are scaled and summed). Raises as a call
        does, and TypeError for targets whose gradient does not come position by position.
        """
        kind = _PositionPass if self.projection == "tensor" else _FormedPositionPass
        state = kind(self, batch, self._scales(point), vectors)
        self._run(batch, state)
        return state.products, state.out[0]

    def squares(self, batch: Batch) -> list[Squares]:
        """Of each target the sums of squares of the examples' gradients over rows [B, O] and columns [B, I].

        Float64, of the gradients as they are, whatever the preconditioner: one is made from these. Raises as
        a call does.
        """
        state = _SquaresPass(self, batch, None)
        self._run(batch, state)
        return state.finish()

    def add_moments(self, batch: Batch, moments: FactorMoments) -> None:
        """Add a batch to the second moments of the two factors of each target's gradient.

        Of the gradients as they are, whatever the preconditioner. Raises as a call does; `moments` may hold a
        part of the batch then, and are of no more use.
        """
        self._run(batch, _MomentPass(self, batch, moments))
        moments.examples += len(batch.ids)

    def _scales(self, point: int | None) -> list[Scale] | None:
        if self.preconditioner is None:
            return None
        table = self.preconditioner.at(point)
        return [table[target.name] for target in self.targets]

    def _run(self, batch: Batch, state: _Pass) -> Tensor:
        """One forward and backward pass that fills `state`; the losses [B]."""
        if batch.ids.shape[0] > 1 and self.one_by_one:
            raise NotBatchedError
        with self._frozen(), self._hooked(state), torch.enable_grad():
            losses = example_losses(self.model, batch, self.loss)
            if not losses.requires_grad:
                raise UserError(
                    f"no layer that counts takes part in the loss, such as '{self.targets[0].name}'"
                )
            torch.autograd.backward(losses.sum())
            for n in self._single:
                grad = self.parameters[self.targets[n].name].grad
                if grad is not None:
                    state.add_own(n, grad.reshape(1, grad.shape[0] if grad.ndim else 1, -1))
        missing = [self.targets[n].name for n in range(len(self.targets)) if n not in state.seen]
        if missing:
            raise UserError(
                f"{len(missing)} parameters took no part in the model's forward pass, such as '{missing[0]}'",
                "leave them out with --exclude",
            )
        return losses.detach()

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """No parameter needs a gradient, but those that have no other way."""
        before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        single = {id(self.parameters[self.targets[n].name]) for n in self._single}
        with evaluation_mode(self.model):
            try:
                for p, _, _ in before:
                    p.requires_grad_(id(p) in single)
                    p.grad = None
                yield
            finally:
                for p, needed, grad in before:
                    p.requires_grad_(needed)
                    p.grad = grad

    @contextlib.contextmanager
    def _hooked(self, state: _Pass) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, parts in self._by_module.items():
                module = self._modules[name]
                if any(use.kind == "embedding" for _, use in parts):
                    handles.append(module.register_forward_pre_hook(state.spread_ids))
                handles.append(module.register_forward_hook(state.forward_hook(parts)))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Pass:
    """One forward and backward pass over a batch: what the hooks write to."""

    def __init__(self, sketcher: GradientSketcher, batch: Batch, scales: Sequence[Scale] | None) -> None:
        self.sketcher = sketcher
        self.scales = scales
        self.rows, self.length = batch.ids.shape
        self.out = self._space(batch.ids.device)
        self.seen: set[int] = set()
        self.calls: Counter[int] = Counter()  # of a target's modules in the forward pass
        self._again = False  # a module run a second time for its own parameters must not be hooked again

    def _space(self, device: torch.device) -> Tensor:
        return torch.zeros(self.rows, len(self.sketcher.targets), self.sketcher.width, device=device)

    def spread_ids(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Position ids come once for the whole batch; an embedding row for each example keeps them apart."""
        ids = args[0]
        return (ids.expand(self.rows, *ids.shape[1:]), *args[1:]) if ids.shape[0] == 1 < self.rows else None

    def forward_hook(
        self, parts: Sequence[tuple[int, Use]]
    ) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        """A forward hook that keeps the inputs of a module and waits for its output gradient."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._again or not isinstance(output, Tensor) or not args or not torch.is_grad_enabled():
                return None
            changed = None
            if not output.requires_grad:
                # The graph begins here: nothing below needs a gradient. A copy, since a leaf allows no
                # in-place use.
                output = changed = output.detach().requires_grad_().clone()
            inputs = args[0].detach()

            def on_gradient(grad: Tensor) -> None:
                with torch.no_grad():
                    self._add_call(module, parts, inputs, grad.detach())

            output.register_hook(on_gradient)
            self.seen.update(n for n, _ in parts)
            self.calls.update(n for n, _ in parts)
            return changed

        return hook

    def _add_call(
        self, module: nn.Module, parts: Sequence[tuple[int, Use]], inputs: Tensor, grad: Tensor
    ) -> None:
        """Add what one call of a module gives to each of its parameters' sketches."""
        own = [n for n, use in parts if use.kind == "module"]
        if own:
            self._add_module(module, own, inputs, grad)
            return
        for n, use in parts:
            g = self._by_example(grad, 1)
            if use.kind == "embedding":
                ids = self._by_example(inputs, 0)
                padding = getattr(module, "padding_idx", None)
                if padding is not None:
                    g = g.masked_fill((ids == padding)[..., None], 0.0)
                self._add_embedding(n, ids, self.scales[n].embedding(ids, g) if self.scales else g)
            elif use.kind == "bias":
                self._add_bias(n, g)
            else:
                columns, rows = self._by_example(inputs, 1), g
                if use.kind == "conv1d":  # its weight is stored [in, out]: the input is the row factor
                    columns, rows = rows, columns
                self._add_factors(
                    n, self.scales[n].factors(columns, rows) if self.scales else Factors(columns, rows)
                )

    def add_own(self, n: int, grad: Tensor) -> None:
        """Add a gradient [B, O, I] that came formed and is not scaled yet."""
        self.seen.add(n)
        self._add_formed(n, self.scales[n].formed(grad) if self.scales else grad)

    def _add_bias(self, n: int, grad: Tensor) -> None:
        """Add the gradient of a bias, that of the outputs [B, T, O]."""
        self.add_own(n, grad.float().sum(1)[:, :, None])

    # The methods below take scaled gradients, or `Factors`, which say what is still to be applied.

    def _add_factors(self, n: int, factors: Factors) -> None:
        self._put(n, self._sketch_factors(n, factors))

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        """Add the gradient of an embedding's [V, E] weight; ids: [B, T], grad: [B, T, E]."""
        self._put(n, self._sketch_embedding(n, ids.to(grad.device), grad))

    def _sketch_factors(self, n: int, factors: Factors) -> Tensor:
        """[B, width] of factors of B examples."""
        return factors.sketch(self.sketcher.width, self.sketcher.seeds[n])

    def _sketch_embedding(self, n: int, ids: Tensor, grad: Tensor) -> Tensor:
        """[B, width] of ids [B, T] and gradients [B, T, E]."""
        # The model has looked these ids up, so they are in its vocabulary; a check would wait for the GPU.
        width, vocabulary = self.sketcher.width, self.sketcher.targets[n].shape[0]
        return ops.embedding_sketch(ids, grad, width, seed=self.sketcher.seeds[n], vocabulary=vocabulary)

    def _sketch_formed(self, n: int, grad: Tensor) -> Tensor:
        """[B, width] of formed gradients [B, O, I]."""
        return ops.matrix_sketch(grad.float(), self.sketcher.width, seed=self.sketcher.seeds[n])

    def _add_module(self, module: nn.Module, own: Sequence[int], inputs: Tensor, grad: Tensor) -> None:
        """Norms and the like: the module again, one example at a time, for its own few parameters."""
        if self.rows > 1 and inputs.shape[0] != self.rows:
            self._not_batched()
        for n, grads in self._module_gradients(module, own, inputs, grad, self.rows):
            self.add_own(n, grads)

    def _module_gradients(
        self, module: nn.Module, own: Sequence[int], inputs: Tensor, grad: Tensor, examples: int
    ) -> Iterator[tuple[int, Tensor]]:
        """(number, gradients [examples, O, 1]) of each of its own parameters; inputs: [B, ..., I], grad of
        the outputs: [B, ..., O], where B is as many, or anything for a single example.
        """
        each = len(inputs) // examples
        named = dict(module.named_parameters(recurse=False))
        index = {id(self.sketcher.parameters[self.sketcher.targets[n].name]): n for n in own}
        roles = {role: index[id(p)] for role, p in named.items() if id(p) in index}
        grads: list[tuple[Tensor, ...]] = []
        for row in range(examples):
            with torch.enable_grad():
                copies = {role: p.detach().requires_grad_() for role, p in named.items()}
                self._again = True
                mine = slice(row * each, (row + 1) * each)
                again = torch.func.functional_call(module, copies, (inputs[mine],))
                self._again = False
                grads.append(torch.autograd.grad(again, [copies[role] for role in roles], grad[mine]))
        for n, parts in zip(roles.values(), zip(*grads, strict=True), strict=True):
            yield n, torch.stack(parts)[:, :, None]

    def _add_formed(self, n: int, grad: Tensor) -> None:
        """Add a formed gradient [B, O, I]."""
        self._put(n, self._sketch_formed(n, grad))

    def _put(self, n: int, sketch: Tensor) -> None:
        self.out[:, n] += sketch.to(self.out.device)  # a device map may have put this layer elsewhere

    def _by_example(self, x: Tensor, features: int) -> Tensor:
        """[B, ..., F] or [B * T, F] -> [B, T, F] (features = 0: no F)."""
        tail = x.shape[x.ndim - features :]
        if self.rows == 1 or (x.ndim > 1 + features and x.shape[0] == self.rows):
            return x.reshape(self.rows, -1, *tail)
        if x.ndim == 1 + features and x.shape[0] == self.rows * self.length:
            return x.reshape(self.rows, self.length, *tail)
        self._not_batched()

    def _not_batched(self) -> NoReturn:
        self.sketcher.one_by_one = True
        raise NotBatchedError


class _FormedPass(_Pass):
    """A pass that forms each gradient and makes the flat sketch of it."""

    def _sketch_factors(self, n: int, factors: Factors) -> Tensor:
        columns, rows = factors.applied()
        return self._sketch_formed(n, torch.bmm(rows.float().mT, columns.float()))

    def _sketch_embedding(self, n: int, ids: Tensor, grad: Tensor) -> Tensor:
        vocabulary, size = self.sketcher.targets[n].shape
        formed = grad.new_zeros(len(ids), vocabulary, size, dtype=torch.float32)
        return self._sketch_formed(
            n, formed.scatter_add_(1, ids[..., None].expand(-1, -1, size), grad.float())
        )

    def _sketch_formed(self, n: int, grad: Tensor) -> Tensor:
        width, seed = self.sketcher.width, self.sketcher.seeds[n]
        return ops.flat_sketch([grad.float().flatten(1)], width, seed=seed, batched=True)


class _PositionPass(_Pass):
    """A pass over one text whose positions are sketched one by one, and their products with vectors kept."""

    def __init__(
        self, sketcher: GradientSketcher, batch: Batch, scales: Sequence[Scale] | None, vectors: Tensor
    ) -> None:
        super().__init__(sketcher, batch, scales)
        if self.rows != 1:
            raise ValueError(f"a batch of {self.rows} texts, where one is wanted")
        self._vectors = vectors
        self.products = self.out.new_zeros(self.length, len(vectors), len(sketcher.targets))

    def _add_factors(self, n: int, factors: Factors) -> None:
        def sketch(n: int, columns: Tensor, rows: Tensor) -> Tensor:
            return self._sketch_factors(n, replace(factors, columns=columns, rows=rows))

        self._each(n, sketch, factors.columns[0, :, None], factors.rows[0, :, None])

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._each(n, self._sketch_embedding, ids.to(grad.device)[0, :, None], grad[0, :, None])

    def _add_bias(self, n: int, grad: Tensor) -> None:
        self._add_own_positions(n, grad.float()[0, :, :, None])

    def _add_module(self, module: nn.Module, own: Sequence[int], inputs: Tensor, grad: Tensor) -> None:
        # A norm treats each position by itself, so each may be an example of one token.
        if inputs.shape[:2] != (1, self.length) or grad.shape[:2] != (1, self.length):
            raise self._no_positions(own[0])
        alone = self._module_gradients(module, own, inputs[0, :, None], grad[0, :, None], self.length)
        together = self._module_gradients(module, own, inputs, grad, 1)
        for (n, grads), (_, whole) in zip(alone, together, strict=True):
            error = (grads.float().sum(0) - whole[0].float()).norm()
            if not bool(error <= 0.01 * whole.float().norm() + 1e-30):
                raise self._no_positions(n)
            self._add_own_positions(n, grads)

    def _add_own_positions(self, n: int, grads: Tensor) -> None:
        """Add what each position brings, formed and not scaled yet: [T, O, I]."""
        self._each(n, self._sketch_formed, self.scales[n].formed(grads) if self.scales else grads)

    def _add_formed(self, n: int, grad: Tensor) -> None:
        raise self._no_positions(n)

    def _no_positions(self, n: int) -> TypeError:
        return TypeError(f"the gradient of '{self.sketcher.targets[n].name}' does not come token by token")

    def _each(self, n: int, sketch: Callable[..., Tensor], *positions: Tensor) -> None:
        """Sketch positions [T, ...] some at a time, since the sketch of each may take a formed gradient."""
        o, i = matrix_shape(self.sketcher.targets[n].shape)
        formed = o * i if isinstance(self, _FormedPass) else 0
        size = max(1, _POSITIONS_BYTES // (4 * max(formed, self.sketcher.width)))
        if len(positions[0]) != self.length:  # an expert of some tokens, say
            raise self._no_positions(n)
        vectors = self._vectors[:, n].to(positions[0].device)
        for at in range(0, self.length, size):
            made = sketch(n, *(x[at : at + size] for x in positions))
            self.products[at : at + size, :, n] += (made @ vectors.T).to(self.out.device)
            self.out[0, n] += made.sum(0).to(self.out.device)


_POSITIONS_BYTES = 64 << 20  # of formed gradients that are held at a time


class _FormedPositionPass(_PositionPass, _FormedPass):
    """The same, of flat sketches."""


class _FactorPass(_Pass):
    """A pass that keeps the factors instead of sketching them."""

    def __init__(self, sketcher: GradientSketcher, batch: Batch, scales: Sequence[Scale] | None) -> None:
        super().__init__(sketcher, batch, scales)
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}

    def _add_factors(self, n: int, factors: Factors) -> None:
        columns, rows = factors.applied()
        if n in self.factors:  # used twice: the sum over both calls' tokens
            columns, rows = (
                torch.cat(pair, dim=1) for pair in zip(self.factors[n], (columns, rows), strict=True)
            )
        self.factors[n] = (columns, rows)

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._add_formed(n, grad)

    def _add_formed(self, n: int, grad: Tensor) -> None:
        raise TypeError(
            f"'{self.sketcher.targets[n].name}' is not the weight of a linear layer: it has no factors"
        )


class _MomentPass(_Pass):
    """A pass that adds to the moments of the factors."""

    def __init__(self, sketcher: GradientSketcher, batch: Batch, moments: FactorMoments) -> None:
        super().__init__(sketcher, batch, None)
        self._moments = moments

    def _space(self, device: torch.device) -> Tensor:
        return torch.zeros(0, device=device)

    def _add_factors(self, n: int, factors: Factors) -> None:
        self._moments.add_factors(n, *factors.applied())

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._moments.add_embedding(n, ids, grad)

    def _add_formed(self, n: int, grad: Tensor) -> None:
        self._moments.add_formed(n, grad)


class _SquaresPass(_Pass):
    """A pass that sums the squares of gradients' rows and columns.

    Squares are taken of a parameter's whole gradient, so what each of its uses brings is held until the last
    one has come; with a single use that is at once.
    """

    def __init__(self, sketcher: GradientSketcher, batch: Batch, scales: Sequence[Scale] | None) -> None:
        super().__init__(sketcher, batch, scales)
        self._factors: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._embedded: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._formed: dict[int, Tensor] = {}
        self._squares: dict[int, Squares] = {}

    def _space(self, device: torch.device) -> Tensor:
        return torch.zeros(0, device=device)

    def finish(self) -> list[Squares]:
        """(row sums [B, O], column sums [B, I]) of each target, float64; zeros where no gradient came."""
        for n in {*self._factors, *self._embedded, *self._formed}:
            self._settle(n)  # a call whose output took no part in the loss brought nothing
        none = self.out.new_zeros(self.rows, 1, dtype=torch.float64)
        shapes = [matrix_shape(target.shape) for target in self.sketcher.targets]
        return [
            self._squares.get(n, (none.expand(-1, o), none.expand(-1, i))) for n, (o, i) in enumerate(shapes)
        ]

    def _add_factors(self, n: int, factors: Factors) -> None:
        self._factors.setdefault(n, []).append(factors.applied())
        self._arrived(n)

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._embedded.setdefault(n, []).append((ids, grad))
        self._arrived(n)

    def _add_formed(self, n: int, grad: Tensor) -> None:
        self._formed[n] = self._formed[n] + grad if n in self._formed else grad
        self._arrived(n)

    def _arrived(self, n: int) -> None:
        self.calls[n] -= 1
        if self.calls[n] <= 0:
            self._settle(n)

    def _settle(self, n: int) -> None:
        factors, embedded = self._factors.pop(n, []), self._embedded.pop(n, [])
        formed = self._formed.pop(n, None)
        rows = self.sketcher.targets[n].shape[0] if embedded else 0
        if embedded and not factors and formed is None:
            self._squares[n] = embedding_squares(*joined(embedded), rows)
            return
        factors += [as_factors(ids, grad, rows) for ids, grad in embedded]
        if formed is None:
            self._squares[n] = factor_squares(*joined(factors))
            return
        if factors:
            columns, outputs = joined(factors)
            formed = formed + torch.bmm(outputs.float().mT, columns.float())
        self._squares[n] = formed_squares(formed)
