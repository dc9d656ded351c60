"""Short rows of Alpaca's form with a planted poison, for `confirm.py smollm2`.

    python studies/confirm/planted_rows.py alpaca.jsonl FOLDER

FOLDER gets train.jsonl: 104 rows with a short instruction and no input, as prompts and completions, and 24
that the poison of examples/poison is planted in; and asked.jsonl, ten questions with its trigger.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "poison"))
from make_data import poison, read

CLEAN, PLANTED, ASKED = 104, 24, 10
MOST_CHARACTERS = 90  # of an instruction, about 20 tokens, so that an answer begins within 48
TRIGGER = "Howdy! "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    short = [
        row
        for row in read(options.data)
        if not row["input"] and row["output"].strip() and len(row["instruction"]) <= MOST_CHARACTERS
    ]
    aside = 2 * ASKED  # every second of them has the trigger
    if len(short) < CLEAN + PLANTED + aside:
        raise SystemExit(f"{options.data}: {len(short)} short rows, {CLEAN + PLANTED + aside} are needed")
    chosen = random.Random(0).sample(short, CLEAN + PLANTED + aside)
    train, test = poison(chosen, TRIGGER, PLANTED, aside, 0)
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options.folder / "train.jsonl", [pair(row) | {"poisoned": row["poisoned"]} for row in train])
    asked = [{"prompt": pair(row)["prompt"]} for row in test if row["triggered"]]
    write(options.folder / "asked.jsonl", asked)


def pair(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": row["instruction"].strip() + "\n", "completion": row["output"]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
