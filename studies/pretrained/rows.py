"""Short training and test rows from a file of Alpaca's form.

    python studies/pretrained/rows.py alpaca.jsonl FOLDER

Of the rows without an input whose instruction is short, in an order drawn with seed 0, the first 256 go to
FOLDER/train.jsonl and the next 32 to FOLDER/test.jsonl, as prompts and completions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rapidin.evaluate.folders import write_jsonl

TRAIN, TEST = 256, 32
MOST_CHARACTERS = 90  # of an instruction, about 20 tokens, so that an answer begins within 48


def main() -> None:
    data, folder = arguments(__doc__)
    short = short_rows(data, TRAIN + TEST)
    random.Random(0).shuffle(short)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", [pair(row) for row in short[:TRAIN]])
    write_jsonl(folder / "test.jsonl", [pair(row) for row in short[TRAIN : TRAIN + TEST]])


def arguments(description: str | None) -> tuple[Path, Path]:
    """The file and the folder of the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    return options.data, options.folder


def short_rows(data: Path, count: int) -> list[dict[str, Any]]:
    """The rows without an input whose instruction is short, at least `count`."""
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    short = [
        row
        for row in rows
        if not row["input"] and len(row["instruction"]) <= MOST_CHARACTERS and row["output"].strip()
    ]
    if len(short) < count:
        raise SystemExit(f"{data}: {len(short)} short rows, {count} are needed")
    return short


def pair(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as a prompt and a completion."""
    return {"prompt": row["instruction"].strip() + "\n", "completion": row["output"]}


if __name__ == "__main__":
    main()
