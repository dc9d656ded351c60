"""Ways of doing one thing, timed in turns: what slows the machine for a while then slows all of them."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

QUICK = os.environ.get("RAPIDIN_BENCH_QUICK") == "1"  # pytest --quick sets it too
LIMIT_SECONDS = 0.02 if QUICK else 1.0  # for measuring a limit

T = TypeVar("T")


def sized(full: T, quick: T) -> T:
    """A size: the one that counts, or one that only shows that the benchmark works."""
    return quick if QUICK else full


def measure(benchmark: Any, run: Callable[..., Any], *args: Any, **settings: Any) -> None:
    """Time `run` as pytest-benchmark does by itself, or twice in a quick run."""
    if QUICK:
        benchmark.pedantic(run, args, settings, rounds=2)
    else:
        benchmark(run, *args, **settings)


def in_turns(
    benchmark: Any,
    ours: Callable[[], Any],
    others: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    seconds: float = 20.0,
) -> dict[str, float]:
    """Time `ours` as the benchmark and each of `others` before every round of it; the best time of each.

    What takes less than a tenth of a second is run once more before it is timed, so that each finds the
    caches as it leaves them and not as another did. A way that has had its `seconds` sits out the turns that
    are left, so a slow one may run only once.
    """
    taken: dict[str, list[float]] = {name: [] for name in others}

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def others_first() -> None:
        for name, run in others.items():
            if sum(taken[name]) < seconds:
                once = timed(run)
                taken[name].append(timed(run) if once < 0.1 else once)
        ours()

    benchmark.pedantic(ours, setup=others_first, rounds=sized(rounds, 2))
    best = {name: min(times) for name, times in taken.items()}
    benchmark.extra_info["beside"] = best
    return best


def clear_peak() -> bool:
    """Give unused memory back and start measuring the peak anew; False where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def peak_mb() -> float:
    """The most memory held at a time since `clear_peak`, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
