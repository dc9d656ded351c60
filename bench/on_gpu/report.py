"""Rows as text: a line each while measuring, a short table at the end; `performance.py` makes the page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from on_gpu.plan import BACKENDS, Facts

SHARE_OF_TIME = 0.05  # a goal below this is a share of time that must not be passed


def key(row: Facts) -> tuple[str, str]:
    """What is measured, whatever the way."""
    return row["op"], json.dumps(row["size"], sort_keys=True)


def times_quicker(row: Facts, rows: Iterable[Facts]) -> dict[str, float]:
    """How many times longer each other way took at the same size, by way."""
    if row.get("seconds") is None or row["way"] not in BACKENDS:
        return {}
    return {
        other["way"]: other["seconds"] / row["seconds"]
        for other in rows
        if other["way"] not in BACKENDS
        and other.get("seconds")
        and key(other) == key(row)
        # A way that took a part of the input only is held against its own floor, not against ours.
        and "elements_projected" not in other
    }


def goals(row: Facts, rows: Sequence[Facts]) -> list[tuple[str, float, float | None, bool]]:
    """(name, goal, value, whether it is met) of each goal of a row; value None where it was not measured."""
    found = {**row.get("of", {}), **times_quicker(row, rows)}
    listed = []
    for name, goal in row["goals"].items():
        value = found.get(name)
        met = value is not None and (value <= goal if goal < SHARE_OF_TIME else value >= goal)
        listed.append((name, goal, value, met))
    return listed


def goal_text(name: str, goal: float) -> str:
    if goal < SHARE_OF_TIME:
        return f"{name} at most {goal:g}"
    if goal > 1:
        return f"{goal:g} times {name.removeprefix('torch: ')}"
    words = {"floor": "limit", "read": "read limit"}
    return f"{goal:g} of the {words.get(name, name)}"


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def rate_text(row: Facts) -> str:
    if "bytes" in row.get("ceiling", "bytes"):
        return f"{row['rate'] / 1e9:.4g} GB/s"
    return f"{row['rate'] / 1e12:.4g} T operations/s"


def size_text(size: dict[str, Any]) -> str:
    """What tells one size from another."""
    if "kind" in size:
        return str(size["kind"])
    return ", ".join(f"{name} {value}" for name, value in size.items())


def line(row: Facts) -> str:
    head = f"  {row['op']:<16} {row['way']:<31} {size_text(row['size'])}"
    if row["state"] != "measured":
        return f"{head}: {row['state']}: {row['why'].splitlines()[0][:160]}"
    facts = [time_text(row["seconds"])]
    if row.get("called_seconds", 0) > 1.2 * row["seconds"]:
        facts.append(f"called {time_text(row['called_seconds'])}")
    if "rate" in row:
        facts.append(rate_text(row))
    facts += [f"{value:.3g} of {name}" for name, value in row.get("of", {}).items()]
    if "tokens_per_s" in row:
        facts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if row.get("bytes_above_bare") is not None:
        facts.append(f"{row['bytes_above_bare'] / 1e6:,.0f} MB above the bare loop")
    if "error" in row:
        facts.append(f"error {row['error']:.1e}" + ("" if row["same_bits"] else ", other bits each time"))
    return f"{head}: {', '.join(facts)}"


def listed(rows: Sequence[Facts]) -> str:
    return "\n".join(line(row) for row in rows)


def failures(rows: Sequence[Facts]) -> str:
    """Each reason once, with how many rows it took."""
    reasons: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        if row["state"] not in ("measured", "passed"):
            reason = (row["state"], row["op"], row["way"], row["why"].splitlines()[0][:200])
            reasons[reason] = reasons.get(reason, 0) + 1
    return "\n".join(
        f"  {state}: {op}, {way}, {count} rows: {why}" for (state, op, way, why), count in reasons.items()
    )


def summary(result: Facts) -> str:
    """The short table: each op and way, how near to its goals."""
    rows = result["rows"]
    about = result["about"] or {}
    lines = ["", f"{about.get('name')}, driver {about.get('driver')}, {result['mode']} run"]
    if result["dry"]:
        lines.append("A dry run: no figure here means anything.")
    lines += [f"  {name}: {rate:.4g}" for name, rate in result["ceilings"].items()]
    lines.append(f"{'op':<17}{'way':<32}{'rows':>5}{'worst':>9}{'median':>9}{'best':>9}  goal, met")
    for op, way in dict.fromkeys(
        (row["op"], row["way"]) for row in rows if row["op"] not in ("ceiling", "step")
    ):
        mine = [row for row in rows if (row["op"], row["way"]) == (op, way)]
        measured = [row for row in mine if row["state"] == "measured"]
        names = dict.fromkeys(name for row in mine for name in row["goals"]) or {"floor": None}
        for name in names:
            wanted = [goal for row in mine for goal in goals(row, rows) if goal[0] == name]
            known = [value for _, _, value, _ in wanted if value is not None]
            if not wanted:
                known = [row["of"][name] for row in measured if name in row.get("of", {})]
            shares = [min(known), statistics.median(known), max(known)] if known else []
            text = "".join(f" {value:>8.2g}" for value in shares) or " " * 27
            goal = ""
            if wanted:
                met = sum(1 for *_, is_met in wanted if is_met)
                goal = f"{goal_text(name, wanted[0][1])}: {met} of {len(wanted)}"
            lines.append(f"{op:<17}{way:<32}{len(measured):>5}{text}  {goal}".rstrip())
    lines += [line(row) for row in rows if row["op"] in ("caching", "stream") and row["state"] == "measured"]
    failed = failures(rows)
    return "\n".join([*lines, *(["not measured:", failed] if failed else [])])
