"""Data sets that LLaMA-Factory's `dataset_info.json` lists, read as LLaMA-Factory reads them.

An entry says where the data is and which columns are what. Both of its formats become chats for the model's
template: `alpaca` joins instruction and input with a line end, `sharegpt` has messages with tags of its own.
With `ranking` they become preference pairs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidin.data.converted import Converted
from rapidin.data.fields import PREFERENCE, chat, merged
from rapidin.data.records import Record, describe
from rapidin.data.sources import DataNotFound, Source
from rapidin.errors import UserError, short

NAME = "dataset_info.json"

_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name")
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "assistant",
    "system_tag": "system",
}
_NOT_READ = {"kto_tag": "marks of good and bad answers", "num_samples": "a random sample"}


def is_listing(path: str | Path) -> bool:
    """Whether a file is a list of data sets of LLaMA-Factory; `datasets` writes other files of this name."""
    return bool(_entries(path))


def _entries(path: str | Path) -> dict[str, dict[str, Any]]:
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        return {}
    return value if any(place in entry for entry in value.values() for place in _PLACES) else {}


def open_listed(path: str, name: str | None, open_path: Callable[[str], Source]) -> Source:
    """The records of a data set that a `dataset_info.json` lists; the only one if `name` is None."""
    entries = _entries(path)
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    if name is None:
        names = ", ".join(list(entries)[:12])
        raise UserError(
            f"{path} lists several data sets: {names}", f"name one, as in {path}:{next(iter(entries))}"
        )
    if name not in entries:
        raise DataNotFound(f"{path} lists no data set '{name}'", f"it lists {', '.join(list(entries)[:12])}")
    entry, where = entries[name], f"{path}:{name}"
    layout = _Layout.of(entry, where)
    if "file_name" in entry:
        source = open_path(os.path.join(os.path.dirname(path), str(entry["file_name"])))
    elif "hf_hub_url" in entry:
        subset = f"/{entry['subset']}" if entry.get("subset") else ""
        source = open_path(f"hf://datasets/{entry['hf_hub_url']}{subset}:{entry.get('split', 'train')}")
    else:
        raise UserError(
            f"{where} is not a file, and not on the Hugging Face hub", "download it, and name its file"
        )
    return Converted(source, layout.read, f"{os.path.abspath(path)}:{name}")


@dataclass(frozen=True)
class _Layout:
    """Which columns of a data set are what, and how the turns of its chats are tagged."""

    formatting: str
    ranking: bool
    columns: Mapping[str, str]
    tags: Mapping[str, str]

    @staticmethod
    def of(entry: Mapping[str, Any], where: str) -> _Layout:
        """The layout that an entry describes. Raises UserError for one that cannot be read."""
        formatting = entry.get("formatting", "alpaca")
        if formatting == "openai":
            formatting = "sharegpt"
        if formatting not in _COLUMNS:
            raise UserError(f"{where}: unknown formatting '{short(formatting)}'", "use alpaca or sharegpt")
        columns, tags = entry.get("columns"), entry.get("tags") or {}
        for value, kind in ((columns or {}, "columns"), (tags, "tags")):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: '{kind}' is {describe(value)}, expected an object")
        for name, what in _NOT_READ.items():
            if entry.get(name) is not None or (columns or {}).get(name) is not None:
                raise UserError(f"{where} has '{name}', {what}, which is not read", f"remove '{name}'")
        media = [each for each in ("images", "videos", "audios") if (columns or {}).get(each)]
        if media:
            raise UserError(f"{where} has {media[0]}, which are not read", "use data of texts")
        columns = {k: v for k, v in (columns if columns is not None else _COLUMNS[formatting]).items() if v}
        if formatting == "sharegpt":
            columns = _COLUMNS["sharegpt"] | columns
        return _Layout(formatting, bool(entry.get("ranking")), columns, _TAGS | dict(tags))

    def read(self, record: Record, where: str) -> Record:
        """The record as LLaMA-Factory reads it. Raises UserError for a column that is missing or not text."""
        if self.formatting == "alpaca" and not self.ranking and "response" not in self.columns:
            return merged(record, {"text": record.get(self.columns.get("prompt", ""))})  # for pretraining
        messages = (
            self._alpaca(record, where) if self.formatting == "alpaca" else self._chat("messages", record)
        )
        if not isinstance(messages, list):
            raise UserError(
                f"{where}: '{self.columns['messages']}' is {describe(messages)}, expected messages"
            )
        system = self._column("system", record)
        first = messages[0] if messages else None
        if system and not (isinstance(first, Mapping) and first.get("role") == "system"):
            messages = [{"role": "system", "content": system}, *messages]
        tools = {"tools": _parsed(self._column("tools", record))} if self._column("tools", record) else {}
        if not self.ranking:
            return merged(record, {"messages": messages} | tools)
        answers = [self._answer(name, record, where) for name in PREFERENCE[1:]]
        return merged(record, dict(zip(PREFERENCE, (messages, *answers), strict=True)) | tools)

    def _column(self, name: str, record: Record) -> Any:
        return record.get(self.columns[name]) if name in self.columns else None

    def _chat(self, name: str, record: Record) -> Any:
        roles = {self.tags[tag]: role for tag, role in _ROLES.items()}
        return chat(self._column(name, record), roles, self.tags["role_tag"], self.tags["content_tag"])

    def _alpaca(self, record: Record, where: str) -> list[Any]:
        messages = []
        for turn in self._column("history", record) or ():
            if not isinstance(turn, list) or len(turn) != 2:
                raise UserError(
                    f"{where}: '{self.columns['history']}' has {describe(turn)}, expected pairs of texts"
                )
            messages += _turn(*turn)
        parts = [self._column(name, record) for name in ("prompt", "query")]
        for part in parts:
            if part is not None and not isinstance(part, str):
                raise UserError(f"{where}: an instruction is {describe(part)}, expected text")
        question = "\n".join(part for part in parts if part)
        answer = self._column("response", record)
        if self.ranking:
            return [*messages, _turn(question, "")[0]]
        if answer is None:
            raise UserError(f"{where}: no '{self.columns['response']}', the column of the response")
        return [*messages, *_turn(question, answer)]

    def _answer(self, name: str, record: Record, where: str) -> list[Any]:
        value = self._chat(name, record)
        if value is None:
            raise UserError(f"{where}: no '{self.columns.get(name, name)}', the column of the {name} answer")
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}]
        return value if isinstance(value, list) else [value]


def _parsed(tools: Any) -> Any:
    """Tools that are spelled as JSON, as a list."""
    try:
        return json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        return tools


def _turn(question: Any, answer: Any) -> list[Record]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
