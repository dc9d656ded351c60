"""The table of versions in docs/guide/install.md is that of the results, and the oldest ones are those that
pyproject.toml allows."""

from __future__ import annotations

import json
import re

import doc_tables
import pytest
import versions


def rows() -> list[dict[str, str]]:
    read: list[dict[str, str]] = json.loads(versions.RESULTS.read_text())
    return read


def test_the_table_is_that_of_the_results() -> None:
    assert doc_tables.read(versions.PAGE, "versions") == versions.table(rows())


def test_every_result_is_of_a_known_combination_and_works() -> None:
    assert {row["name"] for row in rows()} <= {*versions.COMBINATIONS, *versions.INTERPRETERS}
    assert {row["flow"] for row in rows()} == {"works"}


@pytest.mark.parametrize("pin", [*versions.NUMPY, *versions.TYPER])
def test_the_oldest_versions_are_those_that_are_allowed(pin: str) -> None:
    name, _, version = pin.partition("==")
    text = (doc_tables.DOCS.parent / "pyproject.toml").read_text()
    (bound,) = re.findall(rf'^    "{name}>=([\d.]+)",$', text, re.MULTILINE)
    assert version == f"{bound}.0"
