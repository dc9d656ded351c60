"""How many files a query's calls pass through, which is what a reader of the flow has to open."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny import records, save_tiny

import rapidin
from rapidin.cli import main

PACKAGE = str(Path(rapidin.__file__).parent) + "/"
MOST_FILES = 9


def files_of(frame: FrameType | None) -> list[str]:
    """The files of the package on a stack, from the command's function on.

    The handling of errors and options comes before that function. What an operation does inside is no part of
    the flow, so all files of `ops` count as one.
    """
    files: list[str] = []
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            name = name.removeprefix(PACKAGE)
            name = "ops" if name.startswith("ops/") else name
            if name not in files:
                files.append(name)
            if (name, frame.f_code.co_name) == ("cli/query.py", "query"):
                return files[::-1]
        frame = frame.f_back
    return []  # another thread, or before the command


@pytest.mark.full
def test_no_call_of_a_query_passes_through_more_than_nine_files(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    data, cache, page = tmp_path / "train.jsonl", tmp_path / "cache", tmp_path / "page.html"
    data.write_text("".join(json.dumps(record) + "\n" for record in records(12)))
    assert main(["cache", str(tmp_path / "model"), "--data", str(data), "--out", str(cache), "-q"]) == 0

    longest: list[str] = []

    def called(frame: FrameType, event: str, _: Any) -> None:
        nonlocal longest
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            longest = max(longest, files_of(frame), key=len)

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        assert main(["query", str(cache), "--ask", "one two", "--tokens", "--report", str(page), "-q"]) == 0
    finally:
        sys.setprofile(before)
    assert longest[0] == "cli/query.py"
    assert "gradients/collector.py" in longest
    assert len(longest) <= MOST_FILES, " ".join(longest)
