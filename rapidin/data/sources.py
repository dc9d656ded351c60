"""Where examples are read from: jsonl files, HF datasets, data frames, lists, and several of them joined.

`open_source` recognises what it is given. A source gives records by row and knows where each row comes from;
whether a record is of a known form is not its concern (`rapidin.data.examples` checks that).
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rapidin.data.records import Record, describe, to_record
from rapidin.errors import UserError, needs
from rapidin.files import reason

_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Files:
    """Several files or folders of examples, read one after another as if they were one."""

    paths: tuple[str, ...]


def join_paths(paths: Sequence[str] | None) -> str | Files | None:
    """One path or several in the form that `open_examples` takes; None for none."""
    if not paths:
        return None
    return paths[0] if len(paths) == 1 else Files(tuple(paths))


@dataclass(frozen=True)
class Malformed:
    """An example that cannot be read. error: the reason; content: the bytes of the line or value."""

    error: UserError
    content: bytes


class Source(Protocol):
    """Rows of records. `scan` or `skim` is called once, before anything else."""

    @property
    def path(self) -> str | list[str] | None:
        """Absolute path of the file or folder, a list for several, None for data in memory."""

    @property
    def lines(self) -> int:
        """Number of lines once the end has been reached; for sources that are not files, of rows."""

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        """All records in order, at most `limit` of them."""

    def skim(self, limit: int | None) -> int:
        """Locate and count the records, at most `limit` of them, without parsing them."""

    def read(self, row: int) -> Record | Malformed:
        """The record of a row."""

    def index(self, row: int) -> int:
        """The line number of a row, from 0; for sources that are not files, the row."""

    def where(self, row: int) -> str:
        """The location of a row for a message, such as "train.jsonl, line 3"."""

    def file(self, row: int) -> str | None:
        """The file or folder of a row as it was named, None for data in memory."""


def open_source(source: Any) -> Source:
    """The source of anything that `open_examples` takes. Raises UserError if it is none of that."""
    if isinstance(source, Files):
        return _Joined([open_source(path) for path in source.paths])
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source))
    datasets = sys.modules.get("datasets")  # a caller who has a dataset has imported its package
    if datasets is not None and isinstance(source, datasets.Dataset):
        return _Rows(source.with_format(None), None, "dataset")
    if datasets is not None and isinstance(source, datasets.DatasetDict):
        raise UserError(f"the data is a set of splits: {', '.join(source)}", "choose one: data['train']")
    frame = frame_records(source)
    if frame is not None:
        return _Rows(frame, None, "data frame")
    if hasattr(source, "read"):  # an open file: only its path can be read again
        name = getattr(source, "name", None)
        if isinstance(name, str) and os.path.isfile(name):
            return open_source(name)
        raise UserError("the data is an open stream without a file", "give a path or a list of records")
    if isinstance(source, Mapping):
        raise UserError("the data is a single record", "put it into a list: [record]")
    if not isinstance(source, Iterable):
        raise UserError(f"the data is {describe(source)}", _GIVE)
    rows = list(source)
    paths = [row for row in rows if _is_path(row)]
    if not paths:
        return _Rows(rows, None, "examples")
    if len(paths) < len(rows):
        raise UserError(f"the data mixes files, such as '{paths[0]}', with records or texts", _GIVE)
    return _Joined([open_source(path) for path in paths])


_GIVE = "give a path, a list of paths, a list of records or texts, a data frame or a HF dataset"


def _open_path(path: str) -> Source:
    if os.path.isdir(path):
        return _Rows(_load_dataset(path), os.path.abspath(path), path)
    if not os.path.exists(path):
        raise UserError(
            f"data not found: {path}", "give a .jsonl file, or the folder of a HF dataset saved to disk"
        )
    if not os.path.isfile(path):
        raise UserError(f"the data {path} is not a regular file", "save it as a .jsonl file first")
    return _JsonLines(path)


def _is_path(value: object) -> bool:
    """Whether an entry of a list is a file or folder rather than a text: a path object, the path of something
    that exists, or a name with the suffix of a data file."""
    if isinstance(value, os.PathLike):
        return True
    if not isinstance(value, str) or not value or len(value) > 4096 or "\n" in value or "\0" in value:
        return False
    has_suffix = value.endswith((".jsonl", ".json", ".csv", ".parquet")) and not any(map(str.isspace, value))
    return has_suffix or (os.sep in value and os.path.exists(value))


# ----------------------------------------------------------------------------------------- kinds of source


class _JsonLines:
    """A jsonl file of any size: two integers are kept for each example, and records are read on demand."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.lines = 0
        self._name = path
        self._offsets = array("Q")
        self._lines = array("Q")
        try:
            self._file = open(path, "rb")  # noqa: SIM115  (closed with this object)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"cannot read the data file {self._name}: {reason(error)}")

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        for row, line in enumerate(self._find(limit)):
            yield self._entry(line, row)

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self._find(limit))

    def _find(self, limit: int | None) -> Iterator[bytes]:
        """Each line that is not blank; its offset and number are recorded."""
        offset = 0
        try:
            for number, line in enumerate(self._file):
                if limit is not None and len(self._offsets) == limit:
                    return
                self.lines = number + 1
                start, offset = offset, offset + len(line)
                if number == 0 and line.startswith(_UTF8_BOM):
                    line = line[len(_UTF8_BOM) :]
                    start += len(_UTF8_BOM)
                if line.strip():
                    self._offsets.append(start)
                    self._lines.append(number)
                    yield line
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, row: int) -> Record | Malformed:
        try:
            self._file.seek(self._offsets[row])
            return self._entry(self._file.readline(), row)
        except OSError as error:
            raise self._unreadable(error) from error

    def index(self, row: int) -> int:
        return self._lines[row]

    def where(self, row: int) -> str:
        return f"{self._name}, line {self._lines[row] + 1}"

    def file(self, row: int) -> str:
        return self._name

    def _entry(self, line: bytes, row: int) -> Record | Malformed:
        try:
            return _parse_line(line, self.where(row), first=row == 0)
        except UserError as error:
            return Malformed(error, line)


def _parse_line(line: bytes, where: str, *, first: bool) -> Record:
    """The record of a line of jsonl; first: whether it is the file's first. Raises UserError if it is not
    one JSON object."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte {error.start + 1} of the line)",
            "save the file as UTF-8, one JSON object per line",
        ) from error
    except json.JSONDecodeError as error:
        if first and line.lstrip().startswith(b"["):
            raise UserError(
                f"{where}: the file is one JSON list, expected one JSON object per line",
                "jq -c '.[]' converts such a file to lines",
            ) from error
        raise UserError(f"{where}: broken JSON ({error.msg} at column {error.colno})", _FIX_LINE) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply", _FIX_LINE) from error
    except ValueError as error:  # Python limits integers to some thousand digits
        raise UserError(f"{where}: a number with too many digits", _FIX_LINE) from error
    return to_record(record, where)


_FIX_LINE = "fix or remove that line"


class _Rows:
    """A list of records or a HF dataset: anything with a length and rows."""

    def __init__(self, rows: Any, path: str | None, name: str) -> None:
        self.path = path
        self._rows = rows
        self._name = name

    @property
    def lines(self) -> int:
        return len(self._rows)

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return (self.read(row) for row in range(self.skim(limit)))

    def skim(self, limit: int | None) -> int:
        return len(self._rows) if limit is None else min(limit, len(self._rows))

    def read(self, row: int) -> Record | Malformed:
        record = self._rows[row]
        try:
            return to_record({"text": record} if isinstance(record, str) else record, self.where(row))
        except UserError as error:
            return Malformed(error, repr(record).encode("utf-8", "backslashreplace"))

    def index(self, row: int) -> int:
        return row

    def where(self, row: int) -> str:
        return f"{self._name}[{row}]"

    def file(self, row: int) -> str | None:
        return None if self.path is None else self._name


class _Joined:
    """Several sources, one after another; line numbers continue from one to the next."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._first_rows: list[int] = []  # of each source
        self._first_lines: list[int] = []

    @property
    def path(self) -> list[str]:
        return [str(source.path) for source in self._sources]

    @property
    def lines(self) -> int:
        return sum(source.lines for source in self._sources)

    def _each(self, limit: int | None) -> Iterator[tuple[Source, int | None]]:
        """Each source with how many rows it may still give, as long as that is not 0."""
        lines = 0
        for source in self._sources:
            self._first_rows.append(self._first_rows[-1] if self._first_rows else 0)
            self._first_lines.append(lines)
            left = None if limit is None else limit - self._first_rows[-1]
            if left != 0:
                yield source, left
            lines += source.lines

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        done = 0
        for source, left in self._each(limit):
            self._first_rows[-1] = done
            for entry in source.scan(left):
                done += 1
                yield entry

    def skim(self, limit: int | None) -> int:
        done = 0
        for source, left in self._each(limit):
            self._first_rows[-1] = done
            done += source.skim(left)
        return done

    def _locate(self, row: int) -> tuple[int, int]:
        """The number of a row's source, and the row in that source."""
        n = bisect_right(self._first_rows, row) - 1
        return n, row - self._first_rows[n]

    def read(self, row: int) -> Record | Malformed:
        n, row = self._locate(row)
        return self._sources[n].read(row)

    def index(self, row: int) -> int:
        n, row = self._locate(row)
        return self._first_lines[n] + self._sources[n].index(row)

    def where(self, row: int) -> str:
        n, row = self._locate(row)
        return self._sources[n].where(row)

    def file(self, row: int) -> str | None:
        n, row = self._locate(row)
        return self._sources[n].file(row)


# ------------------------------------------------------------------------------- data frames and HF datasets


def frame_records(source: Any) -> list[Record] | None:
    """The rows of a pandas or polars data frame or an Arrow table as records, missing values as None; None
    for anything else."""
    for module, kind, convert in _FRAMES:
        # A caller who has a frame has imported its package.
        frame_type = getattr(sys.modules.get(module), kind, None)
        if frame_type is not None and isinstance(source, frame_type):
            return convert(source)
    return None


def _pandas_records(frame: Any) -> list[Record]:
    objects = frame.astype(object)
    records: list[Record] = objects.where(frame.notna(), None).to_dict("records")
    return records


_FRAMES: tuple[tuple[str, str, Callable[[Any], list[Record]]], ...] = (
    ("pandas", "DataFrame", _pandas_records),
    ("polars", "DataFrame", lambda frame: frame.to_dicts()),
    ("pyarrow", "Table", lambda table: table.to_pylist()),
)


def _load_dataset(path: str) -> Any:
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
        raise UserError(f"{path} has several splits: {splits}", f"name one, as in {folder / 'train'}")
    if not (folder / "state.json").is_file():
        raise UserError(
            f"the folder {path} is not a HF dataset saved to disk (it has no state.json)",
            "give a .jsonl file, or a folder written by Dataset.save_to_disk",
        )
    datasets = needs("datasets", f"reading {path}", "datasets")
    try:
        return datasets.load_from_disk(path).with_format(None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the HF dataset {path}: {error}") from error
