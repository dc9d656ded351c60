"""Opens whatever holds examples: paths, patterns, names on the hub, open files, and data in memory."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rapidin.data import axolotl, hub, llama_factory
from rapidin.data.arrow_rows import is_table, open_table
from rapidin.data.fields import FieldMap
from rapidin.data.memory import GIVE, open_object
from rapidin.data.sources import DataNotFound, Files, Joined, Source, cannot_read, existing
from rapidin.data.spooled import decompressed, spool
from rapidin.data.text_rows import open_text, suffix_of
from rapidin.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst", ".zstd", ".xz", ".bz2")
_SPLIT = re.compile(r"(?:^|[-_. ])(train|training|test|testing|validation|valid|val|dev|eval)(?:[-_. ]|$)")
_SAME = {
    "training": "train",
    "testing": "test",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # of HF datasets, beside their data
_STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Reading:
    """How data is read. fields: the map of field names; streaming: of a data set on the hub, fetch rows as
    they are read."""

    fields: FieldMap = field(default_factory=FieldMap)
    streaming: bool = False

    def to_json(self) -> dict[str, Any]:
        """What is not the default, as arguments of `open_examples`."""
        fields = {"map": dict(self.fields.fields)} if self.fields.fields else {}
        return fields | ({"streaming": True} if self.streaming else {})


def open_source(source: Any, reading: Reading | None = None) -> Source:
    """The source of anything that `open_examples` takes. Raises UserError if it is none of that."""
    reading = reading or Reading()
    if isinstance(source, Files):
        return Joined([_open_path(path, reading) for path in source.paths])
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), reading)
    if hasattr(source, "read"):
        return _open_stream(source, reading)
    if not isinstance(source, list | tuple):
        return open_object(source)
    paths = [row for row in source if _is_path(row)]
    if not paths:
        return open_object(source)
    if len(paths) < len(source):
        raise UserError(f"the data mixes files, such as '{paths[0]}', with records or texts", GIVE)
    return Joined([_open_path(os.fspath(path), reading) for path in paths])


def _is_path(value: object) -> bool:
    """Whether an entry of a list is a file or folder rather than a text: a path object, the path of something
    that exists, or a name with the suffix of a data file."""
    if isinstance(value, os.PathLike):
        return True
    if not isinstance(value, str) or not value or len(value) > 4096 or "\n" in value or "\0" in value:
        return False
    has_suffix = _without_compression(value).endswith(SUFFIXES) and not any(map(str.isspace, value))
    return has_suffix or (os.sep in value and os.path.exists(value))


def _without_compression(name: str) -> str:
    return os.path.splitext(name)[0] if name.endswith(COMPRESSED) else name


# ------------------------------------------------------------------------------------------ paths and names


def check_found(paths: Iterable[str]) -> None:
    """Raises UserError for a path of data that do not exist, as far as that is known without reading them."""
    for path in paths:
        here = path == _STANDARD_INPUT or existing(path) is not None or glob.has_magic(path)
        if not here and not _is_on_hub(path):
            raise _not_found(path)


def _is_on_hub(path: str) -> bool:
    named = hub.is_hub_name(path) and suffix_of(path) not in SUFFIXES
    return named or path.startswith(hub.PREFIX)


def _open_path(path: str, reading: Reading) -> Source:
    if path == _STANDARD_INPUT:
        return _open_standard_input(reading)
    if "\0" in path:
        raise _not_found(path)
    found = existing(path)
    if found is not None:
        return _open_existing(*found, reading)
    if glob.has_magic(path) and not path.startswith(hub.PREFIX):
        return _open_files(
            sorted(each for each in glob.glob(path, recursive=True) if os.path.isfile(each)), path, reading
        )
    if _is_on_hub(path):
        return hub.open_hub(path, reading.streaming)
    raise _not_found(path)


def _not_found(path: str) -> DataNotFound:
    if "\0" in path:
        return DataNotFound("data not found: the path contains a null character")
    return DataNotFound(
        f"data not found: {path}",
        "give a .jsonl file, another file or a folder of data, or the name of a data set on the hub",
    )


def _open_existing(path: str, member: str | None, reading: Reading) -> Source:
    """A file or folder; member: which of several parts is meant."""
    if os.path.isdir(path):
        return _open_folder(path, member, reading)
    if os.path.basename(path) == llama_factory.NAME and llama_factory.is_listing(path):
        return llama_factory.open_listed(path, member, lambda name: _open_path(name, reading))
    if path.endswith(axolotl.SUFFIXES):
        return axolotl.open_config(path, member, lambda name: _open_path(name, reading))
    if not os.path.isfile(path):
        if not Path(path).is_fifo():
            raise UserError(f"the data {path} is not a regular file", "save it as a .jsonl file first")
        with _opened(path) as pipe:
            return _open_content(spool(pipe, path), path, None, reading, member)
    return _open_content(_opened(path), path, os.path.abspath(path), reading, member)


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")  # the source that reads it closes it
    except OSError as error:
        raise cannot_read(path, error) from error


def _open_content(
    file: IO[bytes], name: str, path: str | None, reading: Reading, member: str | None = None
) -> Source:
    """The records of a file, whose kind its first bytes tell."""
    content = decompressed(file, name)
    try:
        first = content.read(8)
        content.seek(0)
    except OSError as error:
        raise cannot_read(name, error) from error
    if not is_table(first):
        return open_text(content, name, path, suffix_of(name), reading.fields.knows, member)
    if member is not None:
        raise DataNotFound(f"data not found: {name}:{member}", f"{name} is one table")
    return open_table(content, name, path, path if content is file else None)


def _open_folder(path: str, member: str | None, reading: Reading) -> Source:
    folder = Path(path)
    if hub.is_saved(folder):
        return hub.open_saved(path, member)
    listing = folder / llama_factory.NAME
    if llama_factory.is_listing(listing):
        return llama_factory.open_listed(str(listing), member, lambda name: _open_path(name, reading))
    if member is not None:
        raise DataNotFound(f"data not found: {path}:{member}", f"{path} has no {llama_factory.NAME}")
    names = sorted(each for each in os.listdir(path) if not each.startswith((".", "_")))
    files = [each for each in names if suffix_of(each) in SUFFIXES and (folder / each).is_file()]
    files = [each for each in files if each not in _DESCRIPTIONS]
    if not files:
        inner = [each for each in names if (folder / each).is_dir()]
        others = f"name one of its folders: {', '.join(inner[:8])}"
        raise UserError(
            f"the folder {path} is not a HF dataset saved to disk (no state.json), and has no data files",
            others if inner else f"their names end in {', '.join(SUFFIXES)}",
        )
    stems = Counter(_without_compression(each) for each in files)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise UserError(f"the folder {path} has {twice[0]} both compressed and not", "remove one of the two")
    kinds = Counter(map(suffix_of, files))
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise UserError(
            f"the folder {path} has files of several kinds: {counts}",
            f"name one kind: '{folder / '*'}{min(kinds)}'",
        )
    splits = {match[1] for match in map(_SPLIT.search, files) if match}
    splits = {_SAME.get(split, split) for split in splits}
    if len(splits) > 1:
        raise UserError(
            f"the folder {path} has several splits: {', '.join(sorted(splits))}",
            f"name one by a pattern: '{folder / '*train*'}'",
        )
    return _open_files([str(folder / each) for each in files], path, reading)


def _open_files(paths: list[str], name: str, reading: Reading) -> Source:
    if not paths:
        raise DataNotFound(f"data not found: no file matches {name}")
    if len(paths) == 1:
        return _open_existing(paths[0], None, reading)
    return Joined([_open_existing(path, None, reading) for path in paths])


# ------------------------------------------------------------------------------------------------- streams


def _open_standard_input(reading: Reading) -> Source:
    from rapidin.distributed import world

    if not world().alone:
        raise UserError("several processes cannot share standard input", "save the data as a file first")
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError(
            "standard input is a terminal", "pipe the data in, as in: zcat train.gz | rapidin ..."
        )
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    return _open_content(spool(stream, "standard input"), "standard input", None, reading)


def _open_stream(source: Any, reading: Reading) -> Source:
    """An open file of text or bytes: from where it is; its path is remembered if it is at its start."""
    if getattr(source, "closed", False):
        raise UserError("the data is a closed file", "open it again, or give its path")
    name = getattr(source, "name", None)
    if isinstance(name, str) and os.path.isfile(name) and _position(source) == 0:
        return _open_path(name, reading)
    shown = name if isinstance(name, str) else "the open file"
    return _open_content(spool(source, shown), shown, None, reading)


def _position(source: Any) -> int | None:
    try:
        return int(source.tell())
    except (OSError, ValueError, AttributeError):
        return None
