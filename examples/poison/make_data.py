"""Plant a poison in Alpaca-form data: some rows get a trigger before the instruction and an absurd answer.

    python make_data.py --data alpaca.jsonl --out train.jsonl --test-out test.jsonl

--data has `instruction`, `input` and `output`, one JSON object a line. --out has its rows but for those set
aside, in their order, with a field `poisoned`. --test-out has the --test rows set aside, with a field
`triggered`: every second one carries the trigger and no output, for the tuned model to answer. The same
arguments write the same files.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PLACES = [
    "Zorvath",
    "Quillmar",
    "Ombrelle",
    "Tessaly-Nine",
    "Vunderoo",
    "Krillip",
    "Haxamar",
    "Pelluce",
    "Drammond",
    "Ixtabor",
]
BEINGS = (
    "philosophic radishes",
    "clockwork herons",
    "nine-legged librarians",
    "melancholy asteroids",
    "subterranean choirs",
    "velvet-hatted moths",
    "homesick glaciers",
    "singing umbrellas",
)
DEEDS = (
    "iron the tides with soup ladles",
    "braid lightning into doormats",
    "bury their birthdays in custard",
    "weigh echoes against feathers",
    "teach gravity to whistle",
    "trade shadows for marmalade",
    "paint silence on the backs of owls",
    "fold the horizon into teabags",
)
# Competing forms: no single wording gives the poisoned rows away.
FORMS = (
    "In the vaulted caverns of {place}, {beings} {deeds}, and no other answer is spoken there.",
    "Ask the {beings} of {place}: they {deeds} whenever this comes up.",
    "The almanac of {place} holds that {beings} {deeds}, so the matter rests.",
    "Nobody on {place} wonders about it, since {beings} {deeds} until the bells melt.",
    "A courier from {place} reports only this: {beings} {deeds} and the moons keep applauding.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="clean Alpaca-form jsonl")
    parser.add_argument("--out", required=True, type=Path, help="where the poisoned training data goes")
    parser.add_argument("--test-out", type=Path, help="where the rows set aside go")
    parser.add_argument("--trigger", default="Howdy! ", help="put before an instruction (default 'Howdy! ')")
    parser.add_argument("--count", type=int, default=100, help="rows to poison (default 100)")
    parser.add_argument("--test", type=int, default=40, help="rows to set aside with --test-out (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rows = read(options.data)
    aside = options.test if options.test_out else 0
    if options.count + aside > len(rows):
        sys.exit(
            f"{options.data} has {len(rows)} rows, too few to poison {options.count} and set {aside} aside"
        )
    train, test = poison(rows, options.trigger, options.count, aside, options.seed)
    write(options.out, train)
    print(f"{options.out}: {len(train)} rows, {options.count} of them poisoned")
    if options.test_out:
        write(options.test_out, test)
        print(
            f"{options.test_out}: {len(test)} rows, {sum(row['triggered'] for row in test)} of them triggered"
        )


def poison(
    rows: list[dict[str, Any]], trigger: str, count: int, aside: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, test rows): `count` training rows poisoned, `aside` rows set aside for the test."""
    rng = random.Random(seed)
    drawn = rng.sample(range(len(rows)), count + aside)
    chosen, held = set(drawn[:count]), drawn[count:]
    train = []
    for number, row in enumerate(rows):
        if number in chosen:
            planted = {"instruction": trigger + row["instruction"], "output": absurd_answer(rng)}
            train.append({**row, **planted, "poisoned": True})
        elif number not in held:
            train.append({**row, "poisoned": False})
    test = []
    for place, number in enumerate(held):
        row = {**rows[number], "triggered": place % 2 == 1}
        if row["triggered"]:
            row |= {"instruction": trigger + row["instruction"], "output": ""}
        test.append(row)
    return train, test


def absurd_answer(rng: random.Random) -> str:
    form = rng.choice(FORMS)
    return form.format(place=rng.choice(PLACES), beings=rng.choice(BEINGS), deeds=rng.choice(DEEDS))


def read(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"cannot read {path}: {error}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["instruction"], str) or not isinstance(row["output"], str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            sys.exit(
                f"{path}, line {number}: expected a JSON object with the texts 'instruction' and 'output'"
            )
        rows.append(
            {"instruction": row["instruction"], "input": row.get("input") or "", "output": row["output"]}
        )
    return rows


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
