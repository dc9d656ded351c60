"""The first examples of some data as a task reads them, to be looked at before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from rapidin.data.encoding import Status, pieces_of
from rapidin.data.examples import Examples, open_examples
from rapidin.data.fields import FieldMap
from rapidin.data.records import Record, shown_parts
from rapidin.errors import UserError
from rapidin.results.reading import Reading, ShownExample, ShownText
from rapidin.tasks.task import Task


def read_examples(
    task: Task,
    tokenizer: Any,
    data: Any,
    limit: int = 3,
    *,
    map: FieldMap | Mapping[str, str] | str | None = None,
    streaming: bool = False,
) -> Reading:
    """The first examples as a task reads them.

    data: anything that `rapidin.data.examples.open_examples` takes. Raises UserError for data that cannot be
    read, and for an example that the task refuses.
    """
    if limit < 1:
        raise UserError(f"`limit` must be at least 1, got {limit}")
    examples = data
    if not isinstance(data, Examples):
        examples = open_examples(data, limit=limit, forms=task.forms, map=map, streaming=streaming)
    if task.chats is not None:
        task.chats.forget()
    made = [
        read_example(task, tokenizer, examples, row, record) for row, record in islice(examples.good(), limit)
    ]
    return Reading(made, [] if task.chats is None else task.chats.notes())


def read_example(task: Task, tokenizer: Any, examples: Examples, row: int, record: Record) -> ShownExample:
    """One example as a task reads it. Raises UserError if the task refuses it."""
    where = examples.where(row)
    try:
        example = task.example(record)
    except UserError as error:
        raise UserError(f"{where}: {error.what}", error.remedy) from error
    texts = task.texts(example) if tokenizer is not None else []
    shown = [ShownText(text.name, text.ids, pieces_of(tokenizer, text.ids), text.target) for text in texts]
    if not shown:  # a task of the user's own, which may read anything
        names = ("prompt", "completion")
        parts = zip(names, shown_parts(record), strict=True)
        shown = [ShownText(name, [], [text], []) for name, text in parts if text]
    status = Status(example.status).name.lower()
    return ShownExample(row, where, shown, status, example.truncated, task.label_text(record))
