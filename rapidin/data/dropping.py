"""Data written again without some of its rows, in the form that it came in."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rapidin.data.arrow_rows import ARROW, PARQUET, ArrowRows
from rapidin.data.converted import Converted, as_in_file, files_of
from rapidin.data.json_document import JsonDocument, ListedRows
from rapidin.data.opening import COMPRESSED, SUFFIXES, Reading, open_source
from rapidin.data.records import json_text
from rapidin.data.sources import Joined, Malformed, Rows, Source, existing
from rapidin.data.spooled import compressed
from rapidin.data.text_rows import DelimitedLines, JsonLines, LocatedRows, suffix_of
from rapidin.errors import UserError
from rapidin.files import check_not_input, reason, replace_file, replacing

LINES = (".jsonl", ".ndjson")
_NAME_LINES = "name a file in .jsonl"


def write_without(
    data: Any,
    rows: Collection[int],
    out: str | Path,
    reading: Reading | None = None,
    dropped: str | Path | None = None,
) -> int:
    """Write training data without these rows, and return how many rows it has with them.

    data: whatever `rapidin.data.opening.open_source` opens and can open again; reading: how. rows: numbers
    from 0. out: the file to write, compressed if its name ends in .gz, .zst, .xz or .bz2; for several files
    the folder that gets files of the same names; for a HF dataset the folder that it is saved to. Text files
    keep their remaining bytes, tables their schema. If the name ends in .jsonl or .ndjson, data of any form
    is written as jsonl. dropped: a file that gets these rows as jsonl.

    Raises UserError if an output cannot be written, is the data itself, has a name of another form, or would
    be empty.
    """
    out = Path(out)
    source = open_source(data, reading or Reading())
    count = source.skim(None)
    gone = sorted(set(rows))
    if gone and not 0 <= gone[0] <= gone[-1] < count:
        raise UserError(f"row {gone[-1]} is to be dropped, but the data has {count:,} rows")
    if len(gone) == count:
        raise UserError("no row would be left")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the directory does not exist")
    check_not_input((out, dropped), files_of(source))
    if dropped is not None and os.path.realpath(out) in _with_folder(dropped):
        raise UserError(
            f"the dropped rows would be among the remaining ones in '{out}'", "write them elsewhere"
        )
    lines = b"".join(_as_line(source, row) for row in gone) if dropped is not None else b""
    source = _unconverted(source)
    if suffix_of(out.name) in LINES and not isinstance(source, JsonLines):
        left_out = set(gone)
        _write_file(out, (_as_line(source, row) for row in range(count) if row not in left_out))
    else:
        _write(source, gone, out)
    if dropped is not None:
        _write_file(Path(dropped), [lines])
    return count


def _with_folder(path: str | Path) -> tuple[str, str]:
    whole = os.path.realpath(path)
    return whole, os.path.dirname(whole)


def _unconverted(source: Source) -> Source:
    """The source as its file has it, which another tool reads in its own way."""
    return _unconverted(source.unconverted) if isinstance(source, Converted) else source


def _as_line(source: Source, row: int) -> bytes:
    entry = as_in_file(source, row)
    if isinstance(entry, Malformed):
        raise entry.error

    def text(value: object) -> str:
        if isinstance(value, bytes):
            what = f"{source.where(row)} has bytes, such as an image, which JSON cannot hold"
            raise UserError(what, "write a file in the form of the data")
        return str(value)

    return json_text(entry, default=text).encode() + b"\n"


def _write(source: Source, rows: list[int], out: Path) -> None:
    if isinstance(source, Joined):
        _write_folder(source, rows, out)
        return
    if isinstance(source, Rows) and hasattr(source.held, "save_to_disk"):
        _save_dataset(source, rows, out)
        return
    _check_suffix(source, out)
    if isinstance(source, LocatedRows | JsonDocument | ListedRows):
        _write_file(out, source.without(rows))
    elif isinstance(source, ArrowRows):
        _write_table(source, rows, out)


def _check_suffix(source: Source, out: Path) -> None:
    """Raise UserError if the name of a file promises another form than the source's."""
    forms = _suffixes(source)
    if not forms or not isinstance(source.path, str):
        raise UserError("this data has no file of its own", _NAME_LINES)
    named, came = suffix_of(out.name), suffix_of(_file_of(source.path).name)
    if named != came and named not in forms and (came or named in SUFFIXES):
        form = came or forms[0]
        remedy = _NAME_LINES if form in LINES else f"name a file in {form} or .jsonl"
        raise UserError(f"the data is {form}, and '{out}' is not", remedy)
    if isinstance(source, ArrowRows) and _compression(out):
        raise UserError(
            f"a table is not compressed as a whole, as the name '{out}' says",
            f"name a file in {forms[0]} or .jsonl",
        )


def _suffixes(source: Source) -> tuple[str, ...]:
    """The suffixes of files that have the form of a source; none if it is no file."""
    if isinstance(source, JsonLines):
        return LINES
    if isinstance(source, DelimitedLines):
        return (".tsv",) if source.delimiter == "\t" else (".csv",)
    if isinstance(source, JsonDocument | ListedRows):
        return (".json",)
    if not isinstance(source, ArrowRows) or source.form is None:
        return ()
    tables = {PARQUET: (".parquet",), ARROW: (".arrow", ".feather")}
    return tables.get(source.form.magic, (".arrow",))


def _file_of(path: str) -> Path:
    found = existing(path)
    return Path(path if found is None else found[0])


def _compression(out: Path) -> str:
    """The suffix of a compression that a file's name ends in, else ""."""
    suffix = out.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def _write_file(out: Path, pieces: Iterable[bytes]) -> None:
    replace_file(out, compressed(pieces, _compression(out)) if _compression(out) else pieces)


def _write_folder(source: Joined, rows: list[int], out: Path) -> None:
    parts = list(_files(source, rows))
    names = [_file_of(str(part.path or "")).name for part, _ in parts]
    if "" in names:
        raise UserError("some of the data has no file of its own", _NAME_LINES)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two files are named {twice[0]}", f"{_NAME_LINES} for all of them")
    for name, (part, _) in zip(names, parts, strict=True):
        if not isinstance(part, Rows):
            _check_suffix(part, out / name)
    _make_empty(out)
    for name, (part, own) in zip(names, parts, strict=True):
        _write(part, own, out / name)


def _files(source: Source, rows: list[int]) -> Iterator[tuple[Source, list[int]]]:
    """Each file behind a source with those of the rows that are its own."""
    source = _unconverted(source)
    if not isinstance(source, Joined):
        yield source, rows
        return
    for part, own in source.divided(rows):
        yield from _files(part, own)


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
    with replacing(out) as partial, open(partial, "wb") as file, _table_writer(source, file, out) as writer:
        for table in source.without(rows):
            if table.num_rows:
                writer.write(table)


def _table_writer(source: ArrowRows, file: IO[bytes], out: Path) -> Any:
    """What writes tables into a file of the same form. Arrow does not tell how an Arrow file is compressed:
    Feather is as its other writers make it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    form = source.form
    assert form is not None
    if form.magic == PARQUET:
        return pq.ParquetWriter(file, form.schema, compression=form.codec)
    if form.magic != ARROW:
        return pa.ipc.new_stream(file, form.schema)
    codec = "lz4" if suffix_of(out.name) == ".feather" else None
    return pa.ipc.new_file(file, form.schema, options=pa.ipc.IpcWriteOptions(compression=codec))
