"""Each value of a manifest is checked: what is valid is kept as it is, and anything else is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rapidin.cache.schema import (
    SECTIONS,
    checked_null,
    checked_preconditioner,
    checked_section,
    checksum,
    count,
    is_number,
    name,
    upgraded,
)

KIND = {"kind": "norms", "parameters": 3, "elements": 40, "names": ["a.norm"]}
GOOD: dict[str, dict[str, Any]] = {
    "model": {"source": {"model": "m", "adapter": None}, "identity": {"model": "1"}},
    "sketch": {"projection": "tensor", "width": 8, "seed": 0, "hash": "lowbias32-1"},
    "gradient": {
        "at": [0.5, 1],
        "loss": "mean",
        "include": ["*"],
        "exclude": [],
        "preconditioner": {"any": ["thing"]},
        "dropout": {"seed": 1, "rate": 0.1},
        "check": {
            "compared": 2,
            "total": 3,
            "worst": 1e-7,
            "mixed_error": 0,
            "by_autograd": {"a.weight": 0.5},
            "mixed": "",
            "unchecked": ["b.weight"],
            "followed": [],
        },
        "coverage": {"counted": 0, "total": 1, "weights": 0.5, "chosen": True, "left_out": [KIND]},
        "stack_sketch": 1,
        "training": {
            "first_step": 0,
            "last_step": 9,
            "visits": 1,
            "seen": 20,
            "learning_rates": [[0, 0.1], [5, 1]],
            "weight": 0.5,
            "trainer": "SFTTrainer",
        },
    },
    "text": {"eos": False, "max_length": 64, "too_long": "skip"},
    "data": {
        "path": ["a.jsonl", "b.jsonl"],
        "form": "prompt",
        "identity": "2",
        "begun": 0,
        "map": {"prompt": "question"},
        "streaming": True,
    },
}
COUNTS = (-1, 1.0, True, "1", None, [])  # none of which is a count
NUMBERS = (True, "1", None, [], float("nan"), float("inf"), -1e301)  # none of which is a number
TEXTS = (1, None, [], {})
LISTS = ("a", ["a", 1], [None], {"a": 1}, None)  # none of which is a list of texts
NAMES = ([], "a", {"a": 1}, {"a": []}, None)
FLAGS = (0, 1, "true", None)
# By section, the way to a value, and values that may not stand there.
BAD: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
    ("model", ("source",), NAMES),
    ("model", ("identity",), NAMES),
    ("model", ("later",), ([], {})),
    ("sketch", ("projection",), TEXTS),
    ("sketch", ("width",), COUNTS),
    ("sketch", ("seed",), COUNTS),
    ("sketch", ("hash",), TEXTS),
    ("gradient", ("at",), (0.5, "a", None, [True], [0.5, "1"], [float("nan")])),
    ("gradient", ("loss",), TEXTS),
    ("gradient", ("include",), LISTS),
    ("gradient", ("exclude",), LISTS),
    ("gradient", ("dropout",), (None, {"seed": 1, "rate": 0.1, "more": 1})),
    ("gradient", ("dropout", "seed"), COUNTS),
    ("gradient", ("dropout", "rate"), NUMBERS),
    *(("gradient", ("check", key), COUNTS) for key in ("compared", "total")),
    *(("gradient", ("check", key), NUMBERS) for key in ("worst", "mixed_error")),
    ("gradient", ("check", "by_autograd"), ({"a": "1"}, {"a": None}, {1: 0.5}, "a")),
    ("gradient", ("check", "mixed"), TEXTS),
    *(("gradient", ("check", key), ([1], "a", None)) for key in ("unchecked", "followed")),
    *(("gradient", ("coverage", key), COUNTS) for key in ("counted", "total")),
    ("gradient", ("coverage", "total"), (0,)),
    ("gradient", ("coverage", "weights"), NUMBERS),
    ("gradient", ("coverage", "chosen"), FLAGS),
    ("gradient", ("coverage", "left_out"), ([1], [{}], None, [KIND, {**KIND, "kind": 1}])),
    *(("gradient", ("coverage", "left_out", 0, key), COUNTS) for key in ("parameters", "elements")),
    ("gradient", ("coverage", "left_out", 0, "kind"), TEXTS),
    ("gradient", ("coverage", "left_out", 0, "names"), (*LISTS, [])),
    ("gradient", ("stack_sketch",), COUNTS),
    *(("gradient", ("training", key), COUNTS) for key in ("first_step", "last_step", "visits", "seen")),
    ("gradient", ("training", "learning_rates"), ([], [[0]], [[0, "1"]], [["0", 1]], [[0, 1], [-1, 1]])),
    ("gradient", ("training", "weight"), NUMBERS),
    ("gradient", ("training", "trainer"), TEXTS),
    ("text", ("eos",), FLAGS),
    ("text", ("max_length",), COUNTS),
    ("text", ("too_long",), ("cut", "", None, 1)),
    ("data", ("path",), (1, [], [1], {})),
    ("data", ("form",), TEXTS),
    ("data", ("identity",), TEXTS),
    ("data", ("begun",), COUNTS),
    ("data", ("map",), NAMES),
    ("data", ("streaming",), FLAGS),
]
REFUSALS = (ValueError, KeyError, TypeError)


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at the end of a path."""
    other = inner = copy.deepcopy(value)
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new
    return other


@pytest.mark.parametrize("section", SECTIONS)
def test_a_valid_section_is_kept_as_it_is(section: str) -> None:
    before = copy.deepcopy(GOOD[section])
    assert checked_section(section, GOOD[section]) == before
    assert checked_section(section, {**before, "later": "value"})["later"] == "value"
    for value in ([], "a", None):
        with pytest.raises(ValueError, match=f"'{section}' lacks a required key"):
            checked_section(section, value)


@pytest.mark.parametrize(("section", "path", "values"), BAD, ids=lambda each: repr(each)[:40])
def test_a_value_of_another_kind_is_refused(section: str, path: tuple[Any, ...], values: Any) -> None:
    for value in values:
        with pytest.raises(REFUSALS):
            checked_section(section, changed(GOOD[section], path, value))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *(("model", key) for key in ("source", "identity")),
        *(("sketch", key) for key in ("projection", "width", "seed")),
        *(("gradient", key) for key in ("at", "loss", "include", "exclude")),
        *(("text", key) for key in ("eos", "max_length", "too_long")),
    ],
)
def test_a_required_key_may_not_be_missing(section: str, key: str) -> None:
    for known in GOOD[section]:
        kept = {name: value for name, value in GOOD[section].items() if name != known}
        if known == key:
            with pytest.raises(ValueError, match="lacks a required key"):
                checked_section(section, kept)


def test_data_may_be_unknown_or_one_file() -> None:
    for value in ({}, {"path": None}, {"path": "a.jsonl"}):
        assert checked_section("data", value) == value


FITTED = {"exponent": 0.5, "sample": 9, "bytes": 100, "sha256": "0" * 64}
PRECONDITIONERS: dict[str, dict[str, Any]] = {
    "kfac": FITTED
    | {"kind": "kfac", "rank": 4, "damping": 1e-3, "tolerance": 0.01, "file": "preconditioner.safetensors"},
    "sample": FITTED | {"kind": "sample", "floor": 0.1, "file": "preconditioner.safetensors"},
    "optimizer": FITTED | {"kind": "optimizer", "floor": 0.1, "file": "preconditioner.safetensors"},
}


@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_a_preconditioner_is_kept_with_its_known_keys(kind: str) -> None:
    value = PRECONDITIONERS[kind]
    assert checked_preconditioner(value) == value
    assert checked_preconditioner({**value, "more": 1}) == value
    assert checked_preconditioner("off") == "off"
    for key in ("sample", "bytes", *(["rank"] if kind == "kfac" else [])):
        for bad in COUNTS:
            with pytest.raises(REFUSALS):
                checked_preconditioner({**value, key: bad})
    for key in set(value) - {"tolerance"}:
        with pytest.raises(REFUSALS):
            checked_preconditioner({name: each for name, each in value.items() if name != key})
    bad_values = {
        "kind": ("adam", "", None),
        "file": ("../a", "a.safetensors", None),
        "sha256": ("0", 1, "g" * 64),
    }
    for key, values in bad_values.items():
        for bad in values:
            with pytest.raises(REFUSALS):
                checked_preconditioner({**value, key: bad})
    for bad in ("on", None, [], 1):
        with pytest.raises(REFUSALS):
            checked_preconditioner(bad)


def test_earlier_caches_kept_all_directions_of_a_side() -> None:
    value = PRECONDITIONERS["kfac"]
    earlier = {key: each for key, each in value.items() if key != "tolerance"}
    assert checked_preconditioner(earlier) == {**value, "tolerance": 0.0}
    with pytest.raises(REFUSALS):
        checked_preconditioner({**value, "tolerance": "x"})


def test_only_a_preconditioner_of_an_optimizer_needs_its_checksum_at_once() -> None:
    for kind, value in PRECONDITIONERS.items():
        unsigned = {**value, "sha256": None}
        if kind == "optimizer":
            with pytest.raises(ValueError, match="the preconditioner has no checksum"):
                checked_preconditioner(unsigned)
        else:
            assert checked_preconditioner(unsigned) == unsigned


def test_null_scores_are_ascending_numbers_with_names() -> None:
    good = {"neutral": {"layer": [-0.5, 0.1, 0.1, 2], "none": [1]}, "rows": {}}
    assert checked_null(good) == good
    assert checked_null({}) == {}
    for scores in ([], [1, 0.5], [True], ["1"], [float("nan")], None, "12"):
        with pytest.raises(REFUSALS):
            checked_null({"neutral": {"layer": scores}})
    for bad in ({"A": {}}, {"": {}}, {"a b": {}}, {"a" * 41: {}}, {"neutral": {"../x": [1]}}, [1], 5):
        with pytest.raises(REFUSALS):
            checked_null(bad)


def test_numbers_counts_checksums_and_names() -> None:
    assert [is_number(value) for value in (0, -1.5, 1e299, 10**299)] == [True] * 4
    assert not any(map(is_number, (*NUMBERS, 10**400)))
    assert [count(value) for value in (0, 7, 10**30)] == [0, 7, 10**30]
    for bad in COUNTS:
        with pytest.raises(ValueError, match="is not a count"):
            count(bad)
    assert checksum("0123456789abcdef" * 4) == "0123456789abcdef" * 4
    assert checksum("0123456789abcdef", 16) == "0123456789abcdef"
    for text in ("", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", 0, None):
        with pytest.raises(ValueError, match="is not a checksum"):
            checksum(text)
    assert [name(value) for value in ("a", "ok_2", "a" * 40)] == ["a", "ok_2", "a" * 40]
    for text in ("", "a" * 41, "A", "a-b", "a\n", 1, None):
        with pytest.raises(ValueError, match="is not a name"):
            name(text)


def test_version_2_has_the_keys_of_the_present_version() -> None:
    fitted = {
        "shape": {"head": 1, "tail": [2], "rest": [3], "other": 4},
        "statistics": {"outside_mean": 5, "outside_99": 6, "other": 7},
        "other": 8,
    }
    old = {
        "version": 2,
        "code": "c",
        "packing": fitted,
        "gradient": {"geometry": "off", "at": [1.0]},
        "rows": 9,
    }
    before = copy.deepcopy(old)
    assert upgraded(old, 3) == {
        "version": 3,
        "codec": "c",
        "fitted_codec": {
            "shape": {"shared": 1, "per_layer": [2], "residual": [3], "other": 4},
            "statistics": {"unexplained_mean": 5, "unexplained_p99": 6, "other": 7},
            "other": 8,
        },
        "gradient": {"preconditioner": "off", "at": [1.0]},
        "rows": 9,
    }
    assert old == before
    assert upgraded({**old, "packing": None}, 3)["fitted_codec"] is None
    for bad in ({**old, "gradient": []}, {**old, "packing": {**fitted, "shape": None}}, []):
        with pytest.raises(REFUSALS):
            upgraded(bad, 3)  # type: ignore[arg-type]
