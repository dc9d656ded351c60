"""What checks and measures a GPU goes all its way on the CPU, ends in time, and keeps what it had."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rapidin.gradients.source import GradientSource

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
OPS = {  # with those that have kernels for them
    "linear_sketch": {"triton", "cuda"},
    "flat_sketch": {"triton", "cuda"},
    "matrix_sketch": {"triton"},
    "embedding_sketch": {"triton"},
    "topk_scan": {"triton", "cuda"},
    "pack": {"triton"},
    "unpack": {"triton"},
    "rotate": {"triton"},
}
PEERS = {
    "linear_sketch": {"torch: double-sided projection"},
    "flat_sketch": {"torch: RapidIn's shuffles", "torch: cat, index_add", "sjlt", "fast_jl"},
    "topk_scan": {"torch", "faiss"},
    "pack": {"torch"},
    "unpack": {"torch"},
    "rotate": {"torch"},
    "caching": {
        "bare loop",
        "training step, AdamW",
        "rapidin, float16 rows, K-FAC",
        "rapidin, sign rows, K-FAC",
        "rapidin, float16 rows, preconditioner off",
    },
    "stream": {
        "pinned memory to the device",
        "scan_cache, float16 rows of 57,344 numbers",
        "scan_cache once more, float16 rows of 57,344 numbers",
    },
}
ELSEWHERE = {"sjlt", "fast_jl", "faiss"}  # packages that nothing here installs


def bench(name: str) -> ModuleType:
    return import_module(name)


def dry_run(call: str, out: Path, *options: str) -> str:
    """What a dry run of one of the two calls printed."""
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), call, "--dry-run", "--out", str(out), *options],
        # One thread: at these sizes others only wait for their turn on a busy machine.
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    logs = "".join(path.read_text()[-3000:] for path in out.glob("*.log"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:] + logs
    return done.stdout


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What a dry run of the measuring call wrote."""
    out = tmp_path_factory.mktemp("measure")
    said = dry_run("measure", out, "--seconds", "380")
    assert "A dry run: no figure here means anything." in said
    return json.loads((out / "gpu-dry-run.json").read_text())


def planned(stages: str, mode: str, *ways: str):
    chosen = bench("on_gpu.stages").chosen(stages.split(","), mode, ways)
    return [case for cases in chosen.values() for _, case in cases]


def test_every_op_backend_and_peer_has_its_rows(dry):
    stages = bench("on_gpu.plan").STAGES
    rows = [row for row in dry["rows"] if row["op"] != "step"]
    made = [(row["op"], row["way"], row["size"]) for row in rows]
    assert made == [(c.op, c.way, json.loads(json.dumps(c.size))) for c in planned(",".join(stages), "dry")]
    assert [row["stage"] for row in rows] == sorted((r["stage"] for r in rows), key=list(stages).index)
    assert list(stages)[:2] == ["ceilings", "caching"]
    ways = {op: {row["way"] for row in rows if row["op"] == op} for op in {*OPS, *PEERS}}
    for op, backends in OPS.items():
        assert ways[op] & {"triton", "cuda"} == backends, op
    for op, peers in PEERS.items():
        assert peers <= ways[op], op


def test_a_row_is_measured_or_says_what_is_missing(dry):
    assert dry["dry"] is True
    assert dry["about"]["versions"]["torch"] == torch.__version__
    assert dry["commit"] is None or len(dry["commit"].rstrip("+")) == 40
    for row in dry["rows"]:
        name = f"{row['op']}, {row['way']}"
        assert row["state"] in ("measured", "missing", "passed"), f"{name}: {row.get('why')}"
        if row["state"] == "missing":
            assert row["why"], name
            assert row["way"] in {"triton: sum, bytes read", *ELSEWHERE}, name
        if row["state"] != "measured":
            continue
        assert row["seconds"] > 0, name
        assert row["unit"] == "s", name
        assert row["device"] == "CPU, dry run", name
        assert row["date"] == dry["date"], name
        assert row["commit"] == dry["commit"], name
        if row["way"] in ("triton", "cuda"):
            low, high = row["quartiles"]
            assert low <= row["seconds"] <= high, name
            assert row["error"] <= row["tolerance"], name
            assert row["of"]["floor"] > 0, name
            assert row["floor_seconds"] > 0, name
            assert row["bound"] in ("bytes", "operations"), name


def test_goals_stand_beside_the_figures(dry):
    goals = {(row["op"], row["way"]): set(row["goals"]) for row in dry["rows"] if row["goals"]}
    for way in ("triton", "cuda"):
        assert goals["linear_sketch", way] == {"floor"}
        assert "read" in goals["flat_sketch", way]
        assert goals["topk_scan", way] == {"read"}
    assert goals["caching", "rapidin, float16 rows, K-FAC"] == {"bare loop", "packing"}


def test_what_the_defaults_reach_is_measured():
    """Default dimensions with K-FAC and in float32; rows of 1,785 bytes; blocks with scales of their own."""
    linear = [case.size for case in planned("linear_sketch", "full", "cuda") if case.op == "linear_sketch"]
    for k in (512, 1024, 2048, 4096, 8192):
        assert any(size["k"] == k and size["kfac"] != "none" for size in linear), k
        assert any(size["k"] == k and size["dtype"] == "float32" for size in linear), k
    assert linear[0]["kfac"] != "none"  # first what is the default
    scans = [case.size for case in planned("topk_scan", "full", "cuda")]
    assert {size["stride"] for size in scans if size["numbers"] == 14280} == {1785, 1792}
    assert any(size["dtype"] == "sign" and size["blocks"] > 1 for size in scans)


def test_the_page_is_what_the_results_make():
    performance = bench("performance")
    assert performance.PAGE.read_text() == performance.page(), "run python bench/performance.py"


def test_a_result_fills_the_page(dry):
    performance = bench("performance")
    lines = "\n".join(performance.section(dry))
    assert "CPU, dry run" in lines
    assert "times" in lines
    assert "missed" in lines or "met" in lines
    without = performance.section({**dry, "rows": [r for r in dry["rows"] if r["op"] != "pack"]})
    assert "#### `pack`" in lines
    assert "#### `pack`" not in without
    assert any(line.startswith("- `pack`, 4 sizes. Ways: triton; torch.") for line in without)


def test_the_smoke_call_checks_each_kernel_and_the_flow(tmp_path):
    said = dry_run("smoke", tmp_path, "--seconds", "380")
    rows = list(bench("on_gpu.plan").all_rows(tmp_path / "smoke-dry-run.jsonl"))
    made = {row["lane"]: [] for row in rows}
    for row in rows:
        if "state" in row:
            assert row["state"] == "passed", f"{row['lane']}: {row.get('why')}"
            made[row["lane"]].append((row["op"], row["way"]))
    kernels = bench("on_gpu.calls").KERNELS
    assert made["cuda"] == [(case.op, case.way) for case in planned(kernels, "dry", "cuda", "triton")]
    assert len(made["flow"]) == len(planned("flow", "dry")) > 0
    assert {way for _, way in made["steps"]} == {"build _cpu", "memcheck", "tests"}
    assert all(row["error"] <= row["tolerance"] for row in rows if "error" in row)
    assert "failed" not in said


def test_the_checks_are_at_odd_sizes_of_all_dtypes():
    kernels = bench("on_gpu.calls").KERNELS
    cases = planned(kernels, "smoke", "cuda", "triton")
    assert {(case.op, case.way) for case in cases} == {(op, way) for op, ways in OPS.items() for way in ways}
    floats = {"float32", "float16", "bfloat16"}
    assert {case.size["dtype"] for case in cases if case.op == "linear_sketch"} == floats
    packed = {"sign", "int4", "int8", "float16"}
    assert {case.size["dtype"] for case in cases if case.op == "topk_scan"} == packed
    rows = {case.size["rows"]: set() for case in planned("flow", "smoke")}
    for case in planned("flow", "smoke"):
        rows[case.size["rows"]].add(case.size["kfac"])
    assert rows == {name: {True, False} for name in ("float16", "sign", "int8", "int4", "400 bytes")}


# ---- cases ----


def small_bench(**more):
    cases, plan, device = bench("on_gpu.cases"), bench("on_gpu.plan"), bench("on_gpu.device")
    return cases, cases.Bench(device.Machine(dry=True), "dry", plan.NOMINAL, **more)


def rows_of(listed, path, deadline=float("inf"), **more):
    """The rows that these cases leave."""
    cases, own = small_bench(**more)
    rows = bench("on_gpu.plan").RowFile(path / "rows.jsonl", "lane")
    cases.run_cases(own, list(enumerate(listed)), rows, deadline)
    found = [row for row in rows.rows() if "state" in row]
    rows.path.unlink()
    return found


def test_a_wrong_result_is_a_failed_row(tmp_path):
    cases, _ = small_bench()
    wanted = torch.ones(2, 3)

    def unwritten() -> torch.Tensor:
        return torch.full((2, 3), torch.nan)

    def run(own):
        return own.measured(
            [unwritten], cases.Cost(read=24), lambda got: cases.relative_error(got, wanted), 1e-3
        )

    for purpose in ("time", "check"):
        (row,) = rows_of([cases.Case("op", "cuda", {}, run)], tmp_path, purpose=purpose)
        assert row["state"] == "failed"
        assert "wrong result" in row["why"]
        assert row["error"] == "nan"  # JSON has no number for it
    # Compiled ahead, nothing is compared: a kernel that was not launched writes nothing.
    (row,) = rows_of([cases.Case("op", "triton", {}, run)], tmp_path, purpose="compile")
    assert row["state"] == "compiled"


def test_an_error_is_a_row_and_not_the_end(tmp_path):
    cases, _ = small_bench()

    def raises(own):
        raise RuntimeError("out of luck")

    listed = [
        cases.Case("op", "cuda", {}, raises),
        cases.Case("op", "triton", {}, lambda own: {"seconds": 1.0}),
    ]
    rows = rows_of(listed, tmp_path)
    assert [row["state"] for row in rows] == ["failed", "measured"]
    assert "out of luck" in rows[0]["why"]
    assert [row["state"] for row in rows_of(listed, tmp_path, 0.0)] == ["left out", "left out"]


def test_a_flow_that_differs_from_the_cpus_fails(tmp_path):
    """The same on both sides passes; with one layer's sketches wrong in the GPU's place it does not."""
    flow = bench("on_gpu.flow")
    case = planned("flow", "dry")[1]
    assert [row["state"] for row in rows_of([case], tmp_path)] == ["passed"]

    class Wrong(GradientSource):
        def sketches(self, *args, **named):
            x, status = super().sketches(*args, **named)
            x[:, 0] = x[:, 0].roll(1, 1)
            return x, status

    def wrong(own, where, size):
        found = flow.attributor_on(own, where, size)
        if where == "gpu":
            # The class, so that sources made of this one with another preconditioner are wrong, too.
            found.source.__class__ = Wrong
        return found

    (row,) = rows_of([flow.flow(case.size, wrong)], tmp_path)
    assert row["state"] == "failed"
    assert "a query of the CPU's cache is off by" in row["why"]
    assert "the CPU's query of the GPU's cache is off by" in row["why"]


# ---- processes: what ends them, and what is left of them ----

WORKER = """
import json, os, signal, sys, time
sys.path.insert(0, {bench!r})
from on_gpu.plan import RowFile
from on_gpu.processes import end_with_parent
end_with_parent()
words = [word for word in sys.argv[1:] if word != "--dry-run"]
arguments = dict(zip(words[::2], words[1::2]))
rows = RowFile(__import__("pathlib").Path(arguments["--rows"]), arguments["--lane"])
rows.about = json.loads(arguments["--about"])
done = {{row["number"] for row in rows.rows() if "state" in row}}
skip = arguments.get("--skip", "")
open({folder!r} + "/pids", "a").write(f"{{os.getpid()}}\\n")
for number, action in enumerate({actions!r}):
    if number in done:
        continue
    row = {{"op": "op", "way": "cuda", "size": {{}}, "goals": {{}}, "number": number, "stage": "pack"}}
    if skip:
        rows.write(row | {{"state": "left out", "why": "skipped"}})
        continue
    rows.write(row | {{"begun": True}})
    if action == "die":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if action == "lose":
        os._exit(3)
    if action == "hang":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(600)
    if action == "wait":
        time.sleep(600)
    rows.write(row | {{"state": "measured", "of": {{}}, "seconds": 1.0}})
"""


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs the measuring call with a worker whose cases do what they are told; gives status, result, time."""
    measure = bench("on_gpu.measure")
    for name in (
        "RAPIDIN_CUDA",
        "TRITON_INTERPRET",
        "CUDA_VISIBLE_DEVICES",
        "TRITON_CACHE_DIR",
        "PYTHONPATH",
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards: the call sets them

    def run(*actions, seconds=20.0, silent=10.0):
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(bench=str(ROOT / "bench"), actions=actions, folder=str(tmp_path)))
        limits = measure.Limits(grace=0.5, look=0.1, last_row=0.1, write=0.1, silent=silent)
        args = Namespace(out=tmp_path, seconds=seconds, dry_run=True, no_build=True)
        args.quick, args.only, args.commit = False, None, "abc"
        start = time.monotonic()
        status = measure.main(args, limits, (sys.executable, str(script)))
        taken = time.monotonic() - start
        return status, json.loads((tmp_path / "gpu-dry-run.json").read_text()), taken

    run.folder = tmp_path
    return run


def states(result):
    return [row["state"] for row in result["rows"]]


def test_a_process_that_dies_costs_one_row(measured):
    status, result, _ = measured("go", "die", "go", "lose", "go")
    assert states(result) == ["measured", "failed", "measured", "failed", "measured"]
    assert result["rows"][1]["why"].startswith("it ended with -11: last words")
    assert result["rows"][3]["why"] == "the device was lost"
    assert all((row["date"], row["commit"]) == (result["date"], "abc") for row in result["rows"])
    assert status == 1


def test_a_stage_that_dies_again_and_again_is_left(measured):
    _, result, _ = measured("die", "go", "die", "die", "die", "go")
    assert states(result) == ["failed", "measured", "failed", "failed", "left out", "left out"]


def test_a_kernel_that_does_not_end_costs_one_row(measured):
    _, result, taken = measured("go", "hang", "go", silent=1.0)
    assert states(result) == ["measured", "failed", "measured"]
    assert "did not end in" in result["rows"][1]["why"]
    assert taken < 10


def test_the_limit_of_time_is_kept(measured):
    """With a case that does not end and does not listen: the rows before it stay, and so does the limit."""
    status, result, taken = measured("go", "hang", "go", seconds=4.0)
    assert states(result)[:2] == ["measured", "left out"]
    assert "time was up" in result["rows"][1]["why"]
    assert taken <= 4.0
    assert status == 0


def test_a_run_cut_by_sigint_keeps_its_rows(measured):
    killer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\n"
            "while not os.path.exists(sys.argv[1]) or b'measured' not in open(sys.argv[1], 'rb').read():\n"
            "    time.sleep(0.05)\n"
            f"os.kill({os.getpid()}, {int(signal.SIGINT)})",
            str(measured.folder / "gpu-dry-run.rows.jsonl"),
        ]
    )
    status, result, taken = measured("go", "wait", "go", seconds=60.0)
    killer.wait(10)
    assert status == 130
    assert states(result) == ["measured", "left out"]
    assert result["cut"] == "SIGINT"
    assert taken < 30


@pytest.mark.skipif(sys.platform != "linux", reason="ends its children as only Linux does")
def test_a_run_killed_leaves_its_rows_and_no_process(tmp_path):
    script, driver = tmp_path / "worker.py", tmp_path / "driver.py"
    script.write_text(
        WORKER.format(bench=str(ROOT / "bench"), actions=("go", "go", "wait"), folder=str(tmp_path))
    )
    driver.write_text(
        textwrap.dedent(
            f"""
            import sys
            from argparse import Namespace
            from pathlib import Path
            sys.path.insert(0, {str(ROOT / "bench")!r})
            from on_gpu import measure
            args = Namespace(out=Path({str(tmp_path)!r}), seconds=60.0, dry_run=True, no_build=True,
                             quick=False, only=None, commit=None)
            measure.main(args, measure.Limits(write=0.1), (sys.executable, {str(script)!r}))
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(driver)])
    out = tmp_path / "gpu-dry-run.json"
    end = time.monotonic() + 30
    while time.monotonic() < end and not (out.exists() and out.read_text().count('"measured"') == 2):
        time.sleep(0.05)
    process.kill()
    process.wait(10)
    assert states(json.loads(out.read_text())) == ["measured", "measured"]
    (worker,) = (tmp_path / "pids").read_text().split()
    while time.monotonic() < end and running(int(worker)):
        time.sleep(0.05)
    assert not running(int(worker))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_steps_wait_for_their_turn_and_say_when_there_is_none(tmp_path):
    processes = bench("on_gpu.processes")
    order, late = [], []

    def step(name, seconds=0.0, after=(), cores=1):
        code = f"import time; time.sleep({seconds}); print('done {name}')"
        return processes.Step(
            name,
            [sys.executable, "-c", code],
            tmp_path / "log",
            20.0,
            after,
            cores=cores,
            ended=lambda was: order.append((name, was)),
        )

    listed = [step("b", after=("a",)), step("a"), step("long", 30.0, ("b",)), step("never", 0.0, ("long",))]
    start = time.monotonic()
    limits = processes.Limits(grace=0.3)
    processes.run_steps(listed, start + 3.0, cores=2, late=lambda step: late.append(step.name), limits=limits)
    assert time.monotonic() - start < 3.0
    assert [name for name, _ in order] == ["a", "b", "long"]
    assert late == ["never"]
    assert [was.cut for _, was in order] == [False, False, True]
    assert order[0][1].log == "done a\n"  # its own words alone
    said = (tmp_path / "log").read_text().splitlines()
    assert [line for line in said if line.startswith("done")] == ["done a", "done b"]


def test_both_calls_fit_the_time_a_machine_is_lent():
    """The limits that the calls set for themselves, of what they start."""
    plan, limits = bench("on_gpu.plan"), bench("on_gpu.measure").LIMITS
    assert limits.grace == bench("on_gpu.processes").LIMITS.grace
    assert plan.SMOKE_SECONDS <= 150
    assert plan.MEASURE_SECONDS <= 420
    starts = 2 * 120
    assert plan.SMOKE_SECONDS + plan.MEASURE_SECONDS + starts <= 15 * 60
    besides = limits.grace + 1 + limits.last_row
    assert sum(plan.STAGES.values()) <= plan.MEASURE_SECONDS - besides - 30


def test_nothing_runs_beside_what_is_timed(tmp_path, monkeypatch):
    """A machine on which nothing was built yet: build and Triton's compiling first, beside each other."""
    measure, rows = bench("on_gpu.measure"), bench("on_gpu.plan").RowFile(tmp_path / "rows", "measure")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # where nothing was compiled
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    args = Namespace(seconds=420.0, dry_run=False, no_build=False, quick=False, only=None)
    seen = measure.steps(args, rows, tmp_path / "log", time.monotonic() + 420)
    names = [step.name for step in seen]
    assert names == ["build _cpu", "build _cuda", *(f"compile {n}" for n in range(8)), "measure"]
    assert seen[-1].after == tuple(names[:-1])
    assert {step.after for step in seen if step.name.startswith("compile")} == {("build _cpu",)}
    args.no_build = True
    listed = measure.steps(args, rows, tmp_path / "log", time.monotonic() + 420)
    assert [step.name for step in listed] == ["measure"]


def test_what_is_compiled_ahead_is_found_by_the_launch(tmp_path):
    """Without a GPU: a launch compiles its kernel for the GPU that is named, and is not made."""
    code = """
        import sys, torch
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        class NoGpu:
            def get_current_device(self): return 0
            def get_current_stream(self, device): return 0
            def get_current_target(self): return GPUTarget("cuda", 90, 32)

        driver.set_active(NoGpu())
        sys.path.insert(0, sys.argv[1])
        from on_gpu.compile_only import compile_only
        compile_only()
        from rapidin.ops import triton as gpu
        codes, scale = gpu.pack(torch.randn(4, 128), "sign")
        assert not codes.any() and not scale.any()  # nothing ran
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", textwrap.dedent(code), str(ROOT / "bench")]
    subprocess.run(command, env=environment, check=True, timeout=200)
    assert [path.name for path in tmp_path.rglob("*.cubin")] == ["_pack_kernel.cubin"]


@pytest.mark.parametrize(
    ("said", "cut", "cases", "state"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", False, 3, "passed"),
        ("========= ERROR SUMMARY: 2 errors\n", False, 3, "failed"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", False, 3, "passed"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", False, 3, "failed"),
        ("========= ERROR SUMMARY: 0 errors\n", False, 0, "failed"),  # it saw no launch
        ("========= ERROR SUMMARY: 0 errors\n", True, 2, "left out"),
        ("Device not supported\n", False, 0, "failed"),
        ("", True, 2, "left out"),
    ],
)
def test_what_compute_sanitizer_says_is_read(tmp_path, said, cut, cases, state):
    smoke, processes, plan = bench("on_gpu.smoke"), bench("on_gpu.processes"), bench("on_gpu.plan")
    rows = plan.RowFile(tmp_path / "rows", "smoke")
    for number in range(cases):
        plan.RowFile(rows.path, "memcheck").write({"state": "passed", "number": number})
    ended = processes.Ended(0, 1.0, "its time was up" if cut else None, cut, said)
    smoke.sanitizer_row(rows, "memcheck", tmp_path / "memcheck.log", False)(ended)
    last = list(plan.all_rows(rows.path))[-1]
    assert (last["way"], last["state"]) == ("memcheck", state)
    assert bool(last["why"]) == (state != "passed")


def test_a_machine_without_its_tools_says_so(tmp_path, monkeypatch):
    """No pytest, no compute-sanitizer: rows, and all the other steps."""
    smoke, plan = bench("on_gpu.smoke"), bench("on_gpu.plan")
    monkeypatch.setattr(smoke, "find_spec", lambda name: None)
    monkeypatch.setattr(smoke, "find_sanitizer", lambda: None)
    rows = plan.RowFile(tmp_path / "rows", "smoke")
    args = Namespace(out=tmp_path, dry_run=False, no_build=False, no_tests=False)
    steps = {step.name: step for step in smoke.steps(args, rows, time.monotonic() + 100)}
    assert {"build _cpu", "build _cuda", "cuda", "flow", "triton 0", "memcheck", "racecheck"} <= set(steps)
    for name in ("memcheck", "racecheck", "tests"):
        steps[name].ended(None)
    assert [row["state"] for row in plan.all_rows(rows.path)] == ["missing"] * 3


def test_the_gpu_is_found_without_torch(tmp_path, monkeypatch):
    calls = bench("on_gpu.calls")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 580.159.04'\necho 'NVIDIA H200, 9.0, 580.159.04'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert calls.find_gpu(False) == {"name": "NVIDIA H200", "arch": "90", "driver": "580.159.04"}
    assert calls.slug("NVIDIA H200") == "nvidia-h200"
    tool.write_text("#!/bin/sh\nexit 9\n")
    if not torch.cuda.is_available():
        assert calls.find_gpu(False) is None


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
