"""Writes docs/measured/performance.md from the results of bench/cpu.py and bench/gpu.sh, which are
bench/results/cpu-*.json and gpu-*.json.

python bench/performance.py            # writes the page
python bench/performance.py --check    # ends with 1 where the page is not what the results make
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from on_gpu.cases import Case
from on_gpu.plan import BACKENDS, STAGES, Facts, all_rows
from on_gpu.report import goal_text, goals, key, rate_text, size_text, time_text
from on_gpu.stages import chosen

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/measured/performance.md"
RESULTS = ROOT / "bench/results"
NOT_YET = "not measured yet"

HEAD = """# Performance

`python bench/performance.py` makes this page from the results of `bench/cpu.py` and `bench/gpu.sh`.
[CONTRIBUTING.md](../../CONTRIBUTING.md) says how to run both.

## On a CPU

A way and its limit are timed in turns, and the medians are compared. The read loop is torch's sum of the same
bytes as float32; the bare loop is a forward and an input-only backward pass over the same batches. The rows
of `topk_scan` have 2,048 bytes each and random contents, and the ten best are found; other methods are given
as multiples of our time, and need not give the same answers: faiss' binary index, where it was measured, cuts
queries to signs. With one thread a time is that of the processor; with more, and from the disk, it is that of
a clock.
A busy machine makes shares larger than an idle one, since the read loop then waits for memory that other
processes read; the load average says how busy it was.
Scans with normalizations have one query; the time includes computing the factors of all rows from their
lengths, and there are 6,000 rows of float16 and 100,000 packed ones.
Caching multiplies large float32 matrices by oneDNN where that is known to be faster than MKL, with which
torch does it: on AMD's Zen 5 (`RAPIDIN_ONEDNN=off` leaves it to torch). The bare loop is as users run it, so
caching may be faster than it; where the bare loop was also run with its products by oneDNN, it is among the
others.
Where a table has K-FAC's products, they are counted: the multiply-adds that precondition both sides of each
layer, as a share of those of the linear layers in the bare loop. If that loop were linear layers alone, and
the products ran at their rate, caching could not have more than 1 / (1 + that share) of its speed.

[studies/peers](../../studies/peers/README.md) has caching and questions beside Bergson and dattri, as whole
processes on one model and the same rows.
"""

GPU_HEAD = """## On a GPU

A cell holds the median time and, after it, the share of the limit: the time that the bytes of inputs and
outputs take at the bandwidth measured in the same run, or the operations at the rate of a matrix product,
whichever is longer. The limit of reads is the rate of the fastest reading kernel, that of writes the rate of
a copy. Each result is first checked against the reference, with its output's memory filled with NaN before; a
wrong result is not measured. Times are GPU times (by events, without the launch), on random data; several
inputs are used in turn so that none stays in the L2 cache. Other methods are given as multiples of the time
of our faster kernel. The results' files also have the quartiles, device, date and commit of each row.
"""

CPU_STAGES = {
    "scan": "`topk_scan`",
    "normalize": "A shard's scan with normalizations other than `layer`",
    "flat": "`flat_sketch`",
    "caching": "Caching, a random Llama of SmolLM2-135M's shape",
    "disk": "One query of a cache on disk",
}

WORDS = {
    "ceiling": "Ceilings",
    "caching": "Caching from end to end",
    "linear_sketch": "`linear_sketch`: a layer's gradient from its factors",
    "matrix_sketch": "`matrix_sketch`: of a formed gradient",
    "embedding_sketch": "`embedding_sketch`",
    "topk_scan": "`topk_scan`: both ends of the ranking, a cache of 4 GiB",
    "flat_sketch": "`flat_sketch`: the gradient of a whole model",
    "pack": "`pack`",
    "rotate": "`rotate`: the random rotation",
    "unpack": "`unpack`",
    "stream": "Scans from disk, and again from the GPU's memory",
}
# What a column's values mean, where its name does not say it.
NOTES = {
    "linear_sketch": "`kfac`: there is no preconditioner, the op applies K-FAC's to each side "
    "(`rapidin.ops.LowRank`), or float32 copies of the factors are preconditioned first, which is timed too.",
    "topk_scan": "`stride`: bytes from row to row; `blocks`: how many parts of a row have a scale of their "
    "own, as in scans of packed rows with `--normalize none` and `cosine`.",
}


def expected() -> list[Case]:
    """What a full run measures."""
    return [case for cases in chosen(list(STAGES), "full").values() for _, case in cases]


def results() -> list[Facts]:
    """The results that are no dry runs, the newest first."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    return sorted((r for r in found if not r["dry"]), key=lambda r: str(r["date"]), reverse=True)


def cpu_results() -> list[Facts]:
    """The results of bench/cpu.py that are no quick runs, by machine and threads."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu-*.json"))]
    return [result for result in found if not result["quick"]]


def cpu_section(result: Facts) -> list[str]:
    """A machine, and a table for each stage that was measured on it."""
    about, rows = result["about"], result["rows"]
    used = dict.fromkeys((name, v) for row in rows for name, v in row["versions"].items() if v)
    versions = ", ".join(f"{name} {v}" for name, v in used)
    threads = "one thread" if about["threads"] == 1 else f"{about['threads']} threads"
    machine = f"{about['cores']} cores, {about['instruction_set']}, {about['memory_bytes'] / 2**30:.0f} GiB"
    lines = [f"### {about['name']}, {threads}", "", f"{machine}; {versions}.", ""]
    for stage, words in CPU_STAGES.items():
        mine = [row for row in rows if row["stage"] == stage]
        if not mine:
            lines += [f"{words}: {NOT_YET}.", ""]
            continue
        last = mine[-1]
        lines += [f"**{words}**", "", *cpu_runs(mine), ""]
        peers = any(row["peers"] for row in mine)
        packing, memory = "packing" in last, "peak_mb" in last
        products = any("products" in row for row in mine)
        head = ["what", "time", f"of {last['limit']}", "goal"]
        head += ["packing's share"] if packing else []
        head += ["K-FAC's products, counted"] if products else []
        head += ["most memory, mapped files included"] if memory else []
        body = []
        for row in mine:
            seconds = row["cpu_seconds"] if row["by"] == "processor" else row["seconds"]
            goal = ""
            if row["goal"] is not None:
                goal = f"{row['goal']:g}, {'met' if row['of'] >= row['goal'] else 'missed'}"
                goal += " on a busy machine" if row["load"] > about["cores"] else ""
            cells = [row["name"], time_text(seconds["rapidin"]), f"{row['of']:.2f}", goal]
            cells += [f"{row['packing']:.3f}"] if packing else []
            cells += [f"{row['products']:.3f}" if "products" in row else ""] if products else []
            cells += [f"{row['peak_mb']:,.0f} MB"] if memory else []
            if peers:
                cells.append("; ".join(f"{way}: {times:.2f}" for way, times in row["peers"].items()))
            body.append(cells)
        lines += table([*head, *(["others, times as long"] if peers else [])], body)
    return lines


def cpu_runs(rows: Sequence[Facts]) -> list[str]:
    """How rows of a stage were measured, a line for each run."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        by = f" by `{row['command']}`" if "command" in row else ""
        run = f"{row['date']}{by}, commit {row['commit']}, load average {row['load']:.1f} before"
        runs.setdefault(run, []).append(row["name"])
    if len(runs) == 1:
        return [f"Measured {next(iter(runs))}."]
    return [f"- {run}: {'; '.join(names)}" for run, names in runs.items()]


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
        return f"{text}, {row['of']['floor']:.2f}" if "floor" in row["of"] else text
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
    mine = [row for row in rows if row["op"] == op and row["state"] != "left out"]
    there_are = {key(row) for row in mine}
    wanted = [row for case in expected() if case.op == op and key(row := case.row()) in there_are]
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
    above = " ".join([*([f"All: {common}."] if common else []), *([NOTES[op]] if op in NOTES else [])])
    made = table([*names, "limit", *ways, "goal"], lines)
    return [above, "", *made] if above else made


def to_come(rows: list[Facts]) -> list[str]:
    """A line for each op that has rows that are not measured yet."""
    there = {(key(row), row["way"]) for row in rows if row["state"] != "left out"}
    lines = []
    for op, words in WORDS.items():
        missing = [case.row() for case in expected() if case.op == op]
        missing = [row for row in missing if (key(row), row["way"]) not in there]
        if not missing:
            continue
        sizes = len({key(row) for row in missing})
        ways = "; ".join(dict.fromkeys(row["way"] for row in missing))
        goals = dict.fromkeys(goal_text(name, goal) for row in missing for name, goal in row["goals"].items())
        line = f"- {words}{f', {sizes} sizes' if sizes > 1 else ''}. Ways: {ways}."
        lines.append(line + (f" Goal: {', '.join(goals)}." if goals else ""))
    return lines


def checks() -> list[str]:
    """What `bench/gpu.sh smoke` found, a line for each device and each failure."""
    lines = []
    for path in sorted(RESULTS.glob("smoke-*.jsonl")):
        if any(row.get("dry") for row in all_rows(path)):
            continue
        rows = [row for row in all_rows(path) if "state" in row and not row["lane"].startswith("compile ")]
        states = [row["state"] for row in rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        if rows:
            commit = str(rows[0]["commit"])[:12]
            lines.append(f"Checked on {rows[0]['device']}, {rows[0]['date']}, commit {commit}: {counts}.")
        for row in rows:
            if row["state"] == "failed":
                why = str(row["why"]).splitlines()[0][:200].replace("|", "\\|")
                lines.append(f"- failed: {row['op']}, {row['way']}, {size_text(row['size'])}: {why}")
    return [*lines, ""] if lines else []


def number_text(value: object) -> str:
    return f"{int(str(value)):,}" if str(value).isdigit() else str(value)


def rates(op: str, rows: list[Facts]) -> list[str]:
    """The rate of each way, and its share of the limit where it has one."""
    lines = []
    for row in rows:
        if row["op"] == op and row["state"] != "left out":
            measured = row["state"] == "measured"
            of = f"{row['of']['read']:.2f}" if measured and row.get("of") else ""
            lines.append([row["way"], rate_text(row) if measured else row["state"], of])
    return table(["what", "rate", "of the limit"], lines)


def caching(rows: list[Facts]) -> list[str]:
    lines = []
    size: Facts = {}
    for row in rows:
        if row["op"] != "caching" or row["state"] == "left out":
            continue
        size = row["size"]
        head = [str(size["kind"]), row["way"]]
        if row["state"] != "measured":
            lines.append([*head, row["state"], "", "", "", "", ""])
            continue
        above = row.get("bytes_above_bare")
        of = row["of"]
        lines.append(
            [
                *head,
                f"{row['width']:,}" if "width" in row else "",
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
    about = (
        f"A Llama of random bfloat16 weights: {size['layers']} layers of {size['hidden']} features, "
        f"{size['vocabulary']:,} tokens; {size['examples']} texts of {size['words'][0]} to "
        f"{size['words'][1]} tokens, {size['batch_tokens']:,} tokens a batch. "
        "The bare loop is a forward and an input-only backward pass over the same batches; caching is all of "
        "`Attributor.cache`, shards on disk included."
    )
    head = ["what counts", "way", "dimension", "tokens/s", "of bare loop", "packing's share", "MB above bare"]
    return [about, "", *table([*head, "goal"], lines)]


def section(result: Facts | None) -> list[str]:
    rows: list[Facts] = [row for row in result["rows"] if row["op"] != "step"] if result else []
    lines = []
    if result is None:
        lines += ["### No GPU so far", ""]
    else:
        about = result["about"]
        versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
        lines += [f"### {about['name']}", ""]
        commit = str(result["commit"] or "not known")[:12]
        made = (
            f"{result['date']}, commit {commit}, {result['mode']} run; driver {about['driver']}, {versions}; "
        )
        lines.append(f"{made}{about['memory_bytes'] / 2**30:.0f} GiB.")
        if result.get("cut"):
            lines.append(f"The run was cut short by {result['cut']}.")
        lines.append("")
    for op, words in WORDS.items():
        if not any(row["op"] == op and row["state"] != "left out" for row in rows):
            continue
        lines += [f"#### {words}", ""]
        if op in ("ceiling", "stream"):
            lines += rates(op, rows)
        else:
            lines += caching(rows) if op == "caching" else by_size(op, rows)
    reasons: dict[str, None] = {}
    for row in rows:
        if row["state"] in ("failed", "missing"):
            said = row["why"].splitlines()[0][:200].replace("|", "\\|")
            reasons[f"- {row['op']}, {row['way']}: {row['state']}: {said}"] = None
    lines += ["Why rows are missing:", "", *reasons, ""] if reasons else []
    waiting = to_come(rows)
    return [*lines, *(["Not measured yet:", "", *waiting, ""] if waiting else [])]


def page() -> str:
    found = results()
    on_cpus = cpu_results()
    lines = (
        [line for result in on_cpus for line in cpu_section(result)] if on_cpus else ["Not measured yet.", ""]
    )
    lines += [*GPU_HEAD.splitlines(), "", *checks()]
    lines += [line for result in (found or (None,)) for line in section(result)]
    return HEAD + "\n" + "\n".join(lines).rstrip() + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
