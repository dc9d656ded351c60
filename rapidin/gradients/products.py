"""Tracks products with parameters that no known kind of module uses: routed experts, routers, their adapters.

Experts are stored as one parameter [E, O, I]. Models multiply by one expert after another (``x[tokens] @
W[e].T``), by all at once (``torch.bmm``) or by sorted tokens (``grouped_mm``). A `ProductTracker` sees every
torch function that a forward pass calls. It recognizes the views of a parameter by their base, and so each
product with a part of the parameter. It keeps the inputs of the product with their token numbers
(`rapidin.gradients.tokens`), and waits for the gradient of the output: these are the two factors of that
expert's gradient. If a parameter is used in any other way, autograd computes its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rapidin.gradients.calls import NotBatchedError
from rapidin.gradients.parameters import Target
from rapidin.gradients.passes import GradientPass
from rapidin.gradients.rows import RowFactors
from rapidin.gradients.tokens import PRODUCTS, TokenNumbers, name_of
from rapidin.gradients.views import WeightView, contiguous_strides
from rapidin.gradients.weight_uses import (
    COPIES,
    PASSIVE,
    Product,
    SumView,
    TargetUses,
    TokenRows,
    UntrackedError,
    WeightSum,
    WeightUse,
    einsum_sum,
    first_of,
    is_list_of_numbers,
    is_whole,
    made_sum,
    numbers_of,
    stacked,
    tensors_of,
)

_VIEW = (
    "_rapidin_view"  # the attribute of a copy of a view, or of a sum: (the tracker, WeightView or SumView)
)
_SUMS = frozenset(["add", "iadd", "radd"])
_MULTIPLIED = frozenset(["mul", "rmul", "imul", "multiply"])
_FOLDED = frozenset(["addmm", "baddbmm"])


class ProductTracker(TorchFunctionMode):
    """Inside the block, every function that is called is seen.

    targets: the parameters to track, by their number, with the places (module, role) where they are.
    """

    def __init__(
        self,
        gradient_pass: GradientPass,
        parameters: Mapping[int, nn.Parameter],
        places: Mapping[int, Sequence[tuple[nn.Module, str]]],
    ) -> None:
        super().__init__()
        self.tokens = TokenNumbers(
            gradient_pass.input_rows,
            gradient_pass.length * gradient_pass.rows // gradient_pass.input_rows,
            gradient_pass.device,
        )
        self._pass = gradient_pass
        self._numbers: dict[int, int | None] = {id(p): n for n, p in parameters.items()}
        self._kept = list(parameters.values())  # so that no other tensor gets one of these ids
        # Weights that are gathered from other processes, or fetched from disk, are other tensors each time.
        self._moved = {
            n: list(places[n]) for n, p in parameters.items() if p.is_meta or hasattr(p, "to_local")
        }
        self._seen: dict[int, TargetUses] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        out = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return out
        if name in PASSIVE:
            if name == "detach":
                self.tokens.follow(name, (args, kwargs), out)
            return out
        views = [(x, view) for x in tensors_of(args, kwargs) if (view := self._view(x)) is not None]
        if views:
            out = self._used(name, args, kwargs, views, out)
        self.tokens.follow(name, (args, kwargs), out)
        return out

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: number the rows of the hidden states that a module is called with."""
        for x in (*args, *kwargs.values()):
            self.tokens.begin(x)

    def finish(self) -> None:
        """Hand on the remaining gradients: uses whose output is not part of the loss have none."""
        with torch.no_grad():
            for n in list(self._seen):
                self._flush(n)

    # --------------------------------------------------------------------------------------- views

    def _view(self, x: Tensor) -> WeightView | SumView | None:
        """The part of a tracked parameter, or of a sum with one, that a tensor shows."""
        known = self._known(x)
        if known is not None:
            return known
        base = x._base
        if base is None:
            return None
        whole = self._known(base)
        if whole is None:
            return None
        part = (whole.view if isinstance(whole, SumView) else whole).part(x, base)
        if part is None:
            raise UntrackedError(numbers_of((whole,)))
        return SumView(whole.sum, part) if isinstance(whole, SumView) else part

    def _known(self, x: Tensor) -> WeightView | SumView | None:
        mark = x.__dict__.get(_VIEW)
        if mark is not None and mark[0] is self:
            view: WeightView | SumView = mark[1]
            return view
        if not isinstance(x, nn.Parameter):
            return None
        number = self._numbers.get(id(x), -1)
        if number == -1 and self._moved:
            places = self._moved.items()
            number = next((n for n, at in places if any(m._parameters.get(r) is x for m, r in at)), None)
            self._numbers[id(x)] = number
            self._kept.append(x)
        return None if number is None or number == -1 else WeightView.whole(number, x)

    def _mark(self, x: Tensor, view: WeightView | SumView) -> Tensor:
        setattr(x, _VIEW, (self, view))
        return x

    def _target(self, n: int) -> Target:
        return self._pass.targets[n]

    # ---------------------------------------------------------------------------------------- uses

    def _used(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        views: Sequence[tuple[Tensor, WeightView | SumView]],
        out: Any,
    ) -> Any:
        """The result of a function of tracked parameters: `out`, or a copy that waits for its gradient."""
        results = [x for x in tensors_of((out,), {}) if x.is_floating_point()]
        if all(self._view(x) is not None for x in results):
            return out  # views, or nothing that has a gradient
        by_id = {id(x): view for x, view in views}
        if isinstance(out, Tensor):
            x, view = views[0]
            if name in COPIES and len(views) == 1 and out.shape == x.shape:
                return self._mark(out, view if isinstance(view, SumView) else replace(view))
            if name == "getitem" and isinstance(view, WeightView) and is_list_of_numbers(args[1]):
                return self._mark(out, replace(view, shape=tuple(out.shape), picked=args[1]))
            if name in PRODUCTS:
                return self._multiplied(name, args, kwargs, by_id, out)
            if name in _FOLDED:
                return self._folded(args, kwargs, by_id, out)
            if name == "einsum" and (made := einsum_sum(args, by_id)) is not None:
                return self._mark_sum(out, made)
            if name in _MULTIPLIED and isinstance(view, SumView):
                factor = next((a for a in args if isinstance(a, (int, float))), None)
                if factor is not None and view.sum.base is None:
                    return self._mark_sum(out, replace(view.sum, alpha=view.sum.alpha * factor))
            if name in _SUMS and not kwargs.get("alpha") and len(args) == 2:
                return self._added(args, by_id, out)
            if name in _MULTIPLIED and len(args) == 2:
                return self._scaled(args, by_id, out)
        raise UntrackedError(numbers_of(view for _, view in views))

    def _multiplied(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], views: dict[int, Any], out: Tensor
    ) -> Tensor:
        left = args[0] if args else kwargs["input"]
        right = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other", kwargs.get("mat2")))
        if name == "rmatmul":
            left, right = right, left
        of_left, of_right = views.get(id(left)), views.get(id(right))
        if of_left is not None and of_right is not None:
            made = made_sum(left, of_left, right, of_right)
            if made is None or name == "linear":
                raise UntrackedError(numbers_of((of_left, of_right)))
            return self._mark_sum(out, made)
        uses: list[tuple[int, WeightUse]] = []
        if of_right is not None:
            offsets = kwargs.get("offs", args[2] if len(args) > 2 and name != "linear" else None)
            x = left if left.ndim > 1 else left[None]
            product = Product(x, -2 if name == "linear" else -1, lambda g: g)
            uses += self._product(product, of_right, out, offsets)
        elif of_left is not None:
            x = right[:, None] if right.ndim == 1 else right
            turn: Callable[[Tensor], Tensor] = (lambda g: g[None]) if right.ndim == 1 else (lambda g: g.mT)
            uses += self._product(Product(self._turned(x), -2, turn), of_left, out, None)
        bias = (args[2] if len(args) > 2 else kwargs.get("bias")) if name == "linear" else None
        if bias is not None and (of_bias := views.get(id(bias))) is not None:
            uses.append(self._bias(left, of_bias, out))
        return self._wait(uses, out)

    def _turned(self, x: Tensor) -> Tensor:
        """x.mT, with the numbers of its tokens."""
        turned = x.mT
        self.tokens.begin(x)
        self.tokens.follow("mT", ((x,), {}), turned)
        return turned

    def _folded(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], views: dict[int, Any], out: Tensor
    ) -> Tensor:
        """``input + alpha left @ right``: a weight with an adapter's, or a product with a bias."""
        base, left, right = args[:3]
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        of_base, of_left, of_right = (views.get(id(x)) for x in (base, left, right))
        known = numbers_of(v for v in (of_base, of_left, of_right) if v is not None)
        if beta != 1:
            raise UntrackedError(known)
        if of_left is not None and of_right is not None:
            made = made_sum(left, of_left, right, of_right)
            if made is None or base.shape != out.shape or isinstance(of_base, SumView):
                raise UntrackedError(known)
            return self._mark_sum(out, replace(made, alpha=float(alpha), base=stacked(of_base)))
        if alpha != 1 or of_left is not None:
            raise UntrackedError(known)
        uses = []
        if of_right is not None:
            uses += self._product(Product(left, -1, lambda g: g), of_right, out, None)
        if of_base is not None:
            uses.append(self._bias(left, of_base, out))
        return self._wait(uses, out)

    def _added(self, args: Sequence[Any], views: dict[int, Any], out: Tensor) -> Tensor:
        first, second = args
        of_first, of_second = (views.get(id(x)) for x in (first, second))
        if isinstance(of_first, SumView) and not isinstance(of_second, SumView):
            (first, of_first), (second, of_second) = (second, of_second), (first, of_first)
        if isinstance(of_second, SumView):
            made = of_second.sum
            whole = of_second.view.strides == contiguous_strides(of_second.view.shape)
            same = isinstance(first, Tensor) and first.shape == second.shape == out.shape
            if isinstance(of_first, SumView) or made.base is not None or not whole or not same:
                raise UntrackedError(numbers_of(v for v in (of_first, of_second) if v is not None))
            return self._mark_sum(out, replace(made, base=stacked(of_first)))
        if of_first is not None and of_second is not None:
            raise UntrackedError(numbers_of((of_first, of_second)))
        other, view = (second, of_first) if of_first is not None else (first, of_second)
        assert view is not None
        in_place = out is other and not out.requires_grad  # where the graph would begin
        if not isinstance(other, Tensor) or in_place:
            raise UntrackedError(numbers_of((view,)))
        return self._wait([self._bias(other, view, out)], out)

    def _scaled(self, args: Sequence[Any], views: dict[int, Any], out: Tensor) -> Tensor:
        """``x * w``: the features of each row times a vector, as IA3 and VeRA have it."""
        first, second = args
        other, view = (second, views[id(first)]) if id(first) in views else (first, views[id(second)])
        if isinstance(other, (int, float)) and other == 1 and isinstance(view, WeightView):
            return self._mark(out, replace(view))  # where peft begins a product
        unlike = not isinstance(other, Tensor) or id(other) in views or other.shape != out.shape
        if unlike or out is other:
            raise UntrackedError(numbers_of(v for v in views.values()))
        x: Tensor = other.detach()
        version = other._version

        def by_row(grad: Tensor) -> Tensor:
            if x._version != version:
                self._pass.changed.update(numbers_of((view,)))
            return (grad * x).reshape(-1, grad.shape[-1])

        return self._wait([self._vector(other, view, out, by_row)], out)

    # ------------------------------------------------------------------------------------ products

    def _product(
        self, product: Product, view: WeightView | SumView, out: Tensor, offsets: Tensor | None
    ) -> list[tuple[int, WeightUse]]:
        """The uses that a product with a view is: of the parameter, or of an adapter's two."""
        if isinstance(view, SumView):
            shown, matrix, stack = view.view, view.sum.matrix, True
        else:
            target = self._target(view.n)
            shown, matrix, stack = view, target.matrix, bool(target.stack)
        x, flat = product.inputs, product.flat
        axes = len(shown.shape)
        if axes == 2:
            return self._one(product, view, shown, matrix, stack, None, self._rows_of(x))
        placed = shown.placed(matrix)
        items = shown.matrices(matrix, x.device) if stack else None
        if axes != 3 or placed is None:
            raise UntrackedError(numbers_of((view,)))
        if offsets is not None:  # rows sorted by their matrix
            if items is None or isinstance(view, SumView):
                raise UntrackedError(numbers_of((view,)))
            ends = offsets.tolist()
            sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            experts = placed.matrix + items.repeat_interleave(torch.tensor(sizes, device=x.device))
            rows = TokenRows(x[: ends[-1]].detach(), first_of(self.tokens.of_rows(x), ends[-1]))
            cut = replace(product, flat=lambda g: flat(g)[: ends[-1]])
            return self._one(cut, view, shown, matrix, stack, experts, rows)
        if x.ndim != 3 or out.ndim != 3 or shown.shape[0] != len(out):
            raise UntrackedError(numbers_of((view,)))
        rows = self._rows_of(x.expand(len(out), -1, -1) if len(x) == 1 < len(out) else x)
        if items is not None and not isinstance(view, SumView):
            experts = (placed.matrix + items).repeat_interleave(x.shape[-2])
            return self._one(product, view, shown, matrix, stack, experts, rows)
        each = x.shape[-2]
        uses = []
        for e in range(len(out)):
            part = slice(e * each, (e + 1) * each)
            tokens = None if rows.tokens is None else rows.tokens[part]
            item: WeightView | SumView = (
                SumView(view.sum, shown.item(e)) if isinstance(view, SumView) else shown.item(e)
            )
            of_item = replace(product, flat=partial(_item, flat, e))
            uses += self._one(
                of_item, item, shown.item(e), matrix, stack, None, TokenRows(rows.inputs[part], tokens)
            )
        return uses

    def _one(
        self,
        product: Product,
        view: WeightView | SumView,
        shown: WeightView,
        matrix: tuple[int, int],
        stack: bool,
        experts: Tensor | None,
        rows: TokenRows,
    ) -> list[tuple[int, WeightUse]]:
        placed = shown.placed(matrix)
        if placed is None:
            raise UntrackedError(numbers_of((view,)))
        out_is_row = (product.out_axis == -2) == placed.first_is_row
        flat = product.flat

        def by_row(grad: Tensor) -> Tensor:
            grad = flat(grad)
            return grad.reshape(-1, grad.shape[-1])

        use = WeightUse(placed.span, None, rows.tokens, rows.inputs, not out_is_row, by_row)
        if isinstance(view, WeightView):
            use.experts = (experts if experts is not None else placed.matrix) if stack else None
            return [(view.n, use)]
        if not is_whole(placed.span):
            raise UntrackedError(numbers_of((view,)))
        return self._of_sum(view.sum, placed.matrix, use)

    def _of_sum(self, total: WeightSum, e: int, use: WeightUse) -> list[tuple[int, WeightUse]]:
        """With ``W_e + alpha L_e R_e`` and the factors u, v of its gradient, those of L_e are u and alpha v
        R_e^T, and those of R_e alpha u L_e and v."""
        left, right = total.values[0][e], total.values[1][e]
        uses = []
        if total.base is not None:
            uses.append((total.base.n, self._within(total.base.item(e), use, None)))
        if total.left is not None:
            uses.append(
                (
                    total.left.n,
                    self._within(total.left.item(e), use, lambda u, v: (u, v @ right.mT * total.alpha)),
                )
            )
        if total.right is not None:
            uses.append(
                (
                    total.right.n,
                    self._within(total.right.item(e), use, lambda u, v: (u @ left * total.alpha, v)),
                )
            )
        return uses

    def _within(
        self,
        view: WeightView,
        use: WeightUse,
        through: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> WeightUse:
        """The use of a view [O', I'] whose rows and columns are the two factors of `use`, after `through`."""
        target = self._target(view.n)
        placed = view.placed(target.matrix)
        if placed is None:
            raise UntrackedError([view.n])

        def turned(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            u, v = (u, v) if through is None else through(u, v)
            return (u, v) if placed.first_is_row else (v, u)

        experts = placed.matrix if target.stack else None
        return replace(use, span=placed.span, experts=experts, through=turned)

    def _bias(self, x: Tensor, view: WeightView | SumView, out: Tensor) -> tuple[int, WeightUse]:
        return self._vector(x, view, out, lambda grad: grad.reshape(-1, grad.shape[-1]))

    def _vector(
        self, x: Tensor, view: WeightView | SumView, out: Tensor, by_row: Callable[[Tensor], Tensor]
    ) -> tuple[int, WeightUse]:
        """The use of one vector, or of a row of a parameter [E, O] for each output; by_row: makes the
        gradient of each row's vector from that of the outputs."""
        rows = out.shape[:-1]
        tokens = self.tokens.of_rows(x) if x.shape[:-1] == rows else None
        tokens = self._checked(tokens, rows.numel())
        if isinstance(view, SumView):
            raise UntrackedError(numbers_of((view,)))
        shape = self._target(view.n).shape
        if len(shape) == 1:
            if view.shape[-1:] != shape or view.shape[-1] != out.shape[-1] or out.numel() % shape[0]:
                raise UntrackedError([view.n])
            return view.n, WeightUse(None, None, tokens, None, False, by_row)
        if shape == (out.shape[-1], 1) and view.shape == shape[:1]:  # a column
            ones = torch.ones(rows.numel(), 1, device=out.device, dtype=out.dtype)
            return view.n, WeightUse(None, None, tokens, ones, False, by_row)
        number = view.bias_rows(shape, rows, out.device)
        if number is None:
            raise UntrackedError([view.n])
        hot = torch.zeros(rows.numel(), shape[0], device=out.device, dtype=out.dtype)
        hot.scatter_(1, number[:, None], 1.0)
        return view.n, WeightUse(None, None, tokens, hot, True, by_row)

    def _mark_sum(self, out: Tensor, total: WeightSum) -> Tensor:
        if not out.is_contiguous():
            raise UntrackedError(total.numbers)
        shape = tuple(out.shape)
        return self._mark(out, SumView(total, WeightView(-1, shape, contiguous_strides(shape))))

    # ---------------------------------------------------------------------------------- gradients

    def _rows_of(self, x: Tensor) -> TokenRows:
        tokens = self._checked(self.tokens.of_rows(x), x.shape[:-1].numel())
        return TokenRows(x.detach().reshape(-1, x.shape[-1]), tokens)

    def _checked(self, tokens: Tensor | None, rows: int) -> Tensor | None:
        if tokens is None and self._pass.rows > 1 and rows:
            raise NotBatchedError
        return tokens

    def _wait(self, uses: Sequence[tuple[int, WeightUse]], out: Tensor) -> Tensor:
        """Let uses wait for the gradient of their output; returns the output, or a copy where the graph
        begins."""
        for n, _ in uses:
            self._pass.seen.add(n)
        if not out.numel():
            return out
        if not out.requires_grad:
            out = out.detach().requires_grad_().clone()
        for n, use in uses:
            seen = self._seen.setdefault(n, TargetUses())
            seen.uses.append(use)
            seen.waiting += 1

        def on_gradient(grad: Tensor) -> None:
            with torch.no_grad():
                for n, use in uses:
                    if use.changed:
                        self._pass.changed.add(n)
                    use.grad = use.flat(grad.detach())
                    self._seen[n].waiting -= 1
                    if not self._seen[n].waiting:
                        self._flush(n)

        waiting: Any = out
        waiting.register_hook(on_gradient)
        return out

    def _flush(self, n: int) -> None:
        """Hand on the gradient of a target, from all uses whose gradient has come."""
        factors = [use.factors() for use in self._seen.pop(n).uses if use.grad is not None]
        if factors:
            self._pass.add_rows(n, RowFactors.joined(factors))


def _item(flat: Callable[[Tensor], Tensor], number: int, grad: Tensor) -> Tensor:
    return flat(grad)[number]
