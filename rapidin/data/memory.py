"""Data in memory: records, texts, data frames, datasets, and iterables of records or of batches.

What can be read only once, such as a generator, is kept in a temporary file as it is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rapidin.data.arrow_rows import ArrowRows
from rapidin.data.fields import plain
from rapidin.data.records import Record, describe
from rapidin.data.sources import Rows, Source
from rapidin.data.spooled import Spooled
from rapidin.errors import UserError, short

GIVE = "give a path, a list of paths, a list of records or texts, a data frame or a HF dataset"

# Fields of text, whose lists are columns of a batch, and fields of lists, whose lists of lists are.
_TEXTS = {"prompt", "completion", "instruction", "input", "output", "text", "question", "answer", "query"}
_TEXTS |= {"response", "chosen", "rejected", "problem", "solution", "inputs", "targets"}
_LISTS = {"messages", "conversations", "input_ids", "labels"}


def open_object(source: Any) -> Source:
    """The source of data in memory. Raises UserError if it is none."""
    refuse_splits(source)
    if _is_a(source, "datasets", "Dataset"):
        return Rows(source.with_format(None), None, "dataset")
    table = _table_of(source)
    if table is not None:
        return ArrowRows.of_table(table)
    frame = frame_records(source)
    if frame is not None:
        return Rows(frame, None, "data frame")
    if isinstance(source, Mapping):
        return Rows(rows_of(source, "the data") or [source], None, "examples")
    if isinstance(source, list | tuple) and not any(map(_is_batch, source[:1])):
        return Rows(source, None, "examples")
    if isinstance(source, Iterable) and not isinstance(source, bytes | bytearray | memoryview):
        return _open_iterable(source)
    is_indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")  # a torch Dataset
    if is_indexed and not isinstance(source, Iterable):
        return Rows(source, None, "examples")
    raise UserError(f"the data is {describe(source)}", GIVE)


def _open_iterable(source: Iterable[Any]) -> Source:
    name = "dataset" if _is_a(source, "datasets", "IterableDataset") else "examples"
    rows = single_rows(source, texts=not isinstance(source, list | tuple))
    return Spooled((plain(row) if isinstance(row, Mapping) else row for row in rows), name)


def single_rows(source: Iterable[Any], *, texts: bool) -> Iterator[Any]:
    """The rows of an iterable of rows or batches; texts: whether a list of texts is a batch of them."""
    for number, item in enumerate(source):
        rows = rows_of(item, f"batch {number}") if isinstance(item, Mapping) else frame_records(item)
        if rows is not None:
            yield from rows
        elif (isinstance(item, list) and item and isinstance(item[0], Mapping)) or (
            texts and isinstance(item, list) and item and isinstance(item[0], str)
        ):
            yield from item
        else:
            yield item


def _is_batch(item: object) -> bool:
    if isinstance(item, list):
        return bool(item) and isinstance(item[0], Mapping)
    return isinstance(item, Mapping) and _columns(item) is not None


def _columns(batch: Mapping[Any, Any]) -> list[str] | None:
    """The names of the columns of a batch; None for a single record."""
    for name, value in batch.items():
        value = plain(value) if name in _TEXTS | _LISTS else None
        if not isinstance(value, list) or not value:
            continue
        if isinstance(value[0], list) or (name in _TEXTS and isinstance(value[0], str)):
            return [key for key, column in batch.items() if isinstance(plain(column), list)]
    return None


def rows_of(batch: Mapping[Any, Any], what: str) -> list[Record] | None:
    """The rows of a mapping of columns; None for a single record. Raises UserError for columns of different
    lengths."""
    names = _columns(batch)
    if names is None:
        return None
    columns = {name: plain(batch[name]) for name in names}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
        raise UserError(f"{what} has columns of different lengths: {short(counts)}", GIVE)
    same = {name: value for name, value in batch.items() if name not in columns}
    return [
        same | {name: column[n] for name, column in columns.items()}
        for n in range(next(iter(lengths.values())))
    ]


# ----------------------------------------------------------------------------------- kinds of other packages


def _is_a(source: object, module: str, *kinds: str) -> bool:
    """Whether an object is of a class of a package, which its caller has imported."""
    classes = (getattr(sys.modules.get(module), kind, None) for kind in kinds)
    return any(isinstance(each, type) and isinstance(source, each) for each in classes)


def refuse_splits(source: Any) -> None:
    """Raises UserError for a HF dataset of several splits."""
    if _is_a(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(source)
        raise UserError(f"the data has several splits: {splits}", f"choose one: data['{min(source)}']")


def _table_of(source: Any) -> Any:
    """The Arrow table of a table, a record batch, a reader of them or a dataset; None for anything else."""
    if _is_a(source, "pyarrow.dataset", "Dataset"):
        return source.to_table()
    if not _is_a(source, "pyarrow", "Table", "RecordBatch", "RecordBatchReader"):
        return None
    import pyarrow as pa

    if isinstance(source, pa.RecordBatchReader):
        return source.read_all()
    return pa.Table.from_batches([source]) if isinstance(source, pa.RecordBatch) else source


def frame_records(source: Any) -> list[Record] | None:
    """The rows of a pandas or polars data frame or an Arrow table as records, missing values as None; None
    for anything else."""
    for module, kind, convert in _FRAMES:
        if _is_a(source, module, kind):
            return convert(source)
    table = _table_of(source)
    return None if table is None else list(table.to_pylist())


def _pandas_records(frame: Any) -> list[Record]:
    objects = frame.astype(object)
    records: list[Record] = objects.where(frame.notna(), None).to_dict("records")
    return records


_FRAMES: tuple[tuple[str, str, Callable[[Any], list[Record]]], ...] = (
    ("pandas", "DataFrame", _pandas_records),
    ("polars", "DataFrame", lambda frame: frame.to_dicts()),
    ("polars", "LazyFrame", lambda frame: frame.collect().to_dicts()),
)
