"""Do the figures of `rapidin eval backdoor` and `classes` hold for other seeds of training?

    python studies/seeds/seeds.py backdoor NAME --seed 1 --work DIR --model MODEL --data FILE --test FILE
    python studies/seeds/seeds.py classes NAME --seed 1 --work DIR --model MODEL --data FILE --test FILE
    python studies/seeds/seeds.py demo --work DIR --seed 0 --seed 1 --seed 2
    python studies/seeds/seeds.py table

For each seed (of the adapter's first weights and of the order of the rows) a LoRA adapter of rank 8 on q_proj
and v_proj is tuned, the data are cached half-way to it, and every method is evaluated: `backdoor` as
`examples/poison` does, `classes` as in `docs/guide/evaluation.md`. With --adapter a ready one is judged
instead, under the seed's name. NAME is the set's in the results. `demo` judges as `backdoor` what `rapidin
demo` makes anew for each seed: data, base model and adapter. Rerun the same command to resume; what
`studies/seeds/seeds.json` has is not repeated. `table` prints the tables of docs/measured/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rapidin.cli.demo_session.instructions import ABSURD_BEGINS, make_data
from rapidin.files import replace_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
POISON = ROOT / "examples" / "poison"
RESULTS = HERE / "seeds.json"
AT = "0.5"
SHOWN = ("dot:layer", "dot:cosine", "dot:none", "datainf:layer", "fisher:layer")
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How an adapter is tuned, as `examples/poison/train.py` takes it; column: of the data, that `rapidin
    eval` looks at; figures: of its results that are kept."""

    steps: int
    batch: int
    max_length: int
    column: str
    figures: tuple[str, ...]
    rank: int = 8
    learning_rate: float = 1e-3

    def options(self) -> list[str]:
        """On the command line of `train.py`."""
        named = {
            "steps": self.steps,
            "batch": self.batch,
            "max-length": self.max_length,
            "rank": self.rank,
            "learning-rate": self.learning_rate,
        }
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]


RECIPES = {
    "backdoor": Recipe(450, 4, 192, "poisoned", ("p10", "p50", "auprc", "auroc")),
    "classes": Recipe(226, 8, 96, "label", ("auc", "recall")),
}
# Its model reads 128 tokens.
RECIPES["demo"] = replace(RECIPES["backdoor"], max_length=128)


class Run(Protocol):
    """Runs Python with these words; `ends` are the exit statuses that are no failure."""

    def __call__(self, *command: object, ends: Collection[int] = (0,)) -> None: ...


def run_python(*command: object, ends: Collection[int] = (0,)) -> None:
    """Run Python with these words; leave with its exit status where it is none of `ends`."""
    words = [sys.executable, *map(str, command)]
    print("$", *words, flush=True)
    code = subprocess.run(words, cwd=ROOT).returncode
    if code not in ends:
        sys.exit(code)


def main(
    arguments: list[str] | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
    run: Run = run_python,
) -> None:
    options = parse(arguments)
    if options.kind == "table":
        print("\n".join(tables(read(options.out))))
        return
    recipe, made_here = recipes[options.kind], options.kind == "demo"
    if made_here:
        options.kind, options.name = "backdoor", "demo"
    for seed in options.seed:
        rows = read(options.out)
        named = {"set": options.name, "seed": seed, "preconditioner": options.preconditioner}
        named |= {"width": options.width} if options.width else {}
        if any(named.items() <= row.items() for row in rows):
            continue
        folder = options.work / f"{options.name}-{seed}"
        if made_here:
            make_demo(options, seed, folder / "made", run)
        found = judge(options, recipe, seed, folder, run)
        row = {"evaluation": options.kind, **named, "at": AT, **found}
        write(options.out, [*read(options.out), row])


def make_demo(options: argparse.Namespace, seed: str, folder: Path, run: Run) -> None:
    """What `rapidin demo` makes in `folder`, as the options of `judge`."""
    options.test = folder / "asked.jsonl"
    if not options.test.exists():
        shutil.rmtree(folder, ignore_errors=True)
        # It ends with 1 where it finds few planted rows, which is a result as well.
        run("-m", "rapidin", "demo", "--out", folder, "--seed", seed, ends=(0, 1))
        asked = [{**row, "triggered": True} for row in make_data(int(seed)).queries]
        replace_file(options.test, "".join(json.dumps(row) + "\n" for row in asked).encode())
    options.model, options.adapter = folder / "model", folder / "adapter"
    options.data = folder / "train.jsonl"
    options.begins = ABSURD_BEGINS


def judge(options: argparse.Namespace, recipe: Recipe, seed: str, folder: Path, run: Run) -> Row:
    """Tune, cache and evaluate in `folder`: the number of queries, and figures by method."""
    adapter = options.adapter or folder / "adapter"
    common = ["--model", options.model, "--data", options.data]
    if not (adapter / "adapter_model.safetensors").exists():
        run(POISON / "train.py", *common, "--out", adapter, "--seed", seed, *recipe.options())
    tuned = ["--adapter", adapter, "--max-length", recipe.max_length, "--at", AT]
    tuned += [
        "--precondition",
        options.preconditioner,
        *(["--width", options.width] if options.width else []),
    ]
    name = options.preconditioner + (f"-width-{options.width}" if options.width else "")
    if options.kind == "backdoor":
        tuned += (f"--begins={text}" for text in options.begins)
        run(POISON / "evaluate.py", *common, *tuned, "--queries", options.test, "--out", folder)
        result = folder / f"results-at-{AT}-{name}.json"
    else:
        cache, result = (folder / f"{what}-{name}" for what in ("cache", "results.json"))
        run("-m", "rapidin", "cache", options.model, "--data", options.data, *tuned, "--out", cache)
        asked = ["--column", recipe.column, "--data", options.test, "--json", result]
        run("-m", "rapidin", "eval", "classes", cache, *asked)
    found = json.loads(result.read_text())
    rows: list[Row] = found["results"]
    figures = {row["method"]: {name: round(row[name]["mean"], 4) for name in recipe.figures} for row in rows}
    queries = rows[0][recipe.figures[0]]["queries"]
    return {"width": found["setting"]["width"], "queries": queries, "methods": figures}


def read(path: Path) -> list[Row]:
    found: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def write(path: Path, rows: list[Row]) -> None:
    ordered = sorted(
        rows, key=lambda row: [row[name] for name in ("evaluation", "set", "preconditioner", "width", "seed")]
    )
    lines = ",\n".join(json.dumps(row) for row in ordered)
    replace_file(path, f'{{"rows": [\n{lines}\n]}}\n'.encode())


def tables(rows: list[Row]) -> list[str]:
    """A table a kind of evaluation, its sets side by side: the figures of each seed, in the order that the
    heading names."""
    lines: list[str] = []
    for kind, figures in (("backdoor", ("auprc",)), ("classes", RECIPES["classes"].figures)):
        of_kind = [row for row in rows if row["evaluation"] == kind]
        sets = dict.fromkeys(map(column, of_kind))
        columns = [(name, figure) for name in sets for figure in figures]
        if not columns:
            continue
        titles = []
        for of, figure in columns:
            name, preconditioner, width = of
            seeds = [row["seed"] for row in of_kind if column(row) == of]
            which = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
            titles.append(f"{name}, {preconditioner}, dimension {width:,}, {LABELS[figure]}, {which}")
        lines += ["", "| | " + " | ".join(titles) + " |", "|" + " --- |" * (len(titles) + 1)]
        baselines = ("BM25", "hidden states") if kind == "backdoor" else ()
        for method in (*SHOWN, *baselines):
            cells = [" / ".join(values(of_kind, name, method, figure)) for name, figure in columns]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines[1:]


LABELS = {"auprc": "auPRC", "auc": "AUC", "recall": "recall"}


def column(row: Row) -> tuple[str, str, int]:
    """The set, the preconditioner and the sketch dimension of a row: rows that differ in their seeds alone
    share a column."""
    return row["set"], row["preconditioner"], row["width"]


def values(rows: list[Row], of: tuple[str, str, int], method: str, figure: str) -> list[str]:
    return [f"{row['methods'][method][figure]:.3f}" for row in rows if column(row) == of]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(begins=[])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in (*RECIPES, "table"):
        sub = kinds.add_parser(kind)
        sub.add_argument("--out", type=Path, default=RESULTS, help="file of results")
        if kind == "table":
            continue
        sub.add_argument("--work", required=True, type=Path, help="folder for adapters and caches")
        sub.add_argument("--seed", action="append", required=True, help="seed of training; may be repeated")
        sub.add_argument(
            "--precondition", dest="preconditioner", choices=("kfac", "sample", "off"), default="kfac"
        )
        sub.add_argument(
            "--width",
            type=int,
            help="sketch dimension per layer  [default: chosen from their number]",
        )
        if kind == "demo":
            continue
        sub.add_argument("name", help="name of the set in the results")
        sub.add_argument("--model", required=True, help="base model: folder, name, or a folder with one GGUF")
        sub.add_argument("--data", required=True, help="data to tune on")
        sub.add_argument("--test", required=True, help="the queries")
        sub.add_argument("--adapter", type=Path, help="evaluate this adapter instead of tuning one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
