"""bench/cpu.py measures every stage against its limit, and its results fill the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cpu
import performance
import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]


def called(*options: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "bench/cpu.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_a_quick_run_measures_each_stage_and_fills_the_page(tmp_path: Path) -> None:
    said = called("--quick", "--threads", "1", "--out", str(tmp_path))
    (path,) = tmp_path.glob("cpu-*-1.json")
    result = json.loads(path.read_text())
    assert result["quick"]  # and so never on the page
    assert {row["stage"] for row in result["rows"]} == set(cpu.STAGES) == set(performance.CPU_STAGES)
    for row in result["rows"]:
        assert row["of"] > 0
        assert row["by"] == ("clock" if row["stage"] == "disk" else "processor")
        assert f"{row['stage']:8} {row['name']}: " in said
    counted = {row["name"] for row in result["rows"] if row.get("products", 0) > 0}
    assert counted == {"linear layers, sign rows", "linear layers, float16 rows"}
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names)
    lines = "\n".join(performance.cpu_section(result))
    assert all(f"| {name} |" in lines for name in names)
    assert "not measured yet" not in lines

    called("--quick", "--threads", "1", "--only", "flat", "--out", str(tmp_path))
    again = json.loads(path.read_text())["rows"]
    assert all(row["versions"]["torch"] for row in again)
    others = [row for row in result["rows"] if row["stage"] != "flat"]
    assert [row for row in again if row["stage"] != "flat"] == others  # kept as they were
    assert len(again) == len(result["rows"])


def test_a_bad_number_is_refused(tmp_path: Path) -> None:
    said = called("--rounds", "0", "--out", str(tmp_path), code=2)
    assert "must be at least 1" in said
    assert not list(tmp_path.iterdir())


def row_of(**facts: Any) -> dict[str, Any]:
    taken = {cpu.LIMIT: [cpu.Taken(1.0, 0.5)] * 3, cpu.OURS: [cpu.Taken(c, 1.0) for c in (9.0, 2.0, 1.0)]}
    taken["peer"] = [cpu.Taken(5.0, 3.0)] * 3
    turns = cpu.Turns(rounds=3, **facts)
    return turns.of("scan", "rows", "the read loop", taken, 0.75)


def test_shares_are_of_medians_by_the_clock_or_the_processor() -> None:
    by_clock, by_cpu = row_of(by_cpu=False), row_of(by_cpu=True)
    assert (by_clock["of"], by_clock["peers"]) == (0.5, {"peer": 2.5})
    assert (by_cpu["of"], by_cpu["peers"]) == (0.5, {"peer": 3.0})
    assert by_clock["seconds"] == by_cpu["seconds"] == {"limit": 1.0, "rapidin": 2.0, "peer": 5.0}


def test_the_page_says_whether_a_goal_is_met() -> None:
    about = {"name": "A CPU", "cores": 2, "threads": 1, "instruction_set": "avx2", "memory_bytes": 2**30}
    measured = {"date": "2026-01-01", "commit": "abc", "load": 0.0}
    versions = [{"torch": "2.11", "faiss": "1.15"}, {"torch": "2.11", "faiss": None}]  # of two runs
    rows = [row_of(by_cpu=True) | measured, row_of(by_cpu=True) | measured | {"name": "others", "of": 0.8}]
    rows = [row | {"versions": v} for row, v in zip(rows, versions, strict=True)]
    lines = performance.cpu_section({"about": about, "rows": rows})
    assert "2 cores, avx2, 1 GiB; torch 2.11, faiss 1.15." in lines
    assert "| rows | 1 s | 0.50 | 0.75, missed | peer: 3.00 |" in lines
    assert "| others | 1 s | 0.80 | 0.75, met | peer: 3.00 |" in lines
    assert "`flat_sketch`: not measured yet." in lines
