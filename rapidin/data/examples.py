"""Training data and queries, from jsonl, a HF dataset or a list.

Four forms of record are read; other fields are left alone and shown with a hit.

    prompt        {"prompt": ..., "completion": ...}                    joined as they stand
    instruction   {"instruction": ..., "input": ..., "output": ...}     the Alpaca form; "input" may be absent
    messages      {"messages": [{"role": ..., "content": ...}, ...]}    the tokenizer's chat template
    text          {"text": ...}                                         all of it counts

`open_examples` reads and checks the whole source once, so a broken line is found before any work is done. It
stops there, or is counted as malformed and skipped: rows and line numbers of the others stay as they are.
"""

import hashlib
import json
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rapidin.errors import UserError
from rapidin.files import reason

Record = dict[str, Any]

# In this order: a record that has the fields of two forms is read as the first of them.
FORMS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
    "text": ("text",),
}
# What a query may lack: the model then writes it.
_COMPLETIONS = {"prompt": "completion", "instruction": "output"}
_EXPECTED = (
    "expected 'prompt' and 'completion', or 'instruction' and 'output' (and 'input'), "
    "or 'messages', or 'text'"
)
EXPECTED_QUERY = "expected 'prompt', or 'instruction' (and 'input'), or 'messages', or 'text'"

MOST_PROBLEMS = 10  # that are told one by one

_UTF8_BOM = b"\xef\xbb\xbf"


# ---------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Files:
    """Several files or folders of examples, read one after another as if they were one."""

    paths: tuple[str, ...]


def files(paths: Sequence[str] | None) -> "str | Files | None":
    """What `open_examples` takes for one path or several, None for none."""
    if not paths:
        return None
    return paths[0] if len(paths) == 1 else Files(tuple(paths))


@dataclass(frozen=True)
class _Malformed:
    """An example that cannot be read: why, and what stands there."""

    error: UserError
    found: bytes


class _Source(Protocol):
    @property
    def path(self) -> str | list[str] | None: ...

    @property
    def lines(self) -> int:
        """Lines in all, where the end was reached; for other sources rows."""

    def scan(self, limit: int | None) -> Iterator[Record | _Malformed]:
        """All records in order, at most `limit` of them. This or `skim` comes before `read`, once."""

    def skim(self, limit: int | None) -> int:
        """Find where the records are and count them, without reading what they say."""

    def read(self, row: int) -> Record | _Malformed: ...

    def index(self, row: int) -> int: ...

    def where(self, row: int) -> str:
        """The place of a row in words, as a person would look it up."""

    def file(self, row: int) -> str | None:
        """The file or folder that a row is in, None for data in memory."""


class _JsonLines:
    """A jsonl file of any size: two integers are kept for each example, records are read when wanted."""

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

    def scan(self, limit: int | None) -> Iterator[Record | _Malformed]:
        for row, line in enumerate(self._find(limit)):
            yield self._entry(line, row)

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self._find(limit))

    def _find(self, limit: int | None) -> Iterator[bytes]:
        """Each line that is not blank, its place noted."""
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

    def read(self, row: int) -> Record | _Malformed:
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

    def _entry(self, line: bytes, row: int) -> Record | _Malformed:
        try:
            return self._parse(line, row)
        except UserError as error:
            return _Malformed(error, line)

    def _parse(self, line: bytes, row: int) -> Record:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.where(row)}: not UTF-8 text (byte {error.start + 1} of the line)",
                "save the file as UTF-8, one JSON object a line",
            ) from error
        except json.JSONDecodeError as error:
            if row == 0 and line.lstrip().startswith(b"["):
                raise UserError(
                    f"{self.where(row)}: the file holds one JSON list, expected one JSON object a line",
                    "jq -c '.[]' turns such a file into lines",
                ) from error
            raise UserError(
                f"{self.where(row)}: broken JSON ({error.msg} at column {error.colno})",
                "mend or remove that line",
            ) from error
        except RecursionError as error:
            raise UserError(
                f"{self.where(row)}: JSON nested too deeply", "mend or remove that line"
            ) from error
        except ValueError as error:  # Python limits integers to some thousand digits
            raise UserError(
                f"{self.where(row)}: a number of too many digits", "fix or remove that line"
            ) from error
        return _as_record(record, self.where(row))


class _Rows:
    """A list of records, or a HF dataset: anything with a length and rows."""

    def __init__(self, rows: Any, path: str | None, name: str) -> None:
        self.path = path
        self._rows = rows
        self._name = name

    @property
    def lines(self) -> int:
        return len(self._rows)

    def scan(self, limit: int | None) -> Iterator[Record | _Malformed]:
        return (self.read(row) for row in range(self.skim(limit)))

    def skim(self, limit: int | None) -> int:
        return len(self._rows) if limit is None else min(limit, len(self._rows))

    def read(self, row: int) -> Record | _Malformed:
        record = self._rows[row]
        try:
            return _as_record({"text": record} if isinstance(record, str) else record, self.where(row))
        except UserError as error:
            return _Malformed(error, repr(record).encode("utf-8", "backslashreplace"))

    def index(self, row: int) -> int:
        return row

    def where(self, row: int) -> str:
        return f"{self._name}[{row}]"

    def file(self, row: int) -> str | None:
        return None if self.path is None else self._name


class _Joined:
    """Several sources, one after another; lines are counted through."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = sources
        self._rows: list[int] = []  # the first row of each source, and its first line
        self._first: list[int] = []

    @property
    def path(self) -> list[str]:
        return [str(source.path) for source in self._sources]

    @property
    def lines(self) -> int:
        return sum(source.lines for source in self._sources)

    def _each(self, limit: int | None) -> Iterator[tuple[_Source, int | None]]:
        """Each source with the number of rows that are still wanted, while more than none are."""
        lines = 0
        for source in self._sources:
            self._rows.append(self._rows[-1] if self._rows else 0)
            self._first.append(lines)
            left = None if limit is None else limit - self._rows[-1]
            if left != 0:
                yield source, left
            lines += source.lines

    def scan(self, limit: int | None) -> Iterator[Record | _Malformed]:
        done = 0
        for source, left in self._each(limit):
            self._rows[-1] = done
            for entry in source.scan(left):
                done += 1
                yield entry

    def skim(self, limit: int | None) -> int:
        done = 0
        for source, left in self._each(limit):
            self._rows[-1] = done
            done += source.skim(left)
        return done

    def _at(self, row: int) -> tuple[int, int]:
        """The number of a row's source, and the row there."""
        n = bisect_right(self._rows, row) - 1
        return n, row - self._rows[n]

    def read(self, row: int) -> Record | _Malformed:
        n, row = self._at(row)
        return self._sources[n].read(row)

    def index(self, row: int) -> int:
        n, row = self._at(row)
        return self._first[n] + self._sources[n].index(row)

    def where(self, row: int) -> str:
        n, row = self._at(row)
        return self._sources[n].where(row)

    def file(self, row: int) -> str | None:
        n, row = self._at(row)
        return self._sources[n].file(row)


def _as_record(value: object, where: str) -> Record:
    if not isinstance(value, Mapping) or not all(isinstance(field, str) for field in value):
        raise UserError(f"{where}: found {_kind(value)}, expected a JSON object with named fields")
    return dict(value)


def _open_source(source: Any) -> _Source:
    if isinstance(source, Files):
        return _Joined([_open_source(path) for path in source.paths])
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if os.path.isdir(path):
            return _Rows(_load_dataset(path), os.path.abspath(path), path)
        if not os.path.exists(path):
            raise UserError(
                f"no such data: {path}", "give a .jsonl file, or the folder of a HF dataset saved to disk"
            )
        if not os.path.isfile(path):
            raise UserError(f"the data {path} is not a regular file", "save it as a .jsonl file first")
        return _JsonLines(path)
    datasets = sys.modules.get("datasets")  # whoever hands over a dataset has imported the package
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
            return _open_source(name)
        raise UserError("the data is an open stream without a file", "give a path or a list of records")
    if isinstance(source, Mapping):
        raise UserError("the data is a single record", "put it into a list: [record]")
    if not isinstance(source, Iterable):
        raise UserError(f"the data is {_kind(source)}", _GIVE)
    rows = list(source)
    paths = [row for row in rows if _is_path(row)]
    if not paths:
        return _Rows(rows, None, "examples")
    if len(paths) < len(rows):
        raise UserError(f"the data mixes files, such as '{paths[0]}', with records or texts", _GIVE)
    return _Joined([_open_source(path) for path in paths])


_GIVE = "give a path, a list of paths, a list of records or texts, a data frame or a HF dataset"


def _is_path(value: object) -> bool:
    """Whether an entry of a list is a file or folder rather than a text: a path object, the path of something
    that exists, or a name that ends as data files' names do."""
    if isinstance(value, os.PathLike):
        return True
    if not isinstance(value, str) or not value or len(value) > 4096 or "\n" in value or "\0" in value:
        return False
    named = value.endswith((".jsonl", ".json", ".csv", ".parquet")) and not any(map(str.isspace, value))
    return named or (os.sep in value and os.path.exists(value))


def frame_records(source: Any) -> list[Record] | None:
    """The rows of a pandas or polars data frame or an Arrow table as records, missing values as None; None
    for anything else."""
    for module, kind, convert in _FRAMES:
        known = getattr(
            sys.modules.get(module), kind, None
        )  # a caller who has a frame has imported its package
        if known is not None and isinstance(source, known):
            rows: list[Record] = convert(source)
            return rows
    return None


def _pandas_records(frame: Any) -> list[Record]:
    whole = frame.astype(object)
    records: list[Record] = whole.where(frame.notna(), None).to_dict("records")
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
        raise UserError(f"{path} holds several splits: {splits}", f"name one, as in {folder / 'train'}")
    if not (folder / "state.json").is_file():
        raise UserError(
            f"the folder {path} is no HF dataset saved to disk (no state.json in it)",
            "give a .jsonl file, or a folder written by Dataset.save_to_disk",
        )
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package datasets", "pip install 'rapidin[datasets]'"
        ) from error
    try:
        return datasets.load_from_disk(path).with_format(None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the HF dataset {path}: {error}") from error


# --------------------------------------------------------------------------------------------- examples


class Examples:
    """Checked examples in order: `len`, iteration, and `examples[row]` give records as they were read.

    path: absolute path of the file or folder, a list of several, None for data in memory.
    form: "prompt" | "instruction" | "messages" | "text", the same for every record.
    malformed: rows that cannot be read or are of no known form, where such are skipped; problems: what is
    wrong with the first of them, a line each.
    """

    def __init__(
        self, source: _Source, limit: int | None, generations: bool, checked: bool, skip: bool
    ) -> None:
        self._source, self._skip = source, skip
        self._identity: str | None = None
        self.path = source.path
        self.form = ""
        self.malformed: set[int] = set()
        self.problems: list[str] = []
        if checked:
            self._length = 0
            digest = hashlib.sha256()
            for row, entry in enumerate(source.scan(limit)):
                self._length += 1
                try:
                    if isinstance(entry, _Malformed):
                        raise entry.error
                    self.form = _check(entry, self.form, generations, source.where(row))
                except UserError as error:
                    self._refuse(row, error)
                digest.update(self._line(row, entry))
            self._identity = digest.hexdigest()
        else:
            self._length = source.skim(limit)
            for row in range(self._length):  # the first that is not malformed says the form
                entry = source.read(row)
                found = None if isinstance(entry, _Malformed) else form_of(entry, generations=generations)
                if found is not None:
                    self.form = found
                    break
        if not self._length:
            where = ", ".join(self.path) if isinstance(self.path, list) else self.path
            raise UserError(f"no examples in {where or 'the data'}", "at least one is needed")
        if len(self.malformed) == self._length:
            raise UserError(f"all {self._length:,} examples are malformed: {self.problems[0]}")

    def _refuse(self, row: int, error: UserError) -> None:
        """Raise the error, or count the row as malformed."""
        if not self._skip:
            raise error
        if row not in self.malformed and len(self.problems) < MOST_PROBLEMS:
            self.problems.append(error.what)
        self.malformed.add(row)

    def refuse(self, row: int, error: UserError) -> None:
        """Say that a record cannot be used: it is malformed where such are skipped, else UserError says
        where."""
        self._refuse(row, UserError(f"{self.where(row)}: {error.what}", error.remedy))

    def _line(self, row: int, entry: Record | _Malformed) -> bytes:
        """What an example brings to the identity."""
        if isinstance(entry, _Malformed) and row not in self.malformed:
            raise entry.error
        found = entry.found if isinstance(entry, _Malformed) else _canonical(entry)
        return b"malformed " + found if row in self.malformed else found

    @property
    def identity(self) -> str:
        """sha256 (hex) over the canonical JSON of the records in order."""
        if self._identity is None:
            self._identity = self.identity_of(self._length)
        return self._identity

    def identity_of(self, rows: int) -> str:
        """The identity of the first so many examples."""
        if self._identity is not None and rows == self._length:
            return self._identity
        digest = hashlib.sha256()
        for row in range(min(rows, self._length)):
            digest.update(self._line(row, self._source.read(row)))
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length} examples")
        entry = self._source.read(row)
        if isinstance(entry, _Malformed):
            raise entry.error
        return entry

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(self._length))

    def good(self) -> Iterator[tuple[int, Record]]:
        """Row and record of each example that is not malformed."""
        return ((row, self[row]) for row in range(self._length) if row not in self.malformed)

    def get(self, row: int) -> Record | None:
        """The record of a row, None where it is malformed."""
        return None if row in self.malformed else self[row]

    def index(self, row: int) -> int:
        """The row's line number in the file, from 0, blank lines counted, through all files where there are
        several; for other sources the row."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length} examples")
        return self._source.index(row)

    def where(self, row: int) -> str:
        """The place of a row in words: file and line, from 1 as editors count."""
        return self._source.where(row)

    def file(self, row: int) -> str | None:
        """The file or folder that a row is in, as it was named; None for data in memory."""
        return self._source.file(row)


def open_examples(
    source: Any,
    *,
    limit: int | None = None,
    generations: bool = False,
    checked: bool = True,
    skip: bool = False,
) -> Examples:
    """Open and check training examples, or with `generations` queries, whose completion may be missing.

    source: path of a .jsonl file or of a HF dataset saved to disk, several of them (a list of paths, or
    `Files`), an open file, a list of records (or of strings, each standing for {"text": string}), a pandas or
    polars data frame, an Arrow table, or a HF dataset in memory. limit: use only this many, from the start.
    checked: read all of it now; else only find where the examples are, which is quick for millions, and parse
    each when it is asked for. skip: examples with something wrong are counted as malformed.
    Raises UserError, naming the place, for a broken line, a record of no known form or of another form than
    the first, and a field of the wrong type, unless they are skipped; and when there are no examples.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} examples leaves none", "give 1 or more")
    return Examples(_open_source(source), limit, generations, checked, skip)


def _canonical(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), default=str).encode("ascii") + b"\n"


def record_hash(record: Record | None) -> int:
    """The first 8 bytes of the SHA-256 of a record's canonical JSON, as a signed integer; 0 for none."""
    if record is None:
        return 0
    return int.from_bytes(hashlib.sha256(_canonical(record)).digest()[:8], "little", signed=True)


def form_of(record: Mapping[str, Any], *, generations: bool = False) -> str | None:
    """The form a record has the fields of, or None; with `generations` the completion may be missing."""
    for lacking in ({}, _COMPLETIONS) if generations else ({},):
        for form, fields in FORMS.items():
            if all(record.get(field) is not None for field in fields if lacking.get(form) != field):
                return form
    return None


def _check(record: Record, form: str, generations: bool, where: str) -> str:
    """The form of a record, which is `form` if that is not ""; UserError says what is wrong with it."""
    found = form_of(record, generations=generations)
    if found is None or found != (form or found):
        fields = ", ".join(
            f"'{name}'" + (" (null)" if value is None else "") for name, value in record.items()
        )
        expected = EXPECTED_QUERY if generations else _EXPECTED
        if form:
            expected = f"expected {' and '.join(map(repr, FORMS[form]))} as in the examples before it"
        raise UserError(f"{where}: found {'the fields ' + fields if fields else 'no fields'}", expected)
    if found == "messages":
        _check_messages(record["messages"], where)
    else:
        for field in (*FORMS[found], *(("input",) if found == "instruction" else ())):
            if record.get(field) is not None:
                _check_text(record[field], f"'{field}'", where)
    return found


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list):
        raise UserError(f"{where}: 'messages' holds {_kind(messages)}, expected a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where}: messages[{number}] is {_kind(message)}, "
                "expected an object with 'role' and 'content'"
            )
        for field in ("role", "content"):
            _check_text(message.get(field), f"'{field}' of messages[{number}]", where)


def _check_text(value: object, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} holds {_kind(value)}, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {name} holds half a character (a lone surrogate)", "mend or remove it"
            ) from error


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
