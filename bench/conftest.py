"""What all benchmarks share: --quick, and a table at the end that says how far each is from its limit."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

RATIOS = ("of_", "times_")  # share of a limit, larger is better; how many times quicker than another way

_rows = pytest.StashKey[list[tuple[str, str, float, dict[str, Any]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="benchmarks at small sizes, once or twice: shows that they work, not how fast anything is "
        "(RAPIDIN_BENCH_QUICK=1 does the same)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_disable", False):
        raise pytest.UsageError(
            "these benchmarks compare times, and --benchmark-disable takes none; --quick shows that they run"
        )
    # In the environment, since the sizes are made when the files are imported, which is later.
    if config.getoption("quick"):
        os.environ["RAPIDIN_BENCH_QUICK"] = "1"
    config.stash[_rows] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "call" and report.passed and getattr(benchmark, "stats", None) is not None:
        group = benchmark.group or item.path.stem.removeprefix("bench_")
        name = item.name.removeprefix("bench_")
        item.config.stash[_rows].append((group, name, benchmark.stats.stats.median, benchmark.extra_info))
    return report


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's tables, which say nothing of limits
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    wide = max(len(name) for _, name, *_ in rows) + 2
    terminalreporter.section("ratios to the limits")
    if os.environ.get("RAPIDIN_BENCH_QUICK") == "1":
        terminalreporter.write_line("A quick run: the sizes are too small for the figures to mean anything.")
    last = None
    for group, name, median, info in rows:
        if group != last:
            terminalreporter.write_line(group)
            last = group
        ratios = (f"{key} {value:.3g}" for key, value in info.items() if key.startswith(RATIOS))
        terminalreporter.write_line(f"  {name:<{wide}}{_time(median):>10}   {', '.join(ratios)}")
        for other, seconds in info.get("beside", {}).items():
            terminalreporter.write_line(f"    {other:<{wide - 2}}{_time(seconds):>10}")


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
