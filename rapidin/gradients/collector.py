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
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.errors import UserError
from rapidin.gradients.batch import Batch, evaluation_mode, example_losses
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.parameters import Target, Use, block_seed
from rapidin.gradients.passes import (
    Call,
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
from rapidin.gradients.settings import LossKind, Projection
from rapidin.gradients.squares import Squares

_Pass = TypeVar("_Pass", bound=GradientPass)


class ChangedInputError(UserError):
    """The input of a module is changed in place after the module has read it, so its gradient is unknown.

    names: the module's parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"the model changes the input of '{names[0]}' in place after it is used",
            "leave out --no-check, or leave it out with --exclude",
        )
        self.names = list(names)


class GradientSketcher:
    """Sketches of the per-example gradients of `targets`.

    width: sketch dimension of a block. loss: see `example_losses`. projection:

    - "tensor": one block per parameter, the TensorSketch of its gradient from the factors;
    - "flat": one block per parameter, the one-permutation sketch of its formed gradient;
    - "rapidgrad": one block for all, the sum of the flat sketches, each scaled to length 1 first: the whole
      layer-normalized gradient in `width` numbers (Lin et al., ACL 2024, section 3).

    preconditioner: scales of the gradients, or None; it may be set between calls. If it differs between the
    points of a path, calls name the point by its number. checked: the gradients were compared with autograd's
    (`rapidin.gradients.check`), so that the gradient of a parameter that an example does not reach is zero.

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
        checked: bool = False,
    ) -> None:
        self.model = model
        self.targets = list(targets)
        self.projection: Projection = projection
        self.blocks = 1 if projection == "rapidgrad" else len(self.targets)
        self.loss: LossKind = loss
        self.preconditioner = preconditioner
        self.checked = checked
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
    def sketch_pass(self) -> type[SketchPass]:
        """The kind of pass that makes the sketches of each target by itself."""
        return SketchPass if self.projection == "tensor" else FlatSketchPass

    def new_pass(self, kind: type[_Pass], batch: Batch, point: int | None = None) -> _Pass:
        """A pass of this kind over a batch, for `run`; its gradients are preconditioned."""
        return kind(self._sketched, batch, self._scales(point))

    def parameter(self, n: int) -> nn.Parameter:
        """The parameter of target n."""
        return self._parameters[self.targets[n].name]

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each example of a batch, [B] float32, with its graph if gradients are enabled."""
        return example_losses(self.model, batch, self.loss)

    @property
    def needs_weights(self) -> list[str]:
        """Parameters whose gradient takes more than inputs and output gradients: their own values."""
        return [t.name for t in self.targets if any(use.kind in ("module", "autograd") for use in t.uses)]

    @property
    def single_names(self) -> list[str]:
        """Parameters whose gradient comes from autograd itself, so that examples come one at a time."""
        return [self.targets[n].name for n in self._by_autograd]

    def __call__(self, batch: Batch, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(sketches [B, blocks, width] float32, losses [B] float32), both on the model's device.

        point: the number of the point where the model stands, for the preconditioner. Raises NotBatchedError
        if a layer mixes the examples of a batch of more than one (batches of one work), UserError if a
        parameter takes no part in the loss of an unchecked model, or the input of a module is changed after
        the module has read it (ChangedInputError), and TypeError if the preconditioner needs a point and none
        is named.
        """
        sketching = self.new_pass(self.sketch_pass, batch, point)
        losses = self.run(batch, sketching)
        sketches = sketching.sketches
        if self.projection == "rapidgrad":
            sketches = F.normalize(sketches, dim=-1, eps=1e-30).sum(1, keepdim=True)
        return sketches, losses

    def factors(self, batch: Batch, point: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """(columns [B, T, I], rows [B, T, O]) of each target: its gradients are ``sum_t rows_t columns_t^T``,
        preconditioned.

        For exact gradients and for the contributions of single tokens. Raises as a call does, and TypeError
        for targets that are not the weights of linear layers.
        """
        keeping = self.new_pass(FactorPass, batch, point)
        self.run(batch, keeping)
        return [keeping.factors_of(n) for n in range(len(self.targets))]

    def positions(self, batch: Batch, vectors: Tensor, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(products [T, Q, targets], sketches [targets, width]), float32, of a batch of one text.

        products: of vectors [Q, targets, width] with the sketch of each position's part of a target's
        gradient, ``rows_t columns_t^T`` alone. Over positions they sum to the products with the sketches,
        which are those of a call ("rapidgrad": before they are scaled and summed). Raises as a call does, and
        TypeError for targets whose gradient does not come position by position.
        """
        kind = PositionPass if self.projection == "tensor" else FlatPositionPass
        sketching = kind(self._sketched, batch, self._scales(point), vectors)
        self.run(batch, sketching)
        return sketching.products, sketching.sketches[0]

    def squares(self, batch: Batch) -> list[Squares]:
        """The sums of squares of each target's gradients over rows [B, O] and columns [B, I], float64.

        The gradients are not preconditioned: a preconditioner is made from these sums. Raises as a call does.
        """
        summing = SquaresPass(self._sketched, batch)
        self.run(batch, summing)
        return summing.finish()

    def add_moments(self, batch: Batch, moments: FactorMoments) -> None:
        """Add a batch to the second moments of the two factors of each target's gradient.

        The gradients are not preconditioned. Raises as a call does; `moments` may hold some of the batch
        then, and are of no more use.
        """
        self.run(batch, MomentPass(self._sketched, batch, moments))
        moments.examples += len(batch.ids)

    def _scales(self, point: int | None) -> list[Scale] | None:
        if self.preconditioner is None:
            return None
        table = self.preconditioner.at(point)
        return [table[target.name] for target in self.targets]

    def run(self, batch: Batch, gradient_pass: GradientPass) -> Tensor:
        """One forward and backward pass, whose gradients go to `gradient_pass`; returns the losses [B]."""
        rows, length = gradient_pass.rows, gradient_pass.length
        if rows > 1 and self._by_autograd:
            raise NotBatchedError(self.single_names[0])
        if rows == length > 1:
            # The axis of the examples is known by its size, which no other axis of a batch may have.
            raise NotBatchedError
        with self.requiring(self._by_autograd), self._hooked(gradient_pass), torch.enable_grad():
            losses = self.losses(batch)
            if not losses.requires_grad:
                raise UserError(
                    f"no parameter that counts takes part in the loss, such as '{self.targets[0].name}'"
                )
            torch.autograd.backward(losses.sum())
            for n in self._by_autograd:
                grad = self.parameter(n).grad
                if grad is not None:
                    gradient_pass.add_parameter_gradient(n, grad)
        if gradient_pass.changed:
            raise ChangedInputError([self.targets[n].name for n in sorted(gradient_pass.changed)])
        unused = [t.name for n, t in enumerate(self.targets) if n not in gradient_pass.seen]
        if unused and not self.checked:
            raise UserError(
                f"{len(unused)} parameters took no part in the model's forward pass, such as '{unused[0]}'",
                "leave out --no-check, or leave them out with --exclude",
            )
        return losses.detach()

    @contextlib.contextmanager
    def requiring(self, numbers: Collection[int]) -> Iterator[None]:
        """Inside the block only the parameters of these targets need a gradient, and none has one yet."""
        before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        needed = {id(self.parameter(n)) for n in numbers}
        with evaluation_mode(self.model):
            try:
                for p, _, _ in before:
                    p.requires_grad_(id(p) in needed)
                    p.grad = None
                yield
            finally:
                for p, required, grad in before:
                    p.requires_grad_(required)
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
                    handles.append(module.register_forward_pre_hook(hooks.expand_ids, with_kwargs=True))
                handles.append(module.register_forward_hook(hooks.forward, with_kwargs=True))
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
        self._rerun = [n for n, use in uses if use.kind == "module"]

    def expand_ids(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook of embeddings: position ids come once for the whole batch, and become a row for
        each example, which keeps the examples' gradients apart."""
        call, rows = Call(args, kwargs), self._pass.rows
        if not call.tensors or not call.inputs.ndim or not call.inputs.shape[0] == 1 < rows:
            return None
        expanded = call.mapped(lambda ids: ids.expand(rows, *ids.shape[1:]) if ids is call.inputs else ids)
        return expanded.args, dict(expanded.kwargs)

    def forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """A forward hook that keeps the arguments of the module and waits for its output gradient."""
        call = Call(args, kwargs)
        used = isinstance(output, Tensor) and call.tensors and torch.is_grad_enabled()
        if self._pass.recomputing or not used:
            return None
        changed = None
        if not output.requires_grad:
            # The graph begins here: nothing below needs a gradient. A copy, since a leaf allows no
            # in-place use.
            output = changed = output.detach().requires_grad_().clone()
        call = (call if self._rerun else Call((call.inputs,), {})).mapped(Tensor.detach)
        versions = call.versions

        def on_gradient(grad: Tensor) -> None:
            if call.versions != versions:
                self._pass.changed.update(n for n, _ in self._uses)
                return
            with torch.no_grad():
                self._add_call(module, call, grad.detach())

        output.register_hook(on_gradient)
        self._pass.seen.update(n for n, _ in self._uses)
        self._pass.calls.update(n for n, _ in self._uses)
        return changed

    def _add_call(self, module: nn.Module, call: Call, grad: Tensor) -> None:
        """Add the gradient of each of the module's parameters that comes of one call of it."""
        scales = self._pass.scales
        if self._rerun:
            self._pass.add_module(module, self._rerun, call, grad)
            return
        for n, use in self._uses:
            g = self._by_example(grad, 1)
            if use.kind == "embedding":
                ids = self._by_example(call.inputs, 0)
                padding = getattr(module, "padding_idx", None)
                if padding is not None:
                    g = g.masked_fill((ids == padding)[..., None], 0.0)
                self._pass.add_embedding(n, ids, scales[n].embedding(ids, g) if scales else g)
            elif use.kind == "bias":
                self._pass.add_bias(n, g)
            else:
                columns, rows = self._by_example(call.inputs, 1), g
                if use.kind == "conv1d":  # its weight is stored [in, out]: the input is the row factor
                    columns, rows = rows, columns
                self._pass.add_factors(
                    n, scales[n].factors(columns, rows) if scales else Factors(columns, rows)
                )

    def _by_example(self, x: Tensor, features: int) -> Tensor:
        """[B, ..., F] or [B * T, F] -> [B, T, F] (features = 0: no F).

        The axes are told apart by their sizes, of which B and T are never the same. Whether [B * T, F] is
        [B, T, F] and not [T, B, F] is for the check to find out.
        """
        feature_shape = x.shape[x.ndim - features :]
        rows, length = self._pass.rows, self._pass.length
        if rows == 1 or (x.ndim > 1 + features and x.shape[0] == rows):
            return x.reshape(rows, -1, *feature_shape)
        if x.ndim == 1 + features and x.shape[0] == rows * length:
            return x.reshape(rows, length, *feature_shape)
        raise NotBatchedError(self._pass.targets[self._uses[0][0]].name)
