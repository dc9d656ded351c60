"""Writes docs/performance.md from the results of bench/gpu.sh, bench/results/gpu-*.json.

python bench/performance.py            # writes the page
python bench/performance.py --check    # ends with 1 where the page is not what the results make
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from on_gpu.cases import Case
from on_gpu.plan import BACKENDS, Facts
from on_gpu.report import goal_text, goals, key, rate_text, time_text
from on_gpu.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/performance.md"
RESULTS = ROOT / "bench/results"
NOT_YET = "not measured yet"

HEAD = """# Performance on GPUs

Made by `python bench/performance.py` from the results of `bench/gpu.sh`; not written by hand. How to run it:
[CONTRIBUTING.md](../CONTRIBUTING.md).

A cell holds the median time and, after it, the share of the limit: the time that the bytes of inputs and
outputs take at the bandwidth measured in the same run, or the operations at the rate of a matrix product,
whichever is longer. Bytes that are only read are held against the best reading kernel, those written
against a copy. Each result is checked against the reference first, with its output's memory filled with NaN
before; a wrong one is no measurement. Times are the GPU's (events; the launch is not in them), on random
data, inputs taken in turn so that none is left in the L2 cache. Other ways stand beside: how many times as
long they take as the quicker of ours.
"""

WORDS = {
    "ceiling": "Ceilings",
    "linear_sketch": "`linear_sketch`: a layer's gradient from its factors",
    "matrix_sketch": "`matrix_sketch`: of a formed gradient",
    "embedding_sketch": "`embedding_sketch`",
    "flat_sketch": "`flat_sketch`: the gradient of a whole model",
    "topk_scan": "`topk_scan`: both ends of the ranking, a cache of 4 GiB",
    "caching": "Caching from end to end",
    "pack": "`pack`",
    "turn": "The random turn",
    "unpack": "`unpack`",
    "stream": "Caches larger than the GPU's memory",
}


def expected() -> list[Case]:
    """What a full run measures."""
    return [case for stage in STAGES for case in stage.cases("full")]


def results() -> list[Facts]:
    """The results that are no dry runs, the newest first."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    return sorted((r for r in found if not r["dry"]), key=lambda r: str(r["date"]), reverse=True)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
    ]


def cell(row: Facts | None, best: float | None) -> str:
    if row is None or row["state"] in ("missing", "left out"):
        return NOT_YET
    if row["state"] == "failed":
        return "failed"
    text = time_text(row["seconds"])
    if row["way"] in BACKENDS:
        return f"{text}, {row['of']['floor']:.2f}"
    if best is not None and "elements_projected" not in row:
        return f"{text}, {row['seconds'] / best:.1f} times"
    return text


def verdicts(rows: list[Facts], group: list[Facts]) -> str:
    """The goals of a size, and what its quickest kernel makes of them."""
    mine = [row for row in group if row["way"] in BACKENDS]
    measured = [row for row in mine if row.get("state") == "measured"]
    chosen = min(measured, key=lambda row: float(row["seconds"])) if measured else None
    if chosen is None:
        return "; ".join(goal_text(name, goal) for name, goal in mine[0]["goals"].items()) if mine else ""
    parts = []
    for name, goal, value, met in goals(chosen, rows):
        said = NOT_YET if value is None else f"{value:.3g}, {'met' if met else 'missed'}"
        parts.append(f"{goal_text(name, goal)}: {said}")
    return "; ".join(parts)


def by_size(op: str, rows: list[Facts]) -> list[str]:
    """A line for each size, a column for each way; what all sizes have in common stands above."""
    wanted = [case.row() for case in expected() if case.op == op]
    mine = [row for row in rows if row["op"] == op]
    ways = list(dict.fromkeys(row["way"] for row in [*wanted, *mine]))
    sizes = {key(row): row["size"] for row in [*wanted, *mine]}
    names = list(dict.fromkeys(name for size in sizes.values() for name in size))
    shared = {n: v for n in names if len(v := {str(size.get(n, "")) for size in sizes.values()}) == 1}
    if len(sizes) > 1:
        names = [name for name in names if name not in shared]
    else:
        shared = {}
    lines = []
    for size, parameters in sizes.items():
        there = {row["way"]: row for row in mine if key(row) == size}
        planned = [row for row in wanted if key(row) == size]
        times = [there[way]["seconds"] for way in BACKENDS if there.get(way, {}).get("state") == "measured"]
        known = {row["way"] for row in planned} | set(there)
        floors = [row["floor_seconds"] for row in there.values() if "floor_seconds" in row]
        group = [there.get(row["way"], row) for row in planned] or list(there.values())
        lines.append(
            [
                *(number_text(parameters.get(name, "")) for name in names),
                time_text(min(floors)) if floors else "",
                *(cell(there.get(way), min(times, default=None)) if way in known else "" for way in ways),
                verdicts(rows, group),
            ]
        )
    common = ", ".join(f"{name} {number_text(*values)}" for name, values in shared.items())
    made = table([*names, "limit", *ways, "goal"], lines)
    return [f"All: {common}.", "", *made] if common else made


def number_text(value: object) -> str:
    return f"{int(str(value)):,}" if str(value).isdigit() else str(value)


def ceilings(rows: list[Facts]) -> list[str]:
    lines = []
    for case in expected():
        if case.op == "ceiling":
            row = next((r for r in rows if r["op"] == "ceiling" and r["way"] == case.way), None)
            measured = row is not None and row["state"] == "measured"
            lines.append([case.way, rate_text(row) if row is not None and measured else NOT_YET])
    return table(["what", "rate"], lines)


def caching(rows: list[Facts]) -> list[str]:
    lines = []
    for case in expected():
        if case.op != "caching":
            continue
        row = next((r for r in rows if (key(r), r["way"]) == (key(case.row()), case.way)), None)
        head = [str(case.size["kind"]), case.way]
        wanted = "; ".join(goal_text(name, goal) for name, goal in case.goals.items())
        if row is None or row["state"] != "measured":
            said = "failed" if row is not None and row["state"] == "failed" else NOT_YET
            lines.append([*head, said, "", "", "", wanted])
            continue
        above = row.get("bytes_above_bare")
        of = row["of"]
        lines.append(
            [
                *head,
                f"{row['tokens_per_s']:,.0f}",
                f"{of['bare loop']:.3f}" if "bare loop" in of else "",
                f"{of['packing']:.3f}" if "packing" in of else "",
                f"{above / 1e6:,.0f}" if above is not None else "",
                "; ".join(
                    f"{goal_text(name, goal)}: {'met' if met else 'missed'}"
                    for name, goal, _, met in goals(row, rows)
                ),
            ]
        )
    size = next(case.size for case in expected() if case.op == "caching")
    about = (
        f"A Llama of random bfloat16 weights: {size['layers']} layers of {size['hidden']} features, "
        f"{size['vocabulary']:,} tokens; {size['examples']} texts of {size['words'][0]} to "
        f"{size['words'][1]} tokens, {size['batch_tokens']:,} tokens a batch, {size['width']} bins a layer. "
        "The bare loop is a forward and an input-only backward pass over the same batches; caching is all of "
        "`Attributor.cache`, shards on disk included."
    )
    head = ["what counts", "way", "tokens/s", "of bare loop", "packing's share", "MB above bare", "goal"]
    return [about, "", *table(head, lines)]


def stream(rows: list[Facts]) -> list[str]:
    lines = []
    for case in expected():
        if case.op == "stream":
            row = next((r for r in rows if r["op"] == "stream" and r["way"] == case.way), None)
            measured = row is not None and row["state"] == "measured"
            lines.append([case.way, rate_text(row) if row is not None and measured else NOT_YET])
    return table(["what", "rate"], lines)


def section(result: Facts | None) -> list[str]:
    rows: list[Facts] = result["rows"] if result else []
    lines = []
    if result is None:
        lines += ["## No GPU so far", "", "Nothing here was measured yet; the tables say what will be.", ""]
    else:
        about = result["about"]
        versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
        lines += [f"## {about['name']}", ""]
        commit = str(result["commit"] or "not known")[:12]
        made = (
            f"{result['date']}, commit {commit}, {result['mode']} run; driver {about['driver']}, {versions}; "
        )
        lines.append(f"{made}{about['memory_bytes'] / 2**30:.0f} GiB.")
        lines.append("")
    special = {"ceiling": ceilings, "caching": caching, "stream": stream}
    for op in dict.fromkeys(case.op for case in expected()):
        lines += [f"### {WORDS[op]}", ""]
        lines += special[op](rows) if op in special else by_size(op, rows)
    reasons: dict[str, None] = {}
    for row in rows:
        if row["state"] in ("failed", "missing"):
            said = row["why"].splitlines()[0][:200].replace("|", "\\|")
            reasons[f"- {row['op']}, {row['way']}: {row['state']}: {said}"] = None
    return [*lines, *(["Why rows are missing:", "", *reasons, ""] if reasons else [])]


def page() -> str:
    found = results()
    lines = [line for result in (found or (None,)) for line in section(result)]
    return HEAD + "\n" + "\n".join(lines).rstrip() + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
