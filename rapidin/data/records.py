"""The forms of a record, the checks of its fields, its prompt and completion, and its hash.

Four forms of record are read; other fields are left alone and shown with a hit.

    prompt        {"prompt": ..., "completion": ...}                    concatenated as they are
    instruction   {"instruction": ..., "input": ..., "output": ...}     the Alpaca form; "input" is optional
    messages      {"messages": [{"role": ..., "content": ...}, ...]}    the tokenizer's chat template
    text          {"text": ...}                                         every token counts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rapidin.errors import UserError

Record = dict[str, Any]

# The fields of each form. A record that has the fields of two forms is read as the first of them.
FORMS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
    "text": ("text",),
}
# The field that a query may lack: the model then generates it.
_COMPLETIONS = {"prompt": "completion", "instruction": "output"}

_EXPECTED = (
    "expected 'prompt' and 'completion', or 'instruction' and 'output' (and 'input'), "
    "or 'messages', or 'text'"
)
EXPECTED_QUERY = "expected 'prompt', or 'instruction' (and 'input'), or 'messages', or 'text'"


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
    return str(record.get("text", "")), ""


def canonical_json(record: Record) -> bytes:
    """The record as one line of JSON with sorted keys, in ASCII."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), default=str).encode("ascii") + b"\n"


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
        fields = ", ".join(
            f"'{name}'" + (" (null)" if value is None else "") for name, value in record.items()
        )
        expected = EXPECTED_QUERY if generations else _EXPECTED
        if form:
            expected = f"expected {' and '.join(map(repr, FORMS[form]))} as in the examples before it"
        raise UserError(f"{where}: found {'the fields ' + fields if fields else 'no fields'}", expected)
    if actual == "messages":
        _check_messages(record["messages"], where)
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
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
