"""HF datasets: saved to disk, and by name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rapidin.data.sources import DataNotFound, Rows, Source
from rapidin.data.spooled import Spooled
from rapidin.errors import UserError, needs

PREFIX = "hf://datasets/"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def is_saved(folder: Path) -> bool:
    """Whether a folder is a HF dataset saved to disk, or a set of splits."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_saved(path: str, split: str | None = None) -> Source:
    """The rows of a HF dataset that was saved to disk."""
    folder = Path(path)
    name = path
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
        if split is None:
            what = f"{path} has several splits: {', '.join(splits)}"
            raise UserError(what, f"name one, as in {folder / 'train'}")
        if split not in splits:
            raise DataNotFound(f"{path} has no split '{split}'", f"its splits are {', '.join(splits)}")
        name = str(folder / split)
    elif split is not None:
        raise DataNotFound(f"data not found: {path}:{split}", f"{path} is a HF dataset without splits")
    datasets = needs("datasets", f"reading {name}", "data")
    try:
        return Rows(datasets.load_from_disk(name).with_format(None), os.path.abspath(name), name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the HF dataset {name}: {error}") from error


def is_hub_name(name: str) -> bool:
    """Whether a name may be that of a data set of the hub: OWNER/NAME, with a configuration and a split."""
    return name.startswith(PREFIX) or _NAME.fullmatch(name) is not None


def open_hub(spelled: str, streaming: bool) -> Source:
    """The rows of a data set of the hub: [hf://datasets/]OWNER/NAME[/CONFIGURATION][:SPLIT].

    streaming: rows are fetched as they are read and kept in a temporary file; else all of it is downloaded.
    """
    datasets = needs("datasets", f"reading {spelled} from the Hugging Face hub", "data")
    whole, _, split = spelled.removeprefix(PREFIX).partition(":")
    owner, _, rest = whole.partition("/")
    name, _, configuration = rest.partition("/")
    repository = f"{owner}/{name}" if name else owner
    try:
        loaded = datasets.load_dataset(repository, configuration or None, streaming=streaming)
        found = _split_of(loaded, spelled, split)
    except UserError:
        raise
    except Exception as error:  # of whatever kind the hub's client raises
        raise _refusal(spelled, repository, error) from error
    path = PREFIX + whole + (f":{split}" if split else "")
    if streaming:
        return _Streamed(_fetched(found, spelled), path, spelled)
    return Rows(found.with_format(None), path, spelled)


def _split_of(loaded: Any, spelled: str, split: str) -> Any:
    if not hasattr(loaded, "keys"):
        return loaded
    splits = list(loaded)
    if not split and len(splits) > 1:
        what = f"{spelled} has several splits: {', '.join(splits)}"
        raise UserError(what, f"name one, as in {spelled}:{splits[0]}")
    chosen = split or splits[0]
    if chosen not in splits:
        raise UserError(f"{spelled}: no split '{chosen}'", f"its splits are {', '.join(splits)}")
    return loaded[chosen]


def _refusal(spelled: str, repository: str, error: Exception) -> UserError:
    kind = type(error).__name__
    missing = f"data not found: {spelled} is no file or folder"
    if isinstance(error, ConnectionError) or "Offline" in kind or "Connect" in kind or "Timeout" in kind:
        offline = [name for name in _OFFLINE if os.environ.get(name) not in (None, "", "0")]
        why = f"{offline[0]} is set" if offline else "no connection"
        what = f"{missing}, and the Hugging Face hub cannot be reached ({why})"
        return DataNotFound(what, "give a file, or connect, so that the data set can be downloaded")
    if "NotFound" in kind:
        remedy = "check the name; a private one needs a login (hf auth login)"
        return DataNotFound(f"{missing}, and no data set of the Hugging Face hub", remedy)
    return UserError(f"cannot load {repository} from the Hugging Face hub: {error}")


def _fetched(rows: Iterable[Any], spelled: str) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:
        raise UserError(f"the Hugging Face hub stopped sending {spelled}: {error}", "run it again") from error


class _Streamed(Spooled):
    """Rows that are fetched as they are read; they can be fetched again by name."""

    def __init__(self, rows: Iterable[Any], path: str, name: str) -> None:
        super().__init__(rows, name)
        self.path = path
