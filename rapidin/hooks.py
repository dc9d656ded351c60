"""Hooks: from a batch of texts to each text's gradient sketch, with no weight gradient computed or formed.

The gradient of a linear layer for one example is ``sum_t g_t a_t^T`` (output gradient times input). Forward
hooks keep the inputs, tensor hooks see the output gradients on their way down, and `ops.linear_sketch` makes
the sketch of one from the other on the spot, so at most one layer's factors beyond the saved inputs are
held. The parameters themselves need no gradient, so autograd computes input gradients only, and only down to
the lowest layer that counts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin import ops
from rapidin.errors import UserError
from rapidin.layers import Target, Use, block_seed
from rapidin.transfer import upload

LossKind = Literal["mean", "sum"]
Projection = Literal["tensor", "flat", "rapidgrad"]


class NotBatchedError(Exception):
    """A layer does not keep the examples of a batch apart, so they must come one at a time."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts padded on the right. ids: [B, T] int64; mask: [B, T] bool, real tokens; target: [B, T] bool;
    first: the first position from which some text's target token is predicted, 0 where there is none."""

    ids: Tensor
    mask: Tensor
    target: Tensor
    first: int

    @staticmethod
    def of(
        texts: Sequence[tuple[Sequence[int], Sequence[bool]]], device: torch.device | str = "cpu"
    ) -> Batch:
        """The batch of (token ids, target flags) pairs."""
        length = max(len(ids) for ids, _ in texts)
        cpu, device = torch.device("cpu"), torch.device(device)
        ids = torch.zeros(len(texts), length, dtype=torch.int64, device=cpu)
        mask = torch.zeros(len(texts), length, dtype=torch.bool, device=cpu)
        target = torch.zeros(len(texts), length, dtype=torch.bool, device=cpu)
        for row, (tokens, flags) in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device=cpu)
            mask[row, : len(tokens)] = True
            target[row, : len(flags)] = torch.tensor(flags, dtype=torch.bool, device=cpu)
        # Here, for to ask a GPU is to wait for it.
        predicted = target[:, 1:].any(0).nonzero()
        first = int(predicted[0]) if len(predicted) else 0
        return Batch(upload(ids, device), upload(mask, device), upload(target, device), first)


def example_losses(model: nn.Module, batch: Batch, kind: LossKind = "mean") -> Tensor:
    """Each example's loss over its target tokens: [B] float32.

    Position t's logits predict token t + 1; ``mean`` divides by the example's own number of target tokens.
    """
    # Logits before the first target token are never needed, and the output head is a large part of a small
    # model.
    first = batch.first
    kept = batch.ids.shape[1] - first
    extra: dict[str, Any] = {"logits_to_keep": kept} if _takes(model, "logits_to_keep") else {}
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False, **extra).logits
    logits = logits[:, -kept:-1] if kept > 1 else logits[:, :0]
    target = batch.target[:, 1 + first :]
    token_loss = F.cross_entropy(
        logits.float().flatten(0, 1), batch.ids[:, first + 1 :].flatten(), reduction="none"
    ).view(target.shape)
    # where, not a product: a token that does not count must not bring its NaN along.
    loss = torch.where(target, token_loss, token_loss.new_zeros(())).sum(1)
    return loss / target.sum(1).clamp(min=1) if kind == "mean" else loss


def _takes(model: nn.Module, name: str) -> bool:
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    return name in inspect.signature(inner.forward).parameters


class GradientSketcher:
    """Sketches of the per-example gradients of `targets`.

    width: bins of a block. loss: see `example_losses`. projection:

    - "tensor": a block a parameter, the TensorSketch of its gradient from the factors;
    - "flat": a block a parameter, the one-permutation sketch of its formed gradient;
    - "rapidgrad": one block for all, the sum of the flat sketches, each scaled to length 1 first: the whole
      layer-normalised gradient in `width` numbers (Lin et al., ACL 2024, section 3).

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
    ) -> None:
        self.model = model
        self.targets = list(targets)
        self.width = width
        self.projection: Projection = projection
        self.blocks = 1 if projection == "rapidgrad" else len(self.targets)
        self.loss: LossKind = loss
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
    def single_names(self) -> list[str]:
        """Parameters for which no batched way is known: examples come one at a time because of them."""
        return [self.targets[n].name for n in self._single]

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sketches [B, blocks, width] float32, losses [B] float32), both on the model's device.

        Raises NotBatchedError where a layer mixes the examples of a batch of more than one (then
        `one_by_one` is set, and batches of one will do), and UserError where a parameter takes no part in
        the loss.
        """
        state = _Pass(self, batch) if self.projection == "tensor" else _FormedPass(self, batch)
        losses = self._run(batch, state)
        if self.projection == "rapidgrad":
            return F.normalize(state.out, dim=-1, eps=1e-30).sum(1, keepdim=True), losses
        return state.out, losses

    def factors(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(columns [B, T, I], rows [B, T, O]) of each target: its gradients are ``sum_t rows_t columns_t^T``.

        For exact gradients and for what single tokens bring. Raises as a call does, and TypeError for
        targets that are not the weights of linear layers.
        """
        state = _FactorPass(self, batch)
        self._run(batch, state)
        return [state.factors[n] for n in range(len(self.targets))]

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
                    state.add_formed(n, grad.reshape(1, grad.shape[0] if grad.ndim else 1, -1))
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
        training = self.model.training
        self.model.eval()
        try:
            for p, _, _ in before:
                p.requires_grad_(id(p) in single)
                p.grad = None
            yield
        finally:
            for p, needed, grad in before:
                p.requires_grad_(needed)
                p.grad = grad
            self.model.train(training)

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

    def __init__(self, sketcher: GradientSketcher, batch: Batch) -> None:
        self.sketcher = sketcher
        self.rows, self.length = batch.ids.shape
        self.out = torch.zeros(self.rows, len(sketcher.targets), sketcher.width, device=batch.ids.device)
        self.seen: set[int] = set()
        self._again = False  # a module run a second time for its own parameters must not be hooked again

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
                self._add_embedding(n, ids, g)
            elif use.kind == "bias":
                self.add_formed(n, g.float().sum(1)[:, :, None])
            elif use.kind == "linear":
                self._add_factors(n, self._by_example(inputs, 1), g)
            else:  # a Conv1D weight is stored [in, out]: the input is the row factor
                self._add_factors(n, g, self._by_example(inputs, 1))

    def _add_factors(self, n: int, columns: Tensor, rows: Tensor) -> None:
        """Add ``sum_t rows_t columns_t^T``; columns: [B, T, I], rows: [B, T, O]."""
        self.out[:, n] += ops.linear_sketch(columns, rows, self.sketcher.width, seed=self.sketcher.seeds[n])

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        """Add the gradient of an embedding's [V, E] weight; ids: [B, T], grad: [B, T, E]."""
        self.out[:, n] += ops.embedding_sketch(ids, grad, self.sketcher.width, seed=self.sketcher.seeds[n])

    def _add_module(self, module: nn.Module, own: Sequence[int], inputs: Tensor, grad: Tensor) -> None:
        """Norms and the like: the module again, one example at a time, for its own few parameters."""
        if inputs.shape[0] != self.rows:
            self._not_batched()
        named = dict(module.named_parameters(recurse=False))
        index = {id(self.sketcher.parameters[self.sketcher.targets[n].name]): n for n in own}
        roles = {role: index[id(p)] for role, p in named.items() if id(p) in index}
        grads: list[tuple[Tensor, ...]] = []
        for row in range(self.rows):
            with torch.enable_grad():
                copies = {role: p.detach().requires_grad_() for role, p in named.items()}
                self._again = True
                again = torch.func.functional_call(module, copies, (inputs[row : row + 1],))
                self._again = False
                grads.append(
                    torch.autograd.grad(again, [copies[role] for role in roles], grad[row : row + 1])
                )
        for n, parts in zip(roles.values(), zip(*grads, strict=True), strict=True):
            self.add_formed(n, torch.stack(parts)[:, :, None])

    def add_formed(self, n: int, grad: Tensor) -> None:
        """Add a formed gradient [B, O, I]."""
        self.seen.add(n)
        self.out[:, n] += ops.matrix_sketch(grad.float(), self.sketcher.width, seed=self.sketcher.seeds[n])

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

    def _add_factors(self, n: int, columns: Tensor, rows: Tensor) -> None:
        self.add_formed(n, torch.bmm(rows.float().mT, columns.float()))

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        vocabulary, size = self.sketcher.targets[n].shape
        formed = grad.new_zeros(self.rows, vocabulary, size, dtype=torch.float32)
        self.add_formed(n, formed.scatter_add_(1, ids[..., None].expand(-1, -1, size), grad.float()))

    def add_formed(self, n: int, grad: Tensor) -> None:
        self.seen.add(n)
        width, seed = self.sketcher.width, self.sketcher.seeds[n]
        self.out[:, n] += ops.flat_sketch([grad.float().flatten(1)], width, seed=seed, batched=True)


class _FactorPass(_Pass):
    """A pass that keeps the factors instead of sketching them."""

    def __init__(self, sketcher: GradientSketcher, batch: Batch) -> None:
        super().__init__(sketcher, batch)
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}

    def _add_factors(self, n: int, columns: Tensor, rows: Tensor) -> None:
        if n in self.factors:  # used twice: the sum over both calls' tokens
            columns, rows = (
                torch.cat(pair, dim=1) for pair in zip(self.factors[n], (columns, rows), strict=True)
            )
        self.factors[n] = (columns, rows)

    def _add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self.add_formed(n, grad)

    def add_formed(self, n: int, grad: Tensor) -> None:
        raise TypeError(
            f"'{self.sketcher.targets[n].name}' is not the weight of a linear layer: it has no factors"
        )
