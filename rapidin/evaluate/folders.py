"""Folders that an evaluation fills over several runs, and that say what they were begun with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rapidin.errors import UserError, short
from rapidin.files import replace_file


def begin(
    folder: Path, name: str, about: Mapping[str, Any], *, names: Mapping[str, str] | None = None
) -> None:
    """Write what a new folder is about into its file `name`, or refuse one that was begun with something
    else.

    names: of keys, in words for the user. Raises UserError, naming the first thing that differs; and where
    a folder without that file holds something.
    """
    path = folder / name
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"'{path}' is damaged", "name another --out") from None
        before, now = _flat(found), _flat(json.loads(json.dumps(dict(about))))
        for key in now:
            if before.get(key) != now[key]:
                words = (names or {}).get(key.split(".")[0], key.split(".")[-1].replace("_", " "))
                what = (
                    ""
                    if words != key.split(".")[-1].replace("_", " ")
                    else (f" ({short(before.get(key))} instead of {short(now[key])})")
                )
                raise UserError(
                    f"'{folder}' was begun with another {words}{what}",
                    "give the same settings, or name another --out",
                )
        return
    others = [p.name for p in sorted(folder.iterdir()) if not _begun(p.name)]
    if others:
        raise UserError(f"the folder '{folder}' holds something else ('{others[0]}')", "name another --out")
    replace_file(path, (json.dumps(dict(about), indent=1) + "\n").encode())


def _begun(name: str) -> bool:
    """Whether a file may lie in a folder that is not described yet."""
    return name.startswith(".") or name.endswith(".partial")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{prefix}{key}.") if isinstance(part, dict) else {f"{prefix}{key}": part}
    return flat
