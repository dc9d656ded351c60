"""Sets the docstrings of rapidin as Markdown: lists of arguments, examples, and lists of fields.

An extension of griffe, which reads the package for mkdocstrings. Docstrings stay plain text in the source.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

# "name: what it is" at the start of a paragraph, or after the sentence or entry before it.
_ARGUMENT = re.compile(r"(?:(?<=^)|(?<=[.;)] ))([a-z_][a-z_0-9]*(?:, [a-z_][a-z_0-9]*)*): (?=\S)")
# What follows the last argument, if it is about errors and warnings.
_LAST = re.compile(r"(.*?)(?:(?<=[.;]) ((?:Raises|Warns) .*))?$", re.DOTALL)


def markdown(text: str, names: set[str]) -> str:
    """A docstring as Markdown. names: the arguments and fields, whose entries become a list."""
    return "\n\n".join(_paragraph(each, names) for each in re.split(r"\n\s*\n", inspect.cleandoc(text)))


def _paragraph(text: str, names: set[str]) -> str:
    if text.lstrip().startswith(">>>"):
        return f"```pycon\n{inspect.cleandoc(text)}\n```"
    lines = text.split("\n")
    if all(re.match(rf" +({'|'.join(map(re.escape, names))}): ", line) for line in lines) if names else False:
        entries = (line.strip().partition(": ") for line in lines)  # the fields of a dataclass of options
        return "\n".join(f"- **`{name}`**: {_escaped(help)}" for name, _, help in entries)
    if text.startswith("    "):
        return text  # indented code
    joined = " ".join(line.strip() for line in lines)
    joined, after = _LAST.match(joined).groups()
    starts = [match for match in _ARGUMENT.finditer(joined) if names.intersection(match[1].split(", "))]
    if not starts:
        return _escaped(text)
    ends = [match.start() for match in starts[1:]] + [len(joined)]
    entries_of = [
        f"- **`{match[1]}`**: {_escaped(joined[match.end() : end].strip().removesuffix(';'))}"
        for match, end in zip(starts, ends, strict=True)
    ]
    before = joined[: starts[0].start()].strip()
    return "\n".join(
        [*([_escaped(before), ""] if before else []), *entries_of, *(["", _escaped(after)] if after else [])]
    )


def _escaped(text: str) -> str:
    """Text whose stars, brackets and angles stay as they are, outside of code between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if n % 2 else re.sub(r"[*\[\]<>_&]", lambda match: f"&#{ord(match[0])};", part)
        for n, part in enumerate(parts)
    )


class Docstrings(griffe.Extension):
    """Reads each docstring once, after the package has been read."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        # `rapidin.settings.documented` adds the fields to the docstring when the module is imported.
        if any(str(decorator.value) == "documented" for decorator in cls.decorators) and cls.docstring:
            found = getattr(importlib.import_module(cls.module.path), cls.name)
            cls.docstring.value = inspect.getdoc(found) or ""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._set(pkg)

    def _set(self, parent: Any) -> None:
        for member in parent.members.values():
            if member.is_alias:
                continue
            if member.docstring is not None:
                member.docstring.value = markdown(member.docstring.value, _names(member))
            if member.is_module or member.is_class:
                self._set(member)


def _names(member: Any) -> set[str]:
    if member.is_function:
        return {each.name.lstrip("*") for each in member.parameters}
    if member.is_class:
        attributes = {name for name, each in member.members.items() if each.is_attribute}
        own = member.members.get("__init__")
        return attributes | ({each.name.lstrip("*") for each in own.parameters} if own else set())
    return set()
