"""Data sets that an Axolotl configuration names, read as Axolotl reads them.

The entries of `datasets` say where the data is and what its fields are. Types that are read: `alpaca`,
`completion`, `chat_template`, `sharegpt`, an object with fields and formats of its own, and none, for token
ids. Others are refused by their name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rapidin.data.converted import Converted
from rapidin.data.fields import chat, merged
from rapidin.data.records import Record, describe
from rapidin.data.sources import DataNotFound, Joined, Source
from rapidin.errors import UserError, needs, short
from rapidin.files import reason
from rapidin.settings import whole

SUFFIXES = (".yml", ".yaml")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system", "tool": "tool"}
_NOT_READ = {
    "shards": "a part of the data",
    "preprocess_shards": "parts of the data",
    "message_field_training_detail": "parts of messages without a loss",
    "split_thinking": "thoughts as fields of their own",
    "drop_system_message": "chats without their system messages",
    "input_transform": "a change of the records",
    "revision": "a certain revision of the data",
}
_FORMATS = ("json", "csv", "parquet", "arrow")  # what `path` says where `data_files` has the files
_PART = re.compile(r"[\[\]+%]")  # in a split: train[:10%], train+test
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def open_config(path: str, number: str | None, open_path: Callable[[str], Source]) -> Source:
    """The records of the data sets that a configuration names, one after another; number: of the one that is
    meant, from 0. Raises UserError if the file names none, or one that cannot be read."""
    config = _read(path)
    entries = config.get("datasets")
    if not isinstance(entries, list) or not all(isinstance(each, Mapping) for each in entries) or not entries:
        raise UserError(f"{path} has no list 'datasets', as an Axolotl configuration has", "name the data")
    chosen = range(len(entries))
    if number is not None:
        at = whole(number)
        if at is None or at not in chosen:
            raise DataNotFound(f"{path} has no data set {short(number)}", f"it has 0 to {len(entries) - 1}")
        chosen = range(at, at + 1)
    sources = [_open_entry(config, entries[n], path, n, open_path) for n in chosen]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _read(path: str) -> Mapping[str, Any]:
    yaml = needs("yaml", "reading an Axolotl configuration", "data")
    try:
        with open(path, encoding="utf-8") as file:
            value = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is {describe(value)}, expected the settings of an Axolotl configuration")
    return value


def _open_entry(
    config: Mapping[str, Any],
    entry: Mapping[str, Any],
    path: str,
    number: int,
    open_path: Callable[[str], Source],
) -> Source:
    where = f"{path}:{number}"
    for name, what in _NOT_READ.items():
        if entry.get(name):
            raise UserError(f"{where} has '{name}', {what}, which is not read", f"remove '{name}'")
    if not isinstance(entry.get("path"), str):
        raise UserError(f"{where} has no 'path'")
    read = _reader(entry, bool(config.get("train_on_inputs")), where)
    sources = [open_path(each) for each in _located(entry, os.path.dirname(path), where)]
    if not sources:
        raise UserError(f"{where} names no 'data_files'")
    source = sources[0] if len(sources) == 1 else Joined(sources)
    return Converted(source, read, f"{os.path.abspath(path)}:{number}")


def _located(entry: Mapping[str, Any], folder: str, where: str) -> list[str]:
    """The files, the folder or the name on the hub of an entry. Axolotl looks for files where it is started;
    they are looked for beside the configuration too."""
    named, files, split = str(entry["path"]), entry.get("data_files"), str(entry.get("split") or "")
    if _PART.search(split):
        raise UserError(f"{where} has the split '{short(split)}', a part of the data, which is not read")
    here = _beside(named, folder)
    if files is not None:
        if here is None and named not in _FORMATS:
            raise UserError(
                f"{where} has 'data_files' of a data set on the hub, which are not read",
                "download them, and name them with the path json",
            )
        named_files = _listed(files, "data_files", where)
        _check_split(split, "files", where)
        return [_beside(each, folder) or each for each in named_files]
    if here is not None:
        if os.path.isfile(os.path.join(here, "dataset_dict.json")) and split:
            return [f"{here}:{split}"]
        _check_split(split, here, where)
        return [here]
    if named.count("/") != 1:
        return [named]
    return ["/".join([named, *_listed(entry.get("name") or [], "name", where)]) + f":{split or 'train'}"]


def _beside(name: str, folder: str) -> str | None:
    """A file or folder where the process was started, or beside the configuration."""
    return next((each for each in (name, os.path.join(folder, name)) if os.path.exists(each)), None)


def _check_split(split: str, what: str, where: str) -> None:
    """Raise UserError for a split that files cannot be told to have."""
    if split not in ("", "train"):
        raise UserError(f"{where} has the split '{short(split)}' of {what}", "name the files of that split")


def _listed(value: Any, name: str, where: str) -> list[str]:
    """A list of texts, of which one may stand alone."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise UserError(f"{where}: '{name}' is {describe(value)}, expected text or a list of texts")
    return values


def _object(entry: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = entry.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: '{name}' is {describe(value)}, expected an object")
    return value


# ------------------------------------------------------------------------------------------------- records


def _reader(entry: Mapping[str, Any], on_inputs: bool, where: str) -> Callable[[Record, str], Record]:
    """What reads a record of a data set. Raises UserError for a type that is not read."""
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        return partial(_instruction, _Format.of(kind, where), on_inputs)
    if kind is None or kind == "":
        return lambda record, where: record
    name, _, variant = str(kind).partition(":")
    if variant:
        raise UserError(f"{where} has the type '{short(kind)}', which is not read", "leave out its variant")
    if name == "alpaca":
        return partial(_instruction, _Format(_WITH_INPUT, _WITHOUT_INPUT), on_inputs)
    if name == "completion":
        return partial(_completion, str(entry.get("field") or "text"))
    if name in ("chat_template", "sharegpt"):
        if on_inputs:
            raise UserError(f"{where} has chats, and 'train_on_inputs' is true, which is not read for chats")
        return _Chats.of(entry, where, share_gpt=name == "sharegpt").read
    raise UserError(
        f"{where} has the type '{short(kind)}', which is not read",
        "use alpaca, completion, chat_template, or an object with fields and formats; or name the fields of "
        "the data with `map`",
    )


@dataclass(frozen=True)
class _Format:
    """How instruction, input and system prompt become a prompt, and the fields that they are in."""

    with_input: str
    without_input: str
    system_prompt: str = ""
    system_format: str = "{system}"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = ""

    @staticmethod
    def of(kind: Mapping[str, Any], where: str) -> _Format:
        """The format that a type of one's own describes."""
        with_input = kind.get("format")
        for name in ("format", "no_input_format", "system_format", "system_prompt"):
            if kind.get(name) is not None and not isinstance(kind[name], str):
                raise UserError(f"{where}: '{name}' is {describe(kind[name])}, expected text")
        if not with_input:
            raise UserError(f"{where}: its type has no 'format'")
        return _Format(
            with_input,
            kind.get("no_input_format") or with_input,
            kind.get("system_prompt") or "",
            kind.get("system_format") or "{system}",
            kind.get("field_instruction") or "instruction",
            kind.get("field_input") or "input",
            kind.get("field_output") or "output",
            kind.get("field_system") or "",
        )

    def prompt(self, record: Record, where: str) -> str:
        """The prompt of a record. Raises UserError for a format that names something else."""
        values = {"instruction": record.get(self.instruction), "input": record.get(self.input) or ""}
        system = (record.get(self.system) if self.system in record else None) or self.system_prompt
        if not isinstance(values["instruction"], str):
            raise UserError(f"{where}: '{self.instruction}' is {describe(values['instruction'])}")
        try:
            start = self.system_format.format(system=system) if system else ""
            turn = self.with_input if values["input"] else self.without_input
            return start + turn.format(**values)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"{where}: a format of the configuration cannot be filled in: {error}") from None


def _instruction(form: _Format, on_inputs: bool, record: Record, where: str) -> Record:
    prompt, answer = form.prompt(record, where), record.get(form.output)
    if not isinstance(answer, str):
        raise UserError(f"{where}: '{form.output}' is {describe(answer)}, expected text")
    if on_inputs:
        return merged(record, {"text": prompt + answer})
    return merged(record, {"prompt": prompt, "completion": answer})


def _completion(name: str, record: Record, where: str) -> Record:
    if not isinstance(record.get(name), str):
        raise UserError(f"{where}: '{name}' is {describe(record.get(name))}, expected text")
    return merged(record, {"text": record[name]})


@dataclass(frozen=True)
class _Chats:
    """How the messages of a chat are found and named."""

    messages: str
    role: str
    content: str
    roles: Mapping[str, str]
    system: str
    training: str | None

    @staticmethod
    def of(entry: Mapping[str, Any], where: str, *, share_gpt: bool) -> _Chats:
        """What an entry says. Raises UserError where other tokens than the assistant's would have a loss."""
        names = _object(entry, "message_property_mappings", where)
        others = [name for name, field in names.items() if name not in ("role", "content", field)]
        if others:
            raise UserError(f"{where} maps '{short(others[0])}' of messages, which is not read")
        roles = {
            source: role
            for role, all_of in _object(entry, "roles", where).items()
            for source in _listed(all_of, f"roles: {role}", where)
        }
        given = entry.get("roles_to_train")
        named = ["assistant"] if given is None else _listed(given, "roles_to_train", where)
        trained = {(roles or _ROLES).get(role, role) for role in named}
        if trained != {"assistant"}:
            whose = ", ".join(sorted(trained)) or "no role, but those that are marked"
            raise UserError(f"{where} trains on the turns of {whose}, which is not read")
        for name in ("train_on_eos", "train_on_eot"):
            # all: the ends of the other turns have a loss too.
            if entry.get(name) not in (None, "turn"):
                raise UserError(f"{where} has '{name}: {short(entry[name])}', which is not read", "use turn")
        return _Chats(
            entry.get("field_messages") or ("conversations" if share_gpt else "messages"),
            entry.get("message_field_role") or names.get("role") or ("from" if share_gpt else "role"),
            entry.get("message_field_content")
            or names.get("content")
            or ("value" if share_gpt else "content"),
            roles or _ROLES,
            entry.get("field_system") or "system",
            entry.get("message_field_training"),
        )

    def read(self, record: Record, where: str) -> Record:
        """The record with its chat as messages. Raises UserError if it has none."""
        messages = chat(record.get(self.messages), self.roles, self.role, self.content)
        if not isinstance(messages, list):
            raise UserError(f"{where}: '{self.messages}' is {describe(messages)}, expected messages")
        if self.training is not None:
            for n, each in enumerate(messages):
                marked = isinstance(each, Mapping) and each.get(self.training)
                if marked and each.get("role") != "assistant":
                    raise UserError(
                        f"{where}: {self.messages}[{n}] is marked by '{self.training}', but only the "
                        "assistant's turns are read as having a loss"
                    )
            messages = [
                each | {"train": each[self.training]} if self.training in each else each for each in messages
            ]
        system = record.get(self.system)
        if isinstance(system, str) and system and not (messages and messages[0].get("role") == "system"):
            messages = [{"role": "system", "content": system}, *messages]
        return merged(record, {"messages": messages})
