"""Calls of a model: in evaluation mode, and with the arguments that its forward method takes."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rapidin import distributed, ops


def cache_use(model: nn.Module) -> bool | None:
    """The argument `use_cache` for a forward pass that uses no keys and values of an earlier one.

    False, except for models whose layers use the keys and values of another layer (Gemma 3n): there None, so
    that the model's config decides, since without a cache transformers 4.57 computes another loss.
    """
    text: Any = getattr(inner_model(model), "config", None)
    text = text.get_text_config() if hasattr(text, "get_text_config") else text
    return None if getattr(text, "num_kv_shared_layers", None) else False


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward method of a model, or of the model in an adapter, has an argument of this name."""
    return name in inspect.signature(inner_model(model).forward).parameters


def inner_model(model: Any) -> Any:
    """The model that an adapter may wrap."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode; every module's mode is restored after it."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device that takes a model's inputs."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@dataclass(frozen=True)
class Listener:
    """Follows what a model writes.

    wrote: called with the ids of all tokens that are written so far, after each; stopped: whether the model
    is to stop before its end.
    """

    wrote: Callable[[Sequence[int]], None]
    stopped: Callable[[], bool]


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, and in its thread alone, the listener follows what models write to single texts."""
    before = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(before)


class _Following:
    """Gives a listener the tokens of a text, as transformers' stopping criteria and streamers are called."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._written: list[int] | None = None  # None until the prompt, which comes first, has been seen

    def put(self, ids: torch.Tensor) -> None:
        if self._written is None:
            self._written = []
            return
        self._written += ids.flatten().tolist()
        self._listener.wrote(tuple(self._written))

    def end(self) -> None:
        pass

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stop = self._listener.stopped()
        return torch.full((len(ids),), stop, dtype=torch.bool, device=ids.device)


def greedy(model: Any, tokenizer: Any, **inputs: Any) -> list[list[int]]:
    """The token ids that a model generates greedily for each text of a batch, after those of its input if it
    continues them, and up to its end token."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    listener = _LISTENER.get()
    if listener is not None and len(inputs["input_ids"]) == 1:
        following = _Following(listener)
        inputs |= {"streamer": following, "stopping_criteria": [following]}
    with torch.no_grad(), evaluation_mode(model), ops.faster_linear(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = partial(model.generate, do_sample=False, num_beams=1, pad_token_id=pad, **inputs)
        written: list[list[int]] = distributed.world().collective(run).tolist()
        return written
