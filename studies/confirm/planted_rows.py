"""Short rows of Alpaca's form with a planted poison, for `confirm.py smollm2`.

    python studies/confirm/planted_rows.py alpaca.jsonl FOLDER

FOLDER gets train.jsonl: 104 rows with a short instruction and no input, as prompts and completions, and 24
that the poison of examples/poison is planted in; and asked.jsonl, ten questions with its trigger.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from rapidin.evaluate.folders import write_jsonl

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "poison"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pretrained"))
from make_data import poison
from rows import arguments, pair, short_rows

CLEAN, PLANTED, ASKED = 104, 24, 10
TRIGGER = "Howdy! "


def main() -> None:
    data, folder = arguments(__doc__)
    aside = 2 * ASKED  # every second of them has the trigger
    count = CLEAN + PLANTED + aside
    chosen = random.Random(0).sample(short_rows(data, count), count)
    train, test = poison(chosen, TRIGGER, PLANTED, aside, 0)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", [pair(row) | {"poisoned": row["poisoned"]} for row in train])
    write_jsonl(folder / "asked.jsonl", [{"prompt": pair(row)["prompt"]} for row in test if row["triggered"]])


if __name__ == "__main__":
    main()
