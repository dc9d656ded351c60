"""What the tests of models share: the rows of docs/reference/models.md, and the check of one."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import model_table
import pytest


def rows(section: str, fast: Collection[str]) -> list[Any]:
    """The rows of a section; fast: those that `make test` measures as well."""
    names = model_table.SECTIONS[section][1]
    assert not set(fast) - set(names)
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.full]) for name in names]


def check_row(section: str, name: str) -> None:
    """A row is right or refused with the reason, and the page says so if it is of the installed versions."""
    if not model_table.exists(section, name):
        pytest.skip("not in the installed libraries")
    for column, found in model_table.measured(section, name).items():
        assert not found.fault, f"{column}: {found.fault}"
        assert not found.wrong(model_table.tolerance(section, name)), column
    written = page()[section][name]
    for column, cell in model_table.cells(section, name).items():
        if model_table.newest() or column in written:
            assert written.get(column) == cell, f"{column}: run tests/support/model_table.py '{name}'"


@cache
def page() -> model_table.Rows:
    return model_table.read_page(model_table.PAGE.read_text())
