"""A case: one thing measured at one size by one way. Here a case becomes a row, whatever happens to it."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from on_gpu.device import Machine, Run
from on_gpu.plan import Facts, RowFile
from rapidin.ops.backends import CUDA_OPS, find

# Sizes: those of real models; fewer of these; tiny even ones for runs on the CPU; tiny odd ones for checks.
Mode = Literal["full", "quick", "dry", "smoke"]
# A case is timed, only checked against the reference, or only has its Triton kernels compiled.
Purpose = Literal["time", "check", "compile"]
SMALL = ("dry", "smoke")

T = TypeVar("T")


def backends_of(op: str) -> tuple[str, ...]:
    """The GPU backends that have kernels for an op, the default first."""
    return ("cuda", "triton") if op in CUDA_OPS else ("triton",)


class MissingError(Exception):
    """What is to be measured is not there; the message says why."""


@dataclass(frozen=True)
class Cost:
    """The least that must be done: bytes read and written, operations at a rate named in the ceilings, and
    those of matrix products in bfloat16 beside them."""

    read: int
    written: int = 0
    operations: float = 0.0
    rate: str = "float32_per_s"
    products: float = 0.0

    def against(self, ceilings: dict[str, float], seconds: float) -> Facts:
        """The floor, what it is spent on, and the shares of a run of so many seconds; nothing where a ceiling
        was not measured."""
        if not {"read_bytes_per_s", "copy_bytes_per_s", "bf16_per_s", self.rate} <= set(ceilings):
            return {"of": {}}
        read = self.read / ceilings["read_bytes_per_s"]
        moved = read + self.written / ceilings["copy_bytes_per_s"]
        counted = max(self.operations / ceilings[self.rate], self.products / ceilings["bf16_per_s"])
        floor, bound = (moved, "bytes") if moved >= counted else (counted, "operations")
        of = {"floor": floor / seconds, "read": read / seconds}
        return {"floor_seconds": floor, "bound": bound, "of": of}


@dataclass(frozen=True)
class Case:
    """One row to be. run: gives its facts, or raises. goals: at least these shares (`of`), by name; where a
    goal is below 0.05 it is a share of time that must not be passed. beside: a peer, which has no goal."""

    op: str
    way: str
    size: dict[str, Any]
    run: Callable[[Bench], Facts]
    goals: dict[str, float] = field(default_factory=dict)

    def row(self) -> Facts:
        return {"op": self.op, "way": self.way, "size": self.size, "goals": self.goals}


@dataclass
class Bench:
    """What the cases of a stage share. once: the last thing made under a name, so that the ways of one size
    have the same inputs and no two sizes lie in memory together."""

    machine: Machine
    mode: Mode
    ceilings: dict[str, float]
    purpose: Purpose = "time"
    _made: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.machine.device

    @property
    def small(self) -> bool:
        """Whether sizes are tiny, as on the CPU and where only results are looked at."""
        return self.mode in SMALL

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes to go round among."""
        return self.machine.sets(size) if self.purpose == "time" else 1

    def once(self, name: str, key: Any, make: Callable[[], T]) -> T:
        if name not in self._made or self._made[name][0] != key:
            self._made.pop(name, None)
            self._made[name] = (key, make())
        made: T = self._made[name][1]
        return made

    def forget(self) -> None:
        self._made.clear()
        gc.collect()
        if not self.machine.dry:
            torch.cuda.empty_cache()

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers, made in pieces where float32 copies of all would fill the memory."""
        out = torch.empty(*shape, dtype=dtype, device=self.device)
        if self.purpose == "compile":
            return out
        for piece in out.view(-1).split(1 << 28):
            piece.copy_(torch.randn(len(piece), device=self.device))
        return out

    def kernel(self, op: str, backend: str) -> None:
        """Raises MissingError where the backend has no such op here."""
        try:
            find(op, backend, self.device)
        except (ImportError, AttributeError, ValueError) as error:
            raise MissingError(str(error)) from None

    def measured(
        self,
        runs: Sequence[Run],
        cost: Cost,
        error: Callable[[Any], float] | None = None,
        tolerance: float = 0.0,
        least: int = 5,
    ) -> Facts:
        """Times against the floor, after a check of the first run's result: a wrong one is no measurement.

        error: how far off a result is; what it compares with is made when it is called, not before.
        """
        if self.purpose == "compile":
            runs[0]()
            return {"state": "compiled"}
        facts: Facts = {}
        if error is not None:
            outputs = runs[0]()
            listed = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
            first = [x.clone() for x in listed]
            self.machine.poison(listed)
            del outputs, listed
            again = runs[0]()
            facts["error"], facts["tolerance"] = error(again), tolerance
            again = [again] if isinstance(again, Tensor) else [x for x in again if x is not None]
            facts["same_bits"] = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            if not facts["error"] <= tolerance:  # NaN too
                return facts | {
                    "state": "failed",
                    "why": f"wrong result: error {facts['error']:.2e} above {tolerance:.0e}",
                }
            del first, again
        if self.purpose == "check":
            return facts | {"state": "passed"}
        times = self.machine.time(runs, least=least)
        return (
            facts
            | times.facts()
            | {"bytes": cost.read + cost.written, "operations": cost.operations + cost.products}
            | cost.against(self.ceilings, times.median)
        )


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest of the rows' errors, each as a share of the row's length; NaN where a number is missing."""
    if got.shape != wanted.shape:
        return float("nan")
    wanted = wanted.double()
    off = (got.double().to(wanted.device) - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    return float(off.max())


def run_cases(
    bench: Bench,
    cases: Sequence[tuple[int, Case]],
    rows: RowFile,
    deadline: float,
    late: str = "the stage's time was used up",
) -> None:
    """A row for each (number, case), written as soon as it is known; past the deadline they are left out, for
    the reason `late`.

    A row that has but `begun` comes before its case is run, for whoever must say which one ended the process.
    Raises RuntimeError where an error has left the device unusable.
    """
    for number, case in cases:
        row: Facts = case.row() | {"number": number}
        if time.monotonic() > deadline:
            rows.write(row | {"state": "left out", "why": late})
            continue
        rows.write(row | {"begun": True})
        start = time.monotonic()
        try:
            row = row | {"state": "measured"} | case.run(bench)
        except MissingError as error:
            row |= {"state": "missing", "why": str(error)}
        except Exception as error:
            if isinstance(error, ValueError) and "has no kernel" in str(error):  # for this size
                row |= {"state": "missing", "why": str(error)}
            else:
                where = traceback.extract_tb(error.__traceback__)[-1]
                why = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                row |= {"state": "failed", "why": why[:2000]}
            if isinstance(error, torch.OutOfMemoryError):
                bench.forget()
        rows.write(_finite(row) | {"case_seconds": round(time.monotonic() - start, 3)})
        if row["state"] == "failed" and bench.machine.is_lost():
            raise RuntimeError("the device is lost")


def _finite(value: Any) -> Any:
    """The same value with NaN and infinities as strings, which JSON cannot hold as numbers."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
