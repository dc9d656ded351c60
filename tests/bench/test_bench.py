"""The benchmarks run, at small sizes, and each says how far it is from its limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]


def test_every_benchmark_runs_and_notes_its_ratio(tmp_path: Path) -> None:
    noted = tmp_path / "benchmarks.json"
    options = ["bench", "--benchmark-only", "--quick", "-q", "-p", "no:cacheprovider"]
    # Told of xdist, which may run this test itself, pytest-benchmark would measure nothing.
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--benchmark-json={noted}"],
        cwd=ROOT,
        # One thread: at these sizes others only wait for their turn on a busy machine.
        env={**outside, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # of a busy machine
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(noted.read_text())["benchmarks"]
    files = {Path(row["fullname"].split("::")[0]).name for row in rows}
    assert files == {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    for row in rows:
        ratios = [value for key, value in row["extra_info"].items() if key.startswith(("of_", "times_"))]
        assert ratios, f"{row['name']} notes no ratio to a limit"
        assert all(value > 0 for value in ratios), row["name"]
    assert "ratios to the limits" in done.stdout


def test_benchmarks_that_take_no_times_are_refused_in_one_line() -> None:
    options = ["bench/bench_flat_sketch.py", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 4
    assert "--quick shows that they run" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
