"""Batches of texts and the loss of each example."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.gradients.settings import LossKind
from rapidin.ops.transfer import upload

_IGNORED = -100  # the label of a token whose loss does not count


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts padded on the right.

    ids: [B, T] int64, 0 for padding, to which the model does not attend; mask: [B, T] bool, real tokens;
    target: [B, T] bool, tokens whose loss counts; first: the first position that predicts a target token of
    some text, 0 if none does.
    """

    ids: Tensor
    mask: Tensor
    target: Tensor
    first: int

    @staticmethod
    def of(
        texts: Sequence[tuple[Sequence[int], Sequence[bool]]], device: torch.device | str = "cpu"
    ) -> Batch:
        """The batch of (token ids, target flags) pairs."""
        length = max(len(ids) for ids, _ in texts)
        cpu, device = torch.device("cpu"), torch.device(device)
        ids = torch.zeros(len(texts), length, dtype=torch.int64, device=cpu)
        mask = torch.zeros(len(texts), length, dtype=torch.bool, device=cpu)
        target = torch.zeros(len(texts), length, dtype=torch.bool, device=cpu)
        for row, (tokens, flags) in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device=cpu)
            mask[row, : len(tokens)] = True
            target[row, : len(flags)] = torch.tensor(flags, dtype=torch.bool, device=cpu)
        # Found on the CPU, since reading it from a GPU would wait for it.
        predicted = target[:, 1:].any(0).nonzero()
        first = int(predicted[0]) if len(predicted) else 0
        return Batch(upload(ids, device), upload(mask, device), upload(target, device), first)


def example_losses(model: nn.Module, batch: Batch, kind: LossKind = "mean") -> Tensor:
    """Each example's loss over its target tokens: [B] float32.

    Position t's logits predict token t + 1; ``mean`` divides by the example's own number of target tokens.
    """
    # Logits before the first target token are never needed, and the output head is a large part of a small
    # model.
    logits, following, target = _predictions(model, batch, batch.first, use_cache=cache_use(model))
    token_loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view(
        target.shape
    )
    # where, not a product: a token that does not count must not contribute its NaN.
    loss = torch.where(target, token_loss, token_loss.new_zeros(())).sum(1)
    return loss / target.sum(1).clamp(min=1) if kind == "mean" else loss


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss over all target tokens of a batch, as trainers minimise it: a float32 scalar."""
    # None leaves the cache of keys to the model's config: with dropout, GPT-2's gradients depend on it.
    logits, following, target = _predictions(model, batch, 0, use_cache=None)
    labels = following.masked_fill(~target, _IGNORED)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)


def _predictions(
    model: nn.Module, batch: Batch, first: int, use_cache: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the positions from `first` to the last but one: the logits [B, P, V] float32, the id of the token
    after each [B, P], and whether that token is a target [B, P]."""
    kept = batch.ids.shape[1] - first
    extra: dict[str, Any] = {"logits_to_keep": kept} if takes(model, "logits_to_keep") else {}
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=use_cache, **extra).logits
    logits = logits[:, -kept:-1] if kept > 1 else logits[:, :0]
    return logits.float(), batch.ids[:, first + 1 :], batch.target[:, first + 1 :]


def cache_use(model: nn.Module) -> bool | None:
    """`use_cache` of a forward pass that needs no keys and values of an earlier one.

    False, but None (as the model's config says) where layers take those of another layer (Gemma 3n):
    transformers 4.57 leaves them out without a cache, and the loss is another.
    """
    text: Any = getattr(_inner(model), "config", None)
    text = text.get_text_config() if hasattr(text, "get_text_config") else text
    return None if getattr(text, "num_kv_shared_layers", None) else False


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward method of a model, or of the model in an adapter, has an argument of this name."""
    return name in inspect.signature(_inner(model).forward).parameters


def _inner(model: Any) -> Any:
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
