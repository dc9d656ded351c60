"""Records: any JSON gives an example or one line with its place, and each way of storing it the same one."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import JSON, RECORDS, made_or_refused, tries, words
from tiny import tiny_tokenizer

from rapidin.data.encoding import Encoder, Status
from rapidin.data.examples import open_examples
from rapidin.data.records import canonical_json, record_hash, record_parts, whole_text
from rapidin.errors import UserError

LENGTH = 24
ENCODER = Encoder(tiny_tokenizer(chat=True), max_length=LENGTH)


def shuffled(value: Any, order: random.Random) -> Any:
    """The same JSON value with the fields of its objects in another order."""
    if isinstance(value, list):
        return [shuffled(each, order) for each in value]
    if not isinstance(value, dict):
        return value
    names = list(value)
    order.shuffle(names)
    return {name: shuffled(value[name], order) for name in names}


@tries(60)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.integers(0, 9))
def test_a_hash_depends_on_the_values_and_not_on_the_order_of_fields(
    record: dict[str, Any], seed: int
) -> None:
    other = shuffled(record, random.Random(seed))
    assert canonical_json(other) == canonical_json(record)
    assert record_hash(other) == record_hash(record)
    assert record_hash(json.loads(json.dumps(record, indent=1, ensure_ascii=False))) == record_hash(record)
    assert record_hash({**record, "more": None}) != record_hash({**record, "more": False})
    assert -(2**63) <= record_hash(record) < 2**63


@tries(60)
@given(JSON, JSON)
def test_records_have_the_same_hash_only_if_they_are_the_same_json(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (record_hash({"a": one}) == record_hash({"a": other})) is same
    assert (canonical_json({"a": one}) == canonical_json({"a": other})) is same


@tries(80)
@given(RECORDS)
def test_any_json_object_of_a_file_is_an_example_or_refused_with_its_line(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"\n{json.dumps(record)}\n" * 2)
    read, error = made_or_refused(lambda: open_examples(path))
    if read is None:
        assert str(error).startswith(f"{path}, line 2: ")
        with pytest.raises(UserError, match="all 2 examples are malformed"):
            open_examples(path, skip=True)
        return
    assert [read.index(row) for row in range(len(read))] == [1, 3]
    assert json.dumps(read.original(0)) == json.dumps(record)  # where NaN equals NaN
    assert record_hash(read[0]) == record_hash(read[1])
    assert all(isinstance(part, str) for part in (*record_parts(read[0]), whole_text(read[0])))
    encoded, _ = made_or_refused(lambda: ENCODER(read[0]))
    if encoded is None:
        return
    assert encoded == ENCODER(read[0])
    assert encoded.length == len(encoded.target) <= LENGTH
    assert not any(encoded.target[:1])
    assert any(encoded.target) is (encoded.status is Status.OK)


@tries(60)
@given(st.binary(max_size=30) | st.text('{}[]":, \n\rtexa\\u', max_size=30).map(str.encode), st.booleans())
def test_any_bytes_are_read_or_refused_with_the_name_of_the_file(
    tmp_path: Path, content: bytes, only: bool
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content if only else b'{"text": "good"}\n' + content)
    read, error = made_or_refused(lambda: list(open_examples(path)))
    assert read is not None or str(path) in str(error)
    assert all(isinstance(record["text"], str) for record in read or () if "text" in record)


def arrow(rows: list[dict[str, str]]) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


def as_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(arrow(rows), path, row_group_size=2)


def as_feather(path: Path, rows: list[dict[str, str]]) -> None:
    pytest.importorskip("pyarrow.feather").write_feather(arrow(rows), str(path))


def as_table(delimiter: str) -> Callable[[Path, list[dict[str, str]]], None]:
    def write(path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    return write


def as_json(indent: int | None, by_line: bool) -> Callable[[Path, list[dict[str, str]]], None]:
    def write(path: Path, rows: list[dict[str, str]]) -> None:
        text = "\n".join(map(json.dumps, rows)) if by_line else json.dumps(rows, indent=indent)
        path.write_text(text, encoding="utf-8")

    return write


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    "d.jsonl": as_json(None, True),
    "d.json": as_json(1, False),
    "d.csv": as_table(","),
    "d.tsv": as_table("\t"),
    "d.parquet": as_parquet,
    "d.feather": as_feather,
}


@tries(25)
@given(
    st.sampled_from([("prompt", "completion"), ("instruction", "output"), ("question", "answer"), ("text",)]),
    st.lists(st.tuples(*3 * [words(max_size=6)]), min_size=1, max_size=5),
)
def test_files_of_all_kinds_with_the_same_records_give_the_same_examples(
    tmp_path: Path, names: tuple[str, ...], cells: list[tuple[str, str, str]]
) -> None:
    """A cell that spells a list is one in a table of text, so there is none here."""
    assume(not any(cell.startswith("[") and cell.endswith("]") for row in cells for cell in row))
    columns = (*names, "source")
    rows = [dict(zip(columns, row, strict=False)) for row in cells]
    expected = open_examples(rows)
    for name, write in WRITERS.items():
        write(tmp_path / name, rows)
        read = open_examples(tmp_path / name)
        assert list(read) == list(expected), name
        assert read.identity == expected.identity
        assert [ENCODER(record) for record in read] == [ENCODER(record) for record in expected]
