"""Data written again without some of its rows, in the form that it came in."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rapidin.data.arrow_rows import ArrowRows
from rapidin.data.converted import Converted
from rapidin.data.json_document import JsonDocument, ListedRows
from rapidin.data.opening import COMPRESSED, Reading, open_source
from rapidin.data.records import jsonl
from rapidin.data.sources import Joined, Malformed, Rows, Source
from rapidin.data.spooled import compressed
from rapidin.data.text_rows import LocatedRows, suffix_of
from rapidin.errors import UserError, needs
from rapidin.files import reason, replace_file, replacing

LINES = (".jsonl", ".ndjson")


def write_without(data: Any, rows: Collection[int], out: str | Path, reading: Reading | None = None) -> int:
    """Write training data without these rows, and return how many rows it has with them.

    data: whatever `rapidin.data.opening.open_source` opens and can open again; reading: how. rows: numbers
    from 0. out: the file to write, compressed if its name ends in .gz, .zst, .xz or .bz2; for several files
    the folder that gets files of the same names; for a HF dataset the folder that it is saved to. Text files
    keep their remaining bytes, tables their schema. If the name ends in .jsonl, data of any form is written
    as jsonl.

    Raises UserError if the output cannot be written, is the data itself, has a name of another form, or would
    be empty.
    """
    out = Path(out)
    source = open_source(data, reading or Reading())
    count = source.skim(None)
    dropped = sorted(set(rows))
    if dropped and not 0 <= dropped[0] <= dropped[-1] < count:
        raise UserError(f"row {dropped[-1]} is to be dropped, but the data has {count:,} rows")
    if len(dropped) == count:
        raise UserError("no row would be left")
    _check_out(out, source)
    source = _unconverted(source)
    if suffix_of(out.name) in LINES and _suffix(source) not in LINES:
        gone = set(dropped)
        _write_file(out, (_as_line(source, row) for row in range(count) if row not in gone))
    else:
        _write(source, dropped, out)
    return count


def _check_out(out: Path, source: Source) -> None:
    """Raise UserError if the output is the data, or has no folder to be in."""
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the directory does not exist")
    paths = source.path if isinstance(source.path, list) else [source.path]
    for path in paths:
        if path is not None and os.path.exists(path) and out.exists() and os.path.samefile(path, out):
            raise UserError(f"'{out}' is the data itself", "write to another file")


def _suffix(source: Source) -> str:
    """The suffix of the file that the rows came from, "" if there are several or none."""
    return suffix_of(_whole(source.path)) if isinstance(source.path, str) else ""


def _whole(path: str) -> str:
    """The file of a path that names a part of it, as in file:list."""
    return path if os.path.exists(path) else path.rpartition(":")[0]


def _unconverted(source: Source) -> Source:
    """The source as its file has it, which another tool reads in its own way."""
    return source.unconverted if isinstance(source, Converted) else source


def _as_line(source: Source, row: int) -> bytes:
    entry = source.read(row)
    if isinstance(entry, Malformed):
        raise entry.error
    return jsonl([entry]).encode()


def _write(source: Source, rows: list[int], out: Path) -> None:
    source = _unconverted(source)
    named, came = suffix_of(out.name), _suffix(source)
    if isinstance(source, Joined):
        _write_folder(source, rows, out)
    elif isinstance(source, Rows) and hasattr(source.held, "save_to_disk"):
        _save_dataset(source, rows, out)
    elif named != came and came:
        raise UserError(f"the data is {came}, and '{out}' is not", f"name a file in {came} or .jsonl")
    elif isinstance(source, LocatedRows | JsonDocument | ListedRows):
        _write_file(out, source.without(rows))
    elif isinstance(source, ArrowRows):
        _write_table(source, rows, out)
    else:
        raise UserError("this data has no file of its own", "name a file in .jsonl")


def _write_file(out: Path, pieces: Iterable[bytes]) -> None:
    replace_file(out, compressed(pieces, out.suffix) if out.suffix in COMPRESSED else pieces)


def _write_folder(source: Joined, rows: list[int], out: Path) -> None:
    parts = [(_unconverted(part), own) for part, own in source.divided(rows)]
    names = [Path(_whole(str(part.path))).name for part, _ in parts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two files are named {twice[0]}", "name a file in .jsonl for all of them")
    _make_empty(out)
    for name, (part, own) in zip(names, parts, strict=True):
        _write(part, own, out / name)


def _make_empty(out: Path) -> None:
    """Make an empty folder. Raises UserError if it has files already."""
    try:
        out.mkdir(exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"the folder '{out}' is not empty", "name a new one")
    except OSError as error:
        raise UserError(f"cannot write into '{out}': {reason(error)}") from None


def _save_dataset(source: Rows, rows: list[int], out: Path) -> None:
    dropped = set(rows)
    kept = [row for row in range(len(source.held)) if row not in dropped]
    _make_empty(out)
    source.held.select(kept).save_to_disk(str(out))


def _write_table(source: ArrowRows, rows: list[int], out: Path) -> None:
    tables = source.without(rows)
    first = next(tables)

    def each() -> Iterator[Any]:
        yield first
        yield from tables

    with replacing(out) as partial, open(partial, "wb") as file:
        _TABLES[suffix_of(out.name)](file, first.schema, each())


def _write_parquet(file: IO[bytes], schema: Any, tables: Iterator[Any]) -> None:
    needs("pyarrow", "writing a table", "data")
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _write_arrow(file: IO[bytes], schema: Any, tables: Iterator[Any], compression: str | None = None) -> None:
    needs("pyarrow", "writing a table", "data")
    import pyarrow as pa

    with pa.ipc.new_file(file, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for table in tables:
            writer.write(table)


def _write_feather(file: IO[bytes], schema: Any, tables: Iterator[Any]) -> None:
    _write_arrow(file, schema, tables, "lz4")


_TABLES: dict[str, Callable[[IO[bytes], Any, Iterator[Any]], None]] = {
    ".parquet": _write_parquet,
    ".arrow": _write_arrow,
    ".feather": _write_feather,
}
