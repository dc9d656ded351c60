"""Text files of records: JSON lines, other JSON, CSV and TSV.

Of a file of any size two integers are kept for each example; records are read on demand.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from rapidin.data.records import Record, to_record
from rapidin.data.sources import DataNotFound, Malformed, Numbered, Rows, Source, is_mapping_list
from rapidin.errors import UserError
from rapidin.files import reason

_UTF8_BOM = b"\xef\xbb\xbf"
_FIX_LINE = "fix or remove that line"
_KINDS = "give jsonl, json, csv, tsv, parquet, arrow or feather"
_FIELD_LIMIT = 1 << 40  # characters of a cell; Python's own limit of 131,072 is less than some texts have
_HEADER_BYTES = 1 << 20
_DELIMITERS = (",", "\t", ";", "|")
_CHAT = [{"role": "user", "content": "text"}]
_LIKE: dict[str, Any] = {"messages": _CHAT, "conversations": _CHAT, "input_ids": [0]}  # values of columns

Knows = Callable[[Mapping[str, Any]], bool]  # whether a record with these fields can be read


def open_text(
    file: IO[bytes], name: str, path: str | None, suffix: str, knows: Knows, member: str | None = None
) -> Source:
    """The records of a text file, of a form that its first line tells.

    file: can be read again; name: for messages; path: from where it can be opened again, if at all; suffix:
    of the file's name, such as ".csv"; member: the list that is meant, of a JSON object that has several.
    """
    first, single = _first_line(file, name)
    problem = _not_text(first)
    if problem:
        raise UserError(f"{name} {problem}")
    if suffix in (".csv", ".tsv") or not first.startswith((b"{", b"[")):
        delimiter = "\t" if suffix == ".tsv" else _delimiter(first, knows, certain=suffix == ".csv")
        if delimiter is not None:
            return DelimitedLines(file, name, path, delimiter)
    by_line = suffix in (".jsonl", ".ndjson") and not single and first.strip() not in (b"{", b"[")
    if not by_line and _is_document(first, single, knows):
        return _open_document(file, name, path, knows, member)
    if member is not None:
        raise DataNotFound(f"data not found: {name}:{member}", f"{name} has one record per line and no parts")
    return JsonLines(file, name, path)


def _first_line(file: IO[bytes], name: str) -> tuple[bytes, bool]:
    """The first line that is not blank, without its ends, and whether there is no other."""
    found = b""
    try:
        file.seek(0)
        for number, line in enumerate(file):
            line = line.removeprefix(_UTF8_BOM).strip() if number == 0 else line.strip()
            if line and found:
                return found, False
            found = found or line
            if found.startswith(b"["):
                break
        return found, True
    except OSError as error:
        raise _unreadable(name, error) from error
    finally:
        file.seek(0)


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(f"cannot read the data file {name}: {reason(error)}")


def _not_text(first: bytes) -> str | None:
    """What a file is if its first bytes are not those of UTF-8 text."""
    if first.startswith((b"\xff\xfe", b"\xfe\xff")) or first[1:2] == b"\0":
        return "is UTF-16 text, expected UTF-8; iconv -f UTF-16 -t UTF-8 converts it"
    kinds = {b"PK\x03\x04": "a zip archive (or a spreadsheet)", b"SQLite format": "an SQLite database"}
    kinds |= {b"%PDF": "a PDF", b"\x80\x04": "a Python pickle", b"\x89HDF": "an HDF5 file"}
    for magic, kind in kinds.items():
        if first.startswith(magic):
            return f"is {kind}, expected jsonl, json, csv, tsv, parquet or arrow; export it as one of them"
    if first[257:262] == b"ustar":
        return "is a tar archive; unpack it, and name its files"
    return None


def _delimiter(first: bytes, knows: Knows, *, certain: bool) -> str | None:
    """The delimiter of a table whose header is this line; None if it is no table. certain: it is one."""
    header = first[:_HEADER_BYTES].decode("utf-8", "replace")
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            continue
        if len(names) > 1 - certain and knows({name: _LIKE.get(name, "text") for name in names}):
            return delimiter
    if not certain:
        return None
    return next((each for each in _DELIMITERS if each in header), ",")


def _is_document(first: bytes, single: bool, knows: Knows) -> bool:
    """Whether a file that begins with this line is JSON that is not one record per line."""
    if first.startswith(b"["):
        return True
    if not first.startswith(b"{"):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):  # an object that begins here and ends in another line
        return first.endswith((b"{", b"[", b","))
    return single and not knows(value) and any(map(is_mapping_list, value.values()))


# ----------------------------------------------------------------------------------- rows at known offsets


class _Located:
    """Rows of a file by their offsets. Subclasses find them, and parse one."""

    def __init__(self, file: IO[bytes], name: str, path: str | None) -> None:
        self.path = path
        self.lines = 0
        self._file = file
        self._name = name
        self._offsets = array("Q")
        self._lines = array("Q")

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        raise NotImplementedError

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self.scan(limit))

    def _parse(self, row: int) -> Record | Malformed:
        """The record that begins where the file stands."""
        raise NotImplementedError

    def read(self, row: int) -> Record | Malformed:
        try:
            self._file.seek(self._offsets[row])
            return self._parse(row)
        except OSError as error:
            raise _unreadable(self._name, error) from error

    def index(self, row: int) -> int:
        return self._lines[row]

    def where(self, row: int) -> str:
        return f"{self._name}, line {self._lines[row] + 1}"

    def file(self, row: int) -> str | None:
        return None if self.path is None else self._name

    def _is_full(self, limit: int | None) -> bool:
        return limit is not None and len(self._offsets) >= limit

    def _found(self, offset: int, line: int) -> int:
        """Records where a row begins; its number."""
        self._offsets.append(offset)
        self._lines.append(line)
        return len(self._offsets) - 1


class JsonLines(_Located):
    """One JSON object per line. Blank lines are no rows."""

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return (self._entry(line, row) for row, line in enumerate(self._find(limit)))

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self._find(limit))

    def _find(self, limit: int | None) -> Iterator[bytes]:
        """Each line that is not blank; its offset and number are recorded."""
        offset = 0
        try:
            self._file.seek(0)
            for number, line in enumerate(self._file):
                if self._is_full(limit):
                    return
                self.lines = number + 1
                start, offset = offset, offset + len(line)
                if number == 0 and line.startswith(_UTF8_BOM):
                    line = line[len(_UTF8_BOM) :]
                    start += len(_UTF8_BOM)
                if line.strip():
                    self._found(start, number)
                    yield line
        except OSError as error:
            raise _unreadable(self._name, error) from error

    def _parse(self, row: int) -> Record | Malformed:
        return self._entry(self._file.readline(), row)

    def _entry(self, line: bytes, row: int) -> Record | Malformed:
        try:
            return _parse_line(line, self.where(row), first=row == 0)
        except UserError as error:
            return Malformed(error, line)


def _parse_line(line: bytes, where: str, *, first: bool) -> Record:
    """The record of a line of jsonl; first: whether it is the file's first. Raises UserError if it is not one
    JSON object."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte {error.start + 1} of the line)",
            "save the file as UTF-8, one JSON object per line",
        ) from error
    except json.JSONDecodeError as error:
        if first and not line.lstrip().startswith((b"{", b'"')):
            raise UserError(f"{where}: not JSON, expected one JSON object per line", _KINDS) from error
        raise UserError(f"{where}: broken JSON ({error.msg} at column {error.colno})", _FIX_LINE) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply", _FIX_LINE) from error
    except ValueError as error:  # Python limits integers to some thousand digits
        raise UserError(f"{where}: a number with too many digits", _FIX_LINE) from error
    return to_record(record, where)


class DelimitedLines(_Located):
    """CSV or TSV with a header: every cell is text. Quoted cells may contain line ends."""

    def __init__(self, file: IO[bytes], name: str, path: str | None, delimiter: str) -> None:
        super().__init__(file, name, path)
        self._delimiter = delimiter
        self._header: list[str] = []
        csv.field_size_limit(_FIELD_LIMIT)

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        try:
            self._file.seek(0)
            lines = _Lines(self._file)
            rows = self._reader(lines)
            while not self._is_full(limit):
                offset, number = lines.offset, lines.number
                try:
                    cells = next(rows, None)
                    problem = None
                except csv.Error as error:
                    cells, problem = [], error
                self.lines = lines.number
                if cells is None:
                    return
                if not cells and problem is None:
                    continue
                if not self._header:
                    self._header = self._checked_header(cells, problem)
                    continue
                yield self._entry(cells, problem, self._found(offset, number), lines)
                lines.taken.clear()
        except OSError as error:
            raise _unreadable(self._name, error) from error

    def _parse(self, row: int) -> Record | Malformed:
        lines = _Lines(self._file)
        try:
            return self._entry(next(self._reader(lines), []), None, row, lines)
        except csv.Error as error:
            return self._entry([], error, row, lines)

    def _reader(self, lines: _Lines) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _checked_header(self, names: list[str], problem: csv.Error | None) -> list[str]:
        if problem is not None:
            raise UserError(f"{self._name}: the header cannot be read ({problem})")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{self._name}: two columns are named '{twice[0]}'", "rename one of them")
        return names

    def _entry(
        self, cells: list[str], problem: csv.Error | None, row: int, lines: _Lines
    ) -> Record | Malformed:
        where = self.where(row)
        what = None
        if problem is not None:
            what = (
                "a quoted cell does not end" if "end of data" in str(problem) else f"broken CSV ({problem})"
            )
        elif len(cells) != len(self._header):
            what = f"{len(cells)} cells, but the header has {len(self._header)}"
        elif not all(cell.isascii() or _is_unicode(cell) for cell in cells):
            what = "not UTF-8 text"
        if what is None:
            return {name: _cell(cell) for name, cell in zip(self._header, cells, strict=True)}
        return Malformed(UserError(f"{where}: {what}", _FIX_LINE), b"".join(lines.taken))


def _is_unicode(text: str) -> bool:
    """Whether a text has no byte that was not decoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _cell(text: str) -> Any:
    """The text of a cell, or the list of objects or numbers that it spells as JSON, such as a chat."""
    if text.startswith("[") and text.endswith("]"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if is_mapping_list(value) or (value and all(type(each) is int for each in value)):
            return value
    return text


class _Lines:
    """The lines of a file as text, for csv.reader. number, offset: of the next one; taken: those that were
    read, as bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.offset = file.tell()
        self.number = 0
        self.taken: list[bytes] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        self.taken.append(line)
        if self.number == 1 and line.startswith(_UTF8_BOM):
            line = line[len(_UTF8_BOM) :]
        return line.decode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------ JSON documents


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


def _open_document(file: IO[bytes], name: str, path: str | None, knows: Knows, member: str | None) -> Source:
    """The records of a JSON text: a list, objects one after another, or an object with a list of records."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start + 1})", "save it as UTF-8") from error
    except OSError as error:
        raise _unreadable(name, error) from error
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
    return Rows(lists[chosen], path, name if member is None else f"{name}:{member}")


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, without that of a compression."""
    base, suffix = os.path.splitext(name.lower())
    return os.path.splitext(base)[1] if suffix in (".gz", ".zst", ".zstd", ".xz", ".bz2") else suffix
