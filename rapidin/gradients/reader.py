"""How a model reads texts: its task with its tokenizer, of a model in memory or without its weights."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import torch
from torch import nn

from rapidin.errors import UserError, reason_of
from rapidin.gradients.adapters import SavedHead
from rapidin.gradients.model import context_of
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.tokenizers import gguf_file, load_tokenizer
from rapidin.tasks.choose import TaskSettings, built_in
from rapidin.tasks.forward import inner_model
from rapidin.tasks.names import CAUSAL, loader_of
from rapidin.tasks.task import Task

_LONGEST = 2048  # tokens, if the model does not say


def load_reader(
    name: str,
    task: str,
    settings: GradientSettings,
    *,
    adapter: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Task, Any, str]:
    """A built-in task of a model that is not loaded, its tokenizer, and a message if that is another than the
    model's, "" if not.

    Raises UserError if the model is not found, or the task cannot be used with it.
    """
    from transformers import AutoConfig

    folder, extra = gguf_file(name)
    head = None if adapter is None else SavedHead.of(adapter)
    labels = {} if head is None or loader_of(task) != loader_of(head.task) else {"num_labels": head.outputs}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra, **labels)
    except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
        raise UserError(f"cannot load the config of '{name}': {reason_of(error)}") from error
    made, _, note = load_tokenizer(
        name, adapter, tokenizer, config=config, trust_remote_code=trust_remote_code
    )
    model = nn.Module() if loader_of(task) == loader_of(CAUSAL) else _without_weights(config, task)
    max_length = max_length_of(context_of(config, model), settings.max_length)
    rows = None if adapter is not None else getattr(config.get_text_config(), "vocab_size", None)
    return (
        dated(built_in(task, made, config, task_settings(settings, max_length, rows)), settings.date),
        made,
        note,
    )


def _without_weights(config: Any, task: str) -> nn.Module:
    """A model whose weights take no memory, for what its modules tell."""
    import transformers

    with torch.device("meta"):
        model: nn.Module = getattr(transformers, loader_of(task)).from_config(config)
    return model


def task_settings(settings: GradientSettings, max_length: int, rows: int | None) -> TaskSettings:
    """What a built-in task is made with; rows: number of tokens that the model has an embedding of."""
    return TaskSettings(
        max_length,
        settings.eos,
        settings.too_long,
        settings.loss,
        settings.turns,
        settings.beta,
        rows=rows,
    )


def max_length_of(limit: int | None, requested: int | None) -> int:
    """The most tokens of an example; limit: of the model. Raises UserError if more are requested."""
    if requested is None:
        return _LONGEST if limit is None else limit
    if limit is not None and requested > limit:
        raise UserError(f"`max_length` {requested} is over the model's context of {limit} tokens")
    return requested


def embedded_tokens(model: Any) -> int | None:
    """The number of tokens that a model has an embedding of, None if that is not known."""
    try:
        table = inner_model(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(table, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def dated(task: Task, date: str | None) -> Task:
    """The task whose chat template writes the date that is asked for, or today's; if it writes none, the task
    itself."""
    if task.chats is None or not task.chats.writes_date:
        return task
    return task.dated(date or datetime.now().date().isoformat())
