"""From a batch of texts to each text's gradient sketch, with no weight gradient computed or formed.

A `GradientSketcher` puts hooks on the modules of a model and runs one forward and backward pass. The gradient
of a linear layer for one example is ``sum_t g_t a_t^T`` (output gradient times input). Forward hooks keep the
inputs, tensor hooks see the output gradients as they are computed, and a pass (`rapidin.gradients.passes`)
receives both factors at once, so at most one layer's factors beyond the saved inputs are held. The parameters
themselves need no gradient, so autograd computes input gradients only, and only down to the lowest layer that
counts. With a preconditioner (`rapidin.gradients.preconditioner`) the factors of a gradient are
preconditioned before they are sketched, or by the sketch itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.errors import UserError
from rapidin.gradients.convolution import grouped_gradient, is_convolution, patches, positions_first
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.parameters import Target, Use, block_seed
from rapidin.gradients.passes import (
    FactorPass,
    FlatPositionPass,
    FlatSketchPass,
    GradientPass,
    MomentPass,
    NotBatchedError,
    PositionPass,
    SketchPass,
    SketchTargets,
    SquaresPass,
)
from rapidin.gradients.preconditioner import Preconditioner
from rapidin.gradients.scale import Factors, Scale
from rapidin.gradients.settings import Projection
from rapidin.gradients.squares import Squares
from rapidin.tasks.causal import example_losses
from rapidin.tasks.forward import evaluation_mode
from rapidin.tasks.task import AnyBatch


class GradientSketcher:
    """Sketches of the per-example gradients of `targets`.

    width: sketch dimension of a block. losses: the loss of each example of a batch, by default the mean loss
    of a text's completion. projection:

    - "tensor": one block per parameter, the TensorSketch of its gradient from the factors;
    - "flat": one block per parameter, the one-permutation sketch of its formed gradient;
    - "rapidgrad": one block for all, the sum of the flat sketches, each scaled to length 1 first: the whole
      layer-normalized gradient in `width` numbers (Lin et al., ACL 2024, section 3).

    preconditioner: scales of the gradients, or None; it may be set between calls. If it differs between the
    points of a path, calls name the point by its number.

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
        losses: Callable[[nn.Module, Any], Tensor] = example_losses,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self.model = model
        self.targets = list(targets)
        self.projection: Projection = projection
        self.blocks = 1 if projection == "rapidgrad" else len(self.targets)
        self._losses = losses
        self.preconditioner = preconditioner
        self.seeds = [block_seed(seed, target.name) for target in self.targets]
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._sketched = SketchTargets(self.targets, self.seeds, width, self._parameters)
        self._by_autograd = [
            n for n, t in enumerate(self.targets) if any(use.kind == "autograd" for use in t.uses)
        ]
        self._uses: dict[str, list[tuple[int, Use]]] = {}  # (target, use) of each module, by its name
        for n, target in enumerate(self.targets):
            for use in target.uses if n not in self._by_autograd else ():
                self._uses.setdefault(use.module, []).append((n, use))

    @property
    def needs_weights(self) -> list[str]:
        """Parameters whose gradient takes more than inputs and output gradients: their own values."""
        return [t.name for t in self.targets if any(use.kind in ("module", "autograd") for use in t.uses)]

    @property
    def single_names(self) -> list[str]:
        """Parameters whose gradient comes from autograd itself, so that examples come one at a time."""
        return [self.targets[n].name for n in self._by_autograd]

    def __call__(self, batch: AnyBatch, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(sketches [B, blocks, width] float32, losses [B] float32), both on the model's device.

        point: the number of the point where the model stands, for the preconditioner. Raises NotBatchedError
        if a layer mixes the examples of a batch of more than one (batches of one work), UserError if a
        parameter takes no part in the loss, and TypeError if the preconditioner needs a point and none is
        named.
        """
        kind = SketchPass if self.projection == "tensor" else FlatSketchPass
        sketching = kind(self._sketched, batch, self._scales(point))
        losses = self._run(batch, sketching)
        sketches = sketching.sketches
        if self.projection == "rapidgrad":
            sketches = F.normalize(sketches, dim=-1, eps=1e-30).sum(1, keepdim=True)
        return sketches, losses

    def factors(self, batch: AnyBatch, point: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """(columns [B, T, I], rows [B, T, O]) of each target: its gradients are ``sum_t rows_t columns_t^T``,
        preconditioned.

        For exact gradients and for the contributions of single tokens. Raises as a call does, and TypeError
        for targets that are not the weights of linear layers.
        """
        keeping = FactorPass(self._sketched, batch, self._scales(point))
        self._run(batch, keeping)
        return [keeping.factors[n] for n in range(len(self.targets))]

    def positions(self, batch: AnyBatch, vectors: Tensor, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(products [T, Q, targets], sketches [targets, width]), float32, of a batch of one text.

        products: of vectors [Q, targets, width] with the sketch of each position's part of a target's
        gradient, ``rows_t columns_t^T`` alone. Over positions they sum to the products with the sketches,
        which are those of a call ("rapidgrad": before they are scaled and summed). Raises as a call does, and
        TypeError for targets whose gradient does not come position by position.
        """
        kind = PositionPass if self.projection == "tensor" else FlatPositionPass
        sketching = kind(self._sketched, batch, self._scales(point), vectors)
        self._run(batch, sketching)
        return sketching.products, sketching.sketches[0]

    def squares(self, batch: AnyBatch) -> list[Squares]:
        """The sums of squares of each target's gradients over rows [B, O] and columns [B, I], float64.

        The gradients are not preconditioned: a preconditioner is made from these sums. Raises as a call does.
        """
        summing = SquaresPass(self._sketched, batch)
        self._run(batch, summing)
        return summing.finish()

    def add_moments(self, batch: AnyBatch, moments: FactorMoments) -> None:
        """Add a batch to the second moments of the two factors of each target's gradient.

        The gradients are not preconditioned. Raises as a call does; `moments` may hold some of the batch
        then, and are of no more use.
        """
        self._run(batch, MomentPass(self._sketched, batch, moments))
        moments.examples += batch.rows

    def _scales(self, point: int | None) -> list[Scale] | None:
        if self.preconditioner is None:
            return None
        table = self.preconditioner.at(point)
        return [table[target.name] for target in self.targets]

    def _run(self, batch: AnyBatch, gradient_pass: GradientPass) -> Tensor:
        """One forward and backward pass; returns the losses [B]."""
        if batch.rows > 1 and self._by_autograd:
            raise NotBatchedError
        with self._frozen(), self._hooked(gradient_pass), torch.enable_grad():
            losses = self._losses(self.model, batch)
            if not losses.requires_grad:
                raise UserError(
                    f"no parameter that counts takes part in the loss, such as '{self.targets[0].name}'"
                )
            torch.autograd.backward(losses.sum())
            for n in self._by_autograd:
                grad = self._parameters[self.targets[n].name].grad
                if grad is not None:
                    gradient_pass.add_raw(n, grad.reshape(1, grad.shape[0] if grad.ndim else 1, -1))
        unused = [t.name for n, t in enumerate(self.targets) if n not in gradient_pass.seen]
        if unused:
            raise UserError(
                f"{len(unused)} parameters took no part in the model's forward pass, such as '{unused[0]}'",
                "leave them out with --exclude",
            )
        return losses.detach()

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Inside the block only the parameters whose gradient comes from autograd itself need a gradient."""
        before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        by_autograd = {id(self._parameters[name]) for name in self.single_names}
        with evaluation_mode(self.model):
            try:
                for p, _, _ in before:
                    p.requires_grad_(id(p) in by_autograd)
                    p.grad = None
                yield
            finally:
                for p, needed, grad in before:
                    p.requires_grad_(needed)
                    p.grad = grad

    @contextlib.contextmanager
    def _hooked(self, gradient_pass: GradientPass) -> Iterator[None]:
        """Inside the block the modules of all targets report to the pass."""
        handles: list[Any] = []
        try:
            for name, uses in self._uses.items():
                module = self._modules[name]
                hooks = ModuleHooks(gradient_pass, uses)
                if any(use.kind == "embedding" for _, use in uses):
                    handles.append(module.register_forward_pre_hook(hooks.expand_ids))
                handles.append(module.register_forward_hook(hooks.forward))
            yield
        finally:
            for handle in handles:
                handle.remove()


class ModuleHooks:
    """The hooks of one module in one pass, which hand the gradients of its parameters to the pass.

    uses: the number of each target that the module uses, and how.
    """

    def __init__(self, gradient_pass: GradientPass, uses: Sequence[tuple[int, Use]]) -> None:
        self._pass = gradient_pass
        self._uses = uses

    def expand_ids(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of embeddings: position ids come once for the whole batch, and become a row for
        each example, which keeps the examples' gradients apart."""
        ids, rows = args[0], self._pass.rows * self._pass.parts
        return (ids.expand(rows, *ids.shape[1:]), *args[1:]) if ids.shape[0] == 1 < rows else None

    def forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook that keeps the inputs of the module and waits for its output gradient."""
        used = isinstance(output, Tensor) and args and torch.is_grad_enabled()
        if self._pass.recomputing or not used:
            return None
        changed = None
        if not output.requires_grad:
            # The graph begins here: nothing below needs a gradient. A copy, since a leaf allows no
            # in-place use.
            output = changed = output.detach().requires_grad_().clone()
        inputs = args[0].detach()

        def on_gradient(grad: Tensor) -> None:
            with torch.no_grad():
                self._add_call(module, inputs, grad.detach())

        output.register_hook(on_gradient)
        self._pass.seen.update(n for n, _ in self._uses)
        self._pass.calls.update(n for n, _ in self._uses)
        return changed

    def _add_call(self, module: nn.Module, inputs: Tensor, grad: Tensor) -> None:
        """Add the gradient of each of the module's parameters that comes of one call of it."""
        scales = self._pass.scales
        rerun = [n for n, use in self._uses if use.kind == "module"]
        if rerun:
            self._pass.add_module(module, rerun, inputs, grad)
            return
        uses = self._uses
        if is_convolution(module):
            if inputs.ndim != len(module.kernel_size) + 2 or inputs.shape[0] % self._pass.rows:
                raise NotBatchedError  # without an axis of examples
            if module.groups > 1:
                for n in [n for n, use in uses if use.kind == "convolution"]:
                    self._pass.add_raw(n, grouped_gradient(module, inputs, grad, self._pass.rows))
                uses = [(n, use) for n, use in uses if use.kind != "convolution"]
            else:
                inputs = patches(module, inputs)
            grad = positions_first(grad)
        for n, use in uses:
            g = self._by_example(grad, 1)
            if use.kind == "embedding":
                ids = self._by_example(inputs, 0)
                padding = getattr(module, "padding_idx", None)
                if padding is not None:
                    g = g.masked_fill((ids == padding)[..., None], 0.0)
                self._pass.add_embedding(n, ids, scales[n].embedding(ids, g) if scales else g)
            elif use.kind == "bias":
                self._pass.add_bias(n, g)
            else:
                columns, rows = self._by_example(inputs, 1), g
                if use.kind == "conv1d":  # its weight is stored [in, out]: the input is the row factor
                    columns, rows = rows, columns
                self._pass.add_factors(
                    n, scales[n].factors(columns, rows) if scales else Factors(columns, rows)
                )

    def _by_example(self, x: Tensor, features: int) -> Tensor:
        """[B * parts, ..., F] or [B * T, F] -> [B, T, F], T over all parts (features = 0: no F)."""
        feature_shape = x.shape[x.ndim - features :]
        rows, length = self._pass.rows, self._pass.length
        with_rows = x.ndim > features if self._pass.pooled else x.ndim > 1 + features
        if rows == 1 or (with_rows and x.shape[0] == rows * self._pass.parts):
            return x.reshape(rows, -1, *feature_shape)
        if x.ndim == 1 + features and x.shape[0] == rows * length:
            return x.reshape(rows, length, *feature_shape)
        raise NotBatchedError
