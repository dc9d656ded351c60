"""The state of a model while gradients are computed: the parameters that require one, and an implementation
of routed experts whose products can be tracked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from rapidin.tasks.forward import evaluation_mode

_IMPLEMENTATION = "_experts_implementation_internal"  # of transformers' configs, from version 5 on
_TRACKED = (None, "eager", "grouped_mm")


@contextlib.contextmanager
def tracked_experts(model: nn.Module) -> Iterator[None]:
    """Inside the block, experts are computed one after another or by sorted tokens, not by a fused kernel."""
    # An adapter on the stacked weights changes the weight of each expert, so experts are computed one by one.
    adapted = any(hasattr(module, "parameter_name") for module in model.modules())
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, _IMPLEMENTATION):
            configs[id(config)] = config
    before = [(config, getattr(config, _IMPLEMENTATION)) for config in configs.values()]
    try:
        for config, name in before:
            if adapted or name not in _TRACKED:
                setattr(config, _IMPLEMENTATION, "eager")
        yield
    finally:
        for config, name in before:
            setattr(config, _IMPLEMENTATION, name)


@contextlib.contextmanager
def gradients_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block only these parameters require a gradient, and no parameter has one yet; the model is
    in evaluation mode, and its experts can be tracked."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    needed = {id(p) for p in parameters}
    with evaluation_mode(model), tracked_experts(model):
        try:
            for p, _, _ in before:
                p.requires_grad_(id(p) in needed and p.is_floating_point())
                p.grad = None
            yield
        finally:
            for p, required, grad in before:
                p.requires_grad_(required)
                p.grad = grad
