"""What happens while a model reads its texts, by torch's own hooks: nothing of the project is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def at_pass(number: int, act: Callable[[], Any] = lambda: None) -> Iterator[list[int]]:
    """Inside the block `act` is called when a language model begins its pass `number`; gives the numbers of
    the passes that have begun, which count from 0."""
    from transformers import GenerationMixin

    begun: list[int] = []

    def hook(module: Any, _: Any) -> None:
        if isinstance(module, GenerationMixin):  # the whole model, in its adapter or without one
            begun.append(len(begun))
            if begun[-1] == number:
                act()

    handle = register_module_forward_pre_hook(hook)
    try:
        yield begun
    finally:
        handle.remove()
