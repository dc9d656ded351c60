"""Second moments out of an optimizer's state, by parameter name; only tensors and numbers are read.

Three kinds of file:

- ``optimizer.pt`` of a Hugging Face Trainer checkpoint, or any torch optimizer's ``state_dict()``: Adam and
  AdamW keep ``exp_avg_sq``, Adafactor ``exp_avg_sq_row`` and ``exp_avg_sq_col``. Parameters are numbered
  there, group after group: one group is the trainable parameters in their order; two are the Trainer's, with
  and without weight decay. Every shape is compared.
- a safetensors file with a tensor for each parameter under its name (or its name and ``.exp_avg_sq``), or two
  with ``.exp_avg_sq_row`` and ``.exp_avg_sq_col``.
- a checkpoint folder that holds ``optimizer.pt``.

A state's bias correction is a common factor of all parameters and is left out.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.errors import UserError, short
from rapidin.gradients.parameters import Target, matrix_shape

Means = tuple[Tensor, Tensor]  # of rows [O] and columns [I], float64
_KEYS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
_NAMED = "or give a safetensors file with a second moment under each parameter's name"


def second_moments(
    path: Path, model: nn.Module, targets: Sequence[Target], trained: Sequence[str] | None = None
) -> dict[str, Means]:
    """Row and column means of the second moment of each target: ([O], [I]) float64, on the CPU.

    model: the tuned model; trained: names of its parameters that the optimizer had, in their order, by
    default those that require a gradient, or all where none does. Raises UserError where the file cannot be
    read, holds more than tensors and numbers, or is not the state of these parameters.
    """
    path = state_file(path)
    kept = (
        _of_safetensors(path, targets)
        if path.suffix == ".safetensors"
        else _of_torch(path, model, targets, trained)
    )
    return {t.name: _means(kept[t.name], t, path) for t in targets}


def state_file(path: Path) -> Path:
    """The file with the state: `path`, or optimizer.pt in it; UserError where there is none."""
    file = path / "optimizer.pt" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no optimizer's state at '{file}'", "give a file, or a checkpoint folder with optimizer.pt"
        )
    return file


def _means(kept: Mapping[str, Tensor], target: Target, path: Path) -> Means:
    o, i = matrix_shape(target.shape)
    whole = kept.get("exp_avg_sq")
    if whole is not None:
        matrix = whole.reshape(o, i)
        means = matrix.mean(1, dtype=torch.float64), matrix.mean(0, dtype=torch.float64)
    else:
        row, column = kept["exp_avg_sq_row"], kept["exp_avg_sq_col"]
        if len(target.shape) != 2:
            raise UserError(
                f"'{path}' keeps rows and columns of '{target.name}', whose shape is {list(target.shape)}",
                "leave it out with --exclude",
            )
        means = row.double(), column.double()
    if not all(bool((m.isfinite() & (m >= 0)).all()) for m in means):
        raise UserError(
            f"the second moment of '{target.name}' in '{path}' is not finite", "give another checkpoint's"
        )
    return means


def _expected(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor that an optimizer keeps for a parameter of this shape."""
    return {"exp_avg_sq": shape, "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}[key]


def _problem(kept: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> str | None:
    """Why the tensors kept for a parameter are not a second moment of its shape, None where they are."""
    if not ("exp_avg_sq" in kept or {"exp_avg_sq_row", "exp_avg_sq_col"} <= set(kept)):
        return f"there is no second moment for '{name}'"
    for key, value in kept.items():
        if not value.is_floating_point():
            return f"'{key}' of '{name}' is of dtype {value.dtype}, not floating point"
        if tuple(value.shape) != _expected(key, shape):
            return f"'{key}' has shape {list(value.shape)} where '{name}' needs {list(_expected(key, shape))}"
    return None


def _of_safetensors(path: Path, targets: Sequence[Target]) -> dict[str, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    kept: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for target in targets:
                there = {key: f"{target.name}.{key}" for key in _KEYS if f"{target.name}.{key}" in names}
                if target.name in names:
                    there["exp_avg_sq"] = target.name
                kept[target.name] = {key: file.get_tensor(name) for key, name in there.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read '{path}': {short(error)}") from None
    for target in targets:
        problem = _problem(kept[target.name], target.name, target.shape)
        if problem:
            raise UserError(f"'{path}' does not fit the model: {problem}")
    return kept


def _of_torch(
    path: Path, model: nn.Module, targets: Sequence[Target], trained: Sequence[str] | None
) -> dict[str, dict[str, Tensor]]:
    value = _load(path)
    try:
        groups = [[int(n) for n in group["params"]] for group in value["param_groups"]]
        state = {int(n): dict(kept) for n, kept in value["state"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"'{path}' is no optimizer's state: it has no 'state' and 'param_groups'") from None
    kept = {
        n: {key: v for key in _KEYS if isinstance(v := values.get(key), Tensor)}
        for n, values in state.items()
    }
    if not any(kept.values()):
        raise UserError(
            f"the optimizer in '{path}' keeps no second moment that rapidin knows",
            "Adam, AdamW, Adafactor do",
        )
    trainable = _trainable(model, trained)
    problem = None
    for ordered in _orders(model, list(trainable), groups):
        found = _fit(ordered, groups, kept, trainable)
        if not isinstance(found, str):
            return _of_targets(found, targets, path)
        problem = problem or found
    raise UserError(f"'{path}' is not the state of this model's parameters: {problem}", _NAMED)


def _load(path: Path) -> Any:
    """What torch saved, tensors and plain values only."""
    refused = UserError(
        f"'{path}' is damaged, or holds more than tensors and numbers, which is not unpickled",
        "give the optimizer.pt of a Trainer's checkpoint, " + _NAMED,
    )
    try:
        try:
            # Mapped, since the state of a large model is larger than the model.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # saved in the form before zip files, which cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise refused from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read '{path}': {short(error)}") from None


def _trainable(model: nn.Module, trained: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that an optimizer had, in their order."""
    named = dict(model.named_parameters())
    if trained is None:
        trained = [name for name, p in named.items() if p.requires_grad] or list(named)
    return {name: tuple(named[name].shape) for name in trained}


def _orders(model: nn.Module, names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[list[list[str]]]:
    """The names of each group's parameters, as far as is known how the groups are made: one way or more."""
    if len(groups) == 1:
        return [[list(names)]]
    ways = []
    for spared in (without_weight_decay(model), _spared_by_class(model)):
        ways.append([[n for n in names if n not in spared], [n for n in names if n in spared]])
    return ways


# transformers' Trainer.get_decay_parameter_names: biases and norms get no weight decay.
_SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def without_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters to which the Hugging Face Trainer of today gives no weight decay."""
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    return {n for n, _ in model.named_parameters() if _SPARED.search(n.lower()) or n.startswith(norms)}


def _spared_by_class(model: nn.Module) -> set[str]:
    """The same in transformers of before, which asked for the classes of norms."""
    norms = tuple(
        f"{name}." for name, module in model.named_modules() if type(module).__name__.endswith("Norm")
    )
    return {n for n, _ in model.named_parameters() if "bias" in n or n.startswith(norms)}


def _fit(
    ordered: Sequence[Sequence[str]],
    groups: Sequence[Sequence[int]],
    kept: Mapping[int, Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Mapping[str, Tensor]] | str:
    """What is kept for each name, or in words what does not fit."""
    if len(ordered) != len(groups):
        return f"it has {len(groups)} groups of parameters, and a Trainer makes 2"
    if [len(names) for names in ordered] != [len(group) for group in groups]:
        there, here = (" + ".join(str(len(g)) for g in whole) for whole in (groups, ordered))
        return f"it has {there} parameters, the model {here} that are trained"
    found: dict[str, Mapping[str, Tensor]] = {}
    for names, group in zip(ordered, groups, strict=True):
        for name, number in zip(names, group, strict=True):
            values = kept.get(number, {})
            # A parameter that never had a gradient has no state; where it counts, that is told later.
            problem = _problem(values, name, shapes[name]) if values else None
            if problem:
                return problem
            found[name] = values
    return found


def _of_targets(
    found: Mapping[str, Mapping[str, Tensor]], targets: Sequence[Target], path: Path
) -> dict[str, dict[str, Tensor]]:
    for target in targets:
        if not found.get(target.name):
            raise UserError(
                f"'{path}' has no second moment for '{target.name}', which counts",
                "leave it out with --exclude",
            )
    return {target.name: dict(found[target.name]) for target in targets}
