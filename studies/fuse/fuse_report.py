"""The tables of README.md and of docs/measured/results.md, from fuse.json.

python studies/fuse/fuse_report.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "fuse.json"
PAGE = HERE.parents[1] / "docs" / "measured" / "results.md"
KINDS = {"LDS": ("LDS",), "poison": ("auPRC", "precision at 10"), "facts": ("MRR", "recall at 10")}
EQUAL, ALONE = "1 1", "0 0"  # weights of BM25 and hidden states beside gradients of weight 1
SHOWN = (ALONE, "0.25 0", "0.25 0.25", "0.5 0.5", EQUAL, "1 0", "0 1")
BINS = ((0, 2), (3, 4), (5, 6), (7, 8), (9, 10))
Row = Mapping[str, Any]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def of_kind(results: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in results if row["kind"] == kind]


def side_by_side(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


def ways_table(results: Sequence[Row]) -> str:
    """What each ranking and each fusion is worth; the subjects of a kind side by side."""
    columns = [(kind, figure) for kind, figures in KINDS.items() for figure in figures]
    header = [
        f"{figure}: {', '.join(row['subject'] for row in of_kind(results, kind))}" for kind, figure in columns
    ]
    rows = []
    for way in results[0]["ways"]:
        cells = [
            side_by_side([mean(row["ways"][way][figure]) for row in of_kind(results, kind)])
            for kind, figure in columns
        ]
        rows.append([way, *cells])
    ranks = [
        side_by_side([mean(row["ranks alone"]["gradients"][figure]) for row in of_kind(results, kind)])
        for kind, figure in columns
    ]
    rows.insert(1, ["gradients, 1 / (60 + rank)", *ranks])
    return doc_tables.table(["", *header], rows)


def weights_table(results: Sequence[Row]) -> str:
    """The first figure of each subject by the weights."""
    rows = [
        [f"1, {', '.join(weights.split())}", *(f"{row['weights'][weights]:.3f}" for row in results)]
        for weights in SHOWN
    ]
    names = [f"{row['subject']}, {KINDS[row['kind']][0]}" for row in results]
    return doc_tables.table(["gradients, BM25, hidden states", *names], rows)


def chosen(results: Sequence[Row], subjects: Sequence[str]) -> str:
    """The weights that lose least, on the mean over these subjects, of what the best weights of each have."""
    of = [row["weights"] for row in results if row["subject"] in subjects]
    return min(of[0], key=lambda weights: mean([max(each.values()) - each[weights] for each in of]))


CHOICES = (
    ("kjv", "demo-0", "facts-0"),
    ("orders", "demo-1", "facts-1"),
    ("kjv", "orders", "alpaca"),
    ("demo-0", "demo-1", "demo-2"),
    ("facts-0", "facts-1"),
)


def held_out_table(results: Sequence[Row]) -> str:
    """Weights that were chosen on some subjects, on the others: what they gain over equal ones."""
    rows = []
    for subjects in CHOICES:
        weights = chosen(results, subjects)
        gains = [
            f"{row['subject']} {row['weights'][weights] - row['weights'][EQUAL]:+.3f}"
            for row in results
            if row["subject"] not in subjects
        ]
        rows.append([", ".join(subjects), f"1, {', '.join(weights.split())}", ", ".join(gains)])
    return doc_tables.table(["chosen on", "weights", "gain over equal weights on the others"], rows)


def common_table(results: Sequence[Row]) -> str:
    """By how many of the gradients' ten best rows are among BM25's: what gradients predict beyond words."""
    rows = []
    for low, high in BINS:
        cells = []
        for kind, (figure, *_) in KINDS.items():
            pairs = [
                (row["ways"]["gradients"][figure][n], row["ways"]["BM25"][figure][n])
                for row in of_kind(results, kind)
                for n, count in enumerate(row["common"])
                if low <= count <= high
            ]
            by_gradients, by_words = ([pair[n] for pair in pairs] for n in (0, 1))
            cells.append(f"{len(pairs)}: {mean(by_gradients):.3f} / {mean(by_words):.3f}" if pairs else "0")
        rows.append([f"{low} to {high}", *cells])
    header = [
        f"{kind if kind != 'LDS' else 'retrained models'}, {figures[0]}" for kind, figures in KINDS.items()
    ]
    return doc_tables.table(["in common", *header], rows)


def tables(results: Sequence[Row]) -> dict[str, str]:
    """All tables of README.md by name."""
    return {
        "ways": ways_table(results),
        "weights": weights_table(results),
        "held-out": held_out_table(results),
        "common": common_table(results),
    }


def main() -> None:
    results = json.loads(RESULTS.read_text())
    for name, text in tables(results).items():
        doc_tables.write(HERE / "README.md", name, text)
    doc_tables.write(PAGE, "fuse", ways_table(results))


if __name__ == "__main__":
    main()
