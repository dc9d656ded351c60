"""A case: one thing measured at one size by one way. Here a case becomes a row, whatever happens to it."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from on_gpu.device import Machine, Run
from rapidin.ops.backends import find

Mode = Literal["full", "quick", "dry"]
State = Literal["measured", "failed", "missing", "left out"]
BACKENDS = ("triton", "cuda")
CEILINGS = ("read_bytes_per_s", "copy_bytes_per_s", "bf16_per_s", "float32_per_s")

T = TypeVar("T")
Facts = dict[str, Any]


class MissingError(Exception):
    """What is to be measured is not there; the message says why."""


@dataclass(frozen=True)
class Cost:
    """The least that must be done: bytes read and written, and operations at a rate named in the ceilings."""

    read: int
    written: int = 0
    operations: float = 0.0
    rate: str = "float32_per_s"

    def floor(self, ceilings: dict[str, float]) -> tuple[float, str]:
        """(seconds, what they are spent on)."""
        moved = self.read / ceilings["read_bytes_per_s"] + self.written / ceilings["copy_bytes_per_s"]
        counted = self.operations / ceilings[self.rate]
        return (moved, "bytes") if moved >= counted else (counted, "operations")


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
    _made: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.machine.device

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
        """Times against the floor, after a check of the first run's result: a wrong one is no measurement."""
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
        times = self.machine.time(runs, least=least)
        floor, bound = cost.floor(self.ceilings)
        read = cost.read / self.ceilings["read_bytes_per_s"]
        return facts | {
            "seconds": times.median,
            "low": times.low,
            "high": times.high,
            "called_seconds": times.called,
            "runs": times.runs,
            "floor_seconds": floor,
            "bound": bound,
            "bytes": cost.read + cost.written,
            "operations": cost.operations,
            "of": {"floor": floor / times.median, "read": read / times.median},
        }


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest of the rows' errors, each as a share of the row's length; NaN where a number is missing."""
    if got.shape != wanted.shape:
        return float("nan")
    wanted = wanted.double()
    off = (got.double().to(wanted.device) - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    return float(off.max())


def rows_of(bench: Bench, cases: Sequence[Case], begin: int, deadline: float) -> Iterator[tuple[int, Facts]]:
    """(number, row) of each case from `begin` on; past the deadline they are left out.

    A row that has but `begun` comes before its case is run, for whoever must say which one ended the process.
    """
    for number in range(begin, len(cases)):
        case = cases[number]
        row: Facts = case.row()
        yield number, row | {"begun": True}
        if time.monotonic() > deadline:
            yield number, row | {"state": "left out", "why": "the stage's time was used up"}
            continue
        start = time.monotonic()
        try:
            row = row | {"state": "measured"} | case.run(bench)
        except MissingError as error:
            row |= {"state": "missing", "why": str(error)}
        except Exception as error:
            if isinstance(error, ValueError) and "has no kernel" in str(error):  # for this size
                yield number, row | {"state": "missing", "why": str(error)}
                continue
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            row |= {"state": "failed", "why": why[:2000]}
            if isinstance(error, torch.OutOfMemoryError):
                bench.forget()
        yield number, row | {"case_seconds": time.monotonic() - start}


def write_row(path: Path, row: Facts) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
