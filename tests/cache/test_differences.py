"""What differs between two caches is said in the words of the first difference, with both values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rapidin.cache.differences import (
    gradient_settings,
    other_model,
    preconditioner_words,
    refuse_difference,
)
from rapidin.errors import UserError

KFAC: dict[str, Any] = {
    "kind": "kfac",
    "exponent": 0.5,
    "rank": 4,
    "damping": 1e-3,
    "tolerance": 0.01,
    "sample": 9,
}
KFAC |= {"file": "preconditioner.safetensors", "bytes": 10, "sha256": "ab" * 32}
OPTIMIZER: dict[str, Any] = {"kind": "optimizer", "exponent": 0.5, "floor": 0.1, "sample": 0}
OPTIMIZER |= {"file": "preconditioner.safetensors", "bytes": 10, "sha256": "cd" * 32}
SAMPLE: dict[str, Any] = {**OPTIMIZER, "kind": "sample", "sample": 7}
CACHED: dict[str, Any] = {
    "model": {"model": "1"},
    "sketch": {"width": 8, "seed": 0},
    "gradient": {"at": [0.5], "preconditioner": "off"},
    "text": {"eos": True},
    "rows": 10,
    "data": {"identity": "2"},
    "codec": {"dtype": "float16"},
    "shard_rows": 4,
    "layers": ["a"],
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"model": "2"}}, "was made with another model: its contents are not the same"),
        ({"sketch": {"width": 8, "seed": 1}}, "with another sketch (seed: 0 in the cache, 1 requested)"),
        ({"sketch": {"width": 8}}, "with another sketch (seed: 0 in the cache, None requested)"),
        (
            {"gradient": {"at": [0.5], "preconditioner": KFAC}},
            "with other gradients (preconditioner: off in the cache, K-FAC's from a sample of at most 9 "
            "examples, rank 4, damping 0.001, tolerance 0.01 requested)",
        ),
        (
            {"text": {"eos": False}},
            "another treatment of the texts (eos: True in the cache, False requested)",
        ),
        ({"rows": 12}, "for another number of examples (10 in the cache, 12 requested)"),
        ({"data": {"identity": "3"}}, "from other data (identity: 2 in the cache, 3 requested)"),
        ({"codec": {"dtype": "int8"}}, "with another codec (dtype: float16 in the cache, int8 requested)"),
        ({"shard_rows": 5}, "with another number of rows a shard (4 in the cache, 5 requested)"),
        ({"layers": ["b"]}, "was made for other layers; name another folder with `path`"),
        ({"rows": 12, "data": {"identity": "3"}}, "for another number of examples"),
    ],
    ids=repr,
)
def test_the_first_difference_is_said(changes: dict[str, Any], said: str) -> None:
    for may_append in (False, True):
        with pytest.raises(UserError) as refused:
            refuse_difference(CACHED, CACHED | changes, Path("c"), may_append=may_append)
        assert str(refused.value).startswith("the cache in 'c' was made ")
        assert said in str(refused.value)
        offered = "or add the new examples with `append`" in str(refused.value)
        assert offered is (may_append and "rows" in changes)


def test_nothing_is_said_of_caches_that_agree() -> None:
    for may_append in (False, True):
        refuse_difference(CACHED, dict(CACHED), Path("c"), may_append=may_append)
    refuse_difference(CACHED | {"created": 1}, CACHED | {"created": 2}, Path("c"), may_append=False)


@pytest.mark.parametrize(
    ("cached", "given", "words"),
    [
        ({"model": "1", "adapter": "2"}, {"model": "3"}, "with an adapter, and none is given"),
        ({"model": "1"}, {"model": "3", "adapter": "2"}, "without an adapter, and one is given"),
        ({"model": "1", "base": "2"}, {"model": "1"}, "with a base model, and none is given"),
        ({"model": "1"}, {"model": "1", "base": "2"}, "without a base model, and one is given"),
        ({"model": "1", "base": "2"}, {"model": "1", "base": "3"}, "with another base model"),
        ({"model": "1", "adapter": "2"}, {"model": "1", "adapter": "3"}, "with another adapter"),
        ({"model": "1", "adapter": "2"}, {"model": "2", "adapter": "3"}, "with another model"),
        ({"model": "1", "tokenizer": "2"}, {"model": "1", "tokenizer": "3"}, "with another tokenizer"),
    ],
)
def test_a_model_differs_in_what_is_said(cached: dict[str, str], given: dict[str, str], words: str) -> None:
    assert other_model(cached, given).startswith(words)


def test_settings_of_gradients_leave_out_what_was_found() -> None:
    found = {"check": {}, "coverage": {}, "training": {}}
    assert gradient_settings({"at": [0.5], **found}) == {"at": [0.5], "preconditioner": "off"}
    for kind in (KFAC, SAMPLE):
        fitted = gradient_settings({"preconditioner": kind})["preconditioner"]
        assert fitted == {key: kind[key] for key in kind if key not in ("file", "bytes", "sha256")}
    loaded = gradient_settings({"preconditioner": OPTIMIZER})["preconditioner"]
    assert loaded == {key: OPTIMIZER[key] for key in OPTIMIZER if key not in ("file", "bytes")}


def test_a_preconditioner_in_words() -> None:
    assert preconditioner_words("off") == "off"
    assert preconditioner_words(SAMPLE) == "from a sample of at most 7 examples, exponent 0.5, floor 0.1"
    assert preconditioner_words(OPTIMIZER) == ("from the optimizer's state cdcdcdcd, exponent 0.5, floor 0.1")
    assert preconditioner_words({**KFAC, "rank": 5}) == (
        "K-FAC's from a sample of at most 9 examples, rank 5, damping 0.001, tolerance 0.01"
    )
    assert preconditioner_words({**KFAC, "tolerance": 0.0}) == (
        "K-FAC's from a sample of at most 9 examples, rank 4, damping 0.001"
    )
