"""The parameters that count, and how the gradient of each is obtained.

A parameter's gradient is treated as a matrix ``[shape[0], product of the rest]`` (a vector of n is
``[n, 1]``), as the parameter is stored. A *block* is one parameter's part of a sketch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from rapidin.errors import UserError

if TYPE_CHECKING:
    from torch import nn

UseKind = Literal["linear", "conv1d", "bias", "embedding", "module", "autograd"]


@dataclass(frozen=True, slots=True)
class Use:
    """A module that uses a parameter, and how the gradient is obtained there.

    linear, conv1d, bias: from the module's inputs and output gradients; embedding: from token ids and output
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


def with_autograd(targets: Sequence[Target], names: Collection[str]) -> list[Target]:
    """The targets, of which those with these names have their gradient from autograd itself."""
    return [
        replace(target, uses=(Use(target.uses[0].module, "autograd"),)) if target.name in names else target
        for target in targets
    ]


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
) -> list[Target]:
    """The parameters that count.

    trained: names of the parameters that an adapter trains; by default exactly these count. Without an
    adapter the weights of all linear layers but the output head count. include: patterns of the parameters
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
        head = output_head(model)
        chosen = [
            name
            for name in shapes
            if any(use.kind in ("linear", "conv1d") and use.module != head for use in uses[name])
            and not any(use.kind == "embedding" for use in uses[name])
        ]
    chosen = [name for name in chosen if not matches(name, exclude)]
    if not chosen:
        raise UserError("no parameter is left to take gradients of", "change --include or --exclude")
    return [Target(name, shapes[name], tuple(uses[name])) for name in chosen]


def all_parameters(model: nn.Module) -> list[Target]:
    """Every parameter of a model, as if it counted."""
    shapes, uses = _uses(model)
    return [Target(name, shapes[name], tuple(uses[name])) for name in shapes]


def output_head(model: nn.Module) -> str | None:
    """The name of the module that makes the logits; None if the model does not tell."""
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

    if _is_linear(module) and role in ("weight", "bias"):
        # A quantised weight is packed; its gradient has the layer's own shape.
        sizes: Any = (module.out_features, module.in_features)
        return ("linear", sizes) if role == "weight" else ("bias", shape)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and role in ("weight", "bias"):
        return ("conv1d" if role == "weight" else "bias"), shape
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return "embedding", shape
    if len(shape) == 1 and not any(True for _ in module.children()):
        return "module", shape
    return "autograd", shape


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, as far as its type and sizes tell; what its forward method makes of
    the weight is for `rapidin.gradients.check` to find out."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return True
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return tuple(getattr(getattr(module, "weight", None), "shape", ())) == sizes
