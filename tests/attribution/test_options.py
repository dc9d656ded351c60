"""The texts of options: each is a value that its dataclass accepts, or one line of what is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import made_or_refused, tries

from rapidin.attribution.options import CacheOptions, QueryOptions
from rapidin.attribution.selection import count_of
from rapidin.data.spans import split_words
from rapidin.evaluate.methods import Method, parse_methods
from rapidin.evaluate.settings import GroundTruthSettings
from rapidin.gradients.settings import GradientSettings
from rapidin.settings import described

# Fields that are read from text by a function of their own.
PARSED = [
    (kind, name)
    for kind in (CacheOptions, GradientSettings, GroundTruthSettings, QueryOptions)
    for name, (_, option) in described(kind).items()
    if option.parse is not None
]
LONG = "9" * 5000  # more digits than Python reads
TEXTS = (
    st.text(max_size=6)
    | st.text("0123456789.,/-+einfa %:=_²٣", max_size=8)
    | st.sampled_from([LONG, f"{LONG}/1"])
)
NUMBERS = st.floats(0, allow_infinity=False)


def test_all_options_that_are_parsed_are_tried() -> None:
    assert {name for _, name in PARSED} >= {"at", "fuse_weights", "lora", "map", "part", "rescore"}


@pytest.mark.parametrize(("kind", "name"), PARSED, ids=lambda value: getattr(value, "__name__", value))
@tries(50)
@given(TEXTS)
def test_any_text_of_an_option_is_read_or_refused(kind: Any, name: str, text: str) -> None:
    parse = described(kind)[name][1].parse
    assert parse is not None
    made, error = made_or_refused(lambda: kind(**{name: parse(text)}))
    assert (made is None) is (error is not None)
    assert made is None or kind(**{name: getattr(made, name)}) == made


@tries(40)
@given(st.integers(0, 99), st.integers(1, 99), st.lists(NUMBERS, min_size=3, max_size=3).filter(any))
def test_options_are_read_as_they_are_written(number: int, parts: int, weights: list[float]) -> None:
    part, fuse = (
        described(kind)[name][1].parse
        for kind, name in ((CacheOptions, "part"), (QueryOptions, "fuse_weights"))
    )
    assert part is not None
    assert fuse is not None
    assert part(f"{number}/{parts}") == (number, parts)
    assert QueryOptions(fuse=True, fuse_weights=fuse(",".join(map(repr, weights)))).fuse_weights == tuple(
        weights
    )


@tries(60)
@given(
    st.lists(
        st.builds(
            Method,
            st.sampled_from(["datainf", "fisher"]),
            st.sampled_from(["layer", "none"]),
            st.none() | st.floats(0, 1e300, exclude_min=True),
        ),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_methods_are_read_as_they_are_written(methods: list[Method]) -> None:
    assert parse_methods(",".join(map(str, methods))) == methods
    assert parse_methods(" , ".join(map(str, [*methods, *methods]))) == methods


@tries(100)
@given(TEXTS | st.text("dotfisher:layn,0.1", max_size=20))
def test_any_text_of_methods_is_read_or_refused(text: str) -> None:
    methods, _ = made_or_refused(lambda: parse_methods(text))
    assert methods is None or parse_methods(",".join(map(str, methods))) == methods


@tries(100)
@given(TEXTS, st.integers(1, 10**9))
def test_a_count_is_a_number_or_a_share_of_the_rows(text: str, rows: int) -> None:
    count, _ = made_or_refused(lambda: count_of(text, rows))
    assert count is None or 1 <= count <= rows


@tries(40)
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_count_and_its_share_are_the_same(count: int, more: int) -> None:
    rows = count + more
    assert count_of(str(count), rows) == count
    assert count_of(f"{count / rows * 100!r}%", rows) == count
    assert count_of("100%", rows) == rows


@tries(60)
@given(st.lists(st.text("ab |\t", max_size=3) | st.text(max_size=3), max_size=5))
def test_hot_words_are_those_between_bars(words: list[str]) -> None:
    text = "|".join(words)
    found = split_words(text)
    assert found == split_words(text.split("|")) == split_words("|".join(found))
    assert set(found) == {each.strip() for each in text.split("|")} - {""}
    assert len(found) == len(set(found))


def test_a_damping_that_is_not_a_number_is_refused() -> None:
    for text in ("fisher:layer:nan", "fisher:layer:inf", "fisher:layer:-1", "fisher:layer:x"):
        assert made_or_refused(lambda text=text: parse_methods(text))[0] is None  # type: ignore[misc]
    assert math.isclose(parse_methods("fisher:layer:1e-3")[0].damping or 0, 1e-3)
