"""Short training and test rows from a file of Alpaca's form.

    python studies/pretrained/rows.py alpaca.jsonl FOLDER

Of the rows without an input whose instruction is short, in an order drawn with seed 0, the first 256 go to
FOLDER/train.jsonl and the next 32 to FOLDER/test.jsonl, as prompts and completions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

TRAIN, TEST = 256, 32
MOST_CHARACTERS = 90  # of an instruction, about 20 tokens, so that an answer begins within 48


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text("utf-8").splitlines()]
    short = [
        {"prompt": row["instruction"].strip() + "\n", "completion": row["output"]}
        for row in rows
        if not row["input"] and len(row["instruction"]) <= MOST_CHARACTERS and row["output"].strip()
    ]
    if len(short) < TRAIN + TEST:
        raise SystemExit(f"{options.data}: {len(short)} short rows, {TRAIN + TEST} are needed")
    random.Random(0).shuffle(short)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", short[:TRAIN]), ("test", short[TRAIN : TRAIN + TEST])):
        lines = [json.dumps(row, ensure_ascii=False) for row in chosen]
        (options.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
