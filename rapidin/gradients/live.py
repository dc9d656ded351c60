"""Sketches of the gradients of a backward pass that somebody else runs: the steps of a training run.

`GradientSketcher` runs the model itself. Here a trainer does, in training mode and with its own loss, whose
gradient for an example is a multiple of that of the example's own loss; the caller divides the sketches by
it, since a sketch is linear. With gradient checkpointing a module is called again in the backward pass. Its
inputs are then kept where autograd keeps its own, so that they take no memory between the two calls, and each
call of the forward pass counts once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import UserError
from rapidin.gradients.calls import Call, NotBatchedError
from rapidin.gradients.collector import GradientSketcher, ModuleHooks
from rapidin.gradients.parameters import Use
from rapidin.gradients.passes import GradientPass, SketchPass
from rapidin.gradients.source import GradientSource


@dataclass(frozen=True, slots=True)
class LiveBatch:
    """The shape of a batch that a trainer computes.

    rows: texts, each with a sketch of its own; length: positions of a text; tokens: the token ``row * length
    + position`` of each position of texts that stand one after the other in a single row, [N] int64; None for
    texts in rows of their own.
    """

    rows: int
    length: int
    device: torch.device
    tokens: Tensor | None = None

    parts = 1
    pooled = False
    alike = False


class LiveSketcher(GradientSketcher):
    """Sketches of a backward pass that the caller runs, of the parameters and with the settings of a source.

    recomputed: whether modules are called again in the backward pass (gradient checkpointing). Raises
    UserError for a parameter whose gradient cannot be taken in such a pass.

    >>> with sketcher.watching(batch) as sketching:
    ...     loss(model(inputs)).backward()
    >>> sketching.sketches                                       # [rows, blocks, width]
    """

    def __init__(self, source: GradientSource, *, recomputed: bool = False) -> None:
        settings = source.settings
        super().__init__(
            source.loaded.model,
            source.targets,
            width=source.width,
            seed=settings.seed,
            projection=settings.projection,
            checked=True,
        )
        self.recomputed = recomputed
        if settings.projection == "rapidgrad":
            raise UserError("the projection 'rapidgrad' cannot be sketched in training", "use 'tensor'")
        self._refuse_other_ways()

    def _refuse_other_ways(self) -> None:
        other = [t.name for t, way in zip(self.targets, self._ways, strict=True) if way != "hooks"]
        remedy = "leave such parameters out with exclude=..., or cache after training with 'rapidin cache'"
        if other:
            raise UserError(
                f"the gradient of '{other[0]}' cannot be taken from the backward pass of the training", remedy
            )
        if self._routed:
            raise UserError(
                "the model routes tokens to experts, whose gradients cannot be taken from the backward pass "
                "of the training",
                "cache after training with 'rapidin cache'",
            )

    @contextlib.contextmanager
    def watching(self, batch: LiveBatch) -> Iterator[SketchPass]:
        """Inside the block, the forward and the backward pass over a batch go to the pass that is given.

        Raises NotBatchedError, from the model's call, where a layer mixes the texts.
        """
        sketching = self.new_pass(self.sketch_pass, batch)
        hooks = partial(LiveHooks, batch=batch, recomputed=self.recomputed)
        with self._hooked(sketching, None, hooks):
            yield sketching
        unseen = [t.name for n, t in enumerate(self.targets) if n not in sketching.seen]
        if unseen:
            raise UserError(
                f"{len(unseen)} parameters took no part in the forward pass, such as '{unseen[0]}'",
                "leave them out with exclude=...",
            )
        if sketching.changed:
            name = self.targets[min(sketching.changed)].name
            raise UserError(
                f"the model changes the input of '{name}' in place after it is used",
                "leave it out with exclude=...",
            )


class LiveHooks(ModuleHooks):
    """The hooks of one module in a training step."""

    def __init__(
        self,
        gradient_pass: GradientPass,
        uses: Sequence[tuple[int, Use]],
        tokens: object,
        followed: Collection[str],
        *,
        batch: LiveBatch,
        recomputed: bool,
    ) -> None:
        super().__init__(gradient_pass, uses, None, set(followed))
        self._batch, self._recomputed = batch, recomputed

    def wait(self, output: Any, call: Call, add: Callable[[Call, Tensor], None]) -> Any:
        if not self._recomputed:
            return super().wait(output, call, add)
        tensors = call.tensors
        without = call.mapped(lambda x: x.new_empty(0, device="meta"))  # the call keeps no memory itself
        keep: Any = _Kept.apply
        return keep(output, partial(self._add, without, add), *tensors)

    @staticmethod
    def _add(
        without: Call, add: Callable[[Call, Tensor], None], tensors: Sequence[Tensor], grad: Tensor
    ) -> None:
        values = iter(tensors)
        add(without.mapped(lambda _: next(values)), grad)

    def _tokens_of(self, x: Tensor) -> Tensor | None:
        tokens = self._batch.tokens
        if tokens is None:
            return super()._tokens_of(x)
        if not self._linear or x.shape[:-1].numel() != len(tokens):
            raise NotBatchedError(self._pass.targets[self._uses[0][0]].name)
        return tokens


class _Kept(torch.autograd.Function):
    """Leaves a module's output as it is, and keeps its arguments for the backward pass as autograd keeps its
    own: with gradient checkpointing they are computed again there."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, then: Callable[..., None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.then = then
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        ctx.then(tensors, grad)
        return (grad, None, *(None for _ in tensors))
