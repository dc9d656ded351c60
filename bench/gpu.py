"""What a GPU makes of the kernels, against what the GPU can do: `bench/gpu.sh` builds, tests and runs this.

python bench/gpu.py --out bench/results/gpu-NAME.json
python bench/gpu.py --dry-run                  # on the CPU, tiny: shows that every line runs

Ceilings first: bandwidth and product rates of this device, measured. Each kernel is then held against its
floor, the time for its bytes or its operations at these rates. Each stage runs in a process of its own: an
error that costs the device, or a kernel that does not end, costs one row, and the stage goes on after it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SILENT_SECONDS = 90  # after which a process that tells no row is ended: the first row of a stage compiles
START_SECONDS = 15  # of a process: imports, the first use of the device
GRACE_SECONDS = 20  # for the row that is being measured when a stage's time is up
RESTARTS = 4
LOST = 3  # exit status of a process whose device no longer answers

Facts = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file of the results; by default named by the device")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes; measures nothing")
    parser.add_argument("--only", action="append", metavar="STAGE", help="this stage (and the ceilings)")
    parser.add_argument("--seconds", type=float, default=370.0, help="for all stages together")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the JSON lines that it writes
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ worker


def prepare_dry_run() -> None:
    """Triton's interpreter and the emulated CUDA kernels in the GPU's place."""
    sys.path.insert(0, str(ROOT / "tests"))
    from emulator.build import emulated  # type: ignore[import-not-found]

    from rapidin.ops import cuda

    cuda.use(emulated())


def work(args: argparse.Namespace) -> int:
    """Measure the stages named, from case `begin` on; rows go to the file as they come."""
    from on_gpu.cases import Bench, rows_of, write_row
    from on_gpu.ceilings import NOMINAL
    from on_gpu.device import Machine
    from on_gpu.stages import STAGES

    mode = mode_of(args)
    if args.dry_run:
        prepare_dry_run()
    import torch

    torch.manual_seed(0)
    machine = Machine(args.dry_run)
    bench = Bench(machine, mode, {**NOMINAL, **json.loads(args.ceilings)})
    write_row(args.worker, {"about": machine.describe()})
    deadline = time.monotonic() + args.seconds
    passed = 0  # cases of the stages before: they are numbered through
    for stage in (s for s in STAGES if s.name in args.only):
        cases = stage.cases(mode)
        for number, row in rows_of(bench, cases, max(0, args.begin - passed), deadline):
            row |= {"stage": stage.name, "number": passed + number}
            write_row(args.worker, row)
            if row.get("state") == "failed" and machine.is_lost():
                os._exit(LOST)  # without tearing down what no longer answers
        passed += len(cases)
        bench.forget()
    return 0


def mode_of(args: argparse.Namespace) -> Any:
    return "dry" if args.dry_run else "quick" if args.quick else "full"


# ---------------------------------------------------------------------------------------------- the whole


def run_worker(
    args: argparse.Namespace, stages: list[str], begin: int, rates: Facts, seconds: float
) -> Facts:
    """One process: its rows, the case that it was at when it ended too early, and what it said then."""
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "rows", Path(folder) / "log"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(lines)]
        command += ["--begin", str(begin), "--ceilings", json.dumps(rates), "--seconds", str(seconds)]
        command += [word for stage in stages for word in ("--only", stage)]
        command += [flag for flag in ("--dry-run", "--quick") if getattr(args, flag[2:].replace("-", "_"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *old_path()])}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if args.dry_run:
            environment["TRITON_INTERPRET"] = "1"
        with log.open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            size, heard, why = -1, time.monotonic(), None
            hard_end = heard + max(0.0, seconds) + START_SECONDS + GRACE_SECONDS
            while process.poll() is None:
                time.sleep(0.2)
                now = lines.stat().st_size if lines.exists() else 0
                if now != size:
                    size, heard = now, time.monotonic()
                silent = time.monotonic() - heard
                if silent > SILENT_SECONDS or time.monotonic() > hard_end:
                    process.kill()
                    process.wait()
                    why = f"it did not end in {silent:.0f} s"
        # What comes after the last line's end was cut off with the process.
        whole = lines.read_text().rpartition("\n")[0] if lines.exists() else ""
        told = [json.loads(line) for line in whole.splitlines()]
        about = next((row["about"] for row in told if "about" in row), None)
        rows = [row for row in told if "state" in row]
        done = {row["number"] for row in rows}
        at = next((row for row in told if "begun" in row and row["number"] not in done), None)
        if process.returncode not in (0, LOST) and why is None:
            why = f"the process ended with {process.returncode}: {log.read_text()[-1500:]}"
        return {"about": about, "rows": rows, "at": at, "why": why, "status": process.returncode}


def old_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def measure_stage(args: argparse.Namespace, stages: list[str], rates: Facts, end: float) -> Facts:
    """All rows of a stage until `end`, over as many processes as it takes."""
    rows: list[Facts] = []
    about, begin = None, 0
    for attempt in range(RESTARTS + 1):
        # Of the last process no time is left, so that every case still has its row.
        left = end - time.monotonic() if attempt < RESTARTS else 0.0
        ended = run_worker(args, stages, begin, rates, left)
        about = about or ended["about"]
        rows += ended["rows"]
        if ended["status"] == 0:
            break
        if ended["at"] is not None:
            row = {key: value for key, value in ended["at"].items() if key != "begun"}
            rows.append(row | {"state": "failed", "why": ended["why"] or "the device was lost"})
        elif ended["status"] != LOST:
            no_case = {
                "op": stages[0],
                "way": "all",
                "size": {},
                "goals": {},
                "stage": stages[0],
                "number": -1,
            }
            rows.append(no_case | {"state": "failed", "why": ended["why"] or ""})
            break
        begin = max(row["number"] for row in rows) + 1
    return {"about": about, "rows": rows}


def main() -> int:
    args = parse()
    if args.worker:
        return work(args)
    from on_gpu import ceilings, report
    from on_gpu.stages import STAGES

    known = [stage.name for stage in STAGES]
    if args.only and not set(args.only) <= set(known):
        sys.exit(f"gpu: --only takes {', '.join(known)}")
    chosen = [name for name in known if not args.only or name in args.only or name == "ceilings"]
    # One process is enough where no device can be lost, and starting it is most of a dry run.
    groups = [chosen] if args.dry_run else [[name] for name in chosen]
    begun = datetime.datetime.now(datetime.timezone.utc)
    end = time.monotonic() + args.seconds
    result: Facts = {
        "dry": args.dry_run,
        "mode": mode_of(args),
        "date": begun.strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "about": None,
        "ceilings": {},
        "rows": [],
    }
    out: Path | None = args.out
    for number, stages in enumerate(groups):
        start = time.monotonic()
        # What the stages before have not used, or were never to run for, is shared among those that are left.
        later = [name for group in groups[number:] for name in group]
        shares = {stage.name: stage.seconds + START_SECONDS for stage in STAGES if stage.name in later}
        share = sum(shares[name] for name in stages) / sum(shares.values())
        made = measure_stage(args, stages, result["ceilings"], start + share * (end - start))
        result["about"] = result["about"] or made["about"]
        result["rows"] += made["rows"]
        if "ceilings" in stages:
            try:
                result["ceilings"] = ceilings.of_rows(result["rows"], args.dry_run)
            except ValueError as error:
                print(report.failures(result["rows"]))
                sys.exit(f"gpu: {error}")
        print(f"{', '.join(stages)}: {len(made['rows'])} rows, {time.monotonic() - start:.0f} s", flush=True)
        if not args.dry_run:
            print(report.listed(made["rows"]), flush=True)
        out = out or default_out(result)
        write(out, result)
    assert out is not None
    print(report.summary(result))
    print(f"written: {out}")
    return 1 if any(row["state"] == "failed" for row in result["rows"]) else 0


def default_out(result: Facts) -> Path:
    name = (result["about"] or {}).get("name") or "unknown"
    slug = re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
    if result["dry"]:
        return Path(tempfile.gettempdir()) / f"rapidin-{slug}.json"
    return HERE / "results" / f"gpu-{slug}.json"


def write(out: Path, result: Facts) -> None:
    """After each stage, and whole: a run that is cut short leaves what it had."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(out)


def commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
