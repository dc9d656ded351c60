"""JSON texts that are not one record per line: a list, an object with a list, or objects one after another.

The whole text is kept in memory.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any

from rapidin.data.records import Record, is_mapping_list, json_text, to_record
from rapidin.data.sources import (
    Malformed,
    Numbered,
    Rows,
    Source,
    cannot_read,
)
from rapidin.errors import UserError

Knows = Callable[[Mapping[str, Any]], bool]  # whether a record with these fields can be read


class JsonDocument(Numbered):
    """The records of a JSON text, from lists of them or one after another; the text is in memory."""

    def __init__(self, text: str, name: str, path: str | None) -> None:
        self.path = path
        self._text, self._name = text, name
        self._starts = array("Q")
        self._lines = array("Q")
        self.cut = False  # whether an integer of too many digits in the last value was read as 0
        self._decoder = json.JSONDecoder(parse_int=self._integer)

    @property
    def lines(self) -> int:
        return len(self._starts)

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.cut = True
            return 0

    def value(self, start: int) -> tuple[Any, int]:
        """The value that begins at a position, and where it ends. Raises UserError if it is broken."""
        self.cut = False
        try:
            return self._decoder.raw_decode(self._text, start)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise UserError(f"{self._name}: broken JSON ({error.msg} at {where})") from error
        except RecursionError as error:
            raise UserError(f"{self._name}: JSON nested too deeply") from error

    def _skip(self, at: int, skipped: str = "") -> int:
        """The next position that is neither white space nor one of these characters."""
        while at < len(self._text) and (self._text[at].isspace() or self._text[at] in skipped):
            at += 1
        return at

    def _find(self, limit: int | None) -> Iterator[Record | Malformed]:
        at = self._skip(0)
        listed = self._text.startswith("[", at)
        counted = line = 0
        at += listed
        while (at := self._skip(at)) < len(self._text) and (limit is None or len(self._starts) < limit):
            if listed and self._text[at] == "]":
                at, listed = at + 1, False
                continue
            value, end = self.value(at)
            line, counted = line + self._text.count("\n", counted, at), at
            self._starts.append(at)
            self._lines.append(line)
            yield self._entry(value, len(self._starts) - 1, self._text[at:end])
            at = self._skip(end)
            if listed and self._text[at : at + 1] == ",":
                at += 1
            elif listed and self._text[at : at + 1] != "]":
                raise UserError(f"{self.where(-1)}: broken JSON (no comma or bracket after that record)")

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return self._find(limit)

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self._find(limit))

    def read(self, row: int) -> Record | Malformed:
        value, end = self.value(self._starts[row])
        return self._entry(value, row, self._text[self._starts[row] : end])

    def without(self, rows: Collection[int]) -> Iterator[bytes]:
        """The text in UTF-8 without these rows, and without what separates each from the one before it."""
        dropped, end, first = set(rows), 0, True
        for row, start in enumerate(self._starts):
            before, (_, after) = self._text[end:start], self.value(start)
            if row == 0:
                yield before.encode("utf-8", "surrogatepass")
            if row not in dropped:
                yield ((before if not first else "") + self._text[start:after]).encode(
                    "utf-8", "surrogatepass"
                )
                first = False
            end = after
        yield self._text[end:].encode("utf-8", "surrogatepass")

    def _entry(self, value: Any, row: int, text: str) -> Record | Malformed:
        where = self.where(row)
        try:
            if self.cut:
                raise UserError(f"{where}: a number with too many digits", "fix or remove that record")
            return to_record(value, where)
        except UserError as error:
            return Malformed(error, text.encode("utf-8", "backslashreplace"))

    def where(self, row: int) -> str:
        return f"{self._name}[{row if row >= 0 else len(self._starts) + row}] (line {self._lines[row] + 1})"


class ListedRows(Rows):
    """The records of one list of a JSON object."""

    def __init__(self, document: Record, member: str, text: str, path: str | None, name: str) -> None:
        super().__init__(document[member], path, name)
        self._document, self._member, self._text = document, member, text

    def without(self, rows: Collection[int]) -> Iterator[bytes]:
        """The object in UTF-8 without these rows, indented as it came."""
        dropped = set(rows)
        kept = [each for row, each in enumerate(self._document[self._member]) if row not in dropped]
        indent = re.match(r"\s*\{\s*?\n([ \t]+)", self._text)
        value = self._document | {self._member: kept}
        text = json_text(value, indent=indent and indent[1], ascii_only=self._text.isascii())
        yield text.encode() + b"\n"


def open_document(file: IO[bytes], name: str, path: str | None, knows: Knows, member: str | None) -> Source:
    """The records of a JSON text: a list, objects one after another, or an object with a list of records."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start + 1})", "save it as UTF-8") from error
    except OSError as error:
        raise cannot_read(name, error) from error
    document = JsonDocument(text, name, path)
    if not text.lstrip().startswith("{"):
        return document
    value, end = document.value(len(text) - len(text.lstrip()))
    if text[end:].strip() or (member is None and knows(value)):
        return document
    if document.cut:
        raise UserError(f"{name}: a number with too many digits", "fix or remove it")
    lists = {key: each for key, each in value.items() if is_mapping_list(each)}
    if member is None and len(lists) > 1:
        named = ", ".join(lists)
        raise UserError(f"{name} has several lists of records: {named}", f"name one: {name}:{min(lists)}")
    if not lists or (member is not None and member not in lists):
        what = f"the list '{member}'" if member is not None else "a list of records"
        raise UserError(
            f"{name} does not have {what}; its fields are {', '.join(map(repr, value)) or 'none'}"
        )
    chosen = member if member is not None else next(iter(lists))
    if path is not None and member is not None:
        path = f"{path}:{member}"
    return ListedRows(value, chosen, text, path, name if member is None else f"{name}:{member}")
