"""Is the false-discovery rate of `rapidin query --fdr` what it says?

    python studies/fdr/fdr.py --work DIR --seed 0 --seed 1 --seed 2    # measures what fdr.json lacks
    python studies/fdr/fdr.py --work DIR --seed 0 --seed 1 --seed 2 --at 0
    python studies/fdr/fdr.py --table                                  # the tables of README.md and the guide

For each seed and each of three sets of data with known truth (README.md) the data are cached with decoys of
the same generator, and the p- and q-values of all rows are taken from queries. What `rapidin demo` makes for
a seed is taken from DIR/demo-<seed>, or made there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables
import everyday

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.decoys import stands_out
from rapidin.attribution.questions import asked
from rapidin.cli.demo_session.instructions import is_absurd, make_data
from rapidin.data.encoding import Status
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.tasks.facts import make_facts
from rapidin.evaluate.training import add_lora, tune
from rapidin.evaluate.tuned import encoder_of, load_float32
from rapidin.files import replace_file
from rapidin.gradients.load import load_model
from rapidin.results.types import Hit, QueryResult

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "fdr.json"
GUIDE = doc_tables.DOCS / "guide" / "reading.md"
RATES = (0.05, 0.1, 0.2)
LEVELS = (0.01, 0.05, 0.1, 0.5)  # at which p-values are compared with uniform ones
Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """What a set is made of.

    tuning: rows of the adapter, which are cached; decoys: of the same generator; questions: whose answers are
    explained, and for each the numbers of the rows behind it; planted: whether an answer is a planted one;
    epochs: of the adapter's training, 0 for the demo's adapter.
    """

    tuning: list[Row]
    decoys: list[Row]
    questions: list[Row]
    behind: list[set[int]]
    planted: Callable[[str], bool]
    epochs: int


def demo(seed: int, planted: int = 40, epochs: int = 0) -> Data:
    """Clean rows, and planted ones with a trigger and an absurd answer, as `rapidin demo` makes them."""
    data = make_data(seed)
    others = [n for n, row in enumerate(data.tuning) if row["poisoned"]][planted:]
    rows = [row for n, row in enumerate(data.tuning) if n not in others]
    behind = {n for n, row in enumerate(rows) if row["poisoned"]}
    return Data(rows, data.held_out, data.queries, [behind] * len(data.queries), is_absurd, epochs)


def planted(seed: int) -> Data:
    """The demo's rows with half as many planted ones."""
    return demo(seed, planted=20, epochs=10)


def facts(seed: int, decoys: int = 1200) -> Data:
    """Facts about invented persons. The rows behind an answer name its person: one states the fact, two more
    have the question in their prompts. Decoys are about other persons."""
    rows, questions = make_facts(30, seed=seed)
    others, _ = make_facts(decoys // 4 + 60, seed=seed + 1000)
    persons = {_person(row["prompt"]) for row in rows}
    unseen = [row for row in others if _person(row["prompt"]) not in persons][:decoys]
    behind = [
        {n for n, row in enumerate(rows) if _person(question["prompt"]) in row["prompt"]}
        for question in questions
    ]
    return Data(rows, unseen, questions, behind, lambda _: False, 20)


SETS = {"demo": demo, "planted": planted, "facts": facts}


def _person(text: str) -> str:
    """The first two neighbouring words with capitals of which the second ends as family names do."""
    words = [word.strip(".,:;?") for word in text.split()]
    endings = ("ick", "ow", "ane", "ley", "mont", "is")
    for first, last in pairwise(words):
        if first[:1].isupper() and last[:1].isupper() and last.endswith(endings):
            return f"{first} {last}"
    raise ValueError(text)


def made(seed: int, work: Path) -> Path:
    """The folder of what `rapidin demo` makes for a seed; it is made if it is not there."""
    folder = work / f"demo-{seed}"
    if not (folder / "hits.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        # It ends with 1 where it finds few planted rows, which is a result as well.
        subprocess.run(
            [sys.executable, "-m", "rapidin", "demo", "--out", folder, "--seed", str(seed)], check=False
        )
    return folder


def tune_adapter(model: Path, data: Data, seed: int, out: Path) -> None:
    """An adapter on the demo's base model, trained as the demo trains its own."""
    loaded = load_float32(str(model))
    texts = [text for text in map(encoder_of(loaded), data.tuning) if text.status == Status.OK]
    steps = Recipe(epochs=data.epochs, batch=16).count(len(texts))
    recipe = Recipe(
        epochs=data.epochs,
        batch=16,
        learning_rate=1e-2,
        warm_up=steps // 20,
        betas=(0.9, 0.98),
        seed=seed,
    )
    tuned = add_lora(loaded.model, seed=seed)
    tune(tuned, texts, recipe)
    tuned.save_pretrained(out)


def measure(
    name: str,
    seed: int,
    data: Data,
    work: Path,
    *,
    at: float = 0.5,
    neutral: Sequence[str] = everyday.QUESTIONS,
) -> Row:
    """The figures of one set and seed; at: where gradients are taken, 0 for the base model."""
    of_demo, folder = made(seed, work), work / f"{name}-{seed}-measured"
    adapter = folder / "adapter" if data.epochs else of_demo / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    if data.epochs:
        tune_adapter(of_demo / "model", data, seed, adapter)
    attributor = Attributor(load_model(str(of_demo / "model"), adapter=str(adapter)), at=at)
    cache = attributor.cache(data.tuning, folder / "cache", decoys=data.decoys, progress=False)
    fields = ("prompt", "completion") if name == "facts" else ("instruction", "input")
    questions = [{field: row[field] for field in fields} for row in data.questions]

    def ask(records: Sequence[Any]) -> list[QueryResult]:
        options = {"top_k": len(cache), "errors": False, "examples": False, "max_new_tokens": 32}
        return list(attributor.query(cache, list(records), progress=False, **options))

    results, everyday = ask(questions), ask([asked(cache.manifest, question) for question in neutral])
    shutil.rmtree(folder)
    assert results[0].decoys is not None
    unanswered = [result for result in everyday if not data.planted(result.completion)]
    return {
        "set": name,
        "at": at,
        "seed": seed,
        "rows": len(cache),
        "tested": results[0].decoys.rows,
        "decoys": results[0].decoys.decoys,
        "behind": round(fmean(map(len, data.behind)), 1),
        "planted_answers": sum(data.planted(result.completion) for result in results),
        "questions": [_figures(result, behind) for result, behind in zip(results, data.behind, strict=True)],
        "neutral": {
            "asked": len(everyday),
            "answered_as_planted": len(everyday) - len(unanswered),
            **{
                f"{rate:g}": {
                    "helpful": sum(bool(_passing(result, result.top, rate)) for result in unanswered),
                    "either": sum(
                        bool(_passing(result, result.top + result.bottom, rate)) for result in unanswered
                    ),
                    "decoys_alone": sum(bool(_below(result.top, rate)) for result in unanswered),
                }
                for rate in RATES
            },
        },
    }


def _passing(result: QueryResult, hits: Sequence[Hit], rate: float) -> list[Hit]:
    """Those of a query's hits that `fdr` would show."""
    return _below(hits, rate) if stands_out(result.verdict, rate) else []


def _below(hits: Sequence[Hit], rate: float) -> list[Hit]:
    """Those of hits that pass a rate by the decoys alone."""
    return [hit for hit in hits if hit.q is not None and hit.q <= rate]


def _figures(result: QueryResult, behind: set[int]) -> Row:
    """Of one question: how many rows pass each rate, and how many of them are behind the answer; and the
    share of the p-values of other rows that are at most each level."""
    others = [hit.p for hit in result.top if hit.p is not None and hit.index not in behind]
    figures: Row = {}
    for rate in RATES:
        passing = _passing(result, result.top, rate)
        figures[f"{rate:g}"] = [len(passing), sum(hit.index in behind for hit in passing)]
    figures["p"] = [round(sum(p <= level for p in others) / len(others), 4) for level in LEVELS]
    return figures


# ------------------------------------------------------------------------------------------------- tables


def by_set(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by their set, and by the point of their gradients if that is not the default."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = row["set"] if row["at"] == 0.5 else f"{row['set']}, `--at {row['at']:g}`"
        found.setdefault(name, []).append(row)
    return found


def rates_table(rows: Sequence[Row]) -> str:
    """Realised false-discovery rates: the mean over the questions of the share of passing rows that are not
    behind the answer, 0 if none passes."""
    lines = []
    for name, some in by_set(rows).items():
        for rate in RATES:
            means = [fmean(false_share(question, rate) for question in row["questions"]) for row in some]
            found = [
                question[f"{rate:g}"][1] / row["behind"] for row in some for question in row["questions"]
            ]
            any_passes = [question[f"{rate:g}"][0] > 0 for row in some for question in row["questions"]]
            lines.append(
                [
                    name,
                    f"{some[0]['rows']:,}",
                    f"{some[0]['decoys']:,}",
                    f"{rate:g}",
                    f"**{fmean(means):.3f}**",
                    " / ".join(f"{mean:.3f}" for mean in means),
                    f"{fmean(found):.0%}",
                    f"{fmean(any_passes):.0%}",
                ]
            )
    header = [
        "set", "rows", "decoys", "promised", "realised", "by seed", "of the rows behind found",
        "questions with a hit",
    ]  # fmt: skip
    return doc_tables.table(header, lines)


def false_share(question: Row, rate: float) -> float:
    """The share of the rows that pass that are not behind the answer."""
    passing, behind = question[f"{rate:g}"]
    return (passing - behind) / max(1, passing)


def neutral_table(rows: Sequence[Row]) -> str:
    """How many neutral questions yield nothing, and how many if decoys alone decide."""
    lines = []
    for name, of_set in by_set(rows).items():
        some = [row["neutral"] for row in of_set]
        asked_in_all = sum(each["asked"] - each["answered_as_planted"] for each in some)
        cells, by_decoys = [], []
        for rate in RATES:
            helpful, either, alone = (
                1 - sum(each[f"{rate:g}"][which] for each in some) / asked_in_all
                for which in ("helpful", "either", "decoys_alone")
            )
            cells.append(f"{helpful:.1%} ({either:.1%})")
            by_decoys.append(f"{alone:.1%}")
        lines.append([name, f"{asked_in_all:,}", *cells])
        lines.append([f"{name}, decoys alone", f"{asked_in_all:,}", *by_decoys])
    header = ["set", "questions", *(f"nothing at {rate:g}" for rate in RATES)]
    return doc_tables.table(header, lines)


def levels_table(rows: Sequence[Row]) -> str:
    """The shares of p-values of rows that are not behind the answer, with their spread over questions."""
    lines = []
    for name, of_set in by_set(rows).items():
        shares = [question["p"] for row in of_set for question in row["questions"]]
        columns = list(zip(*shares, strict=True))
        lines.append([name, *(f"{fmean(each):.3f} ± {stdev(each):.3f}" for each in columns)])
    return doc_tables.table(["set", *(f"p ≤ {level:g}" for level in LEVELS)], lines)


# --------------------------------------------------------------------------------------------------- main


def read(path: Path) -> list[Row]:
    found: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def write(path: Path, rows: Sequence[Row]) -> None:
    order = list(SETS)
    ordered = sorted(rows, key=lambda row: (-row["at"], order.index(row["set"]), row["seed"]))
    lines = ",\n".join(json.dumps(row) for row in ordered)
    replace_file(path, f'{{"rows": [\n{lines}\n]}}\n'.encode())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, help="folder for models and caches")
    add("--seed", type=int, action="append", default=[])
    add("--set", dest="sets", choices=SETS, action="append", default=[])
    add("--at", type=float, default=0.5, help="where gradients are taken")
    add("--out", type=Path, default=RESULTS)
    add("--table", action="store_true", help="write the tables of the README and the guide")
    options = parser.parse_args(arguments)
    if options.table:
        rows = read(options.out)
        doc_tables.write(FOLDER / "README.md", "levels", levels_table(rows))
        doc_tables.write(FOLDER / "README.md", "rates", rates_table(rows))
        doc_tables.write(FOLDER / "README.md", "neutral", neutral_table(rows))
        doc_tables.write(GUIDE, "fdr", rates_table(rows))
        doc_tables.write(GUIDE, "fdr of neutral questions", neutral_table(rows))
        return
    for seed in options.seed:
        for name in options.sets or SETS:
            rows = read(options.out)
            if any((row["set"], row["seed"], row["at"]) == (name, seed, options.at) for row in rows):
                continue
            print(f"{name}, seed {seed}", flush=True)
            row = measure(name, seed, SETS[name](seed), options.work, at=options.at)
            write(options.out, [*rows, row])


if __name__ == "__main__":
    main()
