"""Maps of field names: what a text of one means, what it reads, and that nothing else is accepted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import JSON, NAMES, RECORDS, made_or_refused, tries, words

from rapidin.data.fields import FieldMap
from rapidin.data.opening import Reading
from rapidin.data.records import TEXTS
from rapidin.errors import UserError

TARGETS = ("prompt", "completion", "instruction", "input", "output", "text", "input_ids", "labels", "weight")
# Names that a text of a map can spell: without the comma between its entries, and without white space around.
SPELLABLE = words(min_size=1, max_size=5).map(str.strip).filter(lambda name: name and "," not in name)


@tries(40)
@given(st.dictionaries(st.sampled_from(TARGETS), SPELLABLE, max_size=4))
def test_a_map_as_text_is_read_as_it_is_written(fields: dict[str, str]) -> None:
    text = ",".join(f"{target}={name}" for target, name in fields.items())
    spaced = " , ".join(f" {target} = {name} " for target, name in fields.items())
    assert FieldMap.of(text) == FieldMap.of(spaced) == FieldMap.of(fields) == FieldMap(fields)
    assert FieldMap.of(Reading(FieldMap(fields)).to_json().get("map")) == FieldMap(fields)


@tries(80)
@given(st.text(max_size=10) | st.text("textprom=,. ", max_size=12) | JSON)
def test_anything_else_is_refused_as_a_map(value: Any) -> None:
    read, _ = made_or_refused(lambda: FieldMap.of(value if isinstance(value, str | dict) else None))
    assert read is None or all(isinstance(name, str) and name for name in read.fields.values())


def test_a_field_is_made_of_one_other() -> None:
    with pytest.raises(UserError, match="the map names two fields for 'prompt'; as in prompt=question"):
        FieldMap.of("prompt=a,completion=b,prompt=c")
    assert FieldMap.of("prompt=a,completion=b,prompt=a").fields == {"prompt": "a", "completion": "b"}


@st.composite
def paths(draw: st.DrawFn) -> tuple[Any, list[str | int], Any]:
    """A nested value, the way to a value in it, and that value."""
    found = value = draw(JSON)
    steps: list[str | int] = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            name = draw(st.text("ab0", min_size=1, max_size=2))
            value = {"other": 1, name: value}
            steps.insert(0, name)
        else:
            before = draw(st.integers(0, 3))
            value = [*[None] * before, value, None]
            steps.insert(0, before)
    return value, steps, found


@tries(60)
@given(paths())
def test_a_path_reads_what_python_reads(made: tuple[Any, list[str | int], Any]) -> None:
    value, steps, expected = made
    path = ".".join(map(str, ["top", *steps]))
    read = FieldMap.of({"text": path}).read({"top": value}, "here")
    assert read["text"] is expected
    assert read["top"] is value
    with pytest.raises(UserError, match=r"here: no field '.*' to read as 'text'; its fields are 'top'"):
        FieldMap.of({"text": f"{path}.9"}).read({"top": value if not _goes_on(expected) else 0}, "here")


def _goes_on(value: Any) -> bool:
    """Whether a path may go on in a value by the step 9."""
    return isinstance(value, dict) and "9" in value


def test_a_step_of_thousands_of_digits_is_no_step() -> None:
    with pytest.raises(UserError, match="no field 'a"):
        FieldMap.of({"text": f"a.{'9' * 5000}"}).read({"a": [1]}, "here")


@tries(100)
@given(RECORDS, st.booleans(), st.dictionaries(st.sampled_from(TARGETS), NAMES, max_size=2))
def test_any_record_is_read_or_refused(
    record: dict[str, Any], generations: bool, names: dict[str, str]
) -> None:
    """What was in the record is in what is read of it, under its own name or in `original`, unless the record
    has a field of that name itself."""
    read, error = made_or_refused(lambda: FieldMap.of(names).read(record, "here", generations=generations))
    if read is None:
        assert str(error).startswith("here: ")
        return
    if not names and TEXTS.of(record) is not None:
        assert TEXTS.of(read) is not None
    for name, value in record.items():
        if value is not None and name not in read and "original" not in record:
            assert read["original"][name] is value
