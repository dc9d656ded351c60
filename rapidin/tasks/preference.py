"""Preferences on which a causal language model is tuned: pairs of answers (DPO), or labelled answers
(KTO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.generations import Generation
from rapidin.data.records import Record
from rapidin.errors import UserError, short
from rapidin.ops.transfer import upload
from rapidin.tasks.causal import Causal, TokenBatch, example_losses
from rapidin.tasks.chats import encoded
from rapidin.tasks.names import forms_of
from rapidin.tasks.task import Example, ReadText, Task

_NOTHING = Encoded([0], [False], Status.NO_TARGET)  # the second text of what is no pair


class Preferences(Task):
    """What DPO and KTO share: the log-probability of an answer minus that under the reference model.

    encoder: of causal texts; beta: of the loss. The log-probability of an answer is the sum over its tokens:
    in a chat, over those that follow the prompt, or over the last turn if there is no prompt. The reference
    is the model before it was tuned: the base model, or the model without its adapter. Its log-probabilities
    are constants of an example. A query may also be a prompt, with or without a completion, as for a causal
    model: then its loss is that of the completion.
    """

    needs_causal = True
    needs_reference = True
    parts = 1  # texts of an example

    def __init__(self, encoder: Encoder, beta: float) -> None:
        self.encoder, self.beta = encoder, beta

    def answers(self, record: Record) -> list[Any]:
        """The answers of a record. Raises UserError for a record that is not one of the task."""
        raise NotImplementedError

    def sign(self, record: Record) -> float:
        """Whether training makes the first answer more likely (1) or less likely (-1)."""
        return 1.0

    def from_margins(self, margins: Tensor, sign: Tensor) -> Tensor:
        """The losses [B] from the log-probabilities minus those under the reference, [B, parts]."""
        raise NotImplementedError

    def example(self, record: Record) -> Example:
        texts = [encoded(self.encoder, record, each) for each in self.answers(record)]
        return self.of_texts(texts, self.sign(record))

    def of_texts(self, texts: Sequence[Encoded], sign: float, *, plain: bool = False) -> Example:
        """The example of its encoded texts. plain: it has the loss of a causal text instead."""
        wrong = [text.status for text in texts if text.status != Status.OK and text is not _NOTHING]
        return Example(
            {"texts": [(text.ids, text.target) for text in texts], "sign": sign, "plain": plain},
            self.parts * max(text.length for text in texts),
            wrong[0] if wrong else Status.OK,
            any(text.truncated for text in texts),
        )

    def batch(self, examples: Sequence[Example], device: torch.device) -> TokenBatch:
        texts = [text for each in examples for text in each.inputs["texts"]]
        made = TokenBatch.of(texts, device, self.parts)
        unknown = (0.0,) * self.parts
        columns = [
            [each.reference or unknown for each in examples],
            [[each.inputs["sign"], each.inputs["plain"]] for each in examples],
        ]
        reference, flags = (
            upload(torch.tensor(column, dtype=torch.float32, device="cpu"), device) for column in columns
        )
        return replace(made, reference=reference, sign=flags[:, 0], plain=flags[:, 1] > 0)

    def reference(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        return -example_losses(model, batch, "sum").view(-1, self.parts)

    def losses(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        assert batch.reference is not None
        assert batch.sign is not None
        assert batch.plain is not None
        of_texts = example_losses(model, batch, "sum").view(-1, self.parts)
        losses = self.from_margins(-of_texts - batch.reference, batch.sign)
        tokens = batch.target[:, 1:].sum(1).view(-1, self.parts)[:, 0].clamp(min=1)
        return torch.where(batch.plain, of_texts[:, 0] / tokens, losses)

    def generation(self, model: nn.Module, record: Record, max_new_tokens: int) -> Generation:
        if self.is_complete(record):
            return super().generation(model, record, max_new_tokens)
        made = Causal(self.encoder).generation(model, record, max_new_tokens)
        assert isinstance(made.encoded, Encoded)
        if made.encoded.status != Status.OK:
            return made
        texts = [made.encoded, *[_NOTHING] * (self.parts - 1)]
        return replace(made, encoded=self.of_texts(texts, 1.0, plain=True))

    def texts(self, example: Example) -> list[ReadText]:
        names = ("chosen", "rejected") if self.parts == 2 else ("",)
        return [ReadText(name, *text) for name, text in zip(names, example.inputs["texts"], strict=True)]

    def is_complete(self, record: Record) -> bool:
        """Whether a record is an example of the task, not a text of a causal model."""
        assert self.forms is not None
        return self.forms.of(record) is not None

    def answer(self, model: nn.Module, prompt: str, max_new_tokens: int) -> Generation:
        return Causal(self.encoder).answer(model, prompt, max_new_tokens)

    def check(self, record: Record) -> None:
        if isinstance(record.get("chosen") or record.get("completion"), list):
            self.example(record)  # a template may refuse a chat

    def filler(self) -> Example:
        return self.of_texts([Encoded([0, 0], [False, True], Status.OK)] * self.parts, 1.0)


class Preference(Preferences):
    """Pairs of answers: ``-log sigmoid(beta (m(chosen) - m(rejected)))``, m the log-probability minus that
    under the reference (DPO, Rafailov et al., NeurIPS 2023).

    A pair has one loss and one gradient. Its two texts are its parts in the batch, the chosen one first.
    """

    name = "preference"
    forms = forms_of("preference")
    parts = 2

    def answers(self, record: Record) -> list[Any]:
        return [record["chosen"], record["rejected"]]

    def from_margins(self, margins: Tensor, sign: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * (margins[:, 0] - margins[:, 1]))


class Verdicts(Preferences):
    """Labelled answers: ``1 - sigmoid(beta m)`` for a desirable answer, ``1 - sigmoid(-beta m)`` for another,
    m the log-probability minus that under the reference (KTO, Ethayarajh et al., ICML 2024).

    In KTO training, an estimate of the KL divergence from the reference is subtracted from m. It is computed
    from the other examples of a batch, has no gradient, and is at least 0. Here each example is considered
    alone, so it is 0.
    """

    name = "kto"
    forms = forms_of("kto")

    def answers(self, record: Record) -> list[Any]:
        return [record["completion"]]

    def sign(self, record: Record) -> float:
        label = record["label"]
        if label not in (True, False):
            raise UserError(f"the label {short(repr(label))} is not true or false", "fix the label")
        return 1.0 if label else -1.0

    def from_margins(self, margins: Tensor, sign: Tensor) -> Tensor:
        return 1 - torch.sigmoid(self.beta * sign * margins[:, 0])
