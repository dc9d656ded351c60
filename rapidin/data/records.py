"""The forms of a record, the checks of its fields, its prompt and completion, and its hash.

Five forms of record are read; other fields are left alone and shown with a hit. `rapidin.data.fields` makes
these forms of records with the field names of other tools.

    prompt        {"prompt": ..., "completion": ...}                    concatenated as they are
    instruction   {"instruction": ..., "input": ..., "output": ...}     the Alpaca form; "input" is optional
    messages      {"messages": [{"role": ..., "content": ...}, ...]}    the tokenizer's chat template
    text          {"text": ...}                                         every token counts
    tokens        {"input_ids": [...], "labels": [...]}                 read as they are; -100: no loss
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rapidin.errors import UserError, short

Record = dict[str, Any]

# The fields of each form. A record that has the fields of two forms is read as the first of them.
FORMS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
    "text": ("text",),
    "tokens": ("input_ids",),
}
# The field that a query may lack: the model then generates it.
_COMPLETIONS = {"prompt": "completion", "instruction": "output"}

_EXPECTED = (
    "expected 'prompt' and 'completion', or 'instruction' and 'output' (and 'input'), "
    "or 'messages', or 'text', or 'input_ids' (and 'labels'); a map names other fields, "
    "as in prompt=question,completion=answer"
)
EXPECTED_QUERY = (
    "expected 'prompt', or 'instruction' (and 'input'), or 'messages', or 'text', or 'input_ids'; "
    "a map names other fields, as in prompt=question"
)
NO_LOSS = -100  # the label of a token that does not count
_MASKS = ("completion_mask", "assistant_masks")  # of tokens that count, where there are no labels
_MARKS = ("weight", "train", "training")  # of a message whose tokens do not count, if 0 or false
_MOST_FIELDS = 12  # named in a message


def form_of(record: Mapping[str, Any], *, generations: bool = False) -> str | None:
    """The form whose fields the record has, or None; with `generations` the completion may be missing."""
    for optional in ({}, _COMPLETIONS) if generations else ({},):
        for form, fields in FORMS.items():
            if all(record.get(field) is not None for field in fields if optional.get(form) != field):
                return form
    return None


def record_parts(record: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the completion of a record, without the template that is put around them for the
    model."""
    if record.get("prompt") is not None and record.get("completion") is not None:
        return str(record["prompt"]), str(record["completion"])
    if record.get("instruction") is not None and record.get("output") is not None:
        return f"{record['instruction']} {record.get('input') or ''}", str(record["output"])
    messages = record.get("messages")
    if messages:
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        last = answers[-1] if answers else len(messages)
        question = messages[last - 1]["content"] if last else ""
        return str(question), str(messages[last]["content"]) if answers else ""
    if record.get("text") is None and record.get("input_ids") is not None:
        ids, counts = tokens_of(record)
        first = counts.index(True) if True in counts else 0
        return " ".join(map(str, ids[:first])), " ".join(map(str, ids[first:]))
    return str(record.get("text", "")), ""


def tokens_of(record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """The token ids of a record of the tokens form without its padding, and which of them count."""
    ids, labels = record["input_ids"], record.get("labels")
    counts = [True] * len(ids) if labels is None else [label != NO_LOSS for label in labels]
    if labels is None:
        for name in _MASKS:
            if record.get(name) is not None:
                counts = [bool(each) for each in record[name]]
                break
    mask = record.get("attention_mask")
    if mask is None:
        return list(ids), counts
    kept = [n for n, each in enumerate(mask) if each]
    return [ids[n] for n in kept], [counts[n] for n in kept]


def message_counts(message: Mapping[str, Any]) -> bool:
    """Whether the tokens of an answer in a chat count: if not, OpenAI's format gives it a weight of 0, and
    Axolotl's a field `train` that is false."""
    return all(message.get(name) is None or bool(message[name]) for name in _MARKS)


def canonical_json(record: Record) -> bytes:
    """The record as one line of JSON with sorted keys, in ASCII. Raises UserError if that is impossible."""
    try:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), default=str)
    except RecursionError as error:
        raise UserError("a value is nested too deeply", "fix or remove it") from error
    except TypeError as error:  # keys that cannot be sorted
        raise UserError(f"a value cannot be written as JSON ({error})", "fix or remove it") from error
    except ValueError as error:
        contains_itself = "ircular" in str(error)
        what = "a value contains itself" if contains_itself else "a number with too many digits"
        raise UserError(what, "fix or remove it") from error
    return text.encode("ascii") + b"\n"


def record_hash(record: Record | None) -> int:
    """The first 8 bytes of the SHA-256 of a record's canonical JSON, as a signed integer; 0 for None."""
    if record is None:
        return 0
    return int.from_bytes(hashlib.sha256(canonical_json(record)).digest()[:8], "little", signed=True)


# ------------------------------------------------------------------------------------------------- checks


def to_record(value: object, where: str) -> Record:
    """A value read from a source as a record. Raises UserError if it is not a mapping with names as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(field, str) for field in value):
        raise UserError(f"{where}: found {describe(value)}, expected a JSON object with named fields")
    return dict(value)


def check_record(record: Record, form: str, generations: bool, where: str) -> str:
    """The form of a record. Raises UserError if it has none, another than `form` (unless that is ""), or a
    field of the wrong type."""
    actual = form_of(record, generations=generations)
    if actual is None or actual != (form or actual):
        names = [f"'{name}'" + (" (null)" if value is None else "") for name, value in record.items()]
        more = f" and {len(names) - _MOST_FIELDS} more" if len(names) > _MOST_FIELDS else ""
        fields = ", ".join(names[:_MOST_FIELDS]) + more
        expected = EXPECTED_QUERY if generations else _EXPECTED
        if form:
            expected = f"expected {' and '.join(map(repr, FORMS[form]))} as in the examples before it"
        raise UserError(f"{where}: found {'the fields ' + fields if fields else 'no fields'}", expected)
    if actual == "messages":
        _check_messages(record["messages"], where)
    elif actual == "tokens":
        _check_tokens(record, where)
    else:
        for field in (*FORMS[actual], *(("input",) if actual == "instruction" else ())):
            if record.get(field) is not None:
                _check_text(record[field], f"'{field}'", where)
    return actual


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list):
        raise UserError(f"{where}: 'messages' is {describe(messages)}, expected a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where}: messages[{number}] is {describe(message)}, "
                "expected an object with 'role' and 'content'"
            )
        for field in ("role", "content"):
            _check_text(message.get(field), f"messages[{number}].{field}", where)


def _check_tokens(record: Record, where: str) -> None:
    ids = record["input_ids"]
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        raise UserError(f"{where}: 'input_ids' is {describe(ids)}, expected a list of token ids")
    for name in ("labels", "attention_mask", *_MASKS):
        values = record.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(ids):
            found = f"{len(values)} values" if isinstance(values, list) else describe(values)
            raise UserError(
                f"{where}: '{name}' is {found}, expected one for each of the {len(ids)} input_ids"
            )
    for n, label in enumerate(record.get("labels") or ()):
        if label not in (NO_LOSS, ids[n]):
            raise UserError(
                f"{where}: labels[{n}] is {short(label)}, expected input_ids[{n}] ({ids[n]}) or {NO_LOSS}",
                "labels are not shifted: each belongs to the token at its own position",
            )


def _check_text(value: object, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {describe(value)}, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {name} contains half a character (a lone surrogate)", "fix or remove it"
            ) from error


def describe(value: object) -> str:
    """What kind of value a JSON value is, for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        try:
            return f"a number ({short(value)})"
        except ValueError:
            return "a number of thousands of digits"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
