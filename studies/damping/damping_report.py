"""The tables of README.md and of docs/measured/results.md and the plot docs/img/damping.png, from
damping.json.

    python studies/damping/damping_report.py

A cell has each set (kjv, orders, alpaca) or each seed of the demo, then their mean in bold; each is the mean
over the seeds of its sketch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "damping.json"
PAGE = ROOT / "docs" / "measured" / "results.md"
PLOT = ROOT / "docs" / "img" / "damping.png"
SETS = ("kjv", "orders", "alpaca")
POISON = ("demo-0", "demo-1", "demo-2")
NEW = "1, tolerance 0.01"  # the default
HALF_WAY = 0.5
LATER = (0.6, 0.75)
WEIGHTS = {
    "layer": "`layer`",
    "weights": "`weighted` without factors of rows",
    "weighted": "`weighted`",
}
NAMES = {
    "exact": "exact",
    "floats": "sketch",
    "half": "2,048 bytes, learnt from half",
    "nothing": "2,048 bytes, learnt from nothing",
}
OF_POINTS = [(names, rows) for names in (SETS, POISON) for rows in ("exact", "half", "nothing")]
Row = Mapping[str, Any]


def values(
    results: Sequence[Row],
    way: str,
    rows: str,
    subjects: Sequence[str],
    score: str = "layer",
    at: float = HALF_WAY,
) -> list[float]:
    """One a subject; nothing where one is missing."""
    found = {
        row["subject"]: sum(row[score]) / len(row[score])
        for row in results
        if (row["way"], row["rows"], row["at"]) == (way, rows, at) and score in row
    }
    return [found[name] for name in subjects] if set(subjects) <= set(found) else []


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def cell(numbers: Sequence[float]) -> str:
    if not numbers:
        return ""
    return f"{' '.join(f'{x:.3f}' for x in numbers)} · **{mean(numbers):.3f}**"


def title(subjects: Sequence[str], rows: str) -> str:
    """The heading of a column: what these subjects measure, and with which rows."""
    return f"{'LDS' if subjects is SETS else 'auPRC'}, {NAMES[rows]}"


def ways(results: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in results))


def exact_table(results: Sequence[Row], score: str) -> str:
    """Exact gradients."""
    made = []
    for way in ways(results):
        cells = [cell(values(results, way, "exact", names, score)) for names in (SETS, POISON)]
        if all(cells):
            made.append([way, *cells])
    return doc_tables.table(["damping", "LDS", "auPRC"], made)


def packed_table(results: Sequence[Row], score: str) -> str:
    """Rows of 2,048 bytes, and sketches in floats for the poison."""
    columns = [(SETS, "half"), (SETS, "nothing"), (POISON, "floats"), (POISON, "half"), (POISON, "nothing")]
    made = []
    for way in ways(results):
        cells = [cell(values(results, way, rows, names, score)) for names, rows in columns]
        if all(cells):
            made.append([way, *cells])
    titles = [title(names, rows) for names, rows in columns]
    return doc_tables.table(["damping", *titles], made)


def summary(results: Sequence[Row]) -> str:
    """Means of the ways that are measured packed, for docs/measured/results.md."""
    columns = [(SETS, rows) for rows in ("exact", "half", "nothing")]
    columns += [(POISON, rows) for rows in ("exact", "floats", "half", "nothing")]
    made = []
    for way in ways(results):
        found = [values(results, way, rows, names) for names, rows in columns]
        if all(found):
            made.append([way, *(f"{mean(numbers):.3f}" for numbers in found)])
    titles = [title(names, rows) for names, rows in columns]
    return doc_tables.table(["damping", *titles], made)


def points_table(results: Sequence[Row]) -> str:
    """A row for each preconditioner and point; a cell has each set or demo, and their mean."""
    made = []
    for way in ("off", "0.1", NEW, "3"):
        for at in sorted({row["at"] for row in results}):
            cells = [cell(values(results, way, rows, names, at=at)) for names, rows in OF_POINTS]
            if any(cells):
                made.append([way, f"{at:g}", *cells])
    return doc_tables.table(["damping", "point", *(title(*of) for of in OF_POINTS)], made)


def weights_table(results: Sequence[Row]) -> str:
    """A row for each point, preconditioner and kind of score that weighs the layers; only means."""
    made = []
    for at in (HALF_WAY, *LATER):
        for way in ("off", "0.1", NEW):
            for score, name in WEIGHTS.items():
                found = [values(results, way, rows, names, score, at) for names, rows in OF_POINTS]
                if all(found):
                    made.append([f"{at:g}", way, name, *(f"{mean(each):.3f}" for each in found)])
    titles = ["point", "damping", "normalization", *(title(*of) for of in OF_POINTS)]
    return doc_tables.table(titles, made)


def tables(results: Sequence[Row]) -> dict[str, str]:
    """By name."""
    return {
        "exact": exact_table(results, "layer"),
        "packed": packed_table(results, "layer"),
        "root-exact": exact_table(results, "root"),
        "root-packed": packed_table(results, "root"),
    }


def means(results: Sequence[Row], score: str, at: float = HALF_WAY) -> Iterator[tuple[str, float, float]]:
    """(way, mean LDS, mean auPRC) of exact gradients at a point."""
    for way in ways(results):
        both = [values(results, way, "exact", names, score, at) for names in (SETS, POISON)]
        if all(both):
            yield way, mean(both[0]), mean(both[1])


def plot(results: Sequence[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5))
    for score, style, label in (
        ("layer", "o-", "one damping, rows at length 1"),
        ("root", "s-", "one damping, rows divided by the root of their length"),
    ):
        line = [p for p in means(results, score) if p[0].replace(".", "").isdigit()]
        ax.plot([p[1] for p in line], [p[2] for p in line], style, label=label, markersize=5)
        for way, lds, found in line:
            ax.annotate(way, (lds, found), xytext=(4, 4), textcoords="offset points", fontsize=8)
    for way, lds, found in means(results, "layer"):
        if not way.replace(".", "").isdigit() and way != "off":
            ax.plot(lds, found, "x", color="grey", markersize=5)
            ax.annotate(way, (lds, found), xytext=(4, -8), textcoords="offset points", fontsize=6)
    for way, style in (("0.1", "^--"), (NEW, "v--")):
        by_point = {at: m for at in (HALF_WAY, *LATER) for m in means(results, "layer", at) if m[0] == way}
        line = list(by_point.values())
        label = f"at 0.6, and 0.75 outside the figure, damping {way}"
        ax.plot([m[1] for m in line], [m[2] for m in line], style, label=label, markersize=5)
        for at, (_, lds, found) in by_point.items():
            if at != HALF_WAY:
                ax.annotate(f"at {at:g}", (lds, found), xytext=(5, 4), textcoords="offset points", fontsize=8)
    of_weighted = [m for m in means(results, "weighted") if m[0] in ("0.1", NEW)]
    ax.plot([m[1] for m in of_weighted], [m[2] for m in of_weighted], "D-", label="weighted, the default")
    for way, lds, found in of_weighted:
        ax.annotate(way, (lds, found), xytext=(5, 4), textcoords="offset points", fontsize=8)
    ax.axvline(0.76, color="grey", linewidth=0.8)
    ax.axhline(0.99, color="grey", linewidth=0.8)
    ax.set_xlim(0.71, 0.80)
    ax.set_ylim(0.89, 1.002)
    ax.set_xlabel("LDS, mean of kjv, orders and alpaca")
    ax.set_ylabel("auPRC of the poison, mean of three demos")
    ax.set_title("Damping of K-FAC's preconditioner, exact gradients; thin lines: the goals", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=80)
    plt.close(figure)


def main() -> None:
    results = json.loads(RESULTS.read_text())
    for name, text in tables(results).items():
        doc_tables.write(HERE / "README.md", name, text)
    doc_tables.write(PAGE, "damping", summary(results))
    doc_tables.write(PAGE, "points", points_table(results))
    doc_tables.write(PAGE, "weights", weights_table(results))
    plot(results, PLOT)


if __name__ == "__main__":
    main()
