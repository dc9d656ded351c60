"""The call that measures: one process for all stages, caching first. Rows are written as they come."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from on_gpu import calls, processes, report
from on_gpu.plan import STAGES, Facts, RowFile, all_rows, ceilings_of
from on_gpu.processes import CutShortError, Step, run_steps


@dataclass(frozen=True)
class Limits(processes.Limits):
    """Seconds more. last_row: for the case that is running when the time is up; write: between two updates of
    the results' file; silent: after which a worker that tells no row is ended."""

    last_row: float = 6.0
    write: float = 2.0
    silent: float = 90.0


LIMITS = Limits()


def main(args: argparse.Namespace, limits: Limits = LIMITS, worker: Sequence[str] = calls.WORKER) -> int:
    end = time.monotonic() + args.seconds
    gpu = calls.find_gpu(args.dry_run)
    if gpu is None:
        print("gpu: there is no GPU here; --dry-run goes without one", file=sys.stderr)
        return 2
    calls.set_environment(gpu, args.dry_run)
    args.out.mkdir(parents=True, exist_ok=True)
    name = calls.slug(gpu["name"])
    rows = RowFile(args.out / f"gpu-{name}.rows.jsonl", "measure")
    rows.path.unlink(missing_ok=True)
    rows.about = calls.about(args.commit)
    out, log = args.out / f"gpu-{name}.json", args.out / "measure.log"
    log.unlink(missing_ok=True)
    head = {"dry": args.dry_run, "mode": mode_of(args), **rows.about}
    result = Result(rows.path, out, head, limits.write)
    code = 0
    try:
        run_steps(
            steps(args, rows, log, end, limits, worker),
            end,
            cores=max(1, os.cpu_count() or 1),
            late=calls.late_row(rows),
            each=result.write_soon,
            limits=limits,
        )
    except CutShortError as cut:
        result.head["cut"] = str(cut)
        code = cut.status
    made = result.write()
    print(report.listed([row for row in made["rows"] if row["op"] != "step"]))
    print(report.summary(made))
    print(f"written: {out}, {time.monotonic() - end + args.seconds:.0f} s", flush=True)
    return code or int(any(row["state"] == "failed" for row in made["rows"]))


def mode_of(args: argparse.Namespace) -> str:
    """At which sizes a call measures."""
    return "dry" if args.dry_run else "quick" if args.quick else "full"


def steps(
    args: argparse.Namespace,
    rows: RowFile,
    log: Path,
    end: float,
    limits: Limits = LIMITS,
    worker: Sequence[str] = calls.WORKER,
) -> list[Step]:
    """The steps, in the order in which they start; worker: the command that measures."""
    until = end - limits.grace - 1 - limits.last_row
    listed: list[Step] = []
    if not args.no_build:
        listed += calls.build_steps(rows, log, args.dry_run)
        if not args.dry_run and not calls.compile_stamp().exists():
            print(
                "Triton's kernels have not been compiled here: that comes first, beside the build", flush=True
            )
            # tables come from rapidin.ops._cpu
            shares = max(1, min(calls.MOST_SHARES, (os.cpu_count() or 1) - 3))
            listed += calls.compile_steps(rows, log, until=until, shares=shares, after=["build _cpu"])
    wanted = [name for name in STAGES if not args.only or name in args.only or name == "ceilings"]
    options = ["--purpose", "time", "--mode", mode_of(args), "--stages", ",".join(wanted)]
    options += ["--dry-run"] * args.dry_run
    measuring = calls.worker_step(
        rows,
        "measure",
        options,
        log,
        until=until,
        limit=args.seconds,
        after=[step.name for step in listed],  # nothing else runs while it measures
        alone=True,
        silent=limits.silent,
        worker=worker,
    )
    return [*listed, measuring]


class Result:
    """The results' file, made of the rows and rewritten as a whole as they come.

    write_seconds: between two updates.
    """

    def __init__(self, rows: Path, out: Path, head: Facts, write_seconds: float) -> None:
        self.rows, self.out, self.head, self.write_seconds = rows, out, head, write_seconds
        self.size, self.last = -1, 0.0

    def write_soon(self) -> None:
        size = self.rows.stat().st_size if self.rows.exists() else 0
        if size != self.size and time.monotonic() > self.last + self.write_seconds:
            self.write()
            self.size, self.last = size, time.monotonic()

    def write(self) -> Facts:
        made = result_of(self.rows, self.head)
        scratch = self.out.with_suffix(".part")
        scratch.write_text(json.dumps(made, indent=1) + "\n")
        scratch.replace(self.out)
        return made


def result_of(path: Path, head: Facts) -> Facts:
    """The contents of a file of rows in the form that bench/performance.py takes."""
    rows = [
        {key: value for key, value in row.items() if key != "lane"}
        for row in all_rows(path)
        if "state" in row and not row["lane"].startswith("compile ")
    ]
    about = next((row["about"] for row in all_rows(path) if "about" in row), None)
    return {**head, "about": about, "ceilings": ceilings_of(rows, head["dry"]), "rows": rows}
