"""Checks and measures rapidin on a GPU, in two calls of a few minutes each.

python bench/gpu.py smoke   --out FOLDER     # builds; checks kernels and flow; compute-sanitizer, tests
python bench/gpu.py measure --out FOLDER     # times each kernel and caching against what the GPU can do
With --dry-run either runs on the CPU at tiny sizes, to show that every line runs.

Call it by `bench/gpu.sh`. Rows are written to FOLDER/smoke-<device>.jsonl and gpu-<device>.json as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent))
from on_gpu import measure, processes, smoke
from on_gpu.plan import LOST, MEASURE_SECONDS, ROOT, SMOKE_SECONDS, STAGES, RowFile, ceilings_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    calls = parser.add_subparsers(dest="call", required=True)
    for name, run, seconds in (
        ("smoke", smoke.main, SMOKE_SECONDS),
        ("measure", measure.main, MEASURE_SECONDS),
    ):
        call = calls.add_parser(name)
        call.set_defaults(run=run)
        call.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of the results")
        call.add_argument("--seconds", type=float, default=seconds, help="time limit of the whole call")
        call.add_argument(
            "--dry-run", action="store_true", help="run on the CPU at tiny sizes; measures nothing"
        )
        call.add_argument("--commit", help="commit of this checkout, if git cannot tell")
        call.add_argument("--no-build", action="store_true", help="use the extensions as they are")
        if name == "smoke":
            call.add_argument("--no-tests", action="store_true", help="do not run the tests")
        else:
            call.add_argument("--quick", action="store_true", help="fewer sizes")
            call.add_argument(
                "--only", action="append", choices=list(STAGES), help="run this stage and the ceilings"
            )
    worker = calls.add_parser("worker")  # a process that the other two commands start
    worker.set_defaults(run=work)
    worker.add_argument("--rows", type=Path, required=True)
    worker.add_argument("--lane", required=True)
    worker.add_argument("--purpose", choices=("time", "check", "compile"), required=True)
    worker.add_argument("--mode", choices=("full", "quick", "dry", "smoke"), required=True)
    worker.add_argument("--stages", required=True)
    worker.add_argument("--ways", default="")
    worker.add_argument("--share", default="0/1")
    worker.add_argument("--until", type=float, required=True)
    worker.add_argument("--skip", default="")
    worker.add_argument("--about", default="{}")
    worker.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def prepare_dry_run() -> None:
    """Use Triton's interpreter and the emulated CUDA kernels in place of a GPU."""
    sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT), str(ROOT / "csrc")]
    if find_spec("pybind11") is None:  # only its headers are needed, and torch has them
        from build_extensions import pybind11_headers

        sys.modules["pybind11"] = ModuleType("pybind11")
        sys.modules["pybind11"].get_include = pybind11_headers  # type: ignore[attr-defined]
    from emulator.build import emulated  # type: ignore[import-not-found]

    from rapidin.ops import cuda

    cuda.use(emulated())


def work(args: argparse.Namespace) -> int:
    """Run cases and write a row for each; cases that already have a row in this lane are skipped."""
    processes.end_with_parent()
    rows = RowFile(args.rows, args.lane)
    if args.dry_run:
        prepare_dry_run()
    import torch
    from on_gpu.cases import Bench, run_cases
    from on_gpu.device import Machine
    from on_gpu.stages import chosen

    torch.manual_seed(0)
    if args.purpose == "compile" and not args.dry_run:
        from on_gpu.compile_only import compile_only

        compile_only()
    machine = Machine(args.dry_run)
    about = json.loads(args.about)
    rows.about = about | {"device": machine.name}
    rows.write({"about": machine.describe()})
    share, shares = (int(word) for word in args.share.split("/"))
    ways = [way for way in args.ways.split(",") if way]
    plan = chosen(args.stages.split(","), args.mode, ways, (share, shares))
    done = {row["number"] for row in rows.rows() if "state" in row}
    skip = [stage for stage in args.skip.split(",") if stage]
    left = list(plan)
    for stage, cases in plan.items():
        # Time that other stages did not use is shared among those that are left.
        weights = {name: STAGES.get(name, 1) for name in left}
        now = time.monotonic()
        deadline = now + weights[stage] / sum(weights.values()) * (args.until - now)
        left.remove(stage)
        waiting = [(number, case) for number, case in cases if number not in done]
        bench = Bench(machine, args.mode, ceilings_of(rows.rows(), args.dry_run), args.purpose)
        rows.about["stage"] = stage
        late = "the stage's time was used up"
        if stage in skip:
            deadline, late = 0.0, "the stage's processes ended too often"
        try:
            run_cases(bench, waiting, rows, deadline, late)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(LOST)  # skips the teardown, which would hang
        bench.forget()
    rows.write({"ended": True})
    return 0


def main() -> int:
    args = parse()
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
