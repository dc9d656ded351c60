"""docs/reference/models.md lists every kind, measured with the pinned versions, and can be read back.

The oldest versions are those that the package allows.
"""

from __future__ import annotations

import re

import model_table
import pytest
from model_rows import page


def test_the_page_has_every_row_and_the_pinned_versions() -> None:
    assert {section: list(rows) for section, rows in page().items()} == {
        section: names for section, (_, names, _) in model_table.SECTIONS.items()
    }
    pins = (model_table.ROOT / "constraints.txt").read_text()
    for library in model_table.page_versions(model_table.PAGE.read_text()).split(", "):
        assert library.replace(" ", "==") in pins


def test_the_page_is_what_its_rows_say() -> None:
    text = model_table.PAGE.read_text()
    assert model_table.write_page(page(), model_table.page_versions(text)) == text


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_the_oldest_versions_are_those_that_the_package_allows(library: str) -> None:
    allowed = re.search(rf'"{library}>=([\d.]+)"', (model_table.ROOT / "pyproject.toml").read_text())
    tested = re.search(
        rf"^{library}==([\d.]+)$", (model_table.ROOT / "constraints-oldest.txt").read_text(), re.M
    )
    assert allowed
    assert tested
    assert f"{tested[1]}.".startswith(f"{allowed[1]}.")
