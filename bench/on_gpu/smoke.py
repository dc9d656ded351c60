"""The call that checks: builds, compares kernels and flow with the CPU, runs compute-sanitizer and the tests.

Independent steps run at the same time. Processes share the GPU, each with its own context, so that one that
loses the device does not affect the others. The most informative steps start first; steps that find no time
are reported.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from on_gpu import calls
from on_gpu.calls import KERNELS
from on_gpu.plan import ROOT, Facts, RowFile, all_rows
from on_gpu.processes import LIMITS, CutShortError, Ended, Step, run_steps

CHECK_SECONDS, SANITIZER_SECONDS, TESTS_SECONDS = 90.0, 70.0, 60.0
TOOLS = ("memcheck", "racecheck")
# The last lines of compute-sanitizer's tools: "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards ..."
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def main(args: argparse.Namespace) -> int:
    start = time.monotonic()
    end = start + args.seconds
    gpu = calls.find_gpu(args.dry_run)
    if gpu is None:
        print("gpu: there is no GPU here; --dry-run goes without one", file=sys.stderr)
        return 2
    calls.set_environment(gpu, args.dry_run)
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # a dozen processes at a time
    args.out.mkdir(parents=True, exist_ok=True)
    rows = RowFile(args.out / f"smoke-{calls.slug(gpu['name'])}.jsonl", "smoke")
    rows.path.unlink(missing_ok=True)
    rows.about = {**calls.about(args.commit), "device": gpu["name"]}
    rows.write({"about": gpu, "seconds": args.seconds, "dry": args.dry_run})
    for log in ("smoke.log", "pytest.log", *(f"{tool}.log" for tool in TOOLS)):
        (args.out / log).unlink(missing_ok=True)
    code = 0
    try:
        run_steps(
            steps(args, rows, end),
            end,
            cores=max(1, os.cpu_count() or 1),
            late=calls.late_row(rows),
        )
    except CutShortError as cut:
        rows.write({"cut": str(cut)})
        code = cut.status
    print(summary(rows.path))
    print(f"written: {rows.path}, {time.monotonic() - start:.0f} s", flush=True)
    failed = any(row.get("state") == "failed" for row in all_rows(rows.path))
    return code or int(failed)


def steps(args: argparse.Namespace, rows: RowFile, end: float) -> list[Step]:
    """The steps, in the order in which they start."""
    dry, cores = args.dry_run, os.cpu_count() or 1
    log = args.out / "smoke.log"
    until = end - LIMITS.grace - 3
    built = [] if args.no_build else calls.build_steps(rows, log, dry)
    cpu = [step.name for step in built if step.name == "build _cpu"]
    cuda = [step.name for step in built]

    mode = "dry" if dry else "smoke"

    def check(
        name: str, stages: str, ways: str, after: list[str], share: str = "0/1", cores: int = 1
    ) -> Step:
        options = ["--purpose", "check", "--mode", mode, "--stages", stages, "--ways", ways, "--share", share]
        options += ["--dry-run"] * dry
        return calls.worker_step(
            rows, name, options, log, until=until, limit=CHECK_SECONDS, after=after, cores=cores
        )

    listed = [*built, check("cuda", KERNELS, "cuda,triton" if dry else "cuda", cuda)]
    listed.append(check("flow", "flow", "gpu", cuda, cores=2))
    # Each of Triton's kernels is compiled first, which is most of its check; interpreted, it is not.
    shares = 0 if dry else max(1, min(5, cores // 3))
    listed += [check(f"triton {n}", KERNELS, "triton", cpu, f"{n}/{shares}") for n in range(shares)]
    listed += [sanitizer(tool, args, rows, until, cuda) for tool in (TOOLS[:1] if dry else TOOLS)]
    if not dry:
        listed += calls.compile_steps(rows, log, until=until, shares=max(1, min(6, cores // 2)), after=cpu)
    if not args.no_tests:
        checked = [step.name for step in listed if step.name.split()[0] in ("cuda", "flow", "triton")]
        listed.append(pytest_step(args, rows, checked))
    return listed


def sanitizer(tool: str, args: argparse.Namespace, rows: RowFile, until: float, after: list[str]) -> Step:
    """Each CUDA kernel, at the sizes of the checks, under a tool of compute-sanitizer."""
    log = args.out / f"{tool}.log"
    mode = "dry" if args.dry_run else "smoke"
    options = ["--purpose", "check", "--mode", mode, "--stages", KERNELS, "--ways", "cuda"]
    found = find_sanitizer()
    under: list[str] = []
    if args.dry_run:  # every tenth: here the cases run without the tool
        options += ["--dry-run", "--share", "0/10"]
    elif found is None:
        return calls.missing_step(rows, tool, log, "there is no compute-sanitizer here")
    else:
        # Kernels of other libraries are not checked, which makes it fast.
        under = [found, "--tool", tool, *kernel_filter(found), "--print-limit", "20"]

    return calls.worker_step(
        rows,
        tool,
        options,
        log,
        until=until,
        limit=SANITIZER_SECONDS,
        after=after,
        under=under,
        alone=True,
        restarts=0,
        # Otherwise a write past a tensor's end could hit other memory of torch's allocator unnoticed.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ended=sanitizer_row(rows, tool, log, args.dry_run),
    )


def find_sanitizer() -> str | None:
    """compute-sanitizer, also where it is not on the PATH."""
    for folder in (None, *SANITIZER_PLACES):
        found = shutil.which("compute-sanitizer", path=folder)
        if found:
            return found
    return None


def kernel_filter(found: str) -> list[str]:
    """What has a tool look at our kernels alone, by a part of their names, if this version has it."""
    done = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=20)
    return ["--kernel-name", "kns=rapidin"] if "--kernel-name" in done.stdout + done.stderr else []


def sanitizer_row(rows: RowFile, tool: str, log: Path, dry: bool) -> Callable[[Ended], None]:
    """Writes what a tool found, of the launches that it saw; how many these were stands beside."""

    def write(was: Ended) -> None:
        launched = sum(row["lane"] == tool and row.get("state") == "passed" for row in all_rows(rows.path))
        said = SUMMARY.findall(was.log)
        facts: Facts = {"seconds": round(was.seconds, 2), "cases": launched}
        if dry:
            state = "passed" if was.status == 0 else "failed"
            why = "" if state == "passed" else calls.because(was)
            calls.simple_row(rows, tool, state, why=why, **facts)
        elif not said:
            why = f"no summary; {calls.because(was)}"
            calls.simple_row(rows, tool, "left out" if was.cut else "failed", why=why, **facts)
        else:
            found = sum(int(number) for number in said)
            state, why = "passed", ""
            if found or not launched:
                state, why = "failed", f"{found} errors or hazards in {launched} cases; {log.name} has them"
            elif was.cut:
                state, why = "left out", f"nothing found, then {was.why}"
            calls.simple_row(rows, tool, state, found=found, why=why, **facts)

    return write


def pytest_step(args: argparse.Namespace, rows: RowFile, after: list[str]) -> Step:
    """The tests of the GPU's kernels, as many as there is time for; the log has those that were run."""
    log = args.out / "pytest.log"
    if find_spec("pytest") is None:
        return calls.missing_step(rows, "tests", log, "there is no pytest here")
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu"]
    if args.dry_run:
        command += ["--collect-only", "-q", str(ROOT / "tests/ops/test_sketch_hash.py")]
    else:
        command += ["-v", *map(str, sorted(marked))]
        if find_spec("xdist") is not None:  # most of the time is Triton's, compiling for each shape
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]

    def write(was: Ended) -> None:
        text = log.read_text(errors="replace") if log.exists() else ""
        counts: dict[str, int] = {}
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
            counts[word.lower()] = len(re.findall(rf"\b{word}\b .*::|::.* {word}\b", text))
        bad = counts["failed"] + counts["error"]
        state = "failed" if bad or (was.status and not was.cut) else "left out" if was.cut else "passed"
        why = "" if state == "passed" else calls.because(was)
        calls.simple_row(rows, "tests", state, why=why, seconds=round(was.seconds, 2), counts=counts)

    return Step("tests", command, log, TESTS_SECONDS, tuple(after), alone=True, cores=4, ended=write)


def summary(path: Path) -> str:
    """How many cases of each lane came how far, and each that did not."""
    rows = [row for row in all_rows(path) if "state" in row]
    lines = []
    for lane in dict.fromkeys(row["lane"].split(" ")[0] for row in rows):
        states = [row["state"] for row in rows if row["lane"].split(" ")[0] == lane]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        lines.append(f"{lane}: {counts}")
    for row in rows:
        if row["state"] == "failed":
            size = ", ".join(f"{name} {value}" for name, value in row["size"].items())
            why = str(row.get("why") or "").strip().splitlines() or [""]
            lines.append(f"  failed: {row['op']}, {row['way']}, {size}: {why[0][:200]}")
    return "\n".join(lines)
