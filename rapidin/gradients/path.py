"""The path from the untuned to the tuned weights of a model, and points on it.

A finished model has learnt its training data, so the gradients that are left show what it knows rather than
where it learnt it. Gradients are therefore taken at ``theta(a) = base + a (tuned - base)``, 0 <= a <= 1.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.errors import UserError
from rapidin.gradients import fsdp
from rapidin.gradients.adapters import active_adapters

# The point if the untuned state is known; measured on poison and on retrained models
# (docs/measured/results.md).
DEFAULT_AT = 0.5

End = tuple[nn.Parameter, Tensor | None, Tensor]


@dataclass(frozen=True)
class WeightPath:
    """The straight line from the untuned to the tuned weights.

    ends: for each parameter that tuning changed, the parameter, its untuned value (None for zeros) and its
    tuned value. unknown: why the untuned state is unknown, if there are no ends. apart: in words, what has
    no untuned value and stays as it is; "" if nothing does.
    """

    ends: Sequence[End] = ()
    unknown: str = "no base model is given"
    apart: str = ""

    def check(self, points: Sequence[float]) -> None:
        """Raises UserError if a point is not on the path, or is named twice."""
        for at in points:
            if not 0.0 <= at <= 1.0:
                raise UserError(f"`at` {at:g} is not between 0 (base) and 1 (tuned)")
            if at != 1.0 and not self.ends:
                raise UserError(f"gradients at {at:g} need the untuned state: {self.unknown}", "use `at=1`")
        if len(set(points)) != len(points):
            raise UserError(f"`at` names a point twice: {', '.join(f'{at:g}' for at in points)}")

    @contextlib.contextmanager
    def at(self, point: float) -> Iterator[None]:
        """Inside the block the model has the weights of `point`, and the tuned ones after it."""
        if point == 1.0:
            yield
            return
        try:
            for parameter, untuned, tuned in self.ends:
                if untuned is None:
                    _set(parameter, tuned * point)
                else:
                    _set(parameter, torch.lerp(untuned.to(tuned.device, tuned.dtype), tuned, point))
            yield
        finally:
            for parameter, _, tuned in self.ends:
                _set(parameter, tuned)


def _set(parameter: Any, value: Tensor) -> None:
    if fsdp.is_sharded(parameter):
        parameter.to_local().copy_(value)  # in place: the weight is gathered from this memory
    else:
        parameter.data = value


def adapter_path(model: Any) -> WeightPath:
    """The path of a LoRA adapter: lora_B from zero, modules_to_save from the modules they replaced, DoRA's
    magnitudes from the norms of the weights that they scale."""
    active = active_adapters(model)
    unknown = next((why for name in active if (why := _untuned_unknown(model.peft_config[name]))), None)
    if unknown is not None:
        return WeightPath(unknown=unknown)
    ends: list[End] = []
    from_zero = [f".{kind}.{name}" for kind in ("lora_B", "lora_embedding_B") for name in active]
    for name, p in model.named_parameters():
        if any(f"{mark}." in f"{name}." for mark in from_zero):
            ends.append((p, None, p.data))
    for module in model.modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None) or {}
        for adapter in active:
            if adapter in magnitudes:
                magnitude = magnitudes[adapter].weight
                ends.append((magnitude, _untuned_magnitude(module, adapter), magnitude.data))
        if type(module).__name__ != "ModulesToSaveWrapper":
            continue
        for adapter in active:
            if adapter in module.modules_to_save:
                original = dict(module.original_module.named_parameters())
                for name, p in module.modules_to_save[adapter].named_parameters():
                    ends.append((p, original[name].data, p.data))
    return WeightPath(ends)


def _untuned_magnitude(layer: Any, adapter: str) -> Tensor:
    """DoRA's magnitudes of a layer as peft makes them for a new adapter, whose lora_B is zero."""
    magnitude = copy.deepcopy(layer.lora_magnitude_vector[adapter])
    if adapter in layer.lora_A:
        low, high = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        low, high = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    magnitude.update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=low.detach(),
        lora_B=torch.zeros_like(high),
        scaling=layer.scaling[adapter],
    )
    untuned: Tensor = magnitude.weight.detach()
    return untuned


def base_path(model: Any, base: Any, name: str, base_name: str) -> WeightPath:
    """The path from a base model to the model that was tuned from it in full.

    Tuning may have added tokens to the vocabulary, or padded its tables: rows that the base does not have
    stay as they are. name, base_name: of the two, for the message. Raises UserError if other parameters
    differ.
    """
    untuned = dict(base.named_parameters(remove_duplicate=False))  # tuning may have untied them
    tokens, base_tokens = (len(each.get_input_embeddings().weight) for each in (model, base))
    ends: list[End] = []
    grown: list[str] = []
    for key, p in model.named_parameters():
        value = untuned[key].data if key in untuned else None
        if value is not None and value.shape != p.shape and tokens != base_tokens:
            rows = (*p.shape[:1], *value.shape[:1])
            if rows == (tokens, base_tokens) and p.shape[1:] == value.shape[1:] and not p.is_meta:
                shared = min(rows)
                value = torch.cat([value[:shared].to(p.device, p.dtype), p.data[shared:]])
                grown.append(key)
        if value is None or value.shape != p.shape:
            in_base = "missing" if value is None else f"of shape {list(value.shape)}"
            raise UserError(
                f"'{base_name}' is not what '{name}' was tuned from: '{key}' is {in_base} in the base, "
                f"of shape {list(p.shape)} in the tuned model"
            )
        ends.append((p, value, p.data))
    apart = ""
    if grown:
        apart = (
            f"the base model has {base_tokens:,} tokens and the tuned model {tokens:,}: of "
            f"{' and '.join(grown)} only the first {min(tokens, base_tokens):,} rows have a base state"
        )
    return WeightPath(ends, apart=apart)


def _untuned_unknown(config: Any) -> str | None:
    """Why an adapter's state before tuning is unknown; None if it is known."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"that of a {kind} adapter is not known"
    start = getattr(config, "init_lora_weights", True)
    if start not in (True, "gaussian", "eva"):  # these start lora_B at zero
        return f"that of a LoRA adapter initialised by '{start}' is not known"
    if getattr(config, "bias", "none") != "none":
        return "this adapter trained biases, whose initial values it did not keep"
    if getattr(config, "trainable_token_indices", None):
        return "this adapter trained token rows, whose initial values it did not keep"
    return None
