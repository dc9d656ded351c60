"""One forward and backward pass over a batch, whose hooks hand on the gradient of each parameter.

The gradient of a linear layer for one example is ``sum_t g_t a_t^T`` (output gradient times input). Forward
hooks keep the inputs, tensor hooks see the output gradients as they are computed, and the pass receives both
factors at once, so at most one layer's factors beyond the saved inputs are held. `rapidin.gradients.passes`
has the kinds of passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.gradients.batch import Batch
from rapidin.gradients.parameters import Target, Use
from rapidin.gradients.scale import Factors, Scale


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

    def __init__(self, sketched: SketchTargets, batch: Batch, scales: Sequence[Scale] | None = None) -> None:
        self.sketched = sketched
        self.targets = sketched.targets
        self.scales = scales
        self.rows, self.length = batch.ids.shape
        self.device = batch.ids.device
        self.seen: set[int] = set()  # targets that take part in the forward pass
        self.calls: Counter[int] = Counter()  # of each target's modules, in the forward pass
        self._recomputing = False  # a module that runs again for its own parameters is not hooked again

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
        if self.rows > 1 and inputs.shape[0] != self.rows:
            raise NotBatchedError
        for n, grads in self.module_gradients(module, numbers, inputs, grad, self.rows):
            self.add_raw(n, grads)

    def add_raw(self, n: int, grad: Tensor) -> None:
        """Add a formed gradient [B, O, I] that is not preconditioned yet."""
        self.seen.add(n)
        self.add_formed(n, self.scales[n].formed(grad) if self.scales else grad)

    # -------------------------------------------------------------------------------------- hooks

    def expand_ids(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of embeddings: position ids come once for the whole batch, and become a row for
        each example, which keeps the examples' gradients apart."""
        ids = args[0]
        return (ids.expand(self.rows, *ids.shape[1:]), *args[1:]) if ids.shape[0] == 1 < self.rows else None

    def forward_hook(
        self, uses: Sequence[tuple[int, Use]]
    ) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        """A forward hook that keeps the inputs of a module and waits for its output gradient.

        uses: the number of each target that the module uses, and how.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._recomputing or not isinstance(output, Tensor) or not args or not torch.is_grad_enabled():
                return None
            changed = None
            if not output.requires_grad:
                # The graph begins here: nothing below needs a gradient. A copy, since a leaf allows no
                # in-place use.
                output = changed = output.detach().requires_grad_().clone()
            inputs = args[0].detach()

            def on_gradient(grad: Tensor) -> None:
                with torch.no_grad():
                    self._add_call(module, uses, inputs, grad.detach())

            output.register_hook(on_gradient)
            self.seen.update(n for n, _ in uses)
            self.calls.update(n for n, _ in uses)
            return changed

        return hook

    def _add_call(
        self, module: nn.Module, uses: Sequence[tuple[int, Use]], inputs: Tensor, grad: Tensor
    ) -> None:
        """Add the gradient of each of a module's parameters that comes of one call of the module."""
        rerun = [n for n, use in uses if use.kind == "module"]
        if rerun:
            self.add_module(module, rerun, inputs, grad)
            return
        for n, use in uses:
            g = self._by_example(grad, 1)
            if use.kind == "embedding":
                ids = self._by_example(inputs, 0)
                padding = getattr(module, "padding_idx", None)
                if padding is not None:
                    g = g.masked_fill((ids == padding)[..., None], 0.0)
                self.add_embedding(n, ids, self.scales[n].embedding(ids, g) if self.scales else g)
            elif use.kind == "bias":
                self.add_bias(n, g)
            else:
                columns, rows = self._by_example(inputs, 1), g
                if use.kind == "conv1d":  # its weight is stored [in, out]: the input is the row factor
                    columns, rows = rows, columns
                self.add_factors(
                    n, self.scales[n].factors(columns, rows) if self.scales else Factors(columns, rows)
                )

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
                self._recomputing = True
                example = slice(row * each, (row + 1) * each)
                output = torch.func.functional_call(module, copies, (inputs[example],))
                self._recomputing = False
                grads.append(torch.autograd.grad(output, [copies[role] for role in roles], grad[example]))
        for n, of_examples in zip(roles.values(), zip(*grads, strict=True), strict=True):
            yield n, torch.stack(of_examples)[:, :, None]

    def _by_example(self, x: Tensor, features: int) -> Tensor:
        """[B, ..., F] or [B * T, F] -> [B, T, F] (features = 0: no F)."""
        feature_shape = x.shape[x.ndim - features :]
        if self.rows == 1 or (x.ndim > 1 + features and x.shape[0] == self.rows):
            return x.reshape(self.rows, -1, *feature_shape)
        if x.ndim == 1 + features and x.shape[0] == self.rows * self.length:
            return x.reshape(self.rows, self.length, *feature_shape)
        raise NotBatchedError
