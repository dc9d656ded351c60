"""Folders that an evaluation fills over several runs, and the settings file that lets a later run resume."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidin.data.records import jsonl
from rapidin.errors import UserError, short
from rapidin.files import replace_file


def start_or_resume(
    folder: Path, name: str, settings: Mapping[str, Any], *, labels: Mapping[str, str] | None = None
) -> None:
    """Write the settings of a new folder to its file `name`, or check that an existing folder has the same.

    labels: what to call a top-level key in an error message. Raises UserError, naming the first setting that
    differs, and for a folder that has other files but no such file.
    """
    path = folder / name
    if not path.exists():
        other_files = [p.name for p in sorted(folder.iterdir()) if not _is_temporary(p.name)]
        if other_files:
            raise UserError(
                f"the folder '{folder}' holds something else ('{other_files[0]}')", "name another folder"
            )
        replace_file(path, (json.dumps(dict(settings), indent=1) + "\n").encode())
        return
    try:
        saved = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise UserError(f"'{path}' is damaged", "name another folder") from None
    for key, value in _flat(json.loads(json.dumps(dict(settings)))).items():
        if saved.get(key) == value:
            continue
        label = (labels or {}).get(key.split(".")[0])
        difference = (
            f"{key.split('.')[-1].replace('_', ' ')} ({short(saved.get(key))} instead of {short(value)})"
        )
        raise UserError(
            f"'{folder}' was made with another {label or difference}",
            "give the same settings, or name another folder",
        )


def model_reference(model: str) -> str:
    """The absolute path of a model's folder; a name that is no path stays as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a jsonl file atomically."""
    replace_file(path, jsonl(rows).encode())


def _is_temporary(name: str) -> bool:
    """Whether a file may lie in a folder that has no settings file yet: locks and unfinished writes."""
    return name.startswith(".") or name.endswith(".partial")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
