"""The parameters that count, and how the gradient of each is obtained.

A parameter's gradient is treated as a matrix ``[shape[0], product of the rest]`` (a vector of n is
``[n, 1]``), as the parameter is stored. Routed experts are stored as a stack of matrices ``[E, O, I]``.
A *block* is one parameter's part of a sketch.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from rapidin.errors import UserError

if TYPE_CHECKING:
    from torch import nn

UseKind = Literal["linear", "conv1d", "convolution", "bias", "embedding", "module", "product", "autograd"]


@dataclass(frozen=True, slots=True)
class Use:
    """A module that uses a parameter, and how the gradient is obtained there.

    linear, conv1d (of transformers, which is linear), convolution, bias: from the module's inputs and output
    gradients; embedding: from token ids and output gradients; module: the module runs again for each example
    (norms and the like); product: from the inputs and output gradients of each product with the parameter or
    a part of it, wherever that is; autograd: from the parameter's own gradient, one example at a time.
    """

    module: str
    kind: UseKind


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter whose gradient is sketched, with every use of it (tied weights have several).

    stack: the number of matrices that it is a stack of, as routed experts are; 0 if it is one matrix.
    """

    name: str
    shape: tuple[int, ...]
    uses: tuple[Use, ...]
    stack: int = 0

    @property
    def matrix(self) -> tuple[int, int]:
        """(O, I) of the gradient as a matrix, or of each matrix of the stack."""
        if not self.stack:
            return matrix_shape(self.shape)
        return self.shape[-2] // (self.stack if len(self.shape) == 2 else 1), self.shape[-1]


def with_autograd(targets: Sequence[Target], names: Collection[str]) -> list[Target]:
    """The targets, of which those with these names have their gradient from autograd itself."""
    return [
        replace(target, uses=(Use(target.uses[0].module, "autograd"),)) if target.name in names else target
        for target in targets
    ]


def role_of(name: str) -> str:
    """A name without the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


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


def exact_pattern(name: str) -> str:
    """The pattern that matches this parameter's name alone."""
    return f"[{name[0]}]{glob.escape(name[1:])}"  # without brackets it would match anywhere in a name


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
    adapter the weights of all linear layers but the output head count, routed experts and routers among
    them; of a model that reads images or sounds too, those that a text reaches. include: patterns of the
    parameters that count instead, out of all; exclude: patterns of parameters that do not count.

    Raises UserError if a pattern matches no parameter, or no parameter is left.
    """
    shapes, uses = _uses(model)
    stacks, weights = _stacks(model, uses)
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
        kinds = ("linear", "conv1d", *(("convolution",) if convolutions else ()))
        chosen = [
            name
            for name in shapes
            if any(
                (use.kind in kinds or (use.kind == "product" and name in weights)) and use.module != head
                for use in uses[name]
            )
            and not any(use.kind == "embedding" for use in uses[name])
        ]
    others = () if include else _other_inputs(model)
    chosen = [name for name in chosen if not matches(name, exclude) and not name.startswith(others)]
    if not chosen:
        from rapidin.gradients.quantized import is_quantized

        if any(is_quantized(module) for module in model.modules()):
            raise UserError(
                "no parameter is left to take gradients of: the quantized weights of this model are none of "
                "its parameters",
                "give an `adapter` on them, or choose other parameters with `include`",
            )
        raise UserError("no parameter is left to take gradients of", "change `include` or `exclude`")
    return [Target(name, shapes[name], tuple(uses[name]), stacks.get(name, 0)) for name in chosen]


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


def _other_inputs(model: Any) -> tuple[str, ...]:
    """Of a model that reads images or sounds beside texts, how the names of the parameters start that a text
    does not reach."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(inner, "config", None)
    nested = hasattr(config, "get_text_config") and config.get_text_config() is not config
    if not nested or getattr(config, "is_encoder_decoder", False):
        return ()
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    above = {id(m): name for name, m in model.named_modules()}
    prefix = above.get(id(decoder), "")
    # Each module on the way down to the decoder has its other children: towers and projectors; and the head.
    head, others = output_head(model), []
    parts = prefix.split(".") if prefix else []
    for depth in range(len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        for child, _ in module.named_children():
            name = ".".join([*parts[:depth], child])
            if child != parts[depth] and name != head:
                others.append(f"{name}.")
    return tuple(others)


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

    if _is_linear(module) and role in ("weight", "bias"):
        if role == "bias":
            return "bias", shape
        # A quantized weight is packed: its gradient has the layer's own shape. Of a plain one the weight
        # knows better: peft makes layers of other sizes than their weight, which it ties to another's.
        weight: Any = module.weight
        plain = len(shape) == 2 and weight.is_floating_point()
        sizes: Any = (module.out_features, module.in_features)
        return "linear", shape if plain else sizes
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and role in ("weight", "bias"):
        return ("conv1d" if role == "weight" else "bias"), shape
    if is_convolution(module) and role in ("weight", "bias"):
        return ("convolution" if role == "weight" else "bias"), shape
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return "embedding", shape
    if len(shape) == 1 and not any(True for _ in module.children()):
        return "module", shape
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd, nn.Bilinear)):
        return "autograd", shape
    return ("product" if 1 <= len(shape) <= 3 else "autograd"), shape


_NO_PRODUCT = re.compile("Norm|Embedding|Conv")  # classes whose weight of two axes is no linear map's
_COUNTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")


def _stacks(model: nn.Module, uses: Mapping[str, Sequence[Use]]) -> tuple[dict[str, int], set[str]]:
    """(number of matrices of each parameter that is a stack, names of the weights among those of products).

    Experts are stored as [E, O, I], or one after another as [E * O, I]. Biases, tables and constants may
    have as many axes; a weight of two axes is told by its name, or by the number of its module's experts.
    """
    modules = dict(model.named_modules())
    stacks: dict[str, int] = {}
    weights: set[str] = set()
    for name, of_name in uses.items():
        products = [use for use in of_name if use.kind == "product"]
        if not products:
            continue
        owner, _, role = products[0].module, "", name.rpartition(".")[2]
        module = modules[owner]
        shape = tuple(getattr(module, role).shape) if hasattr(module, role) else ()
        if len(shape) == 3:
            stacks[name] = shape[0]
            if min(shape[1:]) > 1:
                weights.add(name)
            continue
        if len(shape) != 2:
            continue
        number = next((n for key in _COUNTS if isinstance(n := getattr(module, key, None), int)), 0)
        if number > 1 and shape[0] % number == 0 and shape[0] > number and min(shape) > 1:
            stacks[name] = number
            weights.add(name)
        elif role == "weight" and min(shape) > 1 and not _NO_PRODUCT.search(type(module).__name__):
            weights.add(name)
    return stacks, weights


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, as far as its type and sizes tell; what its forward method makes of
    the weight is for `rapidin.gradients.check` to find out."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return True
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return tuple(getattr(getattr(module, "weight", None), "shape", ())) == sizes
