"""Tables of Apache Arrow: Parquet and Feather files, Arrow files and streams, and tables in memory.

Columns are read by groups of rows; the last group stays in memory, so that rows in order cost little.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Any

from rapidin.data.records import Record
from rapidin.data.sources import Malformed, Numbered
from rapidin.errors import UserError, needs

_AT_ONCE = 64  # rows that are converted together

# The first bytes of the files that are read here.
PARQUET, ARROW, STREAM, OLD_FEATHER = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"FEA1"


@dataclass(frozen=True)
class TableFile:
    """What a file of a table is. magic: its first bytes; schema: of its columns; codec: the compression of a
    Parquet file's columns."""

    magic: bytes
    schema: Any
    codec: str = "NONE"


class ArrowRows(Numbered):
    """Rows of tables. sizes: how many rows each table has; load: the table of a number; form: of the file
    that they are in, None in memory."""

    def __init__(
        self,
        sizes: Sequence[int],
        load: Callable[[int], Any],
        name: str,
        path: str | None = None,
        form: TableFile | None = None,
    ) -> None:
        self.path, self.form = path, form
        self.lines = sum(sizes)
        self._ends = list(accumulate(sizes))
        self._load, self._name = load, name
        self._table: tuple[int, Any] = (-1, None)
        self._valid: set[int] = set()  # numbers of tables that were checked
        self._block: tuple[int, list[Record | Malformed]] = (-1, [])

    @staticmethod
    def of_table(table: Any) -> ArrowRows:
        """The rows of a table in memory."""
        _check_names(table.column_names, "the data frame")
        return ArrowRows([table.num_rows], lambda _: table, "data frame")

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return (self.read(row) for row in range(self.skim(limit)))

    def skim(self, limit: int | None) -> int:
        return self.lines if limit is None else min(limit, self.lines)

    def read(self, row: int) -> Record | Malformed:
        number = bisect_right(self._ends, row)
        first = self._ends[number - 1] if number else 0
        start = first + (row - first) // _AT_ONCE * _AT_ONCE
        if self._block[0] != start:
            rows = range(start, min(start + _AT_ONCE, self._ends[number]))
            self._block = start, self._converted(self._table_of(number), start - first, rows)
        entry = self._block[1][row - start]
        return dict(entry) if isinstance(entry, dict) else entry

    def without(self, rows: Collection[int]) -> Iterator[Any]:
        """The tables without these rows: record batches or tables, as they were loaded, in order."""
        import pyarrow as pa

        dropped, first = set(rows), 0
        for number, end in enumerate(self._ends):
            kept = [row - first for row in range(first, end) if row not in dropped]
            table = self._table_of(number)
            yield table if len(kept) == end - first else table.take(pa.array(kept, pa.int64()))
            first = end

    def _table_of(self, number: int) -> Any:
        if self._table[0] != number:
            self._table = (-1, None)  # before the next one: two may not fit into memory
            with _refusals(self._name):
                table = self._load(number)
                if number not in self._valid:  # a damaged offset would read memory that is not the table's
                    table.validate(full=True)
                    self._valid.add(number)
                self._table = number, table
        return self._table[1]

    def _converted(self, table: Any, start: int, rows: range) -> list[Record | Malformed]:
        try:
            return list(table.slice(start, len(rows)).to_pylist())
        except (ValueError, ArithmeticError, LookupError):  # a time that Python lacks; the others are good
            return [self._single(table, start + n, row) for n, row in enumerate(rows)]

    def _single(self, table: Any, at: int, row: int) -> Record | Malformed:
        try:
            return dict(table.slice(at, 1).to_pylist()[0])
        except (ValueError, ArithmeticError, LookupError) as error:
            return Malformed(UserError(f"{self.where(row)}: {error}"), str(table.slice(at, 1)).encode())


def is_table(first: bytes) -> bool:
    """Whether a file with these first bytes is one that `open_table` reads."""
    return first.startswith((PARQUET, ARROW, STREAM, OLD_FEATHER))


def open_table(file: IO[bytes], name: str, path: str | None, plain: str | None) -> ArrowRows:
    """The rows of a Parquet, Feather or Arrow file. plain: its path if it is not compressed as a whole, so
    that it can be mapped into memory."""
    needs("pyarrow", f"reading {name}", "data")
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = file.read(8)
    file.seek(0)
    if first.startswith(OLD_FEATHER):
        raise UserError(f"{name} has version 1 of Feather", "save it as Feather 2 or Parquet")
    with _refusals(name):
        source = pa.memory_map(plain) if plain is not None else file
        if first.startswith(PARQUET):
            parquet = pq.ParquetFile(source)
            _check_names(parquet.schema_arrow.names, name)
            sizes = [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)]
            codec = _codec(parquet.metadata)
            form = TableFile(PARQUET, parquet.schema_arrow, codec)
            return ArrowRows(sizes, parquet.read_row_group, name, path, form)
        if first.startswith(ARROW):
            reader = pa.ipc.open_file(source)
            _check_names(reader.schema.names, name)
            sizes = [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)]
            return ArrowRows(sizes, reader.get_batch, name, path, TableFile(ARROW, reader.schema))
        table = pa.ipc.open_stream(source).read_all()
        _check_names(table.column_names, name)
        return ArrowRows([table.num_rows], lambda _: table, name, path, TableFile(STREAM, table.schema))


def _codec(metadata: Any) -> str:
    """The compression of the first column of a Parquet file, as a writer takes it."""
    if not metadata.num_row_groups or not metadata.num_columns:
        return "NONE"
    codec = str(metadata.row_group(0).column(0).compression)
    return "NONE" if codec == "UNCOMPRESSED" else codec


def _check_names(names: Sequence[str], name: str) -> None:
    twice = [each for each in names if list(names).count(each) > 1]
    if twice:
        raise UserError(f"{name}: two columns are named '{twice[0]}'", "rename one of them")


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """pyarrow's errors as UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {name}: it is damaged or incomplete ({error})") from error
