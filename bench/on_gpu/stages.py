"""The cases of each stage, the most important first: cases for which there is no time are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from on_gpu import caching, ceilings, flow, packing, plan, scans, sketches
from on_gpu.cases import Case, Mode

CASES: dict[str, Callable[[Mode], list[Case]]] = {
    "ceilings": ceilings.cases,
    "caching": caching.cases,
    "linear_sketch": sketches.linear_cases,
    "topk_scan": scans.scan_cases,
    "flat_sketch": sketches.flat_cases,
    "pack": packing.cases,
    "stream": scans.stream_cases,
    "flow": flow.cases,  # checked, not measured
}
assert set(plan.STAGES) < set(CASES)


def chosen(
    stages: Sequence[str], mode: Mode, ways: Sequence[str] = (), share: tuple[int, int] = (0, 1)
) -> dict[str, list[tuple[int, Case]]]:
    """(number, case) of each of these stages; ways: only cases of these; share: (i, n), every n-th case from
    the i-th on. Numbers continue through all stages."""
    found: dict[str, list[tuple[int, Case]]] = {}
    number = 0
    for stage in stages:
        listed = [case for case in CASES[stage](mode) if not ways or case.way in ways]
        numbered = list(enumerate(listed, number))
        found[stage] = [(n, case) for n, case in numbered if n % share[1] == share[0]]
        number += len(listed)
    return found
