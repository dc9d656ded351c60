"""The parameters that count, and how the gradient of each is obtained.

A parameter's gradient is treated as a matrix ``[shape[0], product of the rest]`` (a vector of n is
``[n, 1]``), as the parameter is stored. A *block* is one parameter's part of a sketch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Literal

from rapidin.errors import UserError

if TYPE_CHECKING:
    from torch import nn

UseKind = Literal["linear", "conv1d", "convolution", "bias", "embedding", "module", "autograd"]


@dataclass(frozen=True, slots=True)
class Use:
    """A module that uses a parameter, and how the gradient is obtained there.

    linear, conv1d (of transformers, which is linear), convolution, bias: from the module's inputs and output
    gradients; embedding: from token ids and output
    gradients; module: the module runs again for each example (norms and the like); autograd: from the
    parameter's own gradient, one example at a time.
    """

    module: str
    kind: UseKind


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter whose gradient is sketched, with every use of it (tied weights have several)."""

    name: str
    shape: tuple[int, ...]
    uses: tuple[Use, ...]


def block_seed(seed: int, name: str) -> int:
    """The 64-bit seed of a parameter's sketch, from the seed of all sketches and the parameter's name."""
    text = b"rapidin block\0" + (seed % 2**64).to_bytes(8, "little") + name.encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(O, I) of a parameter's gradient as a matrix: the first axis, and the product of the rest."""
    return (shape[0] if shape else 1), prod(shape[1:])


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the glob patterns; a pattern without * ? [ may match anywhere
    in the name."""
    return any(fnmatchcase(name, p if set(p) & set("*?[") else f"*{p}*") for p in patterns)


def find_targets(
    model: nn.Module,
    *,
    trained: Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    convolutions: bool = False,
) -> list[Target]:
    """The parameters that count.

    trained: names of the parameters that an adapter trains; by default exactly these count. Without an
    adapter the weights of all linear layers but the output head count, and with `convolutions` those of
    convolutions. include: patterns of the parameters
    that count instead, out of all; exclude: patterns of parameters that do not count.

    Raises UserError if a pattern matches no parameter, or no parameter is left.
    """
    shapes, uses = _uses(model)
    for pattern in (*include, *exclude):
        if not any(matches(name, [pattern]) for name in shapes):
            raise UserError(
                f"no parameter's name matches the pattern '{pattern}'",
                f"the names look like '{next(iter(shapes), '(none)')}'",
            )
    if include:
        chosen = [name for name in shapes if matches(name, include)]
    elif trained is not None:
        counting = set(trained)
        chosen = [name for name in shapes if name in counting]
    else:
        head = _output_head(model)
        kinds = ("linear", "conv1d", *(("convolution",) if convolutions else ()))
        chosen = [
            name
            for name in shapes
            if any(use.kind in kinds and use.module != head for use in uses[name])
            and not any(use.kind == "embedding" for use in uses[name])
        ]
    chosen = [name for name in chosen if not matches(name, exclude)]
    if not chosen:
        raise UserError("no parameter is left to take gradients of", "change --include or --exclude")
    return [Target(name, shapes[name], tuple(uses[name])) for name in chosen]


def coverage(model: nn.Module, targets: Sequence[Target]) -> tuple[int, int]:
    """(number of elements of the parameters that count, number of elements of all parameters)."""
    counted = sum(prod(t.shape) for t in targets)
    return counted, sum(prod(shape) for shape in _uses(model)[0].values())


def _output_head(model: nn.Module) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return (
        next((name for name, module in model.named_modules() if module is head), None)
        if head is not None
        else None
    )


def _uses(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Use]]]:
    """Shape and uses of each parameter, under the first name that the model gives it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names.values(), ())
    uses: dict[str, list[Use]] = {name: [] for name in names.values()}
    # An adapter's learnt prompts are made once for the whole batch, or read from the weight itself.
    prompts = {
        id(module)
        for encoder in getattr(model, "prompt_encoder", {}).values()
        for module in encoder.modules()
    }
    for module_name, module in model.named_modules():
        for role, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names[id(parameter)]
            kind, shape = _use_kind(module, role, tuple(parameter.shape))
            if id(module) in prompts:
                kind, shape = "autograd", tuple(parameter.shape)
            shapes[name] = shape
            use = Use(module_name, kind)
            if use not in uses[name]:
                uses[name].append(use)
    return shapes, uses


def _use_kind(module: nn.Module, role: str, shape: tuple[int, ...]) -> tuple[UseKind, tuple[int, ...]]:
    """How a parameter's gradient is obtained from a module, where it is called `role`; and its shape."""
    from torch import nn

    from rapidin.gradients.convolution import is_convolution

    if isinstance(module, nn.Linear) and role in ("weight", "bias"):
        # A quantised weight is packed; its gradient has the layer's own shape.
        return ("linear", (module.out_features, module.in_features)) if role == "weight" else ("bias", shape)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and role in ("weight", "bias"):
        return ("conv1d" if role == "weight" else "bias"), shape
    if is_convolution(module) and role in ("weight", "bias"):
        return ("convolution" if role == "weight" else "bias"), shape
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return "embedding", shape
    if len(shape) == 1 and not any(True for _ in module.children()) and _one_input(module):
        return "module", shape
    return "autograd", shape


def _one_input(module: nn.Module) -> bool:
    """Whether the module is called with one tensor, as norms are."""
    import inspect

    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return len(required) == 1 and not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
