"""Writes docs/measured/methods-results.md from studies/methods/methods.json and studies/peers/peers-lds.json.

python studies/methods/methods_report.py [--out docs/measured/methods-results.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STUDIES = Path(__file__).resolve().parents[1]
SETS = ("kjv", "orders", "alpaca")
POINTS = ("1", "0.5", "0.1+0.5+0.9", "0.1+0.3+0.5+0.7+0.9", "checkpoint 1/3", "6 checkpoints")
# (method, normalize, damping) in the order of the tables
METHODS = (
    ("dot", "none", 0.0),
    ("dot", "cosine", 0.0),
    ("dot", "layer", 0.0),
    ("datainf", "none", 0.1),
    ("datainf", "layer", 0.1),
    ("fisher, left out", "none", 0.2),
    ("fisher, left out", "cosine", 0.2),
    ("fisher, left out", "layer", 0.1),
    ("fisher, left out", "layer", 0.2),
    ("fisher, left out", "layer", 0.3),
    ("fisher, left out", "layer", 1.0),
    ("fisher, left out", "layer", 3.0),
)
PATHS = ("0.5", "0.1+0.5+0.9")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=STUDIES.parent / "docs" / "measured" / "methods-results.md"
    )
    args = parser.parse_args()
    rows: list[Row] = json.loads((STUDIES / "methods" / "methods.json").read_text())["results"]
    peers = json.loads((STUDIES / "peers" / "peers-lds.json").read_text())
    parts = [exact(rows), preconditioner(rows), kfac(rows), ways(rows), codecs(rows), beside(peers)]
    args.out.write_text("\n".join([*HEAD, *(line for part in parts for line in part)]) + "\n")


HEAD = [
    "# Methods on retrained models",
    "",
    "`studies/methods/methods_report.py` writes this page from `studies/methods/methods.json` "
    "(`studies/methods/methods.py`) and `studies/peers/peers-lds.json` (`studies/peers/peers.py lds`).",
    "",
    "LDS is Spearman's correlation of predicted and measured losses of 48 test texts over retrainings on "
    "random halves of 240 texts. There are three settings: `kjv` and `orders` (`studies/lds`), and `alpaca`, "
    "made in the same way from Alpaca texts and tuned for 12 epochs. A cell has the figures of the three, "
    "and their mean.",
]


def find(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def cell(rows: list[Row]) -> str:
    """LDS by set, their mean, and half the width of the widest interval; nothing where a set is missing."""
    by_set = {row["set"]: row for row in rows}
    if set(by_set) != set(SETS):
        return ""
    values = [by_set[name]["lds"] for name in SETS]
    return " ".join(f"{v:.3f}" for v in values) + f" · **{sum(values) / 3:.3f}**"


def table(titles: list[str], lines: list[list[str]]) -> list[str]:
    filled = [line for line in lines if any(line[1:])]
    return ["", "| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)] + [
        "| " + " | ".join(line) + " |" for line in filled
    ]


def label(method: str, normalize: str, damping: float) -> str:
    name = method.split(",")[0]
    return f"{name}:{normalize}" + (f", damping {damping:g}" if damping else "")


def exact(rows: list[Row]) -> list[str]:
    plain = [row for row in rows if row["part"] == "exact" and "preconditioner" not in row]
    lines = [
        [label(m, n, d), *(cell(find(plain, method=m, normalize=n, damping=d, points=p)) for p in POINTS)]
        for m, n, d in METHODS
    ]
    widest = max((row["high"] - row["low"]) / 2 for row in plain)
    return [
        "",
        "## Method, damping and point, exact gradients",
        "",
        "The columns are the tuned model (1), half-way, three and five points of the path, one real "
        "checkpoint after a third of the training, and the sum of six checkpoints (TracIn). 95% intervals "
        f"over the test texts are at most ±{widest:.3f}.",
        *table(["", *POINTS], lines),
    ]


def preconditioner(rows: list[Row]) -> list[str]:
    bent = [row for row in rows if row["part"] == "exact"]
    names = list(dict.fromkeys(row["preconditioner"] for row in bent if "preconditioner" in row))
    chosen = [
        m for m in METHODS if (m[1], m[2]) in (("none", 0.0), ("layer", 0.0), ("layer", 0.1), ("layer", 0.2))
    ]
    lines = []
    for points in PATHS:
        for m, n, d in chosen:
            # Six ways to bend: the plain Fisher was run with all of them, the left-out one without.
            method = "fisher, energy" if m.startswith("fisher") else m
            of = find(bent, method=method, normalize=n, damping=d, points=points)
            cells = [
                cell([row for row in of if row.get("preconditioner") == name]) for name in (None, *names)
            ]
            lines.append([f"{label(m, n, d)} at {points.replace('+', ', ')}", *cells])
    return [
        "",
        "## The optimizer's preconditioner, exact gradients",
        "",
        "Gradients are multiplied by a power of their second moment V on each side (`1/4`: V^-1/4; "
        "`--precondition` uses 1/2). `train`: on the training side only; `elements`: V itself instead of its "
        "row and column means; `adam`: from AdamW's state. Fisher has all rows in the moment here.",
        *table(["", "off", *names], lines),
    ]


def kfac(rows: list[Row]) -> list[str]:
    """K-FAC's preconditioner beside none: the same methods, Fisher with the damping that suits each."""
    white = [row for row in rows if row["part"] == "kfac" and "codec" not in row]
    plain = [row for row in rows if row["part"] == "exact" and "preconditioner" not in row]
    names = list(dict.fromkeys(row["preconditioner"] for row in white))
    lines = []
    for points in ("1", *PATHS):
        for m, n, d, bent in (
            ("dot", "none", 0.0, 0.0),
            ("dot", "cosine", 0.0, 0.0),
            ("dot", "layer", 0.0, 0.0),
            ("datainf", "layer", 0.1, 0.1),
            ("fisher, left out", "layer", 0.2, 1.0),
        ):
            of = {"method": m, "normalize": n, "points": points}
            cells = [cell(find(plain, damping=d, **of))]
            cells += [cell(find(white, damping=bent, preconditioner=name, **of)) for name in names]
            lines.append([f"{m.split(',')[0]}:{n} at {points.replace('+', ', ')}", *cells])
    return [
        "",
        "## K-FAC's preconditioner, exact gradients",
        "",
        "`kfac` is the preconditioner that caches had: half of the damped inverse on each side, 64 "
        "directions of a side of up to 384, damping 0.1, from all training texts. (The default damping is "
        "now 1, and only directions that are needed are kept; `studies/damping` compares these.) Then "
        "follow 16 directions, all directions, and the first 30 texts alone. The damping of Fisher is 0.2 "
        "without the preconditioner and 1 with it.",
        *table(["", "off", *names], lines),
    ]


def ways(rows: list[Row]) -> list[str]:
    """Other ways to have K-FAC's preconditioner."""
    found = [row for row in rows if row["part"] == "ways"]
    dampings = list(dict.fromkeys(row["side_damping"] for row in found if "side_damping" in row))
    lines = [[f"all directions, damping {d:g}", cell(find(found, side_damping=d))] for d in dampings]
    one_side = [row for row in found if "side_damping" not in row]
    lines += [
        ["the whole inverse on the query side", cell([row for row in one_side if "codec" not in row])],
        [
            "the same through a sketch of width 8,192 and a learned codec of 2,048 bytes",
            cell([row for row in one_side if "codec" in row]),
        ],
    ]
    return [
        "",
        "Variants of it, half-way, dot:layer (`studies/methods/methods.py --parts ways`):",
        *table(["", "dot:layer"], lines),
    ]


def codecs(rows: list[Row]) -> list[str]:
    kept = [
        row
        for row in rows
        if row["part"] in ("codecs", "kfac") and "codec" in row and row["normalize"] == "layer"
    ]
    kinds: dict[str, Row] = {}
    for row in kept:
        about = {k: row[k] for k in ("points", "preconditioner", "codec", "width") if k in row}
        about |= {"budget": row["budget"]} if "budget" in row else {}
        kinds.setdefault(json.dumps(about), about)
    lines = []
    for about in kinds.values():
        place = about["points"].replace("+", ", ")
        name = f"{about['codec']}, width {about['width']:,}" + (
            f", {about['budget']:,} bytes" if "budget" in about else ""
        )
        found = find(kept, **about)
        if "budget" not in about:
            found = [row for row in found if "budget" not in row]
        cells = []
        damping_of = 1.0 if about["preconditioner"] == "kfac" else 0.2
        for method, damping in (("dot", 0.0), ("fisher, left out", damping_of)):
            some = find(found, method=method, damping=damping)
            lost = [row["loss"][0] for row in some if row.get("loss")]
            cells.append(cell(some))
            cells.append(" ".join(f"{x:+.3f}" for x in lost) if len(lost) == 3 else "")
        lines.append([f"{name}; at {place}; preconditioner {about.get('preconditioner', 'none')}", *cells])
    return [
        "",
        "## From sketches and from two kilobytes",
        "",
        "Means of three seeds. *lost* is the loss against exact gradients with the same method, points and "
        "preconditioner; *learnt from* names the rows from which the codec has learned its bases.",
        *table(["", "dot:layer", "lost", "fisher:layer, damping 0.2 (1 with kfac)", "lost"], lines),
        "",
        "### Other projections at 2,048 bytes, half-way, in the same study",
        *other_codes(rows),
    ]


def other_codes(rows: list[Row]) -> list[str]:
    kept = [row for row in rows if row["part"] == "peers" and row.get("preconditioner", "none") == "none"]
    kept = [row for row in kept if row.get("budget") == 2048]
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for codec in dict.fromkeys(row["codec"] for row in kept):
        of = find(kept, codec=codec)
        for about in {(r["method"], r["normalize"], r["damping"]) for r in of}:
            some = find(of, method=about[0], normalize=about[1], damping=about[2])
            if len({row["set"] for row in some}) < 3:
                continue
            mean = sum(row["lds"] for row in some) / len(some)
            family = "dot" if about[0] == "dot" else "inverse"
            if mean > best.get((codec, family), (-1.0, ""))[0]:
                best[codec, family] = mean, f"{cell(some)} ({label(*about)})"
    codecs = list(dict.fromkeys(codec for codec, _ in best))
    lines = [[codec, *(best.get((codec, f), (0.0, ""))[1] for f in ("dot", "inverse"))] for codec in codecs]
    return table(
        ["projection (best of its dampings and normalizations)", "dot", "with an inverse second moment"],
        lines,
    )


def beside(peers: dict[str, Any]) -> list[str]:
    best: dict[tuple[Any, ...], Row] = {}
    groups: dict[str, list[Row]] = {}
    for row in peers["rows"]:
        if "lds" not in row:
            continue
        about = {k: v for k, v in row["settings"].items() if k != "seed"}
        groups.setdefault(json.dumps([row["package"], row["method"], row["at"], about]), []).append(row)
    for same in groups.values():
        row = dict(same[0], lds=sum(r["lds"] for r in same) / len(same), runs=len(same))
        kept = row["bytes"]
        size = "none" if kept is None else "at most 2.1 KB" if kept <= 2150 else "more"
        key = (row["package"], row["method"], row["at"], size, row["settings"].get("preconditioner"))
        if key not in best or row["lds"] > best[key]["lds"]:
            best[key] = row
    lines = []
    for size in ("at most 2.1 KB", "more", "none"):
        for key, row in sorted(best.items(), key=lambda pair: -pair[1]["lds"]):
            if key[3] == size:
                said = ", ".join(f"{k} {v}" for k, v in row["settings"].items() if k != "seed")
                name = f"{row['package']} {row['version']} {row['method']}" + (f" ({said})" if said else "")
                kept = "none kept" if row["bytes"] is None else f"{row['bytes']:,.0f}"
                lines.append([name, row["at"], kept, f"{row['lds']:.3f}", str(row["runs"])])
    return [
        "",
        "## Compared with other packages, on one model and data",
        "",
        f"{peers['truth'][0].upper()}{peers['truth'][1:]}, {peers['training texts']} training and "
        f"{peers['test texts']} test texts, {peers['retrainings']} retrainings of two seeds each (the seeds "
        f"agree to {peers['agreement of the seeds']:.3f}). Each row is the best of the settings tried for a "
        "method, which favours methods with many settings. First come those of at most 2.1 KB per example, "
        "last those that store nothing per example and recompute every training gradient for each set of "
        "queries. `at`: where gradients are taken; rapidin's preconditioner is off if it is not named.",
        *table(["", "at", "bytes per example", "LDS", "seeds"], lines),
    ]


if __name__ == "__main__":
    main()
