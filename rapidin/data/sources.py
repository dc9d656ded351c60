"""What a source of records is, and the two simplest: rows in memory, and several sources joined.

A source gives records by row and knows where each row comes from. Whether a record is of a known form is not
its concern (`rapidin.data.examples` checks that). `rapidin.data.opening` recognises what it is given.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rapidin.data.records import Record, to_record
from rapidin.errors import UserError
from rapidin.files import reason

_Each = TypeVar("_Each")


class DataNotFound(UserError):
    """There is no data with the given name."""


def cannot_read(name: str, error: OSError) -> UserError:
    """The error for a file of data that the system does not let read."""
    return UserError(f"cannot read the data file {name}: {reason(error)}")


@dataclass(frozen=True)
class Files:
    """Several files or folders of examples, read one after another as if they were one."""

    paths: tuple[str, ...]


def join_paths(paths: str | Sequence[str] | None) -> str | Files | None:
    """One path or several in the form that `open_examples` takes; None for none."""
    if not paths:
        return None
    if isinstance(paths, str):
        return paths
    return paths[0] if len(paths) == 1 else Files(tuple(paths))


def existing(path: str) -> tuple[str, str | None] | None:
    """The file or folder that a path names, and which of its parts, as in file:part; None if not there."""
    if os.path.exists(path):
        return path, None
    whole, colon, member = path.rpartition(":")
    return (whole, member) if colon and os.path.exists(whole) else None


@dataclass(frozen=True)
class Malformed:
    """An example that cannot be read. error: the reason; content: the bytes of the line or value."""

    error: UserError
    content: bytes


class Source(Protocol):
    """Rows of records. `scan` or `skim` is called once, before anything else."""

    @property
    def path(self) -> str | list[str] | None:
        """Absolute path of the file or folder, a list for several, None for data that cannot be read again:
        data in memory and standard input."""

    @property
    def lines(self) -> int:
        """Number of lines once the end has been reached; for sources without lines, of rows."""

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        """All records in order, at most `limit` of them."""

    def skim(self, limit: int | None) -> int:
        """Locate and count the records, at most `limit` of them, without parsing them."""

    def read(self, row: int) -> Record | Malformed:
        """The record of a row."""

    def index(self, row: int) -> int:
        """The line number of a row, from 0; for sources without lines, the row."""

    def where(self, row: int) -> str:
        """The location of a row for a message, such as "train.jsonl, line 3"."""

    def file(self, row: int) -> str | None:
        """The file or folder of a row as it was named, None for data in memory."""


def unreadable(error: UserError, value: object) -> Malformed:
    """A value in memory that is no record."""
    try:
        content = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a value that contains itself
        content = type(value).__name__
    return Malformed(error, content.encode("utf-8", "backslashreplace"))


def as_record(value: Any, where: str) -> Record | Malformed:
    """A row in memory: a mapping, a text, or a pair of texts."""
    if isinstance(value, str):
        value = {"text": value}
    elif is_pair(value):
        value = {"prompt": value[0], "completion": value[1]}
    try:
        return to_record(value, where)
    except UserError as error:
        return unreadable(error, value)


def is_pair(value: object) -> bool:
    """Whether a value is a tuple of prompt and completion."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, str) for each in value)


class Numbered:
    """Rows that are located by their number in what `_name` names.

    path: from where it can be opened again, None if it cannot.
    """

    path: str | None
    _name: str

    def index(self, row: int) -> int:
        return row

    def where(self, row: int) -> str:
        return f"{self._name}[{row}]"

    def file(self, row: int) -> str | None:
        return None if self.path is None else self._name


class Rows(Numbered):
    """A list of records or a HF dataset: anything with a length and rows."""

    def __init__(self, rows: Any, path: str | None, name: str) -> None:
        self.path = path
        self._rows = rows
        self._name = name

    @property
    def lines(self) -> int:
        return len(self._rows)

    @property
    def held(self) -> Any:
        """The list or dataset itself."""
        return self._rows

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return (self.read(row) for row in range(self.skim(limit)))

    def skim(self, limit: int | None) -> int:
        return len(self._rows) if limit is None else min(limit, len(self._rows))

    def read(self, row: int) -> Record | Malformed:
        return as_record(self._rows[row], self.where(row))


class Joined:
    """Several sources, one after another; line numbers continue from one to the next."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._first_rows: list[int] = []  # of each source
        self._first_lines: list[int] = []

    @property
    def parts(self) -> Sequence[Source]:
        """The sources."""
        return self._sources

    @property
    def path(self) -> list[str] | None:
        """The paths of all; None if one of them cannot be read again."""
        paths: list[str] = []
        for source in self._sources:
            if source.path is None:
                return None
            paths += [source.path] if isinstance(source.path, str) else source.path
        return paths

    @property
    def lines(self) -> int:
        return sum(source.lines for source in self._sources)

    def _each(
        self, limit: int | None, read: Callable[[Source, int | None], Iterator[_Each]]
    ) -> Iterator[_Each]:
        """What `read` gives of each source, until `limit` rows are reached."""
        done = lines = 0
        for source in self._sources:
            if done == limit:
                return
            self._first_rows.append(done)
            self._first_lines.append(lines)
            for each in read(source, None if limit is None else limit - done):
                done += 1
                yield each
            lines += source.lines

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return self._each(limit, lambda source, left: source.scan(left))

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self._each(limit, lambda source, left: iter(range(source.skim(left)))))

    def divided(self, rows: Iterable[int]) -> list[tuple[Source, list[int]]]:
        """Each source with those of the rows that are its own, numbered as it numbers them."""
        parts: list[tuple[Source, list[int]]] = [(source, []) for source in self._sources]
        for row in rows:
            n, own = self._locate(row)
            parts[n][1].append(own)
        return parts

    def located(self, row: int) -> tuple[Source, int]:
        """The source of a row, and the row in that source."""
        n, own = self._locate(row)
        return self._sources[n], own

    def _locate(self, row: int) -> tuple[int, int]:
        """The number of a row's source, and the row in that source."""
        n = bisect_right(self._first_rows, row) - 1
        return n, row - self._first_rows[n]

    def read(self, row: int) -> Record | Malformed:
        source, own = self.located(row)
        return source.read(own)

    def index(self, row: int) -> int:
        n, row = self._locate(row)
        return self._first_lines[n] + self._sources[n].index(row)

    def where(self, row: int) -> str:
        source, own = self.located(row)
        return source.where(own)

    def file(self, row: int) -> str | None:
        source, own = self.located(row)
        return source.file(own)
