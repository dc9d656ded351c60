"""Checks of the JSON values that a manifest or receipt consists of, and manifests of format version 2.

A cache may come from anyone: each value is checked before it is used. Each check raises ValueError, KeyError
or TypeError for a value that is not valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rapidin.cache.names import PRECONDITIONER_FILES
from rapidin.errors import short

# The values that a section of a manifest may have, by kind, and the keys that it must have.
_SECTIONS: dict[str, dict[str, str]] = {
    "model": {"source": "names", "identity": "names"},
    "sketch": {"projection": "string", "width": "count", "seed": "count", "hash": "string"},
    "gradient": {
        "at": "numbers",
        "loss": "string",
        "include": "strings",
        "exclude": "strings",
        "dropout": "dropout",
        "check": "check",
        "coverage": "coverage",
        "stack_sketch": "count",
        "training": "training",
    },
    "text": {"eos": "flag", "max_length": "count", "too_long": "too_long"},
    "data": {
        "path": "paths",
        "form": "string",
        "identity": "string",
        "begun": "count",
        "map": "names",
        "streaming": "flag",
    },
}
SECTIONS = tuple(_SECTIONS)
_REQUIRED = {
    "model": ("source", "identity"),
    "sketch": ("projection", "width", "seed"),
    "gradient": ("at", "loss", "include", "exclude"),
    "text": ("eos", "max_length", "too_long"),
    "data": (),
}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_check(value: Any) -> bool:
    counts = _is_count(value["compared"]) and _is_count(value["total"])
    errors = [value["worst"], value["mixed_error"], *dict(value["by_autograd"]).values()]
    names = isinstance(value["mixed"], str) and _is_strings(value["unchecked"] + value["followed"])
    return counts and names and all(map(is_number, errors)) and _is_strings(list(value["by_autograd"]))


def _is_coverage(value: Any) -> bool:
    numbers = _is_count(value["counted"]) and _is_count(value["total"]) and is_number(value["weights"])
    return (
        numbers
        and value["total"] > 0
        and isinstance(value["chosen"], bool)
        and all(map(_is_kind, value["left_out"]))
    )


def _is_kind(value: Any) -> bool:
    counts = _is_count(value["parameters"]) and _is_count(value["elements"])
    return counts and isinstance(value["kind"], str) and _is_strings(value["names"]) and bool(value["names"])


def _is_training(value: Any) -> bool:
    counts = all(_is_count(value[key]) for key in ("first_step", "last_step", "visits", "seen"))
    pairs = list(value["learning_rates"])
    rates = bool(pairs) and all(_is_count(step) and is_number(rate) for step, rate in pairs)
    return counts and rates and is_number(value["weight"]) and isinstance(value["trainer"], str)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "strings": _is_strings,
    "paths": lambda v: v is None or isinstance(v, str) or (bool(v) and _is_strings(v)),
    "names": lambda v: (
        isinstance(v, dict) and all(item is None or isinstance(item, str) for item in v.values())
    ),
    "dropout": lambda v: _is_count(dict(v)["seed"]) and is_number(v["rate"]) and len(v) == 2,
    "check": _is_check,
    "coverage": _is_coverage,
    "training": _is_training,
    "numbers": lambda v: isinstance(v, list) and all(is_number(item) for item in v),
    "count": _is_count,
    "flag": lambda v: isinstance(v, bool),
    "too_long": lambda v: v in ("truncate", "skip"),
}


def checked_section(name: str, value: Any) -> dict[str, Any]:
    """A section of a manifest, as it is."""
    if not isinstance(value, dict) or not all(key in value for key in _REQUIRED[name]):
        raise ValueError(f"'{name}' lacks a required key")
    for key, item in value.items():
        kind = _SECTIONS[name].get(key)
        if kind is None and name == "gradient" and key == "preconditioner":
            continue
        # A key that a later rapidin of this format adds is kept if its value is simple.
        valid = _KINDS[kind](item) if kind else item is None or isinstance(item, str | int | float)
        if not valid:
            raise ValueError(f"'{key}' of '{name}' is {short(item)}")
    return value


def checked_preconditioner(value: Any) -> str | dict[str, Any]:
    """The preconditioner's record in a manifest: "off", or a dictionary of its known keys."""
    if value == "off":
        return "off"
    if not isinstance(value, dict) or value["kind"] not in ("sample", "kfac", "optimizer"):
        raise ValueError(f"{short(value)} is not a preconditioner")
    if value["sha256"] is None and value["kind"] == "optimizer":
        raise ValueError("the preconditioner has no checksum")
    if value["file"] not in PRECONDITIONER_FILES:
        raise ValueError(f"{short(value['file'])} is not the preconditioner's file")
    if value["kind"] == "kfac":
        options: dict[str, Any] = {
            "rank": count(value["rank"]),
            "damping": float(value["damping"]),
            "tolerance": float(value.get("tolerance", 0.0)),  # earlier versions kept all directions
        }
    else:
        options = {"floor": float(value["floor"])}
    return {
        "kind": value["kind"],
        "exponent": float(value["exponent"]),
        **options,
        "sample": count(value["sample"]),
        "file": value["file"],
        "bytes": count(value["bytes"]),
        "sha256": None if value["sha256"] is None else checksum(value["sha256"]),
    }


def checked_null(value: Any) -> dict[str, dict[str, list[float]]]:
    """The null distribution in a manifest: best scores, ascending, by set and normalization."""
    null: dict[str, dict[str, list[float]]] = {}
    for kind, best in dict(value).items():
        null[name(kind)] = {name(normalize): _scores(scores) for normalize, scores in dict(best).items()}
    return null


def _scores(value: Any) -> list[float]:
    valid = isinstance(value, list) and bool(value) and all(map(is_number, value))
    if not valid or value != sorted(value):
        raise ValueError(f"{short(value)} is not a list of ascending scores")
    return [float(score) for score in value]


def count(value: Any) -> int:
    """A number of things."""
    if not _is_count(value):
        raise ValueError(f"{short(value)} is not a count")
    return int(value)


def checksum(value: Any, digits: int = 64) -> str:
    """A checksum in hexadecimal digits, as many as a SHA-256 has."""
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ValueError(f"{short(value)} is not a checksum")
    return value


def name(value: Any) -> str:
    """The name of a count or a statistic."""
    if not isinstance(value, str) or not re.fullmatch("[a-z0-9_]{1,40}", value):
        raise ValueError(f"{short(value)} is not a name")
    return value


# --------------------------------------------------------------------------------- format version 2

# Keys of version 2 by those of version 3, by the object that they are in.
_RENAMED: dict[str, dict[str, str]] = {
    "manifest": {"code": "codec", "packing": "fitted_codec"},
    "gradient": {"geometry": "preconditioner"},
    "shape": {"head": "shared", "tail": "per_layer", "rest": "residual"},
    "statistics": {"outside_mean": "unexplained_mean", "outside_99": "unexplained_p99"},
}


def upgraded(value: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A manifest of format version 2 with the keys of the present `version`."""
    manifest = _renamed("manifest", value) | {"version": version}
    manifest["gradient"] = _renamed("gradient", manifest["gradient"])
    fitted = manifest["fitted_codec"]
    if fitted is not None:
        shape, statistics = _renamed("shape", fitted["shape"]), _renamed("statistics", fitted["statistics"])
        manifest["fitted_codec"] = {**fitted, "shape": shape, "statistics": statistics}
    return manifest


def _renamed(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"'{where}' is {short(value)}")
    present_keys = _RENAMED[where]
    return {str(present_keys.get(key, key)): item for key, item in value.items()}
