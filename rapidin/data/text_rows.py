"""Text files of records: JSON lines, CSV and TSV; other JSON is in `json_document`.

Of a file of any size two integers are kept for each example; records are read on demand.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Collection, Iterator
from typing import IO, Any

from rapidin.data.json_document import Knows, open_document
from rapidin.data.records import Record, is_mapping_list, to_record
from rapidin.data.sources import DataNotFound, Malformed, Source, cannot_read
from rapidin.errors import UserError

_UTF8_BOM = b"\xef\xbb\xbf"
_FIX_LINE = "fix or remove that line"
_KINDS = "give jsonl, json, csv, tsv, parquet, arrow or feather"
_FIELD_LIMIT = 1 << 40  # characters of a cell; Python's own limit of 131,072 is less than some texts have
_HEADER_BYTES = 1 << 20
_DELIMITERS = (",", "\t", ";", "|")
_CHAT = [{"role": "user", "content": "text"}]
_LIKE: dict[str, Any] = {"messages": _CHAT, "conversations": _CHAT, "input_ids": [0]}  # values of columns


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
        return open_document(file, name, path, knows, member)
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
        raise cannot_read(name, error) from error
    finally:
        file.seek(0)


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


class LocatedRows:
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
            raise cannot_read(self._name, error) from error

    def index(self, row: int) -> int:
        return self._lines[row]

    def where(self, row: int) -> str:
        return f"{self._name}, line {self._lines[row] + 1}"

    def file(self, row: int) -> str | None:
        return None if self.path is None else self._name

    def without(self, rows: Collection[int]) -> Iterator[bytes]:
        """The bytes of the file without those of these rows. Blank lines belong to the row before them."""
        dropped = set(rows)
        ends = [*self._offsets[1:], None][: len(self._offsets)]
        try:
            self._file.seek(0)
            yield self._file.read(self._offsets[0] if self._offsets else -1)
            for row, (start, end) in enumerate(zip(self._offsets, ends, strict=True)):
                if row not in dropped:
                    self._file.seek(start)
                    yield self._file.read(-1 if end is None else end - start)
        except OSError as error:
            raise cannot_read(self._name, error) from error

    def _is_full(self, limit: int | None) -> bool:
        return limit is not None and len(self._offsets) >= limit

    def _found(self, offset: int, line: int) -> int:
        """Records where a row begins; its number."""
        self._offsets.append(offset)
        self._lines.append(line)
        return len(self._offsets) - 1


class JsonLines(LocatedRows):
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
            raise cannot_read(self._name, error) from error

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


class DelimitedLines(LocatedRows):
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
            raise cannot_read(self._name, error) from error

    def _parse(self, row: int) -> Record | Malformed:
        lines = _Lines(self._file)
        try:
            return self._entry(next(self._reader(lines), []), None, row, lines)
        except csv.Error as error:
            return self._entry([], error, row, lines)

    @property
    def delimiter(self) -> str:
        """What separates two cells."""
        return self._delimiter

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


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, without that of a compression."""
    base, suffix = os.path.splitext(name.lower())
    return os.path.splitext(base)[1] if suffix in (".gz", ".zst", ".zstd", ".xz", ".bz2") else suffix
