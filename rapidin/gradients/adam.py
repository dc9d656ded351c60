"""Adam's second moments of gradients, from a sample of the data or from an optimizer's state.

`rapidin.gradients.optimizer_files` reads the optimizer's state. Where it numbers the parameters, group after
group, one group is the trainable parameters in their order, and two are the Trainer's, with and without
weight decay. Every shape is compared. Adam and AdamW keep ``exp_avg_sq``, Adafactor ``exp_avg_sq_row`` and
``exp_avg_sq_col``.

A state's bias correction is a common factor of all parameters and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.errors import UserError
from rapidin.gradients.optimizer_files import (
    NAMED,
    NumberedState,
    State,
    read_state,
    second_moment,
    state_file,
)
from rapidin.gradients.parameters import Target
from rapidin.gradients.scale import Scale
from rapidin.gradients.squares import Squares

Means = tuple[Tensor, Tensor]  # of rows [O] and columns [I], float64


class Moments:
    """Second moments of the gradients of `targets`, as row and column means, gathered batch by batch."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list(targets)
        self._sums: list[Squares] | None = None
        self._examples: Tensor | int = 0

    @property
    def examples(self) -> int:
        """The number of examples with finite gradients. Waits for the GPU."""
        return int(self._examples)

    def add(self, squares: Sequence[Squares]) -> None:
        """Add a batch, given the sums of squares of each example's rows and columns for each target.

        Examples with a value that is not finite are left out. Does not wait for the GPU.
        """
        finite = torch.stack([(r.isfinite().all(1) & c.isfinite().all(1)) for r, c in squares]).all(0)
        self._examples = self._examples + finite.sum()
        counted = finite[:, None]
        sums = [
            (torch.where(counted, r, 0.0).sum(0), torch.where(counted, c, 0.0).sum(0)) for r, c in squares
        ]
        if self._sums is not None:
            sums = [(r + s, c + d) for (r, c), (s, d) in zip(self._sums, sums, strict=True)]
        self._sums = sums

    def scales(self, exponent: float, floor: float) -> dict[str, Scale]:
        """The scale of each target, on the CPU. Raises UserError if no example had a gradient."""
        examples = self.examples
        if self._sums is None or not examples:
            raise UserError(
                "no example of the preconditioner's sample has a gradient that is finite",
                "use `preconditioner='off'`",
            )
        table = {}
        for target, (r, c) in zip(self.targets, self._sums, strict=True):
            matrices = examples * max(1, target.stack)
            rows, columns = r.cpu() / (len(c) * matrices), c.cpu() / (len(r) * matrices)
            table[target.name] = Scale.of(rows, columns, exponent, floor)
        return table


def second_moments(
    path: Path, model: nn.Module, targets: Sequence[Target], trained: Sequence[str] | None = None
) -> dict[str, Means]:
    """Row and column means of the second moment of each target in an optimizer's state: ([O], [I]) float64,
    on the CPU.

    model: the tuned model; trained: names of its parameters that the optimizer had, in their order, by
    default those that require a gradient, or all if none does. Raises UserError if the file cannot be read,
    holds more than tensors and numbers, or is not the state of these parameters.
    """
    path = state_file(path)
    saved = read_state(path, {target.name: target.shape for target in targets})
    states = (
        _by_number(saved, path, model, targets, trained)
        if isinstance(saved, NumberedState)
        else _by_name(saved, targets, path)
    )
    another = "use another checkpoint"
    return {t.name: _means(states[t.name], t, f"'{path}'", another) for t in targets}


def _means(state: State, target: Target, owner: str, remedy: str) -> Means:
    """owner: what has the state, and remedy: what to do if its numbers are damaged, in words."""
    whole = state.get("exp_avg_sq")
    if whole is not None:
        matrices = whole.reshape(max(1, target.stack), *target.matrix)
        means = matrices.mean((0, 2), dtype=torch.float64), matrices.mean((0, 1), dtype=torch.float64)
    else:
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        if target.stack and len(target.shape) == 3:
            row, column = row.double().mean(0), column.double().mean(0)
        elif len(target.shape) != 2 or target.stack:
            raise UserError(
                f"{owner} has rows and columns for '{target.name}', whose shape is {list(target.shape)}",
                "leave it out with `exclude`",
            )
        means = row.double(), column.double()
    if not all(bool((m.isfinite() & (m >= 0)).all()) for m in means):
        raise UserError(f"the second moment of '{target.name}' in {owner} is not finite", remedy)
    return means


def _expected_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor that an optimizer keeps for a parameter of this shape."""
    return {"exp_avg_sq": shape, "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}[key]


def _problem(state: State, name: str, shape: tuple[int, ...]) -> str | None:
    """Why a parameter's state is not a second moment of its shape; None if it is."""
    if not ("exp_avg_sq" in state or {"exp_avg_sq_row", "exp_avg_sq_col"} <= set(state)):
        return f"there is no second moment for '{name}'"
    for key, value in state.items():
        if not value.is_floating_point():
            return f"'{key}' of '{name}' is of dtype {value.dtype}, not floating point"
        expected = _expected_shape(key, shape)
        if tuple(value.shape) != expected:
            return f"'{key}' has shape {list(value.shape)} where '{name}' needs {list(expected)}"
    return None


def _by_name(found: Mapping[str, State], targets: Sequence[Target], path: Path) -> Mapping[str, State]:
    for target in targets:
        problem = _problem(found.get(target.name, {}), target.name, target.shape)
        if problem:
            raise UserError(f"'{path}' does not fit the model: {problem}")
    return found


def _by_number(
    saved: NumberedState,
    path: Path,
    model: nn.Module,
    targets: Sequence[Target],
    trained: Sequence[str] | None,
) -> dict[str, State]:
    shapes = _trained_shapes(model, trained)
    first_problem = None
    for ordered in _orders(model, list(shapes), saved.groups):
        by_name = _match(ordered, saved.groups, saved.states, shapes)
        if not isinstance(by_name, str):
            return _of_targets(by_name, targets, path)
        first_problem = first_problem or by_name
    raise UserError(f"'{path}' is not the state of this model's parameters: {first_problem}", NAMED)


def _trained_shapes(model: nn.Module, trained: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that an optimizer had, in their order."""
    named = dict(model.named_parameters())
    if trained is None:
        trained = [name for name, p in named.items() if p.requires_grad] or list(named)
    return {name: tuple(named[name].shape) for name in trained}


def _orders(model: nn.Module, names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[list[list[str]]]:
    """The ways in which an optimizer may have ordered the parameters: the names in each of its groups."""
    if len(groups) == 1:
        return [[list(names)]]
    return [
        [[n for n in names if n not in undecayed], [n for n in names if n in undecayed]]
        for undecayed in (without_weight_decay(model), _undecayed_by_class(model))
    ]


# transformers' Trainer.get_decay_parameter_names: biases and norms get no weight decay.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def without_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters to which the Hugging Face Trainer gives no weight decay."""
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    return {n for n, _ in model.named_parameters() if _UNDECAYED.search(n.lower()) or n.startswith(norms)}


def _undecayed_by_class(model: nn.Module) -> set[str]:
    """The same for older versions of the Trainer, which look at the classes of norms."""
    norms = tuple(
        f"{name}." for name, module in model.named_modules() if type(module).__name__.endswith("Norm")
    )
    return {n for n, _ in model.named_parameters() if "bias" in n or n.startswith(norms)}


def _match(
    ordered: Sequence[Sequence[str]],
    groups: Sequence[Sequence[int]],
    states: Mapping[int, State],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, State] | str:
    """The state of each name, given the names in each group; or in words what does not fit."""
    if len(ordered) != len(groups):
        return f"it has {len(groups)} groups of parameters, and a Trainer makes 2"
    if [len(names) for names in ordered] != [len(group) for group in groups]:
        in_state, in_model = (" + ".join(str(len(g)) for g in whole) for whole in (groups, ordered))
        return f"it has {in_state} parameters, the model has {in_model} that are trained"
    by_name: dict[str, State] = {}
    for names, group in zip(ordered, groups, strict=True):
        for name, number in zip(names, group, strict=True):
            state = states.get(number, {})
            # A parameter that never had a gradient has no state; that is an error later if it counts.
            problem = _problem(state, name, shapes[name]) if state else None
            if problem:
                return problem
            by_name[name] = state
    return by_name


def _of_targets(by_name: Mapping[str, State], targets: Sequence[Target], path: Path) -> dict[str, State]:
    for target in targets:
        if not by_name.get(target.name):
            raise UserError(
                f"'{path}' has no second moment for '{target.name}', which counts",
                "leave it out with `exclude`",
            )
    return {target.name: by_name[target.name] for target in targets}


def live_second_moments(
    optimizer: Any, targets: Sequence[Target], parameters: Sequence[nn.Parameter]
) -> dict[str, Means] | None:
    """Row and column means of the second moment of each target in an optimizer in memory, on the CPU; None
    if it has no state at all, as before its first step.

    parameters: of the targets. Raises UserError if it keeps none for a target, or not one that rapidin can
    read.
    """
    if not optimizer.state:
        return None
    remedy = "use precondition='off', or leave it out with exclude=..."
    means = {}
    for target, parameter in zip(targets, parameters, strict=True):
        state = second_moment(optimizer.state.get(parameter) or {})
        problem = _problem(state, target.name, target.shape)
        if problem:
            raise UserError(f"the optimizer cannot precondition gradients: {problem}", remedy)
        rows, columns = _means(state, target, "the optimizer", remedy)
        means[target.name] = rows.cpu(), columns.cpu()
    return means
