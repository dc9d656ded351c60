"""pretrained.json from results/, and the tables of docs/measured/pretrained.md from it.

python studies/pretrained/pretrained_report.py
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rapidin.evaluate.lds import correlations
from rapidin.evaluate.methods import DEFAULT, parse_methods
from rapidin.evaluate.metrics import Estimate, estimate, spearman

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
sys.path.append(str(Path(__file__).resolve().parent))
import doc_tables
from pretrained_files import REMOVALS, RESULTS, SECOND, Floats, Scores, kept_truth, trainings
from pretrained_retrained import effects, family_of

OUT = Path(__file__).resolve().parent / "pretrained.json"
PAGE = doc_tables.DOCS / "measured" / "pretrained.md"
GRID = [
    (rows, at, way)
    for rows in ("exact", "2,048 bytes")
    for at in ("1", "0.75", "0.5")
    for way in ("off", "kfac")
]
METHODS = [str(method) for method in parse_methods(DEFAULT)]
# What is compared with BM25 (of the tokens that the model reads), text by text: package, at, method,
# preconditioner, rows.
PAIRS = {
    "gradient cosine, tuned model": ("rapidin", "1", "dot:cosine", "off", "exact"),
    "gradient cosine, half-way": ("rapidin", "0.5", "dot:cosine", "off", "exact"),
    "gradient dot product, tuned model": ("rapidin", "1", "dot:none", "off", "exact"),
    "the RapidIn paper's projection": ("rapidin", "1", "rapidgrad", "off", "65,536 numbers"),
    "the default of rapidin": ("rapidin", "0.5", "dot:weighted", "kfac", "exact"),
    "the default of rapidin, 2,048 bytes": ("rapidin", "0.5", "dot:weighted", "kfac", "2,048 bytes"),
    "BM25 of the whole texts": ("baseline", "", "BM25", "", ""),
    "RISE, both channels": ("RISE", "1", "both channels", "off", "exact"),
    "hidden states (RepSim)": ("baseline", "", "hidden states", "", ""),
}
WORDS = ("baseline", "", "BM25 of the tokens read", "", "")
Row = dict[str, Any]


def rounded(found: Estimate) -> Row:
    """The mean and its interval, as they are written; null where there is no interval."""
    numbers = {"mean": found.mean, "low": found.low, "high": found.high}
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in numbers.items()}


def by_text(folder: Path) -> tuple[list[Row], list[Floats]]:
    """What has scores, and the LDS of each test example [T], the mean over the seeds of a projection."""
    _, masks, losses = kept_truth(folder)
    groups: dict[tuple[str, ...], list[Floats]] = {}
    rows: dict[tuple[str, ...], Row] = {}
    scores = Scores(folder)
    for name in scores.names():
        about, found = scores.load(name)
        for key, values in found.items():
            method, preconditioner, kept, _ = (key.split("|") + [""] * 3)[:4]
            who = (about["package"], about["at"], method, preconditioner, kept)
            groups.setdefault(who, []).append(correlations(masks, losses, values))
            names = ("package", "at", "method", "preconditioner", "rows")
            row = dict(zip(names, who, strict=True)) | {"family": family_of(about, method)}
            if about.get("bytes"):
                row["rows"] = f"{about['bytes']:,.0f} bytes"
            rows[who] = row
        if about.get("failed"):
            who = (about["package"], about["at"], about["method"], "", "")
            rows[who] = {"package": who[0], "at": who[1], "method": who[2], "failed": about["failed"]}
    done = [who for who in rows if who in groups]
    failed = [row for who, row in rows.items() if who not in groups]
    means = [np.mean(groups[who], axis=0) for who in done]
    listed = [rows[who] | {"seeds": len(groups[who])} for who in done]
    return listed + failed, means


def measured(folder: Path = RESULTS) -> Row:
    """All results of a folder that `pretrained.py keep` wrote."""
    about, masks, losses = kept_truth(folder)
    rows, values = by_text(folder)
    of = {
        (row["package"], row["at"], row["method"], row["preconditioner"], row["rows"]): lds
        for row, lds in zip(rows, values, strict=False)
    }
    finished = ~np.isnan(losses).any((1, 2))
    found: Row = {
        "setting": about,
        "retrainings": int(finished.sum()),
        "subsets": len(masks),
        "lds": [
            row | rounded(estimate(lds)) if lds is not None else row
            for row, lds in zip(rows, [*values, *[None] * (len(rows) - len(values))], strict=True)
        ],
        "against BM25": {
            name: rounded(estimate(of[who] - of[WORDS]))
            for name, who in PAIRS.items()
            if who in of and WORDS in of
        },
        "weighted against layer": {
            f"{method}, at {at}, {way}": rounded(estimate(of[weighted] - of[layer]))
            for method in ("dot", "datainf", "fisher")
            for rows, at, way in GRID
            if rows == "exact"
            for weighted, layer in [
                [("rapidin", at, f"{method}:{name}", way, rows) for name in ("weighted", "layer")]
            ]
            if weighted in of
        },
    }
    if (folder / SECOND).exists():
        second = trainings(folder / SECOND)[2]
        both = finished[: len(second)] & ~np.isnan(second).any(1)
        found["second seeds"] = {"subsets": int(both.sum())}
        if both.sum() > 2:
            agreement = spearman(losses[: len(second)][both, 0].T, second[both].T)
            found["second seeds"] |= rounded(estimate(agreement))
    if (folder / REMOVALS).exists():
        found["removals"] = removed(folder)
    return found


def removed(folder: Path) -> Row:
    """What leaving out the rows of each method does, over the trainings that are there."""
    masks, _, losses, about = trainings(folder / REMOVALS)
    by_family, random = effects(losses.astype(np.float64), about["of"])
    found: Row = {
        "trainings": int((~np.isnan(losses).any(1)).sum()),
        "of": len(losses),
        "random": int((~np.isnan(random).any(1)).sum()),
        "methods": {},
    }
    for family, values in by_family.items():
        done = ~np.isnan(values)
        way, key = about["methods"][family]
        row = {"way": way, "key": key, "queries": int(done.sum())} | rounded(estimate(values))
        spread = random[:, : len(values)].max(0) - random[:, : len(values)].mean(0)
        row["above all random"] = int((values[done] > spread[done]).sum())
        found["methods"][family] = row
    whole = {family: values for family, values in by_family.items() if not np.isnan(values).any()}
    first = max(whole, key=lambda family: float(whole[family].mean()), default="")
    for family, values in whole.items():
        if family != first:
            found["methods"][family]["behind the first"] = rounded(estimate(whole[first] - values))
    chosen: dict[str, list[Any]] = {}
    for family, query, training in about["of"]:
        if query is not None:
            chosen.setdefault(family, []).append(~masks[training])
    found["rows in common"] = {
        f"{one} and {other}": round(
            float(
                np.mean([(a & b).sum() / a.sum() for a, b in zip(chosen[one], chosen[other], strict=True)])
            ),
            3,
        )
        for one, other in combinations(chosen, 2)
    }
    return found


# -------------------------------------------------------------------------------------------- the tables


def cell(row: Row) -> str:
    """A mean and its interval."""
    if row["low"] is None:
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f} ({row['low']:.2f} to {row['high']:.2f})"


def what(row: Row) -> str:
    """A method with what it was measured with, in words."""
    parts = [row["method"]]
    parts += [f"preconditioner {row['preconditioner']}"] * bool(row["preconditioner"])
    parts += [f"at {row['at']}"] * bool(row["at"])
    return ", ".join(parts + [row["rows"]] * bool(row["rows"]))


def leaders_table(results: Row) -> str:
    """The best of each family of methods."""
    best: dict[str, Row] = {}
    for row in results["lds"]:
        if "mean" in row and row["mean"] > best.get(row["family"], {"mean": -2.0})["mean"]:
            best[row["family"]] = row
    order = sorted(best, key=lambda family: -best[family]["mean"])
    lines = [[family, what(best[family]), cell(best[family])] for family in order]
    lines += [
        [row["package"], row["method"], f"failed: {row['failed']}".replace("|", "/").replace("\n", " ")]
        for row in results["lds"]
        if "failed" in row
    ]
    return doc_tables.table(["method", "its best setting", "LDS"], lines)


def methods_table(results: Row) -> str:
    """rapidin's methods by point, preconditioner and what is kept of a row."""
    by = {
        (row["method"], row["rows"], row["at"], row["preconditioner"]): row
        for row in results["lds"]
        if row["package"] == "rapidin" and "mean" in row
    }
    lines = []
    columns = [column for column in GRID if any((method, *column) in by for method in METHODS)]
    for method in METHODS:
        cells = [by.get((method, *column)) for column in columns]
        lines.append([method, *("" if row is None else f"{row['mean']:.3f}" for row in cells)])
    header = [f"{rows}, at {at}, {way}" for rows, at, way in columns]
    return doc_tables.table(["method", *header], lines)


def others_table(results: Row) -> str:
    """Everything that is not a method of rapidin by gradients, one row each, best first."""
    rows = [
        row
        for row in results["lds"]
        if "mean" in row and (row["package"] != "rapidin" or row["method"] not in METHODS)
    ]
    rows += [row for row in results["lds"] if row.get("rows", "").startswith("a cache")]
    rows.sort(key=lambda row: -row["mean"])
    return doc_tables.table(
        ["package", "method", "LDS"], [[row["package"], what(row), cell(row)] for row in rows]
    )


def pairs_table(results: Row) -> str:
    """The LDS of methods less that of BM25, text by text."""
    lines = [[name, cell(row)] for name, row in results["against BM25"].items()]
    return doc_tables.table(["", "LDS less that of BM25"], lines)


def weights_table(results: Row) -> str:
    """The LDS of `weighted` less that of `layer`, text by text, with exact gradients."""
    found = results["weighted against layer"]
    methods = list(dict.fromkeys(name.split(", ")[0] for name in found))
    columns = [f"at {at}, {way}" for rows, at, way in GRID if rows == "exact"]
    lines = [
        [method, *(cell(row) if (row := found.get(f"{method}, {of}")) else "" for of in columns)]
        for method in methods
    ]
    return doc_tables.table(["method", *columns], lines)


def state_table(results: Row) -> str:
    """How much of the study is there."""
    lines = [["subsets retrained on", str(results["retrainings"]), str(results["subsets"]), ""]]
    seeds = results.get("second seeds")
    if seeds is not None:
        said = f"agreement {cell(seeds)}" if "mean" in seeds else ""
        lines.append(["second seeds", str(seeds["subsets"]), "20", said])
    gone = results.get("removals")
    if gone is not None:
        lines.append(["trainings without rows", str(gone["trainings"]), str(gone["of"]), ""])
    return doc_tables.table(["", "done", "of", ""], lines)


def removals_table(results: Row) -> str:
    """What leaving rows out adds to the loss."""
    lines: list[Sequence[str]] = []
    for family, row in results.get("removals", {"methods": {}})["methods"].items():
        if row["queries"]:
            behind = cell(row["behind the first"]) if "behind the first" in row else ""
            lines.append([family, cell(row), f"{row['above all random']} of {row['queries']}", behind])
    head = ["method", "added loss", "more than all random choices", "less than that of the first"]
    return doc_tables.table(head, lines)


TABLES = {
    "state": state_table,
    "leaders": leaders_table,
    "methods": methods_table,
    "weights": weights_table,
    "others": others_table,
    "pairs": pairs_table,
    "removals": removals_table,
}


def main() -> None:
    """Write the results and the tables."""
    results = measured()
    OUT.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    for name, table in TABLES.items():
        doc_tables.write(PAGE, name, table(results))


if __name__ == "__main__":
    main()
