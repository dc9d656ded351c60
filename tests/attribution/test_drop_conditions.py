"""The conditions of `rapidin drop`: which texts are conditions, and which records and scores meet them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import JSON, tries

from rapidin.attribution.drop_conditions import DropConditions
from rapidin.errors import UserError

COLUMNS = st.text("ab =é", min_size=1, max_size=3)
# Values that are often each other's spelling: "1" and 1, "true" and True, "null" and None.
NEAR = st.sampled_from(
    [None, True, False, 0, 1, 1.0, "1", "true", "True", "null", "None", '"1"', "", [1], "[1]"]
)


def spelled(column: str, value: Any) -> list[str]:
    """The conditions that a column has this value: as text, and as JSON."""
    return [f"{column}={value}", f"{column}={json.dumps(value)}"]


@tries(60)
@given(st.text(max_size=8) | st.text("a=", max_size=4))
def test_a_condition_is_a_column_and_a_value_or_refused(text: str) -> None:
    if "=" in text[1:] and text[0] != "=":
        assert DropConditions(where=(text,)).where == (text,)
    else:
        with pytest.raises(UserError, match="is not a column and a value"):
            DropConditions(where=(text,))


@tries(60)
@given(st.dictionaries(COLUMNS.filter(lambda name: "=" not in name), JSON, min_size=1, max_size=3), st.data())
def test_a_record_meets_each_spelling_of_its_own_values(record: dict[str, Any], data: st.DataObject) -> None:
    column = data.draw(st.sampled_from(sorted(record)))
    for condition in spelled(column, record[column]):
        assert DropConditions(where=(condition,)).has(record)
        assert not DropConditions(where=(condition,)).has({})


@tries(80)
@given(NEAR, NEAR)
def test_a_value_meets_the_spellings_of_another_only_where_they_are_the_same(value: Any, other: Any) -> None:
    for condition, spelling in zip(spelled("c", other), (str(other), json.dumps(other)), strict=True):
        expected = spelling in (str(value), json.dumps(value))
        assert DropConditions(where=(condition,)).has({"c": value}) is expected


@tries(60)
@given(
    st.dictionaries(st.sampled_from("abc"), NEAR, max_size=3),
    st.lists(st.tuples(st.sampled_from("abc"), NEAR), max_size=4),
)
def test_all_conditions_have_to_be_met(record: dict[str, Any], asked: list[tuple[str, Any]]) -> None:
    conditions = [spelled(column, value)[0] for column, value in asked]
    each = [DropConditions(where=(condition,)).has(record) for condition in conditions]
    assert DropConditions(where=tuple(conditions)).has(record) is all(each)


def test_the_value_of_a_condition_may_hold_the_sign_itself() -> None:
    assert DropConditions(where=("a=b=c",)).has({"a": "b=c"})
    assert not DropConditions(where=("a=b=c",)).has({"a=b": "c"})


def test_values_that_json_or_text_cannot_spell_meet_no_condition() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, deep):
        assert not DropConditions(where=("c=1",)).has({"c": value})
    assert DropConditions(where=("c={1}",)).has({"c": {1}})


@tries(80)
@given(
    st.none() | st.floats(allow_nan=False),
    st.none() | st.floats(allow_nan=False),
    st.floats(),
)
def test_scores_are_compared_with_both_ends(low: float | None, high: float | None, score: float) -> None:
    conditions = DropConditions(min_score=low, max_score=high)
    inside = (low is None or score >= low) and (high is None or score <= high) and not math.isnan(score)
    assert conditions.scored(score) is inside
