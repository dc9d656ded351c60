"""The parts that both calls share: the machine's name, the environment of processes, the build, workers."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from on_gpu.plan import LOST, ROOT, Facts, RowFile, all_rows
from on_gpu.processes import Ended, Step

RESTARTS = 8  # of a worker
STAGE_RESTARTS = 3  # after which the rest of a stage is left out
DRY_PATIENCE = 4  # how many times as long a dry run waits: what runs it may be busy with other things
MOST_SHARES = 8  # of compiling ahead: each holds inputs of up to 8 GB
BUILD_SECONDS, COMPILE_SECONDS = 110.0, 70.0
SILENT_SECONDS = 60.0  # after which a worker that tells no row is ended: a case may compile
KERNELS = "linear_sketch,topk_scan,flat_sketch,pack"  # the stages whose cases launch one kernel each
WORKER = (sys.executable, str(ROOT / "bench/gpu.py"), "worker")


def find_gpu(dry: bool) -> Facts | None:
    """Name, compute capability ("90") and driver of the first GPU, or None. Uses nvidia-smi if it is there,
    otherwise torch."""
    if dry:
        return {"name": "dry run", "arch": None, "driver": None}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
        said = ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.strip()
        words = [word.strip() for word in said.partition("\n")[0].split(",")]
        if len(words) == 3 and re.fullmatch(r"\d+\.\d+", words[1]):
            return {"name": words[0], "arch": words[1].replace(".", ""), "driver": words[2]}
    code = "import torch.cuda as c; print(c.get_device_name(0)); print('%d%d' % c.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    words = done.stdout.split("\n")
    return {"name": words[0], "arch": words[1], "driver": None} if done.returncode == 0 else None


def slug(name: str) -> str:
    """The name in the form that file names contain."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def about(commit: str | None) -> Facts:
    """Date and commit, for every row; commit: given if git cannot tell."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "commit": commit or head()}


def head() -> str | None:
    """The commit that is measured, with "+" if files differ from it."""
    try:
        said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    name = said.stdout.strip()
    return f"{name}+" if name and changed.stdout.strip() else name or None


def set_environment(gpu: Facts, dry: bool) -> None:
    """Set up the environment of all later processes: this checkout, no network, code for this GPU only."""
    path = [str(ROOT), str(ROOT / "bench"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    if dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "RAPIDIN_CUDA": "off"}
        return
    os.environ["RAPIDIN_CUDA"] = "on"
    os.environ.setdefault("RAPIDIN_CUDA_ARCHS", str(gpu["arch"]))
    named = any(os.environ.get(name) for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"))
    if not named and shutil.which("nvcc") is None:
        os.environ["CUDA_HOME"] = "/usr/local/cuda"


def simple_row(rows: RowFile, name: str, state: str, **facts: object) -> None:
    """Write a row for a step without cases, and print a line."""
    row = {"op": "step", "way": name, "size": {}, "goals": {}, "state": state, "why": ""} | facts
    rows.write({"lane": "steps"} | row)
    why = str(row["why"]).splitlines()
    print(f"{name}: {state}{': ' + why[0][:200] if why else ''}", flush=True)


def late_row(rows: RowFile) -> Callable[[Step], None]:
    """Writes a row that says that a step could not start."""
    return lambda step: simple_row(rows, step.name, "left out", why="there was no time left for it")


def missing_step(rows: RowFile, name: str, log: Path, why: str) -> Step:
    """Stands in for a step whose tool is missing."""
    command = [sys.executable, "-c", f"print({why!r})"]
    return Step(name, command, log, 10.0, ended=lambda was: simple_row(rows, name, "missing", why=why))


def because(ended: Ended) -> str:
    """Why a process ended: a summary in one line, then the end of its output."""
    said = ended.log.strip().splitlines()
    last = f": {said[-1][:300]}" if said else ""
    return f"{ended.why or f'it ended with {ended.status}'}{last}\n{ended.log[-1500:]}".strip()


def step_row(rows: RowFile, name: str) -> Callable[[Ended], None]:
    """Writes a row that says how a step ended."""

    def write(ended: Ended) -> None:
        good = ended.status == 0 and ended.why is None
        state, why = ("passed", "") if good else ("failed", because(ended))
        simple_row(rows, name, state, seconds=round(ended.seconds, 2), why=why)

    return write


def build_steps(rows: RowFile, log: Path, dry: bool) -> list[Step]:
    """Build both extensions at the same time. Unchanged sources are not compiled again."""
    command = [sys.executable, str(ROOT / "csrc/build_extensions.py"), "--only"]
    names = ("_cpu",) if dry else ("_cpu", "_cuda")
    return [
        Step(
            f"build {name}",
            [*command, name],
            log,
            BUILD_SECONDS * (DRY_PATIENCE if dry else 1),
            cores=1 if dry else 3,
            ended=step_row(rows, f"build {name}"),
        )
        for name in names
    ]


def worker_step(
    rows: RowFile,
    name: str,
    options: Sequence[str],
    log: Path,
    *,
    until: float,
    limit: float,
    after: Sequence[str] = (),
    cores: int = 1,
    under: Sequence[str] = (),
    alone: bool = False,
    silent: float = SILENT_SECONDS,
    restarts: int = RESTARTS,
    worker: Sequence[str] = WORKER,
    environment: dict[str, str] | None = None,
    ended: Callable[[Ended], None] = lambda ended: None,
) -> Step:
    """A worker: a process that runs cases. A case that ends it gets a row; a new process continues.

    until: the time (monotonic) after which it starts no case. under: a tool that runs it. worker:
    the command that runs cases.
    """
    mine = RowFile(rows.path, name)
    mine.about = dict(rows.about)
    crashes: list[str] = []
    patience = DRY_PATIENCE if "--dry-run" in options else 1

    def command() -> list[str]:
        skip = sorted({stage for stage in crashes if crashes.count(stage) >= STAGE_RESTARTS})
        words = [*under, *worker, "--rows", str(rows.path), "--lane", name, "--until", str(until)]
        words += ["--about", json.dumps(rows.about), *options]
        return [*words, "--skip", ",".join(skip)] if skip else words

    def again(was: Ended) -> list[str] | None:
        if was.status == 0 or was.cut:
            return None
        case = mine.open_case()
        why = "the device was lost" if was.status == LOST and not was.why else because(was)
        if case is None and was.status != LOST:
            simple_row(mine, name, "failed", why=why)
            return None
        if case is not None:
            row = {key: value for key, value in case.items() if key not in ("begun", "lane")}
            mine.write(row | {"state": "failed", "why": why})
            crashes.append(row.get("stage", ""))
        return command() if len(crashes) <= restarts else None

    def done(was: Ended) -> None:
        case = mine.open_case()
        if case is not None:  # it was ended with the whole run
            row = {key: value for key, value in case.items() if key not in ("begun", "lane")}
            mine.write(row | {"state": "left out", "why": because(was)})
        ended(was)

    return Step(
        name,
        command(),
        log,
        limit * patience,
        tuple(after),
        alone=alone,
        silent=silent * patience,
        heard=lambda: sum(1 for _ in mine.rows()),
        cores=cores,
        environment=environment or {},
        again=again,
        ended=done,
    )


def compile_stamp() -> Path:
    """A file that exists if Triton's kernels in their present form were compiled ahead on this machine."""
    digest = hashlib.sha256(os.environ.get("TRITON_CACHE_DIR", "").encode())
    for folder in ("kernels", "rapidin/ops", "bench/on_gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return ROOT / f"build/compiled-{digest.hexdigest()[:16]}"


def compile_steps(
    rows: RowFile, log: Path, *, until: float, shares: int, after: Sequence[str] = (), mode: str = "full"
) -> list[Step]:
    """Compile Triton's kernels of all measured cases, divided among several processes."""
    statuses: list[int] = []
    options = ["--purpose", "compile", "--mode", mode, "--stages", KERNELS, "--ways", "triton"]

    def ended(was: Ended) -> None:
        statuses.append(was.status if was.why is None else -1)
        if len(statuses) == shares:
            compiled = [
                row
                for row in all_rows(rows.path)
                if row["lane"].startswith("compile ") and row.get("state") == "compiled"
            ]
            whole = not any(statuses)
            simple_row(rows, "compile ahead", "passed" if whole else "failed", cases=len(compiled))
            if whole:
                compile_stamp().touch()

    return [
        worker_step(
            rows,
            f"compile {n}",
            [*options, "--share", f"{n}/{shares}"],
            log,
            until=until,
            limit=COMPILE_SECONDS,
            after=after,
            ended=ended,
        )
        for n in range(shares)
    ]
