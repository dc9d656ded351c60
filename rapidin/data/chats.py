"""Chats as a tokenizer's chat template writes them: what of a record reaches the template, the forms of a
message's content, and the date that a template writes.

`rapidin.data.turns` finds in the text what the assistant wrote.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from rapidin.data.fields import ORIGINAL, chat, is_chat, plain
from rapidin.data.records import Record, is_text_part, text_of_content
from rapidin.errors import UserError, short

SENTINEL = "\ue000"  # stands for the content of a message, where that is looked for in a text

# What `chat_template_kwargs` may not set, since a text is asked for.
_RESERVED = {"conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message"}
_RESERVED |= {"return_dict", "return_tensors", "return_assistant_tokens_mask"}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CALLS, _TOOLS = "tool calls", "'tools'"  # what a text may lack
_CLOCK = "strftime_now"  # the function that gives a template the time
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]


@dataclass(frozen=True)
class Chat:
    """A chat, and what else its template reads.

    messages: as the record has them; arguments: of the template, such as `tools`; prompt: number of messages
    before the completion, all of which counts; None if the assistant's turns count. noted: number of messages
    that another chat of the same example begins with, so that notes count them once.
    """

    messages: list[Record]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prompt: int | None = None
    noted: int = 0

    @staticmethod
    def of(record: Record) -> Chat:
        """The chat of a record. Raises UserError if `tools` or `chat_template_kwargs` cannot be read."""
        messages: list[Record] = record["messages"]
        return Chat(messages, arguments_of(record), _prompt_of(record, len(messages)))

    def to(self, count: int, *more: Record) -> Chat:
        """The first messages of the chat, and others after them."""
        return Chat([*self.messages[:count], *more], self.arguments)


def _prompt_of(record: Record, count: int) -> int | None:
    """Number of messages before the completion, of a record with a conversational prompt (TRL)."""
    given = record.get(ORIGINAL)
    if not isinstance(given, Mapping) or not is_chat(given.get("prompt")):
        return None
    if given.get("completion") is None:
        return None
    before = len(chat(given["prompt"]))
    return before if 0 < before < count else None


def arguments_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the template that a record has. Raises UserError if they cannot be read."""
    made: dict[str, Any] = {}
    for name in ("tools", "documents"):
        value = _parsed(record.get(name))
        if value is None or value == []:
            continue
        if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
            made[name] = value
        elif name == "tools":  # 'documents' may be anything else
            raise UserError(
                f"'tools' is {short(repr(record[name]))}, expected a list of JSON schemas, or JSON of one",
                "fix or remove it",
            )
    more = _parsed(record.get("chat_template_kwargs"))
    if more is None or more == {}:
        return made
    if not isinstance(more, Mapping):
        raise UserError(
            f"'chat_template_kwargs' is {short(repr(more))}, expected an object", "fix or remove it"
        )
    taken = sorted(_RESERVED.intersection(more))
    if taken:
        raise UserError(f"'chat_template_kwargs' cannot set '{taken[0]}'", "remove it")
    return made | dict(more)


def _parsed(value: Any) -> Any:
    """A value of a record, which may be written as JSON."""
    if not isinstance(value, str):
        return plain(value)
    with suppress(ValueError, RecursionError):
        return json.loads(value) if value.strip() else None
    return value


class ChatTemplate:
    """The chat template of a tokenizer.

    date: what the template writes as the present, as YYYY-MM-DD with or without a time; None for the clock's.
    rendered, left_out, unplaced, unmarked: number of chats that were read so far, what of them was not, with
    its number, turns whose place is not certain, and chats that the template's own marks do not fit.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self.tokenizer, self.date = tokenizer, date
        self._dated: dict[str, str] = {}
        self.forget()

    def forget(self) -> None:
        """Begins to count anew, for other examples or the same once more."""
        self.rendered = self.unmarked = 0
        self.left_out: Counter[str] = Counter()
        self.unplaced: Counter[str] = Counter()

    @property
    def template(self) -> str | dict[str, str] | None:
        """The template's text, or several by name; None if the tokenizer has none."""
        return getattr(self.tokenizer, "chat_template", None)

    @property
    def writes_date(self) -> bool:
        """Whether the template writes the present date or time."""
        templates = self.template.values() if isinstance(self.template, dict) else [self.template or ""]
        return any(_CLOCK in each for each in templates)

    def text(self, chat: Chat, *, generation: bool = False) -> str:
        """A chat as the template writes it; generation: up to where the assistant begins to speak.

        Raises UserError if there is no template, or it rejects the chat.
        """
        if not self.template:
            raise UserError(
                "the data has chats ('messages'), but the model's tokenizer has no chat template",
                "name the tokenizer of the tuned model as `tokenizer`, or give the data as 'prompt' and "
                "'completion'",
            )
        messages = self._readable(chat.messages)
        try:
            return self._apply(messages, chat.arguments, generation)
        except _Rejected as error:
            rejected = error
            filled = [_with_content(message) for message in messages]
            if filled != messages:
                try:
                    return self._apply(filled, chat.arguments, generation)
                except _Rejected as again:
                    rejected = again
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            raise UserError(
                f"the chat template rejects a chat with the roles {roles}: {rejected}",
                "give chats in the form that the model's template expects",
            ) from rejected

    def marked(self, chat: Chat, text: str) -> list[tuple[int, int]] | None:
        """What the template marks as the assistant's by `{% generation %}`, as [start, end) in the chat's
        text; None if it has no marks, or they are not those of the text."""
        arguments = dict(chat.arguments)
        template = self._chosen(arguments)
        if not _MARKS.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**getattr(self.tokenizer, "special_tokens_map", {}), **arguments}
        messages = self._readable(chat.messages)
        for given in (messages, [_without_nulls(each) for each in messages], map(_with_content, messages)):
            try:
                rendered, indices = render_jinja_template(
                    conversations=[list(given)],
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    **variables,
                )
            except _errors():
                continue
            if rendered[0] == text:
                return [(start, end) for start, end in indices[0] if start < end]
        self.unmarked += 1
        return None

    def count(self, chat: Chat, text: str) -> None:
        """Counts a chat that is read, and what of it is not in its text: parts that are not text, and tool
        calls."""
        self.rendered += 1
        for message in chat.messages[chat.noted :]:
            content = message.get("content")
            if isinstance(content, list):
                self.left_out.update(_kind(part) for part in content if not is_text_part(part))
            self.left_out[_CALLS] += _absent(message.get("tool_calls"), text)
        if not chat.noted:
            self.left_out[_TOOLS] += bool(_absent(chat.arguments.get("tools"), text))

    def notes(self) -> list[str]:
        """What the user should know of how the chats so far were read, a line each."""
        lines = []
        left_out = {what: n for what, n in sorted(self.left_out.items()) if n}
        parts = ", ".join(f"{n:,} {what}" for what, n in left_out.items() if what not in (_CALLS, _TOOLS))
        if parts:
            lines.append(f"parts of messages that are not text are not read: {parts}")
        for what, unit in ((_CALLS, "call"), (_TOOLS, "chat")):
            if n := left_out.get(what):
                lines.append(f"the chat template does not write {what} ({n:,} {unit}{'s' * (n != 1)})")
        if self.rendered and self.writes_date:
            lines.append(
                f"the chat template writes the date, and examples are read with {self.date or 'now'}"
            )
        if n := self.unmarked:
            lines.append(
                "the marks {% generation %} of the chat template do not fit the text that the tokenizer "
                f"writes, so the assistant's turns are found in the text ({n:,} chat{'s' * (n != 1)})"
            )
        for what, n in self.unplaced.items():
            lines.append(f"{what} ({n:,} turn{'s' if n != 1 else ''})")
        return lines

    # ------------------------------------------------------------------------------------------ rendering

    def _apply(self, messages: Sequence[Record], arguments: Mapping[str, Any], generation: bool) -> str:
        arguments = dict(arguments)
        if self.date is not None and self.writes_date:
            arguments["chat_template"] = self._chosen(arguments)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generation, **arguments
                )
            )
        except _errors() as error:
            raise _Rejected(str(error) or type(error).__name__) from error

    def _chosen(self, arguments: dict[str, Any]) -> str:
        """The template of a chat, with the date; takes its name or text out of the arguments."""
        named = arguments.pop("chat_template", None)
        choose = getattr(self.tokenizer, "get_chat_template", None)
        template = str(named or self.template) if choose is None else choose(named, arguments.get("tools"))
        if self.date is None or _CLOCK not in template:
            return template
        if template not in self._dated:
            self._dated[template] = _clock_macro(self.date) + template
        return self._dated[template]

    # ---------------------------------------------------------------------------------- content of messages

    def _readable(self, messages: Sequence[Record]) -> list[Record]:
        """The messages with contents in a form that the template reads: text, or lists of parts."""
        lists = [isinstance(message.get("content"), list) for message in messages]
        if not any(lists) and self._reads_texts:
            return list(messages)
        made = []
        for message, is_list in zip(messages, lists, strict=True):
            content = message.get("content")
            if is_list and not self._reads_lists:
                message = {**message, "content": text_of_content(content)}
            elif isinstance(content, str) and not self._reads_texts:
                message = {**message, "content": [{"type": "text", "text": content}]}
            made.append(message)
        return made

    @cached_property
    def _reads_lists(self) -> bool:
        """Whether the template writes the text of a list of parts; others write the list as Python does."""
        return self._writes([{"type": "text", "text": SENTINEL}])

    @cached_property
    def _reads_texts(self) -> bool:
        """Whether the template writes a content that is text; templates for images may want lists."""
        return self._writes(SENTINEL) or not self._reads_lists

    def _writes(self, content: Any) -> bool:
        try:
            text = self._apply([{"role": "user", "content": content}], {}, False)
        except _Rejected:
            return False
        return SENTINEL in text and f"'{SENTINEL}'" not in text and f'"{SENTINEL}"' not in text


class _Rejected(Exception):
    """What a template says of a chat that it rejects."""


def _errors() -> tuple[type[Exception], ...]:
    """What `apply_chat_template` raises for a chat that the template rejects."""
    from jinja2 import TemplateError

    return TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError


def _with_content(message: Record) -> Record:
    """A message whose content is null or absent, as beside tool calls, with an empty one."""
    return message if message.get("content") is not None else {**message, "content": ""}


def _without_nulls(message: Record) -> Record:
    return {name: value for name, value in message.items() if value is not None}


def _kind(part: Any) -> str:
    return str(part.get("type") or "unnamed") if isinstance(part, Mapping) else type(part).__name__


def _absent(tools: Any, text: str) -> int:
    """How many of these tools, or calls of tools, are not named in a text."""
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, Mapping)]
    names = [str(each.get("name") or "") for each in functions if isinstance(each, Mapping)]
    return sum(name not in text for name in names)


def _clock_macro(date: str) -> str:
    """A macro in the place of the function that tells the time: each directive of its format is replaced by
    what it is at that date. Raises UserError for what is no date."""
    when = moment(date)
    values = {each: when.strftime(each) for each in _DIRECTIVES}
    steps = "".join(
        f".replace({json.dumps(each)}, {json.dumps(value)})"
        for each, value in values.items()
        if value != each
    )
    body = f'(format.replace("%%", "\\u0001"){steps}).replace("\\u0001", "%")'
    return f"{{% macro {_CLOCK}(format) %}}{{{{ {body} }}}}{{% endmacro %}}\n"


def moment(date: str) -> datetime:
    """The time of a text such as 2026-01-31 or 2026-01-31T12:00. Raises UserError for what is none."""
    try:
        return datetime.fromisoformat(date)
    except ValueError:
        raise UserError(f"'{short(date)}' is not a date", "as in 2026-01-31") from None
