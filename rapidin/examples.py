"""Training data and queries, from jsonl, a HF dataset or a list.

Four forms of record are read; other fields are left alone and shown with a hit.

    prompt        {"prompt": ..., "completion": ...}                    joined as they stand
    instruction   {"instruction": ..., "input": ..., "output": ...}     the Alpaca form; "input" may be absent
    messages      {"messages": [{"role": ..., "content": ...}, ...]}    the tokenizer's chat template
    text          {"text": ...}                                         all of it counts

`open_examples` reads and checks the whole source once, so a broken line is found before any work is done.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rapidin.errors import UserError

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

_UTF8_BOM = b"\xef\xbb\xbf"


# ---------------------------------------------------------------------------------------------- sources


class _Source(Protocol):
    path: str | None

    def scan(self, limit: int | None) -> Iterator[Record]:
        """All records in order, at most `limit` of them. This or `skim` comes before `read`, once."""

    def skim(self, limit: int | None) -> int:
        """Find where the records are and count them, without reading what they say."""

    def read(self, row: int) -> Record: ...

    def index(self, row: int) -> int: ...

    def where(self, row: int) -> str:
        """The place of a row in words, as a person would look it up."""


class _JsonLines:
    """A jsonl file of any size: two integers are kept for each example, records are read when wanted."""

    def __init__(self, path: str) -> None:
        self.path: str | None = os.path.abspath(path)
        self._name = path
        self._offsets = array("Q")
        self._lines = array("Q")
        try:
            self._file = open(path, "rb")  # noqa: SIM115  (closed with this object)
        except OSError as error:
            raise UserError(f"cannot read the data file {path}: {error.strerror}") from error

    def scan(self, limit: int | None) -> Iterator[Record]:
        for row, line in enumerate(self._find(limit)):
            yield self._parse(line, row)

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self._find(limit))

    def _find(self, limit: int | None) -> Iterator[bytes]:
        """Each line that is not blank, its place noted."""
        offset = 0
        for number, line in enumerate(self._file):
            if limit is not None and len(self._offsets) == limit:
                return
            start, offset = offset, offset + len(line)
            if number == 0 and line.startswith(_UTF8_BOM):
                line = line[len(_UTF8_BOM) :]
                start += len(_UTF8_BOM)
            if line.strip():
                self._offsets.append(start)
                self._lines.append(number)
                yield line

    def read(self, row: int) -> Record:
        self._file.seek(self._offsets[row])
        return self._parse(self._file.readline(), row)

    def index(self, row: int) -> int:
        return self._lines[row]

    def where(self, row: int) -> str:
        return f"{self._name}, line {self._lines[row] + 1}"

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
        return _as_record(record, self.where(row))


class _Rows:
    """A list of records, or a HF dataset: anything with a length and rows."""

    def __init__(self, rows: Any, path: str | None, name: str) -> None:
        self.path = path
        self._rows = rows
        self._name = name

    def scan(self, limit: int | None) -> Iterator[Record]:
        return (self.read(row) for row in range(self.skim(limit)))

    def skim(self, limit: int | None) -> int:
        return len(self._rows) if limit is None else min(limit, len(self._rows))

    def read(self, row: int) -> Record:
        record = self._rows[row]
        return _as_record({"text": record} if isinstance(record, str) else record, self.where(row))

    def index(self, row: int) -> int:
        return row

    def where(self, row: int) -> str:
        return f"{self._name}[{row}]"


def _as_record(value: object, where: str) -> Record:
    if not isinstance(value, Mapping) or not all(isinstance(field, str) for field in value):
        raise UserError(f"{where}: found {_kind(value)}, expected a JSON object with named fields")
    return dict(value)


def _open_source(source: Any) -> _Source:
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
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UserError(
            f"the data is {_kind(source)}", "give a path, a list of records or strings, or a HF dataset"
        )
    return _Rows(list(source), None, "examples")


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

    path: absolute path of the file or folder, None for data in memory.
    form: "prompt" | "instruction" | "messages" | "text", the same for every record.
    """

    def __init__(self, source: _Source, limit: int | None, generations: bool, checked: bool) -> None:
        self._source = source
        self._identity: str | None = None
        self.path = source.path
        self.form = ""
        if checked:
            self._length = 0
            digest = hashlib.sha256()
            for row, record in enumerate(source.scan(limit)):
                self.form = _check(record, self.form, generations, source.where(row))
                digest.update(_canonical(record))
                self._length += 1
            self._identity = digest.hexdigest()
        else:
            self._length = source.skim(limit)
        if not self._length:
            raise UserError(f"no examples in {self.path or 'the data'}", "at least one is needed")
        self.form = self.form or _check(source.read(0), "", generations, source.where(0))

    @property
    def identity(self) -> str:
        """sha256 (hex) over the canonical JSON of the records in order."""
        if self._identity is None:
            digest = hashlib.sha256()
            for record in self:
                digest.update(_canonical(record))
            self._identity = digest.hexdigest()
        return self._identity

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length} examples")
        return self._source.read(row)

    def __iter__(self) -> Iterator[Record]:
        return (self._source.read(row) for row in range(self._length))

    def index(self, row: int) -> int:
        """The row's line number in the file, from 0, blank lines counted; for other sources the row."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length} examples")
        return self._source.index(row)

    def where(self, row: int) -> str:
        """The place of a row in words: file and line, from 1 as editors count."""
        return self._source.where(row)


def open_examples(
    source: Any, *, limit: int | None = None, generations: bool = False, checked: bool = True
) -> Examples:
    """Open and check training examples, or with `generations` queries, whose completion may be missing.

    source: path of a .jsonl file or of a HF dataset saved to disk, a list of records (or of strings, each
    standing for {"text": string}), or a HF dataset in memory. limit: only the first so many. checked: read
    all of it now; else only find where the examples are, which is quick for millions, and parse each when it
    is asked for.
    Raises UserError, naming the place, for a broken line, a record of no known form or of another form than
    the first, and a field of the wrong type; and when there are no examples.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} examples leaves none", "give 1 or more")
    return Examples(_open_source(source), limit, generations, checked)


def _canonical(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), default=str).encode("ascii") + b"\n"


def record_hash(record: Record) -> int:
    """The first 8 bytes of the SHA-256 of a record's canonical JSON, as a signed integer."""
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
