"""The check before caching: the sketches that hooks make, against plain autograd's.

Hooks assume that a module computes what its type says: that a linear layer's output is its input times its
weight, and that the first axis of a tensor is that of the examples. If the code of a model differs, gradients
are wrong without any error. So one or two examples are sketched in two ways before anything is cached:

- by hooks, and from the gradient of each parameter that autograd computes. If the two sketches of a parameter
  differ, autograd computes its gradient from then on, one example at a time (`parameters.with_autograd`).
- by hooks in a batch of two examples of unequal lengths, and of each alone. If a sketch differs, a layer
  mixes the examples of a batch or has its axes in another order, and examples are processed one at a time.

A sketch is linear, so two sketches differ as much as the gradients do. Differences are compared with the norm
of the sketches and with the rounding error of a sum over tokens: the gradient of the bias of attention keys,
for example, is zero in exact arithmetic.

Autograd cannot compute the gradient of a packed (quantized) weight. The result names it as unchecked; whether
its layer propagates the right gradients is tested when the model is loaded (`rapidin.gradients.quantized`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.data.encoding import AnyExample, Encoded, Status
from rapidin.gradients.autograd_sketches import AutogradSketches
from rapidin.gradients.calls import ChangedInputError, NotBatchedError
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.fsdp import is_sharded
from rapidin.gradients.passes import FlatSketchPass, SketchPass, SketchTargets
from rapidin.gradients.rows import RowGroup
from rapidin.gradients.scale import Factors, Scale
from rapidin.tasks.task import AnyBatch

TOKENS = 64  # of the longer example
_SHORTEST = 8  # tokens
MOST_ELEMENTS = 1 << 30  # of parameters that are all compared; of more, some of each kind
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tolerance:
    """The errors that rounding explains, in the model's number format.

    autograd: between a sketch by hooks and autograd's; batch: between a sketch in a batch and the example's
    alone, where the forward pass is rounded differently; both relative to the norm of the sketch. floor:
    relative to the sum of the norms of all tokens' gradients, which may cancel each other. strict: whether an
    error in one example is enough; otherwise the same parameter must differ in both.
    """

    autograd: float
    batch: float
    floor: float
    strict: bool

    @staticmethod
    def of(model: nn.Module) -> Tolerance:
        """The tolerance of a model: that of the coarsest number format of its parameters."""
        formats = {p.dtype for p in model.parameters()}
        if formats <= {torch.float64, torch.float32}:
            if torch.get_float32_matmul_precision() == "highest":
                return Tolerance(1e-3, 1e-3, 2e-6, True)
            return Tolerance(1e-2, 5e-2, 1e-4, True)
        if formats <= {torch.float64, torch.float32, torch.float16}:
            return Tolerance(2e-2, 0.1, 5e-3, False)
        return Tolerance(5e-2, 0.25, 2e-2, False)


@dataclass(frozen=True)
class GradientCheck:
    """What the check found.

    compared: number of compared parameters, of `total` that count; worst: the largest relative error of those
    that agree; by_autograd: the errors of those that do not, whose gradients autograd computes; mixed: a
    parameter whose gradient depends on the other examples of a batch, "" if there is none; mixed_error: its
    error (0 if the inputs of its layer have no example axis); unchecked: parameters that could not be
    compared; followed: see `GradientSketcher`.
    """

    compared: int = 0
    total: int = 0
    worst: float = 0.0
    by_autograd: Mapping[str, float] = field(default_factory=dict)
    mixed: str = ""
    mixed_error: float = 0.0
    unchecked: tuple[str, ...] = ()
    followed: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The result in a sentence."""
        if not self.compared:
            return "no gradient could be compared with autograd's"
        some = f"{self.compared:,}" + (f" of {self.total:,}" if self.compared < self.total else "")
        text = f"gradients of {some} parameters compared with autograd's: "
        if self.by_autograd:
            name, error = max(self.by_autograd.items(), key=lambda item: item[1])
            text += (
                f"autograd computes those of {len(self.by_autograd):,}, one example at a time, since hooks "
                f"give another result or miss a use (such as '{name}', relative error {error:.2g})"
            )
        else:
            text += f"equal within {max(self.worst, 1e-7):.0e}"
        if self.unchecked:
            text += f"; {len(self.unchecked):,} not checked, such as '{self.unchecked[0]}'"
        return text

    @property
    def why_single(self) -> str:
        """Why examples are processed one at a time; "" if they need not be."""
        if not self.mixed:
            return ""
        if not self.mixed_error:
            return f"the inputs of the layer of '{self.mixed}' have no example axis"
        return (
            f"in a batch the gradient of '{self.mixed}' depends on the other examples "
            f"(relative error {self.mixed_error:.2g})"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as the manifest stores it."""
        return {
            "compared": self.compared,
            "total": self.total,
            "worst": self.worst,
            "by_autograd": dict(self.by_autograd),
            "mixed": self.mixed,
            "mixed_error": self.mixed_error,
            "unchecked": list(self.unchecked),
            "followed": list(self.followed),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> GradientCheck:
        """What `to_json` wrote. Raises KeyError or TypeError if it is something else."""
        return GradientCheck(
            int(value["compared"]),
            int(value["total"]),
            float(value["worst"]),
            dict(value["by_autograd"]),
            str(value["mixed"]),
            float(value["mixed_error"]),
            tuple(value["unchecked"]),
            tuple(value["followed"]),
        )


def check_pair(examples: Sequence[AnyExample], max_length: int) -> tuple[AnyExample, AnyExample] | None:
    """A shorter and a longer one of those that have a gradient; None if none has one.

    Texts of causal models are both cut to be short. Others are taken as they are, and are of one length if
    all are.
    """
    good = sorted((each for each in examples if each.status == Status.OK), key=lambda each: each.length)
    if not good:
        return None
    most = min(TOKENS, max_length)
    at = max((n for n, each in enumerate(good) if each.length <= most), default=0)
    longer, shorter = good[at], good[max(0, at - 1)]
    if not isinstance(longer, Encoded) or not isinstance(shorter, Encoded):
        return (shorter if at else good[-1]), longer
    longer = _cut(longer, most, max_length)
    size = max(2, 2 * len(longer.ids) // 3)
    return _cut(shorter, size, size), longer


def _cut(text: Encoded, most: int, max_length: int) -> Encoded:
    """The last tokens of a text, up to the last that counts, of which there are at least `_SHORTEST` unless
    max_length is less: a shorter text is repeated."""
    ids, target = list(text.ids), list(text.target)
    end = max(t for t, counts in enumerate(target) if counts) + 1
    start = max(0, end - most)
    ids, target = ids[start:end], target[start:end]
    if len(ids) < min(_SHORTEST, max_length):
        times = -(-_SHORTEST // len(ids))
        ids, target = (ids * times)[:max_length], (target * times)[:max_length]
    if not any(target[1:]):
        target[-1] = True
    target[0] = False
    return Encoded(ids, target, Status.OK)


def check_gradients(
    sketcher: GradientSketcher,
    short: AnyBatch,
    long: AnyBatch,
    both: AnyBatch | None,
    most_elements: int = MOST_ELEMENTS,
) -> GradientCheck:
    """Compare the gradients that hooks take with autograd's.

    sketcher: checked, without a preconditioner; short, long, both: the batches of an example, of a longer
    one, and of the two; None if examples come one at a time anyway; most_elements: of parameters that are
    all compared. Raises UserError for a gradient that neither hooks nor autograd can take.
    """
    return _Check(sketcher, short, long, both, most_elements).run()


class _Check:
    def __init__(
        self,
        sketcher: GradientSketcher,
        short: AnyBatch,
        long: AnyBatch,
        both: AnyBatch | None,
        most_elements: int,
    ) -> None:
        self._sketcher, self._both, self._most_elements = sketcher, both, most_elements
        self._alone = [long, short]
        self._tolerance = Tolerance.of(sketcher.model)
        self._by_hooks: dict[int, _MassPass] = {}  # by the number of the example
        self._changed: set[str] = set()
        self._unchecked: set[int] = set()
        self._compared: set[int] = set()

    def run(self) -> GradientCheck:
        sketcher = self._sketcher
        single = {n for n, t in enumerate(sketcher.targets) if t.name in set(sketcher.single_names)}
        numbers = [n for n in range(len(sketcher.targets)) if n not in single]
        chosen = self._sample(numbers)
        errors = self._compare(chosen)
        wrong = {n: error for n, error in errors.items() if error > self._tolerance.autograd}
        if wrong and len(chosen) < len(numbers):
            kinds = {self._kind(n) for n in wrong}
            others = self._compare([n for n in set(numbers) - set(chosen) if self._kind(n) in kinds])
            errors |= others
            wrong |= {n: error for n, error in others.items() if error > self._tolerance.autograd}
        names = [t.name for t in sketcher.targets]
        mixed, error = "", 0.0
        if not (sketcher.single_names or wrong or self._both is None):
            mixed, error = self._mixed(self._both, numbers)
        # A pass may have found that it sees nothing of how a parameter is used, and left it to autograd.
        wrong |= {n: 1.0 for n in numbers if names[n] in set(sketcher.single_names)}
        by_autograd = {names[n]: round(wrong[n], 4) for n in sorted(wrong)}
        if by_autograd:
            mixed, error = "", 0.0
        return GradientCheck(
            len(self._compared),
            len(names),
            max((e for n, e in errors.items() if n not in wrong), default=0.0),
            by_autograd,
            mixed,
            round(error, 4),
            tuple(names[n] for n in sorted(self._unchecked)),
            tuple(sorted(sketcher.followed)),
        )

    # ------------------------------------------------------------------------------ against autograd

    def _kind(self, n: int) -> tuple[str, tuple[int, ...]]:
        """What the parameters at the same place of several blocks have in common."""
        target = self._sketcher.targets[n]
        return re.sub(r"\d+", "*", target.name), target.shape

    def _sample(self, numbers: Sequence[int]) -> list[int]:
        """All parameters, or the first, middle and last of each kind if they are too many."""
        if sum(prod(self._sketcher.targets[n].shape) for n in numbers) <= self._most_elements:
            return list(numbers)
        kinds: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for n in numbers:
            kinds.setdefault(self._kind(n), []).append(n)
        return sorted({same[at] for same in kinds.values() for at in (0, len(same) // 2, -1)})

    def _compare(self, numbers: Sequence[int]) -> dict[int, float]:
        """The relative error of each of these parameters, as far as it is known."""
        errors: dict[int, float] = {}
        left = [n for n in numbers if self._has_gradient(n)]
        self._unchecked.update(set(numbers) - set(left))
        for number, batch in enumerate(self._alone):
            if not left:
                break
            by_hooks = self._hooked(number)
            by_autograd = AutogradSketches(self._sketcher, batch, left)
            found = self._errors(
                by_hooks.sketches[0], by_autograd.sketches[0], by_hooks, self._tolerance.autograd
            )
            self._unchecked.update(by_autograd.failed)
            left = [n for n in left if n not in by_autograd.failed]
            self._compared.update(left)
            for n in left:
                errors[n] = min(errors.get(n, found[n]), found[n])
                if self._sketcher.targets[n].name in self._changed:
                    errors[n] = 1.0
            left = [n for n in left if errors[n] > self._tolerance.autograd]
            if self._tolerance.strict:
                break
        self._refuse_changed()
        return errors

    def _has_gradient(self, n: int) -> bool:
        """Whether autograd can give a parameter's gradient: it is in memory and not packed."""
        parameter = self._sketcher.parameter(n)
        packed = parameter.dtype not in _FLOATS or (
            hasattr(parameter, "__tensor_flatten__") and not is_sharded(parameter)
        )
        return (
            not packed and not parameter.is_meta and tuple(parameter.shape) == self._sketcher.targets[n].shape
        )

    def _hooked(self, number: int) -> _MassPass:
        """The sketches that hooks make of one example."""
        if number not in self._by_hooks:
            self._by_hooks[number] = self._run_hooks(self._alone[number])
        return self._by_hooks[number]

    def _run_hooks(self, batch: AnyBatch) -> _MassPass:
        kind = _MassPass if self._sketcher.sketch_pass is SketchPass else _FlatMassPass
        sketching = self._sketcher.new_pass(kind, batch)
        try:
            self._sketcher.run(batch, sketching)
        except ChangedInputError as error:  # which leaves those parameters out, and only those
            self._changed.update(error.names)
        return sketching

    def _errors(self, got: Tensor, expected: Tensor, weighed: _MassPass, tolerance: float) -> list[float]:
        """Errors [targets] of sketches [targets, width]: relative to the larger of the two, and to what
        rounding explains."""
        difference = (got - expected).norm(dim=-1)
        size = torch.maximum(got.norm(dim=-1), expected.norm(dim=-1))
        error = difference / (size + weighed.mass * (self._tolerance.floor / tolerance)).clamp(min=1e-30)
        errors: list[float] = error.nan_to_num(nan=1.0, posinf=1.0).cpu().tolist()
        return errors

    def _refuse_changed(self) -> None:
        """Raise UserError if the input of a parameter is changed, and autograd cannot take its gradient."""
        names = {self._sketcher.targets[n].name for n in self._unchecked} & self._changed
        if names:
            raise ChangedInputError(sorted(names), checked=True)

    # ------------------------------------------------------------------------------------ batches

    def _mixed(self, both: AnyBatch, numbers: Sequence[int]) -> tuple[str, float]:
        """(a parameter whose gradient in a batch is not that of the example alone, its error); ("", 0) if
        there is none."""
        names = [t.name for t in self._sketcher.targets]
        try:
            together = self._run_hooks(both)
        except NotBatchedError as unbatched:
            return unbatched.name or names[0], 0.0
        errors = []
        for row, number in ((0, 1), (1, 0)):
            alone = self._hooked(number)
            errors.append(
                self._errors(together.sketches[row], alone.sketches[0], alone, self._tolerance.batch)
            )
        combine = max if self._tolerance.strict else min
        worst = max(numbers, key=lambda n: combine(errors[0][n], errors[1][n]))
        error = combine(errors[0][worst], errors[1][worst])
        return (names[worst], error) if error > self._tolerance.batch else ("", 0.0)


class _MassPass(SketchPass):
    """Sketches, and the sum of the sizes of all tokens' gradients.

    mass: [targets], of all examples.
    """

    def __init__(self, sketched: SketchTargets, batch: AnyBatch, scales: Sequence[Scale] | None) -> None:
        super().__init__(sketched, batch, scales)
        self.mass = torch.zeros(len(self.targets), device=self.device)

    def add_factors(self, n: int, factors: Factors) -> None:
        self._weigh(n, _sizes(factors.columns) * _sizes(factors.rows))
        super().add_factors(n, factors)

    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        self._weigh(n, _sizes(factors.columns) * _sizes(factors.rows))
        super().add_group(n, factors, group)

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._weigh(n, _sizes(grad))
        super().add_embedding(n, ids, grad)

    def add_bias(self, n: int, grad: Tensor) -> None:
        self._weigh(n, _sizes(grad))
        super().add_bias(n, grad)

    def _weigh(self, n: int, sizes: Tensor) -> None:
        self.mass[n] += sizes.sum().to(self.device)


class _FlatMassPass(_MassPass, FlatSketchPass):
    """`_MassPass` with flat sketches."""


def _sizes(x: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return sizes
