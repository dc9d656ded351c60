"""The stages in the order in which they are measured, with their cases and their shares of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from on_gpu import caching, ceilings, packing, scans, sketches
from on_gpu.cases import Case, Mode


@dataclass(frozen=True)
class Stage:
    """seconds: that it should take, of some 400 for all; more where others leave some. What it has no time
    for is left out, so what matters most comes first in `cases`."""

    name: str
    seconds: float
    cases: Callable[[Mode], list[Case]]


STAGES = (
    Stage("ceilings", 25, ceilings.cases),
    Stage("linear_sketch", 80, sketches.linear_cases),
    Stage("flat_sketch", 50, sketches.flat_cases),
    Stage("topk_scan", 80, scans.scan_cases),
    Stage("caching", 90, caching.cases),
    Stage("pack", 25, packing.cases),
    Stage("stream", 20, scans.stream_cases),
)
