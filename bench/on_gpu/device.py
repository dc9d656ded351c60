"""The machine that is measured: its clock, its memory and what it is. What asks for CUDA is here."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds of one run, on the device alone and as a caller waits for it; low, high: its quartiles."""

    median: float
    low: float
    high: float
    called: float
    runs: int

    def facts(self) -> dict[str, Any]:
        """As rows have them."""
        return {
            "unit": "s",
            "seconds": self.median,
            "quartiles": [self.low, self.high],
            "called_seconds": self.called,
            "runs": self.runs,
        }


class Machine:
    """A GPU, or in a dry run the CPU in its place."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        if not dry:
            found = torch.cuda.get_device_properties(0)
            self.memory = int(found.total_memory)
            self.l2 = int(getattr(found, "L2_cache_size", 0)) or 64 << 20
            self.units = int(found.multi_processor_count)
        else:
            self.memory, self.l2, self.units = 1 << 30, 1 << 14, 2

    @property
    def name(self) -> str:
        return "CPU, dry run" if self.dry else torch.cuda.get_device_name(0)

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def time(self, runs: Sequence[Run], *, seconds: float = 0.12, least: int = 5, most: int = 100) -> Times:
        """Median of many runs, going round among `runs`, which do the same on inputs of their own.

        Each is run once to warm up. On the GPU all are queued behind a kernel that only waits, so that the
        events see the device's time and not the host's; the host's shows in `called`, without that kernel.
        """
        if self.dry:  # kernels are interpreted, which is slow, and there is nothing to be learnt of launches
            (once,) = self._taken(runs, 1, 0.0)
            return Times(once, once, once, once, 1)
        for run in runs:
            run()
        self.wait()
        start = time.perf_counter()
        for run in runs[:3]:
            run()
        queued = (time.perf_counter() - start) / min(3, len(runs))
        self.wait()
        once = (time.perf_counter() - start) / min(3, len(runs))
        count = max(least, min(most, int(seconds / max(once, 1e-7))))
        called = self._taken(runs, count, 0.0)
        # A run that takes far longer than its launch needs no head start.
        taken = called if once > 2e-3 else self._taken(runs, count, min(0.1, 1.5 * queued * count))
        return Times(
            statistics.median(taken),
            taken[len(taken) // 4],
            taken[-1 - len(taken) // 4],
            statistics.median(called),
            count,
        )

    def _taken(self, runs: Sequence[Run], count: int, head_start: float) -> list[float]:
        """Sorted seconds of each of `count` runs."""
        if self.dry:
            taken = []
            for n in range(count):
                start = time.perf_counter()
                runs[n % len(runs)]()
                taken.append(time.perf_counter() - start)
            return sorted(taken)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
        ]
        if head_start:
            torch.cuda._sleep(int(head_start * 2e9))  # cycles, at about 2 GHz
        for n, (begin, end) in enumerate(events):
            begin.record()
            runs[n % len(runs)]()
            end.record()
        self.wait()
        return sorted(begin.elapsed_time(end) / 1e3 for begin, end in events)

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes to go round among, so that none is left in the L2 cache."""
        if self.dry:
            return 1
        return max(1, min(16, -(-4 * self.l2 // max(size, 1)), self.memory // 4 // max(size, 1)))

    def poison(self, outputs: Sequence[Tensor]) -> None:
        """Leave NaN (or -1) in the memory of these outputs, and in what other outputs and scratch of a run
        will be given next: what a kernel does not write is then seen."""
        held = []
        for x in outputs:
            value = torch.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -1
            x.fill_(value)
            held += [torch.full_like(x, value) for _ in range(3)]
        if not self.dry:
            held.append(torch.full((64 << 18,), torch.nan, device=self.device))  # 64 MiB
        self.wait()

    def clear_peak(self) -> None:
        if not self.dry:
            self.wait()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """The most memory that torch held at a time since `clear_peak`."""
        return None if self.dry else int(torch.cuda.max_memory_allocated())

    def pinned(self, size: int) -> Tensor:
        x = torch.empty(size, dtype=torch.uint8, pin_memory=not self.dry)
        some = torch.randint(0, 256, (min(size, 1 << 20),), dtype=torch.uint8)
        return x.copy_(some.repeat(size // len(some)))

    def is_lost(self) -> bool:
        """Whether an error has left the device unusable for this process."""
        try:
            self.wait()
            torch.ones(8, device=self.device).sum().item()
        except RuntimeError:
            return True
        return False

    def describe(self) -> dict[str, Any]:
        """Name, driver and versions, as they stand in the results."""
        about: dict[str, Any] = {
            "name": self.name,
            "driver": None if self.dry else driver(),
            "memory_bytes": self.memory,
            "l2_bytes": self.l2,
            "multiprocessors": self.units,
            "capability": None if self.dry else list(torch.cuda.get_device_capability(0)),
            "host_cores": os.cpu_count(),
        }
        return about | {"versions": versions()}


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split()
    return said[0] if said else None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    for name in ("triton", "transformers", "peft", "faiss-gpu", "sjlt", "fast_jl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
