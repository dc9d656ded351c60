"""How transformers computes routed experts: by a function whose products can be tracked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_IMPLEMENTATION = "_experts_implementation_internal"  # of transformers' configs, from version 5 on
_TRACKED = (None, "eager", "grouped_mm")


@contextlib.contextmanager
def tracked_experts(model: nn.Module) -> Iterator[None]:
    """Inside the block, experts are computed one after another or sorted, not by a fused kernel."""
    # An adapter on the stacked weights makes another weight of each expert's, so these come one by one.
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
