"""Every form of data in docs/guide/data.md: the same three examples give the same tokens and targets."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_forms import (
    ENCODER,
    FIELDS,
    FILES,
    PROMPTS,
    arrow,
    encoded,
    lines_of,
    several,
    table,
    written,
)

import rapidin
from rapidin.data.examples import open_examples
from rapidin.data.sources import Files

PAGE = Path(rapidin.__file__).parent.parent / "docs" / "guide" / "data.md"


@pytest.mark.parametrize("form", FILES)
def test_a_file_of_each_form_gives_the_same_tokens(tmp_path: Path, form: str) -> None:
    source = FILES[form](tmp_path)
    examples = open_examples(source)
    assert [ENCODER(record) for record in examples] == encoded(PROMPTS)
    assert [ENCODER(examples[row]) for row in (2, 0, 1)] == [encoded(PROMPTS)[row] for row in (2, 0, 1)]
    if form == "pipe":
        assert examples.path is None
        return
    assert len(open_examples(source, limit=2)) == 2
    assert examples.path is not None
    again = open_examples(
        examples.path if isinstance(examples.path, str) else Files(tuple(examples.path)), checked=False
    )
    assert list(again) == list(examples)  # a query opens the data by the path that the cache has
    assert again.identity == examples.identity


def test_standard_input(tmp_path: Path) -> None:
    code = "from rapidin.data.examples import open_examples as o; e = o('-'); print(e.path, e[2], e[0])"
    content = gzip.compress(table(PROMPTS).encode())
    run = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True)
    assert run.stdout.decode().strip() == f"None {PROMPTS[2]} {PROMPTS[0]}"


@pytest.mark.parametrize("form", FIELDS)
def test_records_with_each_form_of_fields_give_the_same_tokens(tmp_path: Path, form: str) -> None:
    rows, same, names = FIELDS[form]
    expected = encoded(same)
    path = written(tmp_path / "d.jsonl", lines_of(rows))
    examples = open_examples(path, map=names)
    assert [ENCODER(record) for record in examples] == expected
    for shown, row in zip(examples, rows, strict=True):  # what a record came with is still there
        original = shown.get("original", {})
        assert all(shown.get(name) == value or original.get(name) == value for name, value in row.items())
    for suffix, content in (("csv", table([_as_cells(row) for row in rows])), ("json", json.dumps(rows))):
        if form != "map":  # its cell is an object
            assert encoded(written(tmp_path / f"d.{suffix}", content), map=names) == expected
    assert encoded(arrow(rows), map=names) == expected
    assert encoded(pytest.importorskip("pandas").DataFrame(rows), map=names) == expected


def _as_cells(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


# -------------------------------------------------------------------------------- Python: a form to an object


class Items:
    """A map-style dataset: neither a list nor an iterable."""

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return PROMPTS[row]


def _columns() -> dict[str, list[Any]]:
    return {name: [row[name] for row in PROMPTS] for name in PROMPTS[0]}


def _loader() -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(PROMPTS, batch_size=2)  # type: ignore[arg-type]


def _streamed() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(PROMPTS).to_iterable_dataset()


OBJECTS: dict[str, Callable[[Path], Any]] = {
    "list of records": lambda f: PROMPTS,
    "list of pairs": lambda f: [(row["prompt"], row["completion"]) for row in PROMPTS],
    "columns": lambda f: _columns(),
    "generator": lambda f: (row for row in PROMPTS),
    "batches": lambda f: _loader(),
    "torch dataset": lambda f: Items(),
    "datasets.Dataset": lambda f: pytest.importorskip("datasets").Dataset.from_list(PROMPTS),
    "datasets.IterableDataset": lambda f: _streamed(),
    "pandas": lambda f: pytest.importorskip("pandas").DataFrame(PROMPTS),
    "polars": lambda f: pytest.importorskip("polars").DataFrame(PROMPTS),
    "arrow table": lambda f: arrow(PROMPTS),
    "path": lambda f: FILES["jsonl"](f),
    "list of paths": lambda f: list(several(f).paths),
    "open file": lambda f: io.StringIO(lines_of(PROMPTS)),
}


@pytest.mark.parametrize("form", OBJECTS)
def test_an_object_of_each_form_gives_the_same_tokens(tmp_path: Path, form: str) -> None:
    from rapidin.data.generations import as_records

    examples = open_examples(OBJECTS[form](tmp_path))
    assert [ENCODER(record) for record in examples] == encoded(PROMPTS)
    assert ENCODER(examples[1]) == encoded(PROMPTS)[1]
    if form not in ("torch dataset", "list of paths"):
        assert [ENCODER(record) for record in as_records(OBJECTS[form](tmp_path))] == encoded(PROMPTS)


# -------------------------------------------------------------------------------------------------- the page

ELSEWHERE = {"standard input", "HF dataset by name", "LLaMA-Factory", "Axolotl"}  # have tests of their own


def forms_of_page() -> Iterator[tuple[str, str]]:
    """Section and form of each row of the page's tables."""
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith(("| form |", "| ---")):
            yield section, line.split(" | ")[0].removeprefix("| ")


def test_the_tests_go_through_the_page() -> None:
    if not PAGE.exists():
        pytest.skip("the package is tested without its checkout")
    rows = list(forms_of_page())
    tested = {"Files": {*FILES, *ELSEWHERE}, "Fields": set(FIELDS), "Python": set(OBJECTS)}
    assert sorted(rows) == sorted((section, form) for section, forms in tested.items() for form in forms)
