"""What measures a GPU goes all its way on the CPU, and its page is what its results make."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
OPS = (
    "linear_sketch",
    "flat_sketch",
    "matrix_sketch",
    "embedding_sketch",
    "topk_scan",
    "pack",
    "unpack",
    "turn",
)
PEERS = {
    "linear_sketch": {"torch: double-sided projection"},
    "flat_sketch": {"torch: RapidIn's shuffles", "torch: cat, index_add", "sjlt", "fast_jl"},
    "topk_scan": {"torch", "faiss"},
    "pack": {"torch"},
    "unpack": {"torch"},
    "turn": {"torch"},
    "caching": {
        "bare loop",
        "training step, AdamW",
        "rapidin, float16 rows",
        "rapidin, sign rows",
        "rapidin, float16 rows, geometry off",
    },
    "stream": {"pinned memory to the device", "scan_cache, float16 rows of 57,344 numbers"},
}
ELSEWHERE = {"sjlt", "fast_jl", "faiss"}  # packages that nothing here installs


def bench(name: str) -> ModuleType:
    if str(ROOT / "bench") not in sys.path:
        sys.path.append(str(ROOT / "bench"))
    return import_module(name)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What a dry run of the whole script wrote."""
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), "--dry-run", "--out", str(out)],
        # One thread: at these sizes others only wait for their turn on a busy machine.
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "A dry run: no figure here means anything." in done.stdout
    return json.loads((out / "gpu-dry-run.json").read_text())


def test_every_op_backend_and_peer_has_its_rows(dry):
    planned = [case for stage in bench("on_gpu.stages").STAGES for case in stage.cases("dry")]
    made = [(row["op"], row["way"], row["size"]) for row in dry["rows"]]
    assert made == [(c.op, c.way, json.loads(json.dumps(c.size))) for c in planned]
    ways = {op: {row["way"] for row in dry["rows"] if row["op"] == op} for op in {*OPS, *PEERS}}
    for op in OPS:
        assert {"triton", "cuda"} <= ways[op], op
    for op, peers in PEERS.items():
        assert peers <= ways[op], op


def test_a_row_is_measured_or_says_what_is_missing(dry):
    assert dry["dry"] is True
    assert dry["about"]["versions"]["torch"] == torch.__version__
    for row in dry["rows"]:
        name = f"{row['op']}, {row['way']}"
        assert row["state"] in ("measured", "missing"), f"{name}: {row.get('why')}"
        if row["state"] == "missing":
            assert row["why"], name
            assert row["way"] in {"triton", "cuda", "triton: sum, bytes read", *ELSEWHERE}, name
            continue
        assert row["seconds"] > 0, name
        if row["way"] in ("triton", "cuda"):
            assert row["error"] <= row["tolerance"], name
            assert row["of"]["floor"] > 0, name


def test_goals_stand_beside_the_figures(dry):
    goals = {(row["op"], row["way"]): set(row["goals"]) for row in dry["rows"] if row["goals"]}
    for way in ("triton", "cuda"):
        assert goals["linear_sketch", way] == {"floor"}
        assert "read" in goals["flat_sketch", way]
        assert goals["topk_scan", way] == {"read"}
    assert goals["caching", "rapidin, float16 rows"] == {"bare loop", "packing"}


def test_the_page_is_what_the_results_make():
    performance = bench("performance")
    assert performance.PAGE.read_text() == performance.page(), "run python bench/performance.py"


def test_a_result_fills_the_page(dry):
    lines = "\n".join(bench("performance").section(dry))
    assert "CPU, dry run" in lines
    assert "times" in lines
    assert "missed" in lines or "met" in lines


def small_bench():
    cases, ceilings, device = bench("on_gpu.cases"), bench("on_gpu.ceilings"), bench("on_gpu.device")
    return cases, cases.Bench(device.Machine(dry=True), "dry", ceilings.NOMINAL)


def test_a_wrong_result_is_a_failed_row():
    cases, own = small_bench()
    wanted = torch.ones(2, 3)

    def unwritten() -> torch.Tensor:
        return torch.full((2, 3), torch.nan)

    def run(own):
        return own.measured(
            [unwritten], cases.Cost(read=24), lambda got: cases.relative_error(got, wanted), 1e-3
        )

    rows = list(cases.rows_of(own, [cases.Case("op", "cuda", {}, run)], 0, float("inf")))
    assert rows[-1][1]["state"] == "failed"
    assert "wrong result" in rows[-1][1]["why"]


def test_an_error_is_a_row_and_not_the_end():
    cases, own = small_bench()

    def raises(own):
        raise RuntimeError("out of luck")

    listed = [
        cases.Case("op", "cuda", {}, raises),
        cases.Case("op", "triton", {}, lambda own: {"seconds": 1.0}),
    ]
    rows = [row for _, row in cases.rows_of(own, listed, 0, float("inf")) if "state" in row]
    assert [row["state"] for row in rows] == ["failed", "measured"]
    assert "out of luck" in rows[0]["why"]
    late = [row for _, row in cases.rows_of(own, listed, 0, 0.0) if "state" in row]
    assert [row["state"] for row in late] == ["left out", "left out"]


def test_a_lost_device_costs_one_row(monkeypatch):
    gpu = bench("gpu")
    begins = []

    def worker(args, stages, begin, rates, seconds):
        begins.append(begin)
        row = {"op": "op", "way": "cuda", "size": {}, "goals": {}, "stage": "pack"}
        if begin == 0:  # the second case takes the process with it
            done, at = [row | {"number": 0, "state": "measured"}], row | {"number": 1, "begun": True}
            return {"about": {}, "rows": done, "at": at, "why": "the process ended with -11: ", "status": -11}
        return {
            "about": {},
            "rows": [row | {"number": 2, "state": "measured"}],
            "at": None,
            "why": None,
            "status": 0,
        }

    monkeypatch.setattr(gpu, "run_worker", worker)
    made = gpu.measure_stage(SimpleNamespace(), ["pack"], {}, float("inf"))
    assert begins == [0, 2]
    assert [row["state"] for row in made["rows"]] == ["measured", "failed", "measured"]


def test_the_clock_reads_the_devices_events(monkeypatch):
    """The lines that only a GPU reaches, with a device made up in its place."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = now[0]

        def elapsed_time(self, later):
            return later.at - self.at  # milliseconds

    slept: list[int] = []
    made_up = {
        "Event": Event,
        "_sleep": slept.append,
        "synchronize": lambda: None,
        "get_device_properties": lambda n: SimpleNamespace(total_memory=1 << 36, multi_processor_count=100),
        "get_device_name": lambda n: "NVIDIA Thing",
        "get_device_capability": lambda n: (9, 0),
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 5,
    }
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    machine = bench("on_gpu.device").Machine(dry=False)
    machine.device = torch.device("cpu")
    order: list[int] = []

    def run(number):
        order.append(number)
        now[0] += 2.0

    times = machine.time([lambda: run(0), lambda: run(1)], most=6)
    assert (times.median, times.low, times.called, times.runs) == (2e-3, 2e-3, 2e-3, 6)
    assert order[-6:] == [0, 1] * 3
    assert slept == [cycles for cycles in slept if cycles > 0]
    assert len(slept) == 1
    assert machine.sets(1 << 20) == 16
    assert machine.sets(1 << 30) == 1
    x = torch.ones(3)
    machine.poison([x])
    assert bool(x.isnan().all())
    machine.clear_peak()
    assert machine.peak_bytes() == 5
    assert not machine.is_lost()
    assert machine.describe()["capability"] == [9, 0]


def test_a_scan_that_misses_a_row_is_seen():
    scan_error = bench("on_gpu.scans").scan_error
    exact = torch.randn(2, 50)
    top, bottom = exact.topk(4), exact.topk(4, largest=False)
    assert scan_error(exact, (*top, *bottom)) == 0
    other = exact.topk(5)  # without the best one
    assert scan_error(exact, (other.values[:, 1:], other.indices[:, 1:], *bottom)) > 0
    twice = top.indices.clone()
    twice[:, 1] = twice[:, 0]
    assert not scan_error(exact, (top.values, twice, *bottom)) <= 1


def test_contributing_names_the_files():
    said = (ROOT / "CONTRIBUTING.md").read_text()
    for name in ("bench/gpu.sh", "bench/gpu.py", "bench/on_gpu/", "bench/performance.py"):
        assert name in said, name
