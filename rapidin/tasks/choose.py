"""The task of a model: one of the user's own, one chosen by name, or the one that the model was saved for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rapidin.data.encoding import Encoder
from rapidin.errors import UserError
from rapidin.tasks.causal import Causal
from rapidin.tasks.classify import Classification, Regression, Reward
from rapidin.tasks.forward import inner_model
from rapidin.tasks.masked import Masked
from rapidin.tasks.names import CAUSAL, LossKind, Turns, forms_of, task_of_class
from rapidin.tasks.preference import Preference, Verdicts
from rapidin.tasks.seq2seq import Seq2Seq
from rapidin.tasks.task import Task
from rapidin.tasks.texts import TextEncoder


@dataclass(frozen=True)
class TaskSettings:
    """What the built-in tasks are made with; see `rapidin.gradients.settings.GradientSettings`.

    rows: number of tokens that the model has an embedding of, None if that is not known.
    """

    max_length: int
    eos: bool = True
    too_long: str = "truncate"
    loss: LossKind = "mean"
    turns: Turns = "all"
    beta: float = 0.1
    date: str | None = None
    rows: int | None = None


def task_of(wanted: Task | str | None, model: Any, tokenizer: Any, settings: TaskSettings) -> Task:
    """The task with this name, or the one that the model was saved for.

    Raises UserError for an unknown name, and for a model or a tokenizer that the task cannot use.
    """
    if isinstance(wanted, Task):
        return wanted
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    name = wanted or ("" if config is None else task_of_class(type(inner).__name__, config))
    if not name:
        raise UserError(
            f"a {type(model).__name__} does not say what it is for",
            "pass a task of your own as task=..., see docs/guide/tasks.md",
        )
    if forms_of(name) is None:
        raise UserError(f"the task '{name}' is not built in", "pass the task object as task=...")
    if tokenizer is None:
        raise UserError(
            f"the task '{name}' reads texts, and there is no tokenizer",
            "give it: rapidin.Attributor(model, tokenizer)",
        )
    if settings.loss == "sum" and name not in (CAUSAL, "masked", "seq2seq"):
        raise UserError(
            f"`loss='sum'` adds up the losses of tokens, and the task '{name}' has one loss per example",
            "leave out `loss`",
        )
    return built_in(name, tokenizer, config, settings)


def built_in(name: str, tokenizer: Any, config: Any, settings: TaskSettings) -> Task:
    """The built-in task with this name; config: of the model."""
    return _MAKERS[name](tokenizer, config, settings)


def _causal_encoder(tokenizer: Any, settings: TaskSettings, turns: Turns) -> Encoder:
    return Encoder(
        tokenizer,
        eos=settings.eos,
        max_length=settings.max_length,
        too_long=settings.too_long,
        turns=turns,
        date=settings.date,
        rows=settings.rows,
    )


def _text_encoder(tokenizer: Any, config: Any, settings: TaskSettings) -> TextEncoder:
    return TextEncoder(
        tokenizer,
        config,
        max_length=settings.max_length,
        too_long=settings.too_long,
        eos=settings.eos,
        date=settings.date,
        rows=settings.rows,
    )


_MAKERS: dict[str, Callable[[Any, Any, TaskSettings], Task]] = {
    CAUSAL: lambda tokenizer, _, settings: Causal(
        _causal_encoder(tokenizer, settings, settings.turns), settings.loss
    ),
    "classification": lambda *args: Classification(_text_encoder(*args), args[1]),
    "regression": lambda *args: Regression(_text_encoder(*args), args[1]),
    "reward": lambda *args: Reward(_text_encoder(*args), args[1]),
    "masked": lambda *args: Masked(_text_encoder(*args), args[2].loss),
    "seq2seq": lambda *args: Seq2Seq(_text_encoder(*args), args[2].loss),
    "preference": lambda tokenizer, _, settings: Preference(
        _causal_encoder(tokenizer, settings, "last"), settings.beta
    ),
    "kto": lambda tokenizer, _, settings: Verdicts(
        _causal_encoder(tokenizer, settings, "last"), settings.beta
    ),
}
