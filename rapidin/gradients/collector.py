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
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rapidin import ops
from rapidin.errors import UserError
from rapidin.gradients.calls import (
    Call,
    ChangedInputError,
    FollowTokensError,
    NotBatchedError,
    RowsDifferError,
    UnseenError,
)
from rapidin.gradients.convolution import as_linear
from rapidin.gradients.exact import ExactGradient, ExactPass
from rapidin.gradients.experts import gradients_of
from rapidin.gradients.fsdp import is_sharded
from rapidin.gradients.hook_handles import registered
from rapidin.gradients.kept import KeepingPass, KeptBatch
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.moment_passes import MomentPass, SquaresPass
from rapidin.gradients.parameters import Target, Use, block_seed, role_of
from rapidin.gradients.passes import (
    FlatPositionPass,
    FlatSketchPass,
    GradientPass,
    PositionPass,
    SketchPass,
    SketchTargets,
    backward,
)
from rapidin.gradients.preconditioner import Preconditioner
from rapidin.gradients.products import ProductTracker
from rapidin.gradients.rows import RowFactors
from rapidin.gradients.scale import Factors, Scale
from rapidin.gradients.settings import Projection
from rapidin.gradients.shared_rows import SharedRows, shares_forward
from rapidin.gradients.squares import Squares
from rapidin.gradients.tokens import TokenNumbers
from rapidin.gradients.weight_uses import UntrackedError
from rapidin.tasks.causal import example_losses
from rapidin.tasks.task import AnyBatch

_Pass = TypeVar("_Pass", bound=GradientPass)
_Way = Literal["hooks", "product", "autograd"]  # in which a target's gradient is obtained
_EXPERT = re.compile("Expert|M[oO]E|Moe")  # classes of modules that may see some tokens only


class GradientSketcher:
    """Sketches of the per-example gradients of `targets`.

    width: sketch dimension of a block. losses: the loss of each example of a batch, by default the mean loss
    of a text's completion. projection:

    - "tensor": one block per parameter, the TensorSketch of its gradient from the factors;
    - "flat": one block per parameter, the one-permutation sketch of its formed gradient;
    - "rapidgrad": one block for all, the sum of the flat sketches, each scaled to length 1 first: the whole
      layer-normalized gradient in `width` numbers (Lin et al., ACL 2024, section 3).

    preconditioner: scales of the gradients, or None; it may be set between calls. If it differs between the
    points of a path, calls name the point by its number. checked: the gradients were compared with autograd's
    (`rapidin.gradients.check`), so that the gradient of a parameter that an example does not reach is zero.
    followed: roles (names without the numbers of layers) of modules to which tokens are followed, since their
    inputs do not begin with the axis of the examples; those that passes find are added.

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
        checked: bool = False,
        followed: Collection[str] = (),
    ) -> None:
        self.model = model
        self.targets = list(targets)
        self.projection: Projection = projection
        self.blocks = 1 if projection == "rapidgrad" else len(self.targets)
        self._losses = losses
        self.preconditioner = preconditioner
        self.checked = checked
        self.seeds = [block_seed(seed, target.name) for target in self.targets]
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._sketched = SketchTargets(self.targets, self.seeds, width, self._parameters)
        # A pass may find that a way does not work, and chooses another for all that follow.
        self._ways: list[_Way] = [_first_way(target) for target in self.targets]
        self._unreached: set[int] = set()  # targets without a gradient in some batch, as autograd confirmed
        # Whether tokens are followed to modules that see some of them, in any order.
        self._routed = bool(followed) or any(
            _EXPERT.search(type(module).__name__) for module in self._modules.values()
        )
        self.followed = set(followed)
        # Whether copies of a text share a forward pass: not if a layer computes another thing for each.
        self.shares_rows = shares_forward(model, any(is_sharded(p) for p in self._parameters.values()))

    @cached_property
    def _containers(self) -> list[str]:
        """The modules that use a target, and all that they are in."""
        paths = [use.module.split(".") for target in self.targets for use in target.uses]
        return sorted({".".join(path[:depth]) for path in paths for depth in range(len(path) + 1)})

    @property
    def sketch_pass(self) -> type[SketchPass]:
        """The kind of pass that makes the sketches of each target by itself."""
        return SketchPass if self.projection == "tensor" else FlatSketchPass

    def new_pass(self, kind: type[_Pass], batch: AnyBatch, point: int | None = None) -> _Pass:
        """A pass of this kind over a batch, for `run`; its gradients are preconditioned."""
        return kind(self._sketched, batch, self._scales(point))

    def parameter(self, n: int) -> nn.Parameter:
        """The parameter of target n."""
        return self._parameters[self.targets[n].name]

    def losses(self, batch: AnyBatch) -> Tensor:
        """The loss of each example of a batch, [B] float32, with its graph if gradients are enabled."""
        return self._losses(self.model, batch)

    @property
    def needs_weights(self) -> list[str]:
        """Parameters whose gradient takes more than inputs and output gradients: their own values."""
        return [
            t.name
            for t, way in zip(self.targets, self._ways, strict=True)
            if way == "autograd" or any(use.kind == "module" for use in t.uses)
        ]

    @property
    def single_names(self) -> list[str]:
        """Parameters whose gradient comes from autograd itself, so that examples come one at a time."""
        return [t.name for t, way in zip(self.targets, self._ways, strict=True) if way == "autograd"]

    def __call__(self, batch: AnyBatch, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(sketches [B, blocks, width] float32, losses [B] float32), both on the model's device.

        point: the number of the point where the model stands, for the preconditioner. Raises NotBatchedError
        if a layer mixes the examples of a batch of more than one (batches of one work), UserError if a
        parameter takes no part in the loss of an unchecked model, or the input of a module is changed after
        the module has read it (ChangedInputError), and TypeError if the preconditioner needs a point and none
        is named.
        """
        sketching = self.new_pass(self.sketch_pass, batch, point)
        losses = self.run(batch, sketching)
        return sketching.blocks(self.projection == "rapidgrad"), losses

    def exact(
        self, batch: AnyBatch, point: int | None = None, *, by_position: bool = False
    ) -> list[ExactGradient]:
        """The gradient of each target for a batch of one example, preconditioned.

        by_position: whether they have to come position by position; TypeError is raised for one that does
        not. Raises as a call does.
        """
        keeping = ExactPass(self._sketched, batch, self._scales(point), by_position=by_position)
        self.run(batch, keeping)
        return keeping.gradients()

    def positions(self, batch: AnyBatch, vectors: Tensor, point: int | None = None) -> tuple[Tensor, Tensor]:
        """(products [B, T, Q, targets], sketches [B, targets, width]), float32, of a batch of texts.

        products: of vectors [Q, targets, width] with the sketch of each position's part of a target's
        gradient, ``rows_t columns_t^T`` alone. Over positions they sum to the products with the sketches,
        which are those of a call ("rapidgrad": before they are scaled and summed). Raises as a call does, and
        TypeError for targets whose gradient does not come position by position.
        """
        kind = PositionPass if self.projection == "tensor" else FlatPositionPass
        sketching = kind(self._sketched, batch, self._scales(point), vectors)
        self.run(batch, sketching)
        products = sketching.products.view(batch.rows, batch.length, *sketching.products.shape[1:])
        return products, sketching.sketches

    def squares(self, batch: AnyBatch) -> list[Squares]:
        """The sums of squares of each target's gradients over rows [B, O] and columns [B, I], float64.

        The gradients are not preconditioned: a preconditioner is made from these sums. Raises as a call does.
        """
        summing = SquaresPass(self._sketched, batch)
        self.run(batch, summing)
        return summing.finish()

    def add_moments(self, batch: AnyBatch, moments: FactorMoments, kept: KeptBatch | None = None) -> None:
        """Add a batch to the second moments of the two factors of each target's gradient.

        The gradients are not preconditioned. kept: where they go too. Raises as a call does; `moments` may
        hold some of the batch then, and are of no more use.
        """
        kind = MomentPass if kept is None else partial(KeepingPass, kept=kept)
        self.run(batch, kind(self._sketched, batch, moments))
        moments.examples += batch.rows

    def _scales(self, point: int | None) -> list[Scale] | None:
        if self.preconditioner is None:
            return None
        table = self.preconditioner.at(point)
        return [table[target.name] for target in self.targets]

    def run(self, batch: AnyBatch, gradient_pass: GradientPass) -> Tensor:
        """One forward and backward pass, whose gradients go to `gradient_pass`; returns the losses [B].

        It begins again where the forward pass shows that a gradient is to be obtained in another way.
        """
        rows, inputs = gradient_pass.rows, gradient_pass.input_rows
        if inputs == gradient_pass.length * rows // inputs > 1:
            # The axis of the examples is known by its size, which no other axis of a batch may have.
            raise NotBatchedError
        while True:
            if rows > 1 and self.single_names:
                raise NotBatchedError(self.single_names[0], len(self.single_names))
            gradient_pass.seen.clear()
            gradient_pass.calls.clear()
            try:
                losses = self._forward_and_backward(batch, gradient_pass)
                break
            except UntrackedError as error:
                self._leave_to_autograd(error.numbers)
            except FollowTokensError:
                self._routed = True
            except RowsDifferError:
                self.shares_rows = False
            except UnseenError as error:
                self._settle(batch, error.numbers)
        if gradient_pass.changed:
            raise ChangedInputError([self.targets[n].name for n in sorted(gradient_pass.changed)])
        return losses.detach()

    def _forward_and_backward(self, batch: AnyBatch, gradient_pass: GradientPass) -> Tensor:
        tracker = self._tracker(gradient_pass)
        by_autograd = [n for n, way in enumerate(self._ways) if way == "autograd"]
        alike = self.shares_rows and tracker is None and getattr(batch, "alike", False)
        share = SharedRows(batch.rows) if alike else None
        with self.requiring(by_autograd), self._hooked(gradient_pass, tracker), torch.enable_grad():
            faster = share or ops.faster_linear(self.model)  # shared rows are multiplied so anyway
            with faster, tracker or contextlib.nullcontext():
                losses = self.losses(batch)
            if share is not None and share.differ:
                raise RowsDifferError
            unseen = set(range(len(self.targets))) - set(by_autograd) - gradient_pass.seen - self._unreached
            if unseen:
                raise UnseenError(sorted(unseen))
            if losses.requires_grad:
                backward(losses)
            elif len(self._unreached) == len(self.targets):
                raise UserError(
                    f"no parameter that counts takes part in the loss, such as '{self.targets[0].name}'"
                )
            if tracker is not None:
                tracker.finish()
            for n in by_autograd:
                grad = self.parameter(n).grad
                if grad is not None:
                    gradient_pass.add_parameter_gradient(n, grad)
        return losses

    def _tracker(self, gradient_pass: GradientPass) -> ProductTracker | None:
        """What sees the products with parameters that are no module's of a known kind, if there are any."""
        tracked = [n for n, way in enumerate(self._ways) if way == "product"]
        if not tracked and not self._routed:
            return None
        roles = {n: self.targets[n].name.rpartition(".")[2] for n in tracked}
        places = {n: [(self._modules[use.module], roles[n]) for use in self.targets[n].uses] for n in tracked}
        return ProductTracker(gradient_pass, {n: self.parameter(n) for n in tracked}, places)

    def _leave_to_autograd(self, numbers: Sequence[int]) -> None:
        """Take these targets' gradients from autograd, in all layers at once: each pass finds one."""
        roles = {role_of(self.targets[n].name) for n in numbers}
        for n, target in enumerate(self.targets):
            if self._ways[n] == "product" and role_of(target.name) in roles:
                self._ways[n] = "autograd"

    def _settle(self, batch: AnyBatch, unseen: Sequence[int]) -> None:
        """Find out whether targets that no hook saw have a gradient; if so, it is obtained in another way.

        A weight may be used by another function than its module's. If it has no gradient, no token came to
        its expert, say.
        """
        if any(is_sharded(self.parameter(n)) for n in unseen):
            if not self.checked:
                raise UserError(
                    f"{len(unseen)} parameters took no part in the model's forward pass, such as "
                    f"'{self.targets[unseen[0]].name}'",
                    "leave out `check=False`, or leave them out with `exclude`",
                )
            self._unreached.update(unseen)
            return
        with self.requiring(unseen), torch.enable_grad():
            losses = self.losses(batch)
            if losses.requires_grad:
                torch.autograd.backward(losses.sum())
            reached = [n for n in unseen if self.parameter(n).grad is not None]
        self._unreached |= set(unseen) - set(reached)
        for n in reached:
            self._ways[n] = "product" if self._ways[n] == "hooks" else "autograd"

    def requiring(self, numbers: Collection[int]) -> contextlib.AbstractContextManager[None]:
        """Inside the block only the parameters of these targets need a gradient, and none has one yet."""
        return gradients_of(self.model, [self.parameter(n) for n in numbers])

    def _hooked(
        self,
        gradient_pass: GradientPass,
        tracker: ProductTracker | None,
        make_hooks: Callable[..., ModuleHooks] | None = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the block the modules of all targets report to the pass. make_hooks: of another kind."""
        by_module: dict[str, list[tuple[int, Use]]] = {}
        for n, target in enumerate(self.targets):
            if self._ways[n] == "hooks":
                for use in target.uses:
                    by_module.setdefault(use.module, []).append((n, use))
        tokens = None if tracker is None else tracker.tokens
        make = make_hooks or ModuleHooks
        hooks = {name: make(gradient_pass, uses, tokens, self.followed) for name, uses in by_module.items()}
        begins = {} if tracker is None else dict.fromkeys(self._containers, tracker.begin)
        return registered(self._modules, hooks, begins)


def _first_way(target: Target) -> _Way:
    kinds = {use.kind for use in target.uses}
    return "autograd" if "autograd" in kinds else "product" if "product" in kinds else "hooks"


class ModuleHooks:
    """The hooks of one module in one pass, which hand the gradients of its parameters to the pass.

    uses: the number of each target that the module uses, and how; tokens: which tokens the module sees, or
    None if they are not followed; followed: roles of modules whose inputs do not begin with the axis of the
    examples, of which more are found here.
    """

    def __init__(
        self,
        gradient_pass: GradientPass,
        uses: Sequence[tuple[int, Use]],
        tokens: TokenNumbers | None,
        followed: set[str],
    ) -> None:
        self._pass = gradient_pass
        self._uses = uses
        self._tokens, self._followed, self._name = tokens, followed, role_of(uses[0][1].module)
        self._linear = all(use.kind in ("linear", "conv1d", "bias") for _, use in uses)
        self._rerun = [n for n, use in uses if use.kind == "module"]
        self.with_ids = any(use.kind == "embedding" for _, use in uses)

    def expand_ids(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook of embeddings: position ids come once for the whole batch, and become a row for
        each example, which keeps the examples' gradients apart."""
        call, rows = Call(args, kwargs), self._pass.input_rows
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
        tokens = self._tokens_of(call.inputs)
        self._pass.seen.update(n for n, _ in self._uses)
        if not output.numel():
            return None  # no token came here
        changed = None
        if not output.requires_grad:
            # The graph begins here: nothing below needs a gradient. A copy, since a leaf allows no
            # in-place use.
            output = changed = output.detach().requires_grad_().clone()
        call = (call if self._rerun else Call((call.inputs,), {})).mapped(Tensor.detach)

        def add(call: Call, grad: Tensor) -> None:
            with torch.no_grad():
                if tokens is None:
                    self._add_call(module, call, grad.detach())
                else:
                    self._add_rows(call.inputs, grad.detach(), tokens)

        self._pass.calls.update(n for n, _ in self._uses)
        waiting = self.wait(output, call, add)
        return changed if waiting is output else waiting

    def wait(self, output: Any, call: Call, add: Callable[[Call, Tensor], None]) -> Any:
        """The output in whose place the module's is to be used, such that `add` gets the call and the
        output's gradient as soon as that is computed."""
        versions = call.versions

        def on_gradient(grad: Tensor) -> None:
            if call.versions == versions:
                add(call, grad)
            else:
                self._pass.changed.update(n for n, _ in self._uses)

        output.register_hook(on_gradient)
        return output

    def _add_call(self, module: nn.Module, call: Call, grad: Tensor) -> None:
        """Add the gradient of each of the module's parameters that comes of one call of it."""
        scales = self._pass.scales
        if self._rerun:
            self._pass.add_module(module, self._rerun, call, grad)
            return
        inputs, grad, uses = as_linear(module, call.inputs, grad, self._uses, self._pass)
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

    def _tokens_of(self, x: Tensor) -> Tensor | None:
        """The token of each row of a linear layer's inputs [N, F], if they are not the batch's in order.

        Raises NotBatchedError if they are not known and matter, and FollowTokensError to follow them from now
        on.
        """
        rows, tokens_in_all = self._pass.rows, self._pass.rows * self._pass.length
        # If an axis that is not the first has all tokens, the first is another one that has this size now.
        inner = x.shape[1:-1].numel()
        apart = x.ndim > 2 and (rows == 1 or not inner or inner % tokens_in_all > 0)
        batch_first = x.shape[0] == self._pass.input_rows and (apart or (self._pass.pooled and x.ndim > 1))
        if not self._linear or (batch_first and self._name not in self._followed):
            return None
        in_order = x.ndim == 2 and x.shape[0] == tokens_in_all
        if rows > 1 and not in_order:
            self._followed.add(self._name)
        if self._tokens is None:
            if rows > 1 and not in_order:
                raise FollowTokensError
            return None
        tokens = self._tokens.of_rows(x)
        if tokens is None and rows > 1:
            raise NotBatchedError(self._pass.targets[self._uses[0][0]].name)
        return tokens

    def _add_rows(self, inputs: Tensor, grad: Tensor, tokens: Tensor) -> None:
        """Add the gradients of a linear layer that sees tokens in any order."""
        x, g = inputs.reshape(-1, inputs.shape[-1]), grad.reshape(-1, grad.shape[-1])
        for n, use in self._uses:
            columns, rows = (g, x) if use.kind == "conv1d" else (x, g)
            self._pass.add_rows(n, RowFactors(None if use.kind == "bias" else columns, rows, tokens, None))

    def _by_example(self, x: Tensor, features: int) -> Tensor:
        """[B * parts, ..., F] or [B * T, F] -> [B, T, F], T over all parts (features = 0: no F).

        The axes are told apart by their sizes, of which B and T are never the same. Whether [B * T, F] is
        [B, T, F] and not [T, B, F] is for the check to find out.
        """
        feature_shape = x.shape[x.ndim - features :]
        rows, length = self._pass.rows, self._pass.length
        with_rows = x.ndim > features + (0 if self._pass.pooled else 1)
        if rows == 1 or (with_rows and x.shape[0] == self._pass.input_rows):
            return x.reshape(rows, -1, *feature_shape)
        if x.ndim == 1 + features and x.shape[0] == rows * length:
            return x.reshape(rows, length, *feature_shape)
        raise NotBatchedError(self._pass.targets[self._uses[0][0]].name)
