"""Counts what the CUDA kernels ask of shared and global memory: `python tests/support/counts.py [NAME ...]`.

Each launch runs on the CPU with its accesses watched (emulator/watch.h), so what is printed is counted, not
measured: for each kernel the requests of its warps, the turns of the 32 banks of shared memory or the sectors
of 32 bytes of global memory that they take, and how many times the fewest that hold the same bytes; --lines
prints the same for each line of its source. tests/csrc/test_emulator.py holds totals to counts.json,
which --write writes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from emulator.build import emulated

from rapidin import ops
from rapidin.ops import cuda

LIMITS = Path(__file__).with_name("counts.json")
KINDS = ("read", "write", "atomic")
# Files whose lines are helpers': what they do is counted where they were called.
HELPERS = ("device.h", "emulator.h", "sketch_hash.h")


@dataclass
class Line:
    """One line's accesses of one kind in one memory."""

    requests: int = 0
    lanes: int = 0
    bytes: int = 0  # of all lanes
    turns: int = 0
    least: int = 0

    @property
    def ratio(self) -> float:
        return self.turns / max(self.least, 1)


@dataclass
class Counts:
    """A kernel's launches in one run. Bytes of sectors: touched in all, and summed over blocks."""

    blocks: int = 0
    barriers: int = 0
    exchanges: int = 0
    products: int = 0
    read: int = 0
    written: int = 0
    of_blocks: int = 0
    lines: dict[tuple[str, str, str], Line] = field(default_factory=lambda: defaultdict(Line))

    def total(self, memory: str) -> Line:
        total = Line()
        for (_, _, which), line in self.lines.items():
            if which == memory:
                for name in ("requests", "lanes", "bytes", "turns", "least"):
                    setattr(total, name, getattr(total, name) + getattr(line, name))
        return total


def counted(run: Callable[[], Any]) -> dict[str, Counts]:
    """What `run` makes the watched kernels do, by kernel."""
    extension = emulated("watched")
    extension.count(True)
    try:
        with cuda.using(extension):
            run()
        launches = extension.counted()
    finally:
        extension.count(False)
    places = sorted({site.place for launch in launches for site in launch.sites})
    line_of = dict(zip(places, lines(extension.__file__, places), strict=True))
    kernels: dict[str, Counts] = defaultdict(Counts)
    for launch in launches:
        counts = kernels[launch.name]
        for name in ("blocks", "barriers", "exchanges", "products"):
            setattr(counts, name, getattr(counts, name) + getattr(launch, name))
        counts.read += 32 * launch.sectors_read
        counts.written += 32 * launch.sectors_written
        counts.of_blocks += 32 * launch.sectors_of_blocks
        for site in launch.sites:
            memory = "shared" if site.shared else "global"
            line = counts.lines[line_of[site.place], KINDS[site.kind], memory]
            line.requests += site.requests
            line.lanes += site.lanes
            line.bytes += site.lanes * site.bytes
            line.turns += site.turns
            line.least += site.least
    return dict(kernels)


def lines(library: str, places: list[int]) -> list[str]:
    """The kernels' line of each place, of a helper its caller's; addr2line comes with a compiler."""
    if not places:
        return []
    command = ["addr2line", "-a", "-i", "-e", library, *(hex(place - 1) for place in places)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for chain in shown.strip().split("0x")[1:]:
        names = [name.split(" (")[0].rsplit("/", 1)[-1] for name in chain.splitlines()[1:]]
        found.append(next((name for name in names if not name.startswith(HELPERS)), names[0]))
    return found


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def runs() -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(name, floor, run): floor is the bytes of the inputs and outputs once."""
    bf16, f16 = torch.bfloat16, torch.float16

    def linear(dim: int, dtype: torch.dtype, tokens: int = 64) -> tuple[int, Callable[[], Any]]:
        inputs, grads = normal(1, tokens, 1024, dtype=dtype), normal(1, tokens, 1024, dtype=dtype)
        floor = 2 * inputs.nbytes + 4 * dim
        return floor, lambda: ops.linear_sketch(inputs, grads, dim, seed=1, backend="cuda")

    for dim, dtype in ((512, bf16), (64, bf16), (1024, bf16), (512, torch.float32)):
        yield f"linear_sketch {str(dtype)[6:]} {dim}, 1024 x 1024", *linear(dim, dtype)

    def flat(dtype: torch.dtype) -> tuple[int, Callable[[], Any]]:
        tensors = [normal(1000, 256, dtype=dtype), normal(256, dtype=dtype)]
        floor = sum(x.nbytes for x in tensors) + 4 * 1024
        return floor, lambda: ops.flat_sketch(tensors, 1024, seed=1, backend="cuda")

    for dtype in (bf16, torch.float32):
        yield f"flat_sketch {str(dtype)[6:]} 1024", *flat(dtype)

    def scan(kind: Any, queries: int, width: int = 1024) -> tuple[int, Callable[[], Any]]:
        x = normal(1024, width)
        cache = ops.pack(x, kind) if isinstance(kind, str) else x.to(kind)
        rows = cache if isinstance(cache, torch.Tensor) else cache.codes
        floor, q = rows.nbytes, normal(queries, width)
        return floor, lambda: ops.topk_scan_both_ends(cache, q, 100, backend="cuda")

    for kind in (f16, "sign", "int8", "int4"):
        for queries in (1, 16):
            name = kind if isinstance(kind, str) else str(kind)[6:]
            yield f"topk_scan {name}, {queries} queries", *scan(kind, queries)
    yield "topk_scan sign, rows of 1785 bytes, 1 query", *scan("sign", 1, 8 * 1785)


def totals(kernels: dict[str, Counts]) -> dict[str, dict[str, int]]:
    """What is held to limits, by kernel."""
    return {
        name: {
            "shared turns": counts.total("shared").turns,
            "global sectors": counts.total("global").turns,
            "barriers": counts.barriers,
        }
        for name, counts in kernels.items()
    }


def main() -> None:
    wanted = [name for name in sys.argv[1:] if not name.startswith("--")]
    limits = {}
    for name, floor, run in runs():
        if wanted and not any(part in name for part in wanted):
            continue
        kernels = counted(run)
        limits[name] = totals(kernels)
        print(f"\n{name}: floor {floor:,} bytes")
        for kernel, counts in kernels.items():
            shared, of_global = counts.total("shared"), counts.total("global")
            print(
                f"  {kernel}: {counts.blocks} blocks, {counts.barriers} barriers, "
                f"{counts.exchanges} warp exchanges, {counts.products} mma\n"
                f"    shared: {shared.requests:,} requests, {shared.turns:,} turns, "
                f"{shared.ratio:.2f} of the fewest\n"
                f"    global: {of_global.requests:,} requests, {of_global.turns:,} sectors, "
                f"{of_global.ratio:.2f} of the fewest; {32 * of_global.turns:,} bytes asked for, "
                f"{counts.of_blocks:,} by blocks once, {counts.read:,} read and {counts.written:,} written "
                f"in all, {(counts.read + counts.written) / floor:.2f} of the floor"
            )
            if "--lines" in sys.argv:
                rows = sorted(counts.lines.items(), key=lambda item: -item[1].turns)
                for (where, kind, memory), line in rows:
                    each = line.bytes / max(line.lanes, 1)
                    what = "turns" if memory == "shared" else "sectors"
                    print(
                        f"      {where:24} {memory:6} {kind:6} {each:4.0f} bytes a lane "
                        f"{line.requests:9,} requests {line.turns:9,} {what:7} {line.ratio:6.2f}"
                    )
    if "--write" in sys.argv:
        LIMITS.write_text(json.dumps(limits, indent=1) + "\n")


if __name__ == "__main__":
    main()
