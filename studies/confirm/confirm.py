"""Does retraining confirm planted rows, and random ones as often as chance would have it?

    rapidin demo --out DEMO
    python studies/confirm/confirm.py planted DEMO --out studies/confirm/planted.json
    python studies/confirm/confirm.py random DEMO --out studies/confirm/random.json
    python studies/confirm/confirm.py smollm2 FOLDER --out studies/confirm/smollm2.json
    python studies/confirm/confirm.py --table    # the tables of the README

`planted` confirms the ten best hits of the demo's query, and all of its planted rows. `random` puts random
rows in the place of the hits of 50 questions that the demo set aside, with the model's own answers, and
confirms them all: their p-values should be uniform. `smollm2` confirms the hits of one query of a pretrained
model, as many as rows are planted; the README says how FOLDER is made. Trainings are kept in the folder, and
the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables

from rapidin import Ensemble
from rapidin.cli.demo_session.instructions import make_data
from rapidin.evaluate.confirm import Confirmed, confirm
from rapidin.results.confirmation import Confirmation, Effect

FOLDER = Path(__file__).resolve().parent
TRIES, ROWS = 50, 10
# Shorter than the demo's own training, which has ten passes over the rows.
SHORT: dict[str, Any] = {"epochs": 4, "batch": 16, "learning_rate": 1e-2, "warm_up": 5}
# As the adapter of `smollm2` was tuned.
PRETRAINED: dict[str, Any] = {"epochs": 3, "batch": 4, "learning_rate": 1e-3, "warm_up": 10}
PRETRAINED_HITS = 24
LIMITS = (0.05, 0.1, 0.25, 0.5)  # of p


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", nargs="?", choices=("planted", "random", "smollm2"))
    add("folder", nargs="?", type=Path, help="of 'rapidin demo --out'; for smollm2 one with hits.json")
    add("--out", type=Path)
    add("--controls", type=int, help="random sets for comparison (planted: 39, random: 19, smollm2: 20)")
    add("--tries", type=int, default=TRIES, help="sets of random rows in the place of hits")
    add("--table", action="store_true", help="write the tables of the README")
    options = parser.parse_args(arguments)
    if options.table:
        for name, made in TABLES.items():
            doc_tables.write(
                FOLDER / "README.md", name, made(json.loads((FOLDER / f"{name}.json").read_text()))
            )
        return
    if options.study == "planted":
        found = planted(options.folder, options.controls or 39)
    elif options.study == "random":
        found = random_hits(options.folder, options.controls or 19, options.tries)
    else:
        found = pretrained(options.folder, options.controls or 20)
    text = json.dumps(found, indent=1) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def done(found: Confirmed | None) -> Confirmed:
    assert found is not None
    return found


def planted(demo: Path, controls: int) -> dict[str, Any]:
    """What came of leaving out the best hits, and all planted rows."""
    sets = {"the 10 best hits": {}, "all planted rows": {"by": "poisoned", "top_k": 1}}
    return {"sets": [left_out(demo, name, controls=controls, **options) for name, options in sets.items()]}


def pretrained(folder: Path, controls: int) -> dict[str, Any]:
    """What came of leaving out the best hits of the first query, as many as rows are planted."""
    name = f"the {PRETRAINED_HITS} best hits"
    found = left_out(folder, name, controls=controls, top_k=PRETRAINED_HITS, query=1, **PRETRAINED)
    hits = json.loads((folder / "hits.json").read_text())["queries"][0]["top"][:PRETRAINED_HITS]
    planted = [json.loads(line)["poisoned"] for line in (folder / "train.jsonl").read_text().splitlines()]
    return {"sets": [found | {"planted": sum(planted[hit["index"]] for hit in hits)}]}


def left_out(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """What `confirm` says with these options of the hits in a folder, which are one set of rows."""
    (found,) = done(confirm(folder / "hits.json", log=say, **options)).confirmations.values()
    (effect,) = found.effects
    return {
        "left_out": name,
        "rows": len(effect.rows),
        "tuned": found.tuned,
        "all_rows": list(found.everything),
        "fall": effect.fall,
        "controls": list(effect.controls),
        "p": effect.p,
        "said": found.said,
        "changed": effect.changed,
        "controls_changed": effect.controls_changed,
        "before": found.answer,
        "after": effect.answer,
    }


def random_hits(demo: Path, controls: int, tries: int) -> dict[str, Any]:
    """The p-values of random rows that stand in the place of hits."""
    work = demo / "random"
    work.mkdir(exist_ok=True)
    hits = work / "hits.json"
    if not hits.exists():
        hits.write_text(json.dumps(with_random_rows(demo, tries)))
    found = done(confirm(hits, controls=controls, log=say, **SHORT))
    rows = []
    for confirmation in found.confirmations.values():
        (effect,) = confirmation.effects
        rows.append(row_of(confirmation, effect))
    p = np.array([row["p"] for row in rows])
    # p has 1 / (controls + 1) as its step; a uniform number of that width makes it continuous.
    spread = p - np.random.default_rng(0).random(len(p)) / (controls + 1)
    test = stats.kstest(spread, "uniform")
    return {"controls": controls, "rows": ROWS, "kolmogorov_smirnov": test.pvalue, "tries": rows}


def row_of(confirmation: Confirmation, effect: Effect) -> dict[str, Any]:
    return {
        "p": effect.p,
        "fall": effect.fall,
        "changed": effect.changed,
        "controls_changed": effect.controls_changed,
        "tokens": confirmation.tokens,
    }


def with_random_rows(demo: Path, tries: int) -> dict[str, Any]:
    """The demo's file of hits with other queries, whose hits are random rows."""
    value: dict[str, Any] = json.loads((demo / "hits.json").read_text())
    asked = [{name: row[name] for name in ("instruction", "input")} for row in make_data(0).held_out[:tries]]
    results = Ensemble([demo / "cache"]).query(asked, examples=False, errors=False, top_k=1)
    count = len((demo / "train.jsonl").read_text().splitlines())
    chance = random.Random(1)
    value["queries"] = [
        {
            "prompt": result.prompt,
            "completion": result.completion,
            "top": [{"index": row, "score": 1.0} for row in chance.sample(range(count), ROWS)],
        }
        for result in results
    ]
    return value


# ---------------------------------------------------------------------------------------- the tables


def planted_table(found: dict[str, Any]) -> str:
    rows = []
    for each in found["sets"]:
        controls = each["controls"]
        rows.append(
            [
                each["left_out"],
                f"{each['rows']}",
                f"{each['fall']:.1f}",
                f"{min(controls):.1f} to {max(controls):.1f}",
                f"{len(controls)}",
                f"{each['p']:.3f}",
                "yes" if each["changed"] else "no",
                f"{each['controls_changed']} of {len(controls)}",
            ]
        )
    header = [
        "left out",
        "rows",
        "fall",
        "falls of controls",
        "controls",
        "p",
        "answer changes",
        "in controls",
    ]
    return doc_tables.table(header, rows)


def random_table(found: dict[str, Any]) -> str:
    tries = found["tries"]
    shares = [sum(each["p"] <= limit for each in tries) for limit in LIMITS]
    header = ["tries", *(f"p <= {limit:g}" for limit in LIMITS), "mean p", "Kolmogorov-Smirnov p"]
    mean = sum(each["p"] for each in tries) / len(tries)
    cells = [f"{len(tries)}", *map(str, shares), f"{mean:.2f}", f"{found['kolmogorov_smirnov']:.2f}"]
    return doc_tables.table(header, [cells])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "planted": planted_table,
    "random": random_table,
    "smollm2": planted_table,
}


if __name__ == "__main__":
    main()
