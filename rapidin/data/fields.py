"""Records with the field names of other tools, as records of the forms in `rapidin.data.records`.

The fields of a form are added to the record's own fields, which are shown with a hit. A field that is not
read but has the name of a form's field moves into the field `original`.

    ShareGPT            {"conversations": [{"from": "human", "value": ...}, ...]}     messages
    TRL                 {"prompt": [messages], "completion": [messages]}              messages
    TRL, preferences    {"prompt", "chosen", "rejected"}, texts or lists of messages  the same, of one kind
    pairs               {"question": ..., "answer": ...} and others                   prompt, completion
    instructions        {"instruction": ..., "response": ...}                         instruction, output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidin.data.records import TEXTS, Forms, Record, record_parts
from rapidin.errors import UserError, short
from rapidin.settings import whole

ORIGINAL = "original"  # the field for what a record had under the names of a form that is not read
PREFERENCE = ("prompt", "chosen", "rejected")

_TOKENS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")
_TEXT_FIELDS = (name for fields in TEXTS.fields.values() for name in fields)
_FORM_FIELDS = {*_TEXT_FIELDS, *PREFERENCE, *_TOKENS, "input"}
_TURNS = ("system", "user", "assistant")  # of which a map makes messages
_SHOWN = {*_FORM_FIELDS, "text_pair", "label", "hotwords"}  # with the text of a hit, or not at all
_LONG = 20  # characters: a shorter value, such as a category, may stand in a text by chance
_OTHERS = ("tools", "documents", "chat_template_kwargs", "weight", "hotwords")
_TARGETS = sorted({*_FORM_FIELDS, *_TURNS, *_OTHERS})
_MAY_LACK = {"input", "system", "labels", *_OTHERS, *_TOKENS[1:]}

_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("problem", "solution"),
    ("inputs", "targets"),
    ("input", "output"),
)
_ANSWERS = ("response", "completion", "answer")  # to an instruction
_INPUTS = ("input", "context")  # of an instruction
# Fields that are part of what the model reads, but have no place beside a question and an answer.
_CONTEXTS = ("system", "system_prompt", "context", "passage", "input", "history", "choices", "options")
_CHATS = ("conversations", "conversation", "messages")
_EXAMPLE = "as in prompt=question,completion=answer"
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class FieldMap:
    """Which field of a record is read as which field of a form: {"prompt": "question"}; empty for none."""

    fields: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(value: FieldMap | Mapping[str, str] | str | None) -> FieldMap:
        """A map from a mapping, or from text as in "prompt=question,completion=answer". Raises UserError."""
        if isinstance(value, FieldMap):
            return value
        if isinstance(value, str):
            value = _parsed(value)
        fields = dict(value or {})
        for target, source in fields.items():
            if not isinstance(source, str) or not source:
                raise UserError(f"the map names no field for '{short(target)}'", _EXAMPLE)
            if target not in _TARGETS:
                raise UserError(
                    f"a map cannot make the field '{short(target)}'", f"use {', '.join(_TARGETS)}; {_EXAMPLE}"
                )
        if any(turn in fields for turn in _TURNS) and not {"user", "assistant"} <= set(fields):
            raise UserError(
                "a map that makes messages needs both turns", "as in user=question,assistant=answer"
            )
        return FieldMap(fields)

    def read(
        self, record: Record, where: str, *, generations: bool = False, forms: Forms | None = TEXTS
    ) -> Record:
        """The record with the fields of one of the forms, as far as that is known; forms: None if any record
        is read. Raises UserError for a record that lacks a field of the map, or that cannot be read without
        one."""
        if generations and forms is not None and forms.queries is not None and forms.of(record) is None:
            forms = forms.queries
        if not self.fields:
            fields = _other_fields(record, where, generations, forms) if forms is not None else {}
            return merged(record, fields) if fields else record
        made: Record = {}
        for target, source in self.fields.items():
            value = _value(record, source)
            if (
                value is _ABSENT
                and target not in _MAY_LACK
                and not (generations and target in _ANSWER_FIELDS)
            ):
                names = ", ".join(map(repr, record)) or "none"
                raise UserError(f"{where}: no field '{source}' to read as '{target}'; its fields are {names}")
            if value is not _ABSENT:
                made[target] = value
        if "user" in made:
            made = _turns(made) | {name: made[name] for name in made if name not in _TURNS}
        if forms is not None:
            made |= _other_fields(made, where, generations, forms)
        return merged(record, made)

    def knows(self, record: Mapping[str, Any]) -> bool:
        """Whether a record with these fields can be read."""
        try:
            read = self.read(dict(record), "", generations=False)
        except UserError:
            return False
        return TEXTS.of(read) is not None or all(read.get(name) is not None for name in PREFERENCE)


def _parsed(text: str) -> dict[str, str]:
    """The entries of a map's text. Raises UserError if two of them differ on one field."""
    fields: dict[str, str] = {}
    for entry in text.split(","):
        target, _, source = (part.strip() for part in entry.partition("="))
        if fields.get(target, source) != source:
            raise UserError(f"the map names two fields for '{short(target)}'", _EXAMPLE)
        if entry.strip():
            fields[target] = source
    return fields


_ABSENT = object()
_ANSWER_FIELDS = {"completion", "output", "assistant", "chosen", "rejected"}


def _value(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or of a path such as "answers.text.0"."""
    if name in record:
        return record[name]
    value: Any = record
    for step in name.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and (at := whole(step)) is not None and at < len(value):
            value = value[at]
        else:
            return _ABSENT
    return value


def _turns(made: Record) -> Record:
    messages = [
        {"role": role, "content": made[role]}
        for role in _TURNS
        if role in made and not (role != "user" and made[role] in (None, ""))
    ]
    return {"messages": messages}


def has_form(record: Record, forms: Forms | None) -> bool:
    """Whether `FieldMap.read` without a map leaves a record as it is, by a quick test that most records
    pass."""
    if forms is None:
        return True
    form = forms.of(record)
    return form is not None and all(type(record[name]) is str for name in forms.fields[form])


def merged(record: Record, made: Record) -> Record:
    """The fields of a form with the others of a record."""
    kept = {name: value for name, value in record.items() if name not in _FORM_FIELDS}
    moved = {name: value for name, value in record.items() if name in _FORM_FIELDS and value is not None}
    moved = {name: value for name, value in moved.items() if name not in made or plain(value) != made[name]}
    return kept | made | ({ORIGINAL: moved} if moved and ORIGINAL not in kept else {})


def _other_fields(record: Record, where: str, generations: bool, forms: Forms) -> Record:
    """The fields of a form that are made from a record's; none if it has them itself, or is not known."""
    form = forms.of(record)
    chats = "messages" in forms.fields
    if form == "messages" and _is_share_gpt(record["messages"]):
        return _share_gpt(record, "messages")
    if form in ("messages", "tokens"):
        return _plain_fields(record)
    answered = record.get("chosen") is not None and record.get("rejected") is not None
    if chats and form in ("prompt", None) and not answered and is_chat(record.get("prompt")):
        return _prompted_chat(record, generations)
    if answered and (form is None or ("chosen" in forms.fields[form] and _is_mixed(record))):
        return _preference(record, where)
    if form is not None:
        return {}
    for name in _CHATS if chats else ():
        if is_chat(record.get(name)):
            return _share_gpt(record, name)
    return _pair(record, where, generations, forms) if "prompt" in forms.fields else {}


def _pair(record: Record, where: str, generations: bool, forms: Forms) -> Record:
    for lacks in (False, True) if generations else (False,):
        if lacks and forms.of(record, generations=True) is not None:
            return {}
        if record.get("instruction") is not None:
            answer = next((name for name in _ANSWERS if record.get(name) is not None), None)
            if answer is not None and "instruction" in forms.fields:
                _refuse_context(record, where, ("instruction", answer), _INPUTS)
                inputs = [record[name] for name in _INPUTS if record.get(name)]
                made = {"instruction": record["instruction"], "output": record[answer]}
                return made | ({"input": inputs[0]} if inputs else {})
            continue
        for question, answer in _PAIRS:
            if record.get(question) is None or (record.get(answer) is None and not lacks):
                continue
            _refuse_context(record, where, (question, answer))
            made = {"prompt": record[question]}
            return made if record.get(answer) is None else made | {"completion": record[answer]}
    return {}


def _refuse_context(record: Record, where: str, names: tuple[str, str], read: tuple[str, ...] = ()) -> None:
    """Raises UserError for a field that the model read besides the question: without it, the example would be
    another."""
    for name in _CONTEXTS:
        if name not in (*names, *read) and record.get(name):
            raise UserError(
                f"{where}: '{name}' beside '{names[0]}' and '{names[1]}' would be ignored",
                f"map the fields that are read: system={name},user={names[0]},assistant={names[1]}, "
                f"or without it: prompt={names[0]},completion={names[1]}",
            )


# ---------------------------------------------------------------------------------------------------- chats


def plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, at any depth; other values as they are."""
    if getattr(value, "ndim", 0) and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return value


def _plain_fields(record: Record) -> Record:
    """The list fields of a record that are arrays or tuples, as lists."""
    names = [name for name in ("messages", *_TOKENS) if record.get(name) is not None]
    if all(type(record[name]) is list for name in names):
        return {}
    return {name: plain(record[name]) for name in names}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages; in an array, tuple or list, or as columns."""
    if isinstance(value, Mapping):  # a sequence of objects as older versions of datasets give it
        return {"role", "content"} <= set(value) or {"from", "value"} <= set(value)
    if not isinstance(value, list | tuple) and not getattr(value, "ndim", 0):
        return False
    return len(value) > 0 and all(isinstance(each, Mapping) for each in value)


def _is_share_gpt(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return is_chat(value) and any("from" in each and "role" not in each for each in value)


def chat(
    value: Any, roles: Mapping[str, str] = _ROLES, role_tag: str = "from", text_tag: str = "value"
) -> Any:
    """A list of messages with `role` and `content`; anything that is no list of messages as it is."""
    value = plain(value)
    if isinstance(value, Mapping) and (is_chat(value) or role_tag in value):
        columns = {name: each for name, each in value.items() if isinstance(each, list)}
        if not columns:  # a single message
            value = [value]
        else:
            length = max(map(len, columns.values()))
            value = [{name: c[n] for name, c in columns.items() if n < len(c)} for n in range(length)]
    if not isinstance(value, list):
        return value
    return [_message(each, roles, role_tag, text_tag) for each in value]


def _message(value: Any, roles: Mapping[str, str], role_tag: str, text_tag: str) -> Any:
    if not isinstance(value, Mapping) or role_tag not in value or (role_tag != "role" and "role" in value):
        return value
    others = {name: each for name, each in value.items() if name not in (role_tag, text_tag)}
    role = value[role_tag]
    role = roles.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": value.get(text_tag)} | others


def _share_gpt(record: Record, name: str) -> Record:
    messages = chat(record[name])
    system = record.get("system")
    has_system = isinstance(messages, list) and messages[:1] and messages[0].get("role") == "system"
    if isinstance(system, str) and system and isinstance(messages, list) and not has_system:
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages}


def _prompted_chat(record: Record, generations: bool) -> Record:
    """A chat whose last turns alone count. Earlier answers have the weight 0, as in OpenAI's format."""
    completion = record.get("completion")
    if completion is None and not generations:
        return {}
    prompt = chat(record["prompt"])
    if completion is None:
        return {"messages": prompt}
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    unlearnt = [each | {"weight": 0} if each.get("role") == "assistant" else each for each in prompt]
    return {"messages": [*unlearnt, *chat(completion)]} if is_chat(completion) else {}


# ---------------------------------------------------------------------------------------------- preferences


def _preference(record: Record, where: str) -> Record:
    """Prompt, chosen and rejected, all of them texts or all of them lists of messages."""
    chosen, rejected = (_listed(record[name]) for name in ("chosen", "rejected"))
    question = next(
        (n for n in ("prompt", "question", "query", "instruction") if record.get(n) is not None), ""
    )
    if question != "prompt" and question:
        _refuse_context(record, where, (question, "chosen"))
    turns = next((name for name in _CHATS[:2] if not question and is_chat(record.get(name))), question)
    prompt = chat(record.get(turns))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            chosen, rejected = ([{"role": "assistant", "content": each}] for each in (chosen, rejected))
        elif prompt is None:
            prompt, chosen, rejected = _split(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        common, chosen, rejected = _split(chosen, rejected)
        prompt = common or ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else [])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _is_mixed(record: Record) -> bool:
    """Whether prompt, chosen and rejected are neither all texts nor all lists of messages with a role."""
    values = [record[name] for name in PREFERENCE if record.get(name) is not None]
    if all(isinstance(value, str) for value in values):
        return False
    return not all(type(value) is list and not _is_share_gpt(value) for value in values)


def _listed(value: Any) -> Any:
    value = chat(value)
    return [value] if isinstance(value, Mapping) else value


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What two answers begin with, and the rest of each; a space goes with the answers, and at least one
    message stays with them."""
    most = min(len(chosen), len(rejected))
    if isinstance(chosen, list):
        most = max(0, most - 1)
    at = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    if isinstance(chosen, str) and at and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def other_columns(record: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a record that hold a single value besides its text, as texts: a source, an id, a flag.

    Empty values are left out, and so are texts that the record's prompt and completion were made of.
    """
    parts = record_parts(record)
    columns = {}
    for name, value in record.items():
        if name in _SHOWN or not isinstance(value, str | int | float):
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value).strip()
        if text and not (isinstance(value, str) and _is_part(text, parts)):
            columns[name] = text
    return columns


def _is_part(text: str, parts: Sequence[str]) -> bool:
    """Whether a column holds one of the texts, or so much of one that it is there by no chance."""
    return any(text == part.strip() or (len(text) > _LONG and text in part) for part in parts)
