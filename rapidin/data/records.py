"""The forms of a record, the checks of its fields, its prompt and completion, and its hash.

A causal language model reads five forms; other tasks have forms of their own. Other fields are left alone and
shown with a hit. `rapidin.data.fields` makes these forms of records with the field names of other tools.

    prompt        {"prompt": ..., "completion": ...}                    concatenated as they are
    instruction   {"instruction": ..., "input": ..., "output": ...}     the Alpaca form; "input" is optional
    messages      {"messages": [{"role": ..., "content": ...}, ...]}    the tokenizer's chat template
    text          {"text": ...}                                         every token counts
    tokens        {"input_ids": [...], "labels": [...]}                 read as they are; -100: no loss
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from rapidin.errors import UserError, short

Record = dict[str, Any]

NO_LOSS = -100  # the label of a token that does not count
_MASKS = ("completion_mask", "assistant_masks")  # of tokens that count, where there are no labels
_MARKS = ("weight", "train", "training")  # of a message whose tokens do not count, if 0 or false
_TEXT_PARTS = ("text", "input_text", "output_text", None)  # types of a message's parts
# What a message may have in the place of a content.
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal")
_CHATS = ("messages", "prompt", "completion", "chosen", "rejected")  # fields that may be lists of messages
_MOST_FIELDS = 12  # named in a message

# Raises UserError for a field's value of the wrong kind, given the value, the field's name and the location.
Check = Callable[[object, str, str], None]


@dataclass(frozen=True)
class Forms:
    """The forms of record that a task reads.

    fields: those of each form, all of which a training example has; a record that has the fields of two forms
    is read as the first of them. missing: the field of a form that a query may lack: the model then writes
    it. expected, expected_query: the forms in words. checks: of fields that are not text; queries: other
    forms that a query may have; optional: texts that a form may have besides; chats: of a form, the field
    that must be a list of messages.
    """

    fields: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, str]
    expected: str
    expected_query: str
    checks: Mapping[str, Check] = field(default_factory=dict)
    queries: Forms | None = None
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    chats: Mapping[str, str] = field(default_factory=dict)

    def of(self, record: Mapping[str, Any], *, generations: bool = False) -> str | None:
        """The form whose fields the record has, or None; with `generations` a field may be missing."""
        for missing in ({}, self.missing) if generations else ({},):
            for form, fields in self.fields.items():
                if form in self.chats and not isinstance(record.get(self.chats[form]), list):
                    continue
                if all(record.get(field) is not None for field in fields if missing.get(form) != field):
                    return form
        return None


def record_parts(record: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the completion of a record, without the template that is put around them for the
    model.

    Works for any record: a field that another form uses for a chat or for tokens may hold something else.
    """
    if record.get("prompt") is not None and record.get("completion") is not None:
        return _last_text(record["prompt"]), _last_text(record["completion"])
    if record.get("instruction") is not None and record.get("output") is not None:
        return f"{record['instruction']} {record.get('input') or ''}", str(record["output"])
    messages = record.get("messages")
    if is_mapping_list(messages):
        answers = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
        last = answers[-1] if answers else len(messages)
        question = text_of_message(messages[last - 1]) if last else ""
        return question, text_of_message(messages[last]) if answers else ""
    if record.get("chosen") is not None and record.get("rejected") is not None:
        both = f"{_last_text(record['chosen'])} | rejected: {_last_text(record['rejected'])}"
        return _last_text(record.get("prompt") or ""), both
    if isinstance(record.get("text"), str) and record.get("text_pair") is None:
        return record["text"], ""
    if _are_tokens(record):
        ids, counts = tokens_of(record)
        first = counts.index(True) if True in counts else 0
        return " ".join(map(str, ids[:first])), " ".join(map(str, ids[first:]))
    texts = [value for name, value in record.items() if isinstance(value, str) and name != "label"]
    return " | ".join(texts), ""


def whole_text(record: Mapping[str, Any]) -> str:
    """The text of a record with all turns of its chats, of which `record_parts` has the last ones alone."""
    values = [record[name] for name in _CHATS if record.get(name)]
    if not any(map(is_mapping_list, values)):
        return " ".join(record_parts(record))
    turns = (value if is_mapping_list(value) else [{"content": value}] for value in values)
    return " ".join(text_of_message(turn) for chat in turns for turn in chat)


def shown_parts(record: Mapping[str, Any]) -> tuple[str, str]:
    """The `record_parts` of a record as it is shown: with its label, if it has one."""
    prompt, completion = record_parts(record)
    label = record.get("label")
    if label is None:
        return prompt, completion
    if isinstance(label, bool) and completion:
        return prompt, f"{completion} [{str(label).lower()}]"
    return prompt, completion or str(label)


def _last_text(value: Any) -> str:
    """A text, or the last message of a chat."""
    if is_mapping_list(value):
        return text_of_message(value[-1])
    return "" if value == [] else str(value)


def is_mapping_list(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a value is a list of objects, such as messages, and not an empty one."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _are_tokens(record: Mapping[str, Any]) -> bool:
    """Whether a record could be read as token ids with their labels."""
    if record.get("input_ids") is None:
        return False
    try:
        _check_ids(record["input_ids"], "input_ids", "")
        _check_labels(record, "")
    except UserError:
        return False
    return True


def text_of_message(message: Mapping[str, Any]) -> str:
    """The content of a message as text; its tool calls as JSON if it has none."""
    content = message.get("content")
    if not content and message.get("tool_calls"):
        return json.dumps(message["tool_calls"], ensure_ascii=False, default=str)
    return text_of_content(content)


def text_of_content(content: Any) -> str:
    """The text of a message's content: a text, a list of parts of which those of text are read, or none."""
    if isinstance(content, list):
        return "".join(
            part if isinstance(part, str) else part["text"] for part in content if is_text_part(part)
        )
    return "" if content is None else str(content)


def is_text_part(part: Any) -> bool:
    """Whether a part of a message's content is text, as in {"type": "text", "text": ...}."""
    if isinstance(part, str):
        return True
    return isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type") in _TEXT_PARTS


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
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), default=_as_text)
    except RecursionError as error:
        raise UserError("a value is nested too deeply", "fix or remove it") from error
    except TypeError as error:  # keys that cannot be sorted
        raise UserError(f"a value cannot be written as JSON ({error})", "fix or remove it") from error
    except ValueError as error:
        contains_itself = "ircular" in str(error)
        what = "a value contains itself" if contains_itself else "a number with too many digits"
        raise UserError(what, "fix or remove it") from error
    return text.encode("ascii") + b"\n"


def _as_text(value: Any) -> str:
    """What stands for a value that JSON does not know: of arrays, tensors and images a hash of all of it."""
    as_bytes = getattr(value.numpy() if hasattr(value, "numpy") else value, "tobytes", None)
    if as_bytes is None or getattr(value, "ndim", None) == 0:
        return str(value)
    facts = [str(getattr(value, name, "")) for name in ("dtype", "mode", "shape", "size")]
    facts = [type(value).__name__, *(fact for fact in facts if "built-in" not in fact)]
    return f"{' '.join(facts)} {hashlib.sha256(as_bytes()).hexdigest()}"


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


def check_record(record: Record, forms: Forms, form: str, generations: bool, where: str) -> str:
    """The form of a record. Raises UserError if it has none of `forms`, another than `form` (unless that is
    ""), or a field of the wrong type."""
    if generations and forms.queries is not None and forms.of(record) is None:
        forms = forms.queries
    actual = forms.of(record, generations=generations)
    if actual is None or actual != (form or actual):
        names = [f"'{name}'" + (" (null)" if value is None else "") for name, value in record.items()]
        more = f" and {len(names) - _MOST_FIELDS} more" if len(names) > _MOST_FIELDS else ""
        fields = ", ".join(names[:_MOST_FIELDS]) + more
        expected = forms.expected_query if generations else forms.expected
        if form:
            expected = f"expected {' and '.join(map(repr, forms.fields[form]))} as in the examples before it"
        raise UserError(f"{where}: found {'the fields ' + fields if fields else 'no fields'}", expected)
    for name in (*forms.fields[actual], *forms.optional.get(actual, ())):
        if record.get(name) is not None:
            forms.checks.get(name, check_text)(record[name], name, where)
    if actual == "tokens":
        _check_labels(record, where)
    return actual


def check_messages(messages: object, name: str, where: str) -> None:
    """Raises UserError for a field that is not a list of messages."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: '{name}' is {describe(messages)}, expected a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where}: {name}[{number}] is {describe(message)}, "
                "expected an object with 'role' and 'content'"
            )
        _check_unicode(message.get("role"), f"{name}[{number}].role", where)
        _check_content(message, f"{name}[{number}].content", where)


def _check_content(message: Mapping[str, Any], name: str, where: str) -> None:
    """Raises UserError for the content of a message that is neither text nor a list of parts."""
    content = message.get("content")
    if content is None and any(message.get(each) for each in _INSTEAD):
        return
    if not isinstance(content, list):
        _check_unicode(content, name, where)
        return
    for number, part in enumerate(content):
        if not isinstance(part, str | Mapping):
            raise UserError(
                f"{where}: {name}[{number}] is {describe(part)}, expected a part with 'type', such as text"
            )
        if is_text_part(part):
            text = part if isinstance(part, str) else part["text"]
            _check_unicode(text, f"{name}[{number}].text", where)


def _check_ids(ids: object, name: str, where: str) -> None:
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        raise UserError(f"{where}: '{name}' is {describe(ids)}, expected a list of token ids")


def _check_labels(record: Mapping[str, Any], where: str) -> None:
    """Raises UserError for labels or masks that do not go with the token ids."""
    ids = record["input_ids"]
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


def check_text(value: object, name: str, where: str) -> None:
    """Raises UserError for a field that is not text."""
    _check_unicode(value, f"'{name}'", where)


def _check_unicode(value: object, name: str, where: str) -> None:
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


# ------------------------------------------------------------------------------- forms of causal models

TEXTS = Forms(
    fields={
        "prompt": ("prompt", "completion"),
        "instruction": ("instruction", "output"),
        "messages": ("messages",),
        "text": ("text",),
        "tokens": ("input_ids",),
    },
    missing={"prompt": "completion", "instruction": "output"},
    expected="expected 'prompt' and 'completion', or 'instruction' and 'output' (and 'input'), "
    "or 'messages', or 'text', or 'input_ids' (and 'labels'); a map names other fields, "
    "as in prompt=question,completion=answer",
    expected_query="expected 'prompt', or 'instruction' (and 'input'), or 'messages', or 'text', or "
    "'input_ids'; a map names other fields, as in prompt=question",
    checks={"messages": check_messages, "input_ids": _check_ids},
    optional={"instruction": ("input",)},
)


def jsonl(records: Iterable[Mapping[str, Any]]) -> str:
    """The records as JSON, one a line."""
    return "".join(json_text(dict(record)) + "\n" for record in records)


def json_text(
    value: Any,
    *,
    indent: str | None = None,
    ascii_only: bool = False,
    default: Callable[[object], object] = str,
) -> str:
    """A value as JSON that UTF-8 can write: half a character (a lone surrogate) is spelled as an escape, and
    so is then all that is not ASCII. default: what is written of a value that JSON does not know."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, default=default)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, default=default)
    return text
