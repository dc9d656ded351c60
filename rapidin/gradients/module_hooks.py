"""The hooks of a module, which keep its inputs and hand on the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.gradients.calls import Call, FollowTokensError, NotBatchedError
from rapidin.gradients.convolution import as_linear
from rapidin.gradients.parameters import Use, role_of
from rapidin.gradients.passes import GradientPass
from rapidin.gradients.rows import RowFactors
from rapidin.gradients.scale import Factors
from rapidin.gradients.tokens import TokenNumbers


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
