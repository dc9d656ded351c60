"""What is found without reading it, and what is opened, are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_forms import PROMPTS, lines_of, written

from rapidin.data.opening import check_found, open_source
from rapidin.errors import UserError


def test_what_is_found_is_what_can_be_opened(tmp_path: Path) -> None:
    data = written(tmp_path / "a:b.jsonl", lines_of(PROMPTS))
    check_found([str(data), f"{data}:part", str(tmp_path / "*.jsonl"), "-", "owner/name:train"])
    check_found(["hf://datasets/owner/name.json"])
    for name in (str(tmp_path / "none.jsonl"), f"{tmp_path / 'none'}:part", "owner/name.jsonl", "a\0b"):
        with pytest.raises(UserError, match="data not found"):
            check_found([name])
        with pytest.raises(UserError, match="data not found"):
            open_source(name)
