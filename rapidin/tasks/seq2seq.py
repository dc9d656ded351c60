"""Encoder-decoder models such as T5 and BART: the prompt is encoded, and the completion decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.data.encoding import Status, alpaca_prompt
from rapidin.data.generations import Generation
from rapidin.data.records import Record
from rapidin.errors import UserError
from rapidin.ops.transfer import upload
from rapidin.tasks.forward import device_of, greedy, inner_model
from rapidin.tasks.names import LossKind, forms_of
from rapidin.tasks.task import Batch, Example, ReadText, Task
from rapidin.tasks.texts import IGNORED, Text, TextEncoder, label_losses, padded


class Seq2Seq(Task):
    """The loss of a completion under an encoder-decoder model, given the prompt.

    Both are encoded by the tokenizer, with its end-of-text token. kind: whether the loss is the mean or the
    sum over the completion's tokens.
    """

    name = "seq2seq"
    forms = forms_of("seq2seq")

    def __init__(self, encoder: TextEncoder, kind: LossKind) -> None:
        self.encoder, self.kind = encoder, kind

    def prompt(self, record: Record) -> str:
        """What the encoder reads."""
        if record.get("prompt") is not None:
            return str(record["prompt"])
        return alpaca_prompt(record["instruction"], record.get("input") or "")

    def completion(self, record: Record) -> str:
        """The text of the decoder; "" if the model has to generate it."""
        return record.get("completion" if record.get("prompt") is not None else "output") or ""

    def example(self, record: Record) -> Example:
        text, completion = self.encoder(self.prompt(record)), self.completion(record)
        tokenizer = self.encoder.tokenizer
        labels = list(tokenizer(text_target=completion, verbose=False)["input_ids"]) if completion else []
        return self._example(text, labels)

    def _example(self, text: Text, labels: list[int]) -> Example:
        most = self.encoder.max_length
        status, truncated = text.status, text.truncated or len(labels) > most
        if status == Status.OK and not labels:
            status = Status.NO_TARGET
        if status == Status.OK and len(labels) > most and self.encoder.too_long == "skip":
            status = Status.TOO_LONG
        inputs: dict[str, Any] = text.inputs | {"labels": labels[:most]}
        return Example(inputs, text.length + len(labels[:most]), status, truncated)

    def texts(self, example: Example) -> list[ReadText]:
        inputs = example.inputs
        return [
            ReadText.whole("prompt", inputs["input_ids"]),
            ReadText.whole("completion", inputs["labels"], True),
        ]

    def batch(self, examples: Sequence[Example], device: torch.device) -> Batch:
        names = [name for name in examples[0].inputs if name != "labels"]
        inputs = self.encoder.padded([{k: each.inputs[k] for k in names} for each in examples], device)
        labels = upload(padded([each.inputs["labels"] for each in examples], IGNORED), device)
        length = inputs["input_ids"].shape[1]
        return Batch(inputs | {"labels": labels}, len(examples), 1, length, pooled=False)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        inputs = batch.without("labels")
        begun = inner_model(model).prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(**inputs, decoder_input_ids=begun, use_cache=False).logits
        return label_losses(logits, labels, batch.rows, self.kind)

    def generation(self, model: nn.Module, record: Record, max_new_tokens: int) -> Generation:
        completion = self.completion(record)
        if completion:
            return Generation(self.prompt(record), completion, False, self.example(record))
        return self.answer(model, self.prompt(record), max_new_tokens)

    def answer(self, model: Any, prompt: str, max_new_tokens: int) -> Generation:
        text = self.encoder(prompt)
        if text.status != Status.OK:
            raise UserError("the prompt is empty or too long, so the model cannot answer it")
        tokenizer = self.encoder.tokenizer
        inputs = self.encoder.padded([text.inputs], device_of(model))
        (written,) = greedy(model, tokenizer, **inputs, max_new_tokens=max_new_tokens)
        labels = [
            token for token in written[1:] if token != tokenizer.pad_token_id
        ]  # after the decoder's start
        answer = str(tokenizer.decode(labels, skip_special_tokens=True))
        return Generation(prompt, answer, True, self._example(text, labels))

    def filler(self) -> Example:
        return Example({"input_ids": [0], "attention_mask": [1], "labels": [0]}, 2)
