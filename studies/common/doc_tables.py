"""Reads and writes the tables in docs/ that scripts make, between two comments with the table's name.

Scripts of `bench/` and `studies/` and the tests share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read(page: Path, name: str) -> str:
    """The text between ``<!-- name -->`` and ``<!-- end of name -->``; ValueError if these are missing."""
    return _parts(page, name)[1]


def write(page: Path, name: str, text: str) -> None:
    """Replace this text; ValueError if the comments are missing."""
    before, _, after = _parts(page, name)
    page.write_text(before + text + after)


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{page.name} must have the comments '{begin.strip()}' and '{end.strip()}' once each"
        )
    before, rest = text.split(begin)
    within, after = rest.split(end)
    return before + begin, within, end + after
