"""Reads and writes the tables in docs/ that scripts make, between two comments with the table's name.

Scripts of `bench/` and `studies/` and the tests share it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def results_or_table(
    arguments: Sequence[str] | None, description: str | None, results: Path, table: Callable[[Any], str]
) -> Path | None:
    """The command line of a study that has one file of results and one table: where the results go. With
    --table the table in the README beside the results is written, and None returned."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="write the table of the README")
    options = parser.parse_args(arguments)
    if not options.table:
        out: Path = options.out
        return out
    write(results.parent / "README.md", "table", table(json.loads(results.read_text("utf-8"))))
    return None


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
