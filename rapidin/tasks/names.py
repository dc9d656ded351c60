"""The built-in tasks by their names in `task` and in manifests, and the forms of their records.

This module does not import torch, since the help of the command line and the reading of data need it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from rapidin.data.records import TEXTS, Check, Forms, check_messages, check_text, describe
from rapidin.errors import UserError

LossKind = Literal["mean", "sum"]
Turns = Literal["all", "last"]
TaskName = Literal[
    "causal", "classification", "regression", "reward", "masked", "seq2seq", "preference", "kto"
]

CAUSAL = "causal"  # also the task of a cache that does not name one


# ------------------------------------------------------------------------------------------------- forms


def _check_label(value: object, name: str, where: str) -> None:
    each = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(label, str | int | float) for label in each):
        raise UserError(
            f"{where}: '{name}' is {describe(value)}, expected a class's number or name, or a list of them"
        )


def _check_number(value: object, name: str, where: str) -> None:
    each = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in each):
        raise UserError(f"{where}: '{name}' is {describe(value)}, expected a number")


def _check_flag(value: object, name: str, where: str) -> None:
    if value not in (True, False):
        raise UserError(f"{where}: '{name}' is {describe(value)}, expected true or false")


def _check_text_or_messages(value: object, name: str, where: str) -> None:
    (check_messages if isinstance(value, list) else check_text)(value, name, where)


# One or two texts, as in the columns of GLUE and of most datasets.
_TEXT_FIELDS = {
    "sentences": ("sentence1", "sentence2"),
    "premise": ("premise", "hypothesis"),
    "questions": ("question1", "question2"),
    "question": ("question", "sentence"),
    "pair": ("text", "text_pair"),
    "sentence": ("sentence",),
    "text": ("text",),
}
_TEXTS_IN_WORDS = "'text' or 'sentence', or two texts such as 'sentence1' and 'sentence2'"


# Forms of preferences whose answers are messages of a chat.
CHAT_FORMS = ("preference chat", "chosen chat", "verdict chat")


def _labelled(check: Check, otherwise: str = "") -> Forms:
    return Forms(
        fields={form: (*fields, "label") for form, fields in _TEXT_FIELDS.items()},
        missing=dict.fromkeys(_TEXT_FIELDS, "label"),
        expected=f"expected 'label' with {_TEXTS_IN_WORDS}{otherwise}",
        expected_query=f"expected {_TEXTS_IN_WORDS}",
        checks={"label": check},
    )


_PAIRS = Forms(
    fields={
        "preference chat": ("prompt", "chosen", "rejected"),
        "preference": ("prompt", "chosen", "rejected"),
        "chosen chat": ("chosen", "rejected"),
        "chosen": ("chosen", "rejected"),
    },
    chats={"preference chat": "chosen", "chosen chat": "chosen"},
    missing={},
    expected="expected 'chosen' and 'rejected' (and 'prompt'), as texts or as lists of messages",
    expected_query="expected 'chosen' and 'rejected' (and 'prompt'), as texts or as lists of messages",
    checks=dict.fromkeys(("prompt", "chosen", "rejected"), _check_text_or_messages),
)

_VERDICTS = Forms(
    fields=dict.fromkeys(("verdict chat", "verdict"), ("prompt", "completion", "label")),
    chats={"verdict chat": "completion"},
    missing={},
    expected="expected 'prompt', 'completion' and 'label' (true or false)",
    expected_query=TEXTS.expected_query,
    checks=dict.fromkeys(("prompt", "completion"), _check_text_or_messages) | {"label": _check_flag},
    queries=TEXTS,
)

_FORMS: dict[str, Forms] = {
    CAUSAL: TEXTS,
    "classification": _labelled(_check_label),
    "regression": _labelled(_check_number, "; pairs of 'chosen' and 'rejected' need `task='reward'`"),
    "reward": _PAIRS,
    "masked": Forms(_TEXT_FIELDS, {}, f"expected {_TEXTS_IN_WORDS}", f"expected {_TEXTS_IN_WORDS}"),
    "seq2seq": Forms(
        fields={form: TEXTS.fields[form] for form in ("prompt", "instruction")},
        missing=TEXTS.missing,
        expected="expected 'prompt' and 'completion', or 'instruction' and 'output' (and 'input')",
        expected_query="expected 'prompt', or 'instruction' (and 'input')",
        optional=TEXTS.optional,
    ),
    "preference": replace(
        _PAIRS,
        expected_query=f"{_PAIRS.expected_query}, or the fields of a causal model's query",
        queries=TEXTS,
    ),
    "kto": _VERDICTS,
}


def forms_of(name: str) -> Forms | None:
    """The forms of a task's records; None for a task of the user's own, which reads any record."""
    return _FORMS.get(name)


def texts_of(record: dict[str, Any]) -> tuple[str, ...]:
    """The one or two texts of a record that has a label. Raises UserError if there is none."""
    for fields in _TEXT_FIELDS.values():
        if all(isinstance(record.get(name), str) for name in fields):
            return tuple(record[name] for name in fields)
    raise UserError(
        f"a record has no text; its fields are {', '.join(map(repr, record)) or 'none'}",
        f"expected {_TEXTS_IN_WORDS}",
    )


# ------------------------------------------------------------------------------------------------- models


def task_of_class(made_for: str, config: Any) -> str:
    """The name of the task of a model's class, such as BertForMaskedLM; "causal" where that is not clear.

    config: the model's, or None.
    """
    if made_for.endswith("ForSequenceClassification"):
        numbers = getattr(config, "problem_type", None) == "regression"
        return "regression" if numbers or getattr(config, "num_labels", 2) == 1 else "classification"
    if made_for.endswith("ForMaskedLM"):
        return "masked"
    if made_for.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    return CAUSAL


def task_of_config(config: Any) -> str:
    """The name of the task that a model was saved for."""
    return task_of_class((getattr(config, "architectures", None) or [""])[0] or "", config)


def task_of_folder(folder: str) -> str | None:
    """The name of the task that the model in a folder was saved for; None if there is no config to tell."""
    try:
        value = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        config = SimpleNamespace(**value)
    except (OSError, ValueError, TypeError):
        return None
    if "id2label" in value:
        config.num_labels = len(value["id2label"])
    return task_of_config(config)


_CLASSES = {  # of transformers, and the name that peft has for their task
    "classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "regression": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "reward": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "masked": ("AutoModelForMaskedLM", None),
    "seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}
_CAUSAL_CLASS = ("AutoModelForCausalLM", "CAUSAL_LM")


def loader_of(name: str) -> str:
    """The class of transformers that loads models for a task."""
    return _CLASSES.get(name, _CAUSAL_CLASS)[0]


def peft_task_of(name: str) -> str | None:
    """The name that adapters for a task have for it; None if they name none."""
    return _CLASSES.get(name, _CAUSAL_CLASS)[1]
