"""The task of a model: of the user's own, by its name, or by what the model was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rapidin.data.encoding import Encoder
from rapidin.errors import UserError
from rapidin.tasks.causal import Causal
from rapidin.tasks.forward import inner_model
from rapidin.tasks.names import CAUSAL, LossKind, forms_of, task_of_config
from rapidin.tasks.task import Task


@dataclass(frozen=True)
class TaskSettings:
    """What the built-in tasks are made with; see `rapidin.gradients.settings.GradientSettings`."""

    max_length: int
    eos: bool = True
    too_long: str = "truncate"
    loss: LossKind = "mean"


def task_of(wanted: Task | str | None, model: Any, tokenizer: Any, settings: TaskSettings) -> Task:
    """The task of this name, or the one that the model was made for.

    Raises UserError for an unknown name, and for a model or a tokenizer that the task cannot use.
    """
    if isinstance(wanted, Task):
        return wanted
    config = getattr(inner_model(model), "config", None)
    name = wanted or ("" if config is None else task_of_config(config))
    if not name:
        raise UserError(
            f"a {type(model).__name__} does not say what it is for",
            "give a task of your own with task=..., see docs/guide/tasks.md",
        )
    if forms_of(name) is None:
        raise UserError(f"the task '{name}' is not built in", "give the task itself with task=...")
    if tokenizer is None:
        raise UserError(f"the task '{name}' reads texts, and there is no tokenizer", "give the tokenizer")
    encoder = Encoder(tokenizer, eos=settings.eos, max_length=settings.max_length, too_long=settings.too_long)
    assert name == CAUSAL
    return Causal(encoder, settings.loss)
