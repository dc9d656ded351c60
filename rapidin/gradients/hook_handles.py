"""Hooks of modules that are registered for one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import nn


class Hooks(Protocol):
    """What is called before and after a module. with_ids: whether `expand_ids` is."""

    @property
    def with_ids(self) -> bool: ...

    def expand_ids(self, module: nn.Module, args: Any, kwargs: Any) -> Any: ...

    def forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any: ...


@contextlib.contextmanager
def registered(
    modules: Mapping[str, nn.Module], hooks: Mapping[str, Hooks], begins: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Inside the block modules have these hooks, by their names. begins: what is called before others."""
    handles: list[Any] = []
    try:
        for name, begin in begins.items():
            handles.append(modules[name].register_forward_pre_hook(begin, with_kwargs=True))
        for name, hook in hooks.items():
            if hook.with_ids:
                handles.append(modules[name].register_forward_pre_hook(hook.expand_ids, with_kwargs=True))
            handles.append(modules[name].register_forward_hook(hook.forward, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
