"""Records of a source that another tool reads in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rapidin.data.records import Record
from rapidin.data.sources import Malformed, Source
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
