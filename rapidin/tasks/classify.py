"""Classifiers, regression and reward models: `AutoModelForSequenceClassification` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.data.generations import Generation
from rapidin.data.records import Forms, Record
from rapidin.errors import UserError, short
from rapidin.ops.transfer import upload
from rapidin.tasks.chats import rendered
from rapidin.tasks.forward import cache_use, device_of, evaluation_mode, takes
from rapidin.tasks.names import forms_of, texts_of
from rapidin.tasks.task import Batch, Example, ReadText, Task
from rapidin.tasks.texts import Text, TextEncoder


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    extra: dict[str, Any] = {"use_cache": cache_use(model)} if takes(model, "use_cache") else {}
    logits: Tensor = model(**inputs, **extra).logits
    return logits.float()


class Labelled(Task):
    """One or two texts with a label: the base class of classification and regression.

    encoder: of the texts; config: of the model.
    """

    def __init__(self, encoder: TextEncoder, config: Any) -> None:
        self.encoder, self.config = encoder, config
        if getattr(config, "pad_token_id", None) is None:
            raise UserError(
                "the model's config has no pad_token_id, so the model cannot find the end of a padded text",
                "set pad_token_id in the model's config.json as in training",
            )

    @property
    def forms(self) -> Forms | None:  # type: ignore[override]
        return forms_of(self.name)

    @property
    def outputs(self) -> int:
        """Number of outputs of the model."""
        return int(getattr(self.config, "num_labels", 1))

    def example(self, record: Record) -> Example:
        text = self.encoder(*texts_of(record))
        return Example(
            text.inputs | {"label": self.label(record.get("label"))}, text.length, text.status, text.truncated
        )

    def batch(self, examples: Sequence[Example], device: torch.device) -> Batch:
        texts = [{k: v for k, v in each.inputs.items() if k != "label"} for each in examples]
        inputs = self.encoder.padded(texts, device)
        length = inputs["input_ids"].shape[1]
        labels = torch.tensor([each.inputs["label"] for each in examples], device="cpu")
        return Batch(inputs | {"label": upload(labels, device)}, len(examples), 1, length)

    def texts(self, example: Example) -> list[ReadText]:
        return [ReadText.whole("", example.inputs["input_ids"])]

    def label_text(self, record: Record) -> str:
        return "" if record.get("label") is None else self.shown(record["label"])

    def check(self, record: Record) -> None:
        texts_of(record)
        self.label(record.get("label"))

    def generation(self, model: nn.Module, record: Record, max_new_tokens: int) -> Generation:
        generated = record.get("label") is None
        if generated:
            record = record | {"label": self.predicted(model, record)}
        shown = self.shown(record["label"])
        return Generation("\n".join(texts_of(record)), shown, generated, self.example(record))

    def predicted(self, model: nn.Module, record: Record) -> Any:
        """The model's own answer as a label, for a record that has none."""
        text = self.encoder(*texts_of(record))
        inputs = self.encoder.padded([text.inputs], device_of(model))
        with torch.no_grad(), evaluation_mode(model):
            return self.answer_of(_logits(model, inputs)[0])

    def filler(self) -> Example:
        return Example({"input_ids": [0], "attention_mask": [1], "label": self.label(self.some_label)}, 1)

    some_label: Any = 0

    def label(self, value: Any) -> Any:
        """A record's label in the form that the loss takes. Raises UserError for an invalid label."""
        raise NotImplementedError

    def answer_of(self, logits: Tensor) -> Any:
        """The label that the model predicts, from its outputs for one text."""
        raise NotImplementedError

    def shown(self, label: Any) -> str:
        """A label as it is shown."""
        return str(label)


class Classification(Labelled):
    """The class of a text, or its classes if the config's problem_type is "multi_label_classification".

    The loss is that of transformers: the cross-entropy of the class, or the mean of the binary
    cross-entropies of all classes.
    """

    name = "classification"

    @property
    def many(self) -> bool:
        """Whether a text may have several classes."""
        return getattr(self.config, "problem_type", None) == "multi_label_classification"

    @property
    def _names(self) -> dict[str, int]:
        names = getattr(self.config, "id2label", None) or {}
        return {str(name): int(number) for number, name in names.items()}

    def label(self, value: Any) -> Any:
        if not self.many:
            return self._class(value)
        values = list(value) if isinstance(value, list | tuple) else [value]
        flags = len(values) == self.outputs and all(each in (0, 1) for each in values)
        if flags:
            return [float(each) for each in values]
        chosen = {self._class(each) for each in values}
        return [float(n in chosen) for n in range(self.outputs)]

    def _class(self, value: Any) -> int:
        if isinstance(value, str) and value in self._names:
            return self._names[value]
        number = (
            int(value) if isinstance(value, int) or (isinstance(value, float) and value.is_integer()) else -1
        )
        if not 0 <= number < self.outputs:
            known = ", ".join(list(self._names)[:6])
            raise UserError(
                f"the label {short(repr(value))} is none of the model's {self.outputs} classes",
                f"use a number from 0 to {self.outputs - 1}, or a name such as {known}",
            )
        return number

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = _logits(model, batch.without("label"))
        if self.many:
            return F.binary_cross_entropy_with_logits(logits, batch["label"], reduction="none").mean(1)
        return F.cross_entropy(logits, batch["label"], reduction="none")

    def answer_of(self, logits: Tensor) -> Any:
        if self.many:
            return [float(logit > 0) for logit in logits.tolist()]
        return int(logits.argmax())

    def shown(self, label: Any) -> str:
        names = {number: name for name, number in self._names.items()}
        made = self.label(label)
        numbers = [n for n, on in enumerate(made) if on] if self.many else [made]
        return ", ".join(names.get(n, str(n)) for n in numbers) or "none"


class Regression(Labelled):
    """A number that the model predicts for a text. The loss is the squared error, averaged over the
    outputs."""

    name = "regression"

    def label(self, value: Any) -> Any:
        values = list(value) if isinstance(value, list | tuple) else [value]
        if len(values) != self.outputs or not all(
            isinstance(each, int | float) and not isinstance(each, bool) for each in values
        ):
            what = "a number" if self.outputs == 1 else f"a list of {self.outputs} numbers"
            pairs = "; for pairs of 'chosen' and 'rejected' use `task='reward'`" if value is None else ""
            raise UserError(f"the label {short(repr(value))} is not {what}", f"fix the label{pairs}")
        return [float(each) for each in values]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = _logits(model, batch.without("label"))
        return (logits - batch["label"]).square().mean(1)

    def predicted(self, model: nn.Module, record: Record) -> Any:
        raise UserError(
            "a query to a regression model needs a label: the model's own prediction has no error and so no "
            "gradient",
            "give the number that the model should, or should not, have predicted as 'label'",
        )


class Reward(Task):
    """Which of two answers is the better one: ``-log sigmoid(r(chosen) - r(rejected))`` (Bradley & Terry,
    1952), one loss and one gradient for a pair.

    Answers are whole chats, or texts that follow the prompt. The two texts of a pair are its parts in the
    batch, the chosen one first.
    """

    name = "reward"
    forms = forms_of("reward")

    def __init__(self, encoder: TextEncoder, config: Any) -> None:
        if getattr(config, "num_labels", 1) != 1:
            raise UserError(
                f"a reward model has one output, and this one has {config.num_labels}",
                "use `task='classification'`",
            )
        self.encoder = encoder

    def example(self, record: Record) -> Example:
        pair = [self._text(record, name) for name in ("chosen", "rejected")]
        return Example(
            {"chosen": pair[0].inputs, "rejected": pair[1].inputs},
            2 * max(text.length for text in pair),
            max(text.status for text in pair),
            any(text.truncated for text in pair),
        )

    def _text(self, record: Record, name: str) -> Text:
        text, special = rendered(self.encoder.chats, record, record[name])
        if special and self.encoder.eos and not text.endswith(self.encoder.eos):
            text += self.encoder.eos
        return self.encoder(text, special=special)

    def batch(self, examples: Sequence[Example], device: torch.device) -> Batch:
        texts = [each.inputs[name] for each in examples for name in ("chosen", "rejected")]
        inputs = self.encoder.padded(texts, device)
        return Batch(inputs, len(examples), 2, 2 * inputs["input_ids"].shape[1])

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        rewards = _logits(model, dict(batch.inputs)).view(batch.rows, 2)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])

    def texts(self, example: Example) -> list[ReadText]:
        names = ("chosen", "rejected")
        return [ReadText.whole(name, example.inputs[name]["input_ids"]) for name in names]

    def check(self, record: Record) -> None:
        for name in ("chosen", "rejected"):
            rendered(self.encoder.chats, record, record[name])

    def filler(self) -> Example:
        text = {"input_ids": [0], "attention_mask": [1]}
        return Example({"chosen": text, "rejected": text}, 2)
