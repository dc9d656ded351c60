"""Records of a source that another tool reads in its own way, and what the files behind a source have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rapidin.data.records import Record
from rapidin.data.sources import Joined, Malformed, Source, existing
from rapidin.errors import UserError


class Converted:
    """The records of a source, each made into another by `read`, which gets the record and its location, and
    raises UserError for one that it cannot read."""

    def __init__(self, source: Source, read: Callable[[Record, str], Record], path: str) -> None:
        self._source, self._read = source, read
        self.path = path
        self.skim, self.index, self.where, self.file = source.skim, source.index, source.where, source.file

    @property
    def unconverted(self) -> Source:
        """The records as they are in the file."""
        return self._source

    @property
    def lines(self) -> int:
        return self._source.lines

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return (self._entry(entry, row) for row, entry in enumerate(self._source.scan(limit)))

    def read(self, row: int) -> Record | Malformed:
        return self._entry(self._source.read(row), row)

    def _entry(self, entry: Record | Malformed, row: int) -> Record | Malformed:
        if isinstance(entry, Malformed):
            return entry
        try:
            return self._read(entry, self.where(row))
        except UserError as error:
            return Malformed(error, repr(sorted(entry)).encode("utf-8", "backslashreplace"))


def as_in_file(source: Source, row: int) -> Record | Malformed:
    """The record of a row as its file has it, whatever another tool makes of it."""
    if isinstance(source, Joined):
        part, own = source.located(row)
        return as_in_file(part, own)
    return as_in_file(source.unconverted, row) if isinstance(source, Converted) else source.read(row)


def files_of(source: Source) -> list[str]:
    """The files and folders that a source is read from, those of a configuration included."""
    if isinstance(source, Joined):
        return [path for part in source.parts for path in files_of(part)]
    found = existing(source.path) if isinstance(source.path, str) else None
    behind = files_of(source.unconverted) if isinstance(source, Converted) else []
    return behind if found is None else [found[0], *behind]
