"""The study of standard errors finds again what it kept, and docs/guide/reading.md shows it."""

import json
from pathlib import Path
from typing import Any

import pytest
import score_errors
from doc_tables import DOCS
from tiny import tiny_llama, tiny_tokenizer

STUDY = Path(score_errors.__file__).parent


def kept(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((STUDY / f"{name}.json").read_text())["results"]
    return rows


def test_a_row_of_the_result_is_found_again(tmp_path: Path) -> None:
    tiny_llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--include", "*proj*", "--queries", "4", "--precondition", "off", "--width", "64"]
    written = tmp_path / "found.json"
    data = ["--data", str(STUDY / "texts.jsonl"), "--normalize", "layer", "--json", str(written)]
    score_errors.main([str(tmp_path / "model"), *data, *options])
    (row,) = json.loads(written.read_text())["results"]
    (same,) = (
        row
        for row in kept("off")
        if (row["width"], row["codec"], row["normalize"]) == (64, "float16", "layer")
    )
    assert row["error"] == pytest.approx(same["error"], rel=0.01)
    for name in ("exact", "exact, best tenth", "differences, best tenth", "between"):
        assert row[name]["rms"] == pytest.approx(same[name]["rms"], rel=0.01)


def test_the_page_shows_the_results() -> None:
    lines = (DOCS / "guide" / "reading.md").read_text().splitlines()
    shown = [line.split(" | ", 1)[1] for line in lines if line.count("|") == 7]
    for name in ("off", "kfac"):
        for row in kept(name):
            if row["codec"] != "float16" and row["normalize"] == "none":
                continue  # not shown
            cells = [row["normalize"], f"{row['error']:.2g}"]
            for of in ("exact", "exact, best tenth", "between"):
                cells.append(f"{row[of]['rms']:.2f}, {row[of]['within 1.96']:.1%}")
            assert " | ".join(cells) + " |" in shown
