"""Questions as records: what `rapidin query --ask`, `Attributor.ask` and `rapidin.explain` ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rapidin.attribution.provenance import task_name
from rapidin.cache import Manifest
from rapidin.data.records import Record
from rapidin.data.sources import is_pair
from rapidin.errors import UserError
from rapidin.tasks.names import CAUSAL, CHAT_FORMS

_CONTINUING = (CAUSAL, "seq2seq", "preference", "kto")  # tasks whose models write a text
_GIVE = "give a question, or a (question, answer) pair, as texts"


def asked(manifest: Manifest, question: str, answer: str | None = None) -> Record:
    """The record of a question in the form of a cache's training data: the Alpaca form, the chat template, or
    as it is. Without an answer the model writes one.

    Raises UserError if the question is empty, or the cache's task has no use for it.
    """
    task, form = task_name(manifest), str(manifest.data.get("form"))
    if not question.strip():
        raise UserError("the question is empty", "ask something")
    if task in _CONTINUING and form in ("messages", *CHAT_FORMS):
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages}
    if task in _CONTINUING and form == "instruction":
        return {"instruction": question} | ({} if answer is None else {"output": answer})
    return continued(manifest, question, answer)


def continued(manifest: Manifest, prompt: str, completion: str | None = None) -> Record:
    """The record of a text that the model reads with nothing around it. Raises as `asked` does."""
    task = task_name(manifest)
    if task in _CONTINUING:
        return {"prompt": prompt} | ({} if completion is None else {"completion": completion})
    return _labelled(prompt, completion, task)


def all_asked(manifest: Manifest, questions: Any) -> list[Record]:
    """The records of a question, a (question, answer) pair, a record, or a list of these.

    Raises UserError for anything else, and as `asked` does.
    """
    alone = isinstance(questions, str | Mapping) or is_pair(questions)
    given = [questions] if alone else questions
    if not isinstance(given, Sequence) or not given:
        raise UserError(f"the question is {_kind(questions)}", _GIVE)
    records: list[Record] = []
    for each in given:
        if isinstance(each, Mapping):
            records.append(dict(each))
            continue
        question, answer = each if isinstance(each, list | tuple) and len(each) == 2 else (each, None)
        if not (isinstance(question, str) and isinstance(answer, str | None)):
            raise UserError(f"a question is {_kind(each)}", _GIVE)
        records.append(asked(manifest, question, answer))
    return records


def _kind(value: Any) -> str:
    return "empty" if value is None or value == [] else f"a {type(value).__name__}"


def _labelled(text: str, completion: str | None, task: str) -> Record:
    """The record of a text that the model says something of; completion: what it says, as text."""
    if task == "reward":
        raise UserError("a reward model compares two answers", "give records with 'chosen' and 'rejected'")
    if task == "masked" and completion is not None:
        raise UserError("a masked language model has no completion", "write its mask token into the text")
    if completion is None:
        return {"text": text}
    try:
        number = float(completion)
    except ValueError:
        return {"text": text, "label": completion}
    return {"text": text, "label": int(number) if number.is_integer() and task != "regression" else number}
