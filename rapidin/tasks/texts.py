"""Texts encoded for models that read whole texts, with the tokenizer's special tokens, and padded batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rapidin.data.chats import ChatTemplate
from rapidin.data.encoding import Status, unknown_token
from rapidin.ops.transfer import upload
from rapidin.tasks.names import LossKind

IGNORED = -100  # the label of a token whose loss does not count
Inputs = dict[str, list[int]]  # a tokenizer's outputs for one text, by their names


@dataclass(frozen=True, slots=True)
class Text:
    """A text's inputs, why it cannot be used, and whether it was cut."""

    inputs: Inputs
    status: Status
    truncated: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.inputs["input_ids"])


class TextEncoder:
    """Encodes one text or two with the special tokens that the tokenizer itself puts around them.

    Texts of more than max_length tokens are cut as the tokenizer cuts them ("truncate") or get
    Status.TOO_LONG ("skip"). pad: the id that fills up shorter texts of a batch; date: what a chat template
    writes as the present; rows: number of tokens that the model has an embedding of, None if that is not
    known.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: Any,
        *,
        max_length: int,
        too_long: str,
        eos: bool,
        date: str | None = None,
        rows: int | None = None,
    ) -> None:
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.chats, self.rows = ChatTemplate(tokenizer, date), rows
        self.eos = tokenizer.eos_token if eos else None
        pads = (getattr(config, "pad_token_id", None), tokenizer.pad_token_id, 0)
        self.pad = next(int(pad) for pad in pads if pad is not None)

    def dated(self, date: str | None) -> TextEncoder:
        """The same encoder with another date."""
        other = copy.copy(self)
        other.chats = ChatTemplate(self.tokenizer, date)
        return other

    def __call__(self, text: str, second: str | None = None, *, special: bool = True) -> Text:
        """special: whether the tokenizer adds its special tokens."""
        if not text and not second:
            return Text({"input_ids": []}, Status.EMPTY)
        encoded = self.tokenizer(text, second, add_special_tokens=special, verbose=False)
        truncated = len(encoded["input_ids"]) > self.max_length
        if truncated:
            if self.too_long == "skip":
                return Text({"input_ids": list(encoded["input_ids"])}, Status.TOO_LONG)
            encoded = self.tokenizer(
                text,
                second,
                add_special_tokens=special,
                truncation=True,
                max_length=self.max_length,
                verbose=False,
            )
        ids = encoded["input_ids"]
        if self.rows is not None and ids and max(ids) >= self.rows:
            raise unknown_token(self.tokenizer, max(ids), self.rows)
        return Text({name: list(value) for name, value in encoded.items()}, Status.OK, truncated)

    def padded(
        self, texts: Sequence[Mapping[str, Sequence[int]]], device: torch.device, repeats: int = 1
    ) -> dict[str, Tensor]:
        """Texts padded on the right, [B, T] by the names of the model's inputs.

        repeats: rows of the model's inputs for each text. If there are several rows, T never equals their
        number, so that the size of an axis shows which one it is.
        """
        longest = max(len(text["input_ids"]) for text in texts)
        longest += 1 if longest == len(texts) * repeats > 1 and longest < self.max_length else 0
        fills = {"input_ids": self.pad}
        return {
            name: upload(padded([text[name] for text in texts], fills.get(name, 0), longest), device)
            for name in texts[0]
        }


def label_losses(logits: Tensor, labels: Tensor, rows: int, kind: LossKind) -> Tensor:
    """The mean or the sum of the cross-entropies of each example's labels: [rows] float32.

    logits: [B, T, V], labels: [B, T] int64, `IGNORED` for none, with B = rows, or any multiple of it for
    examples of several parts.
    """
    of_tokens = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(rows, -1)
    losses = of_tokens.sum(1)
    return losses / (labels != IGNORED).view(rows, -1).sum(1) if kind == "mean" else losses


def padded(rows: Sequence[Sequence[int]], fill: int, length: int = 0) -> Tensor:
    """Lists of numbers as one tensor on the CPU, [B, T] int64, filled up on the right; length: at least T."""
    out = torch.full((len(rows), max(length, *map(len, rows))), fill, dtype=torch.int64, device="cpu")
    for row, values in enumerate(rows):
        out[row, : len(values)] = torch.tensor(values, dtype=torch.int64, device="cpu")
    return out
