"""docs/reference/models.md lists every kind, measured with the pinned versions, and can be read back."""

from __future__ import annotations

import model_table
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
