"""Compiles for GPUs what the launchers launch, with no GPU: `python tests/aot.py [NAME ...]`.

Each call of `launches` is made with tensors such as users have, but of the "meta" device, and the kernel that
would have run is compiled for sm_80, sm_90 and sm_100 with the arguments' types and divisibility as Triton
specialises them. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHS = (80, 90, 100)
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.float64: "fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel as it would have been launched."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[int]
    warps: int
    stages: int
    most_registers: int | None
    grid: tuple[int, ...]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, as far as a launcher can see on the GPU."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def recorded(run: Callable[[], Any]) -> list[Launch]:
    """The launches that `run` would make."""
    launches: list[Launch] = []

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(
            *args: Any, num_warps: int = 4, num_stages: int = 3, maxnreg: int | None = None, **named: Any
        ) -> None:
            values = dict(zip(kernel.arg_names, args, strict=False)) | named
            signature, constants, divisible = {}, {}, []
            for number, parameter in enumerate(kernel.params):
                value = values[parameter.name]
                whole = isinstance(value, int) and not parameter.do_not_specialize
                if parameter.is_constexpr or value is None or (whole and value == 1):
                    signature[parameter.name] = "constexpr"
                    constants[parameter.name] = getattr(value, "value", value)
                elif isinstance(value, Tensor):
                    signature[parameter.name] = "*" + TYPES[value.dtype]
                    divisible.append(number)
                elif isinstance(value, float):
                    signature[parameter.name] = "fp32"
                else:
                    wide = "u32" if 2**31 <= value < 2**32 else "i64" if value >= 2**31 else "i32"
                    signature[parameter.name] = wide
                    if whole and value % 16 == 0:
                        divisible.append(number)
            blocks = grid(constants) if callable(grid) else grid
            launches.append(
                Launch(kernel, signature, constants, divisible, num_warps, num_stages, maxnreg, tuple(blocks))
            )

        return launch

    before = JITFunction.__getitem__
    JITFunction.__getitem__ = launcher
    try:
        run()
    finally:
        JITFunction.__getitem__ = before
    return launches


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """Registers, shared memory and spills of a kernel on an architecture."""
    indices = {(number,): [["tt.divisibility", 16]] for number in launch.divisible}
    constants = {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, launch.signature, constants, indices)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.most_registers}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resources(made.asm["cubin"])
    return {**usage, "shared": made.metadata.shared, "warps": launch.warps, "ptx": made.asm["ptx"]}


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump reads from a cubin: registers a thread, bytes of stack (which is where spills go)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", shown)
    registers, stack, _, local = map(int, found[-1])
    return {"registers": registers, "stack": stack, "local": local}


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of each launch that is compiled: the sizes and dtypes that users have most."""
    from rapidin.kernels import linear_sketch as linear
    from rapidin.kernels.fold import fold
    from rapidin.kernels.sketch_hash import hash_words
    from rapidin.ops import triton as gpu

    def flat(
        dtype: torch.dtype,
        *,
        norms: torch.dtype | None = None,
        squares: bool = False,
        scales: bool = False,
        dim: int = 65536,
    ) -> None:
        tensors = [meta(4096, 4096, dtype=dtype), meta(4096, dtype=norms or dtype)] * 4
        factors = meta(8) if scales else None
        gpu.flat_sketch([x[None] for x in tensors], dim, seed=1, scales=factors, squares=squares)

    yield "flat_sketch bfloat16", lambda: flat(torch.bfloat16)
    yield "flat_sketch bfloat16 and float32", lambda: flat(torch.bfloat16, norms=torch.float32)
    yield "flat_sketch float32", lambda: flat(torch.float32)
    yield "flat_sketch bfloat16 squares", lambda: flat(torch.bfloat16, squares=True, scales=True)
    yield "flat_sketch bfloat16 narrow", lambda: flat(torch.bfloat16, dim=16)
    yield "matrix_sketch 576", lambda: gpu.matrix_sketch(meta(8, 576, 576, dtype=torch.bfloat16), 512, seed=1)
    yield "matrix_sketch bias", lambda: gpu.matrix_sketch(meta(8, 2048, 1), 64, seed=1)
    yield "fold of a product", lambda: fold(meta(8, 512, 512), None, None, 512)
    yield "hash_words", lambda: hash_words(meta(600, dtype=torch.int32), 1, 2, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (64, 256, 512, 1024) if dtype == torch.bfloat16 else (512,):
            inputs, grads = meta(8, 512, 4096, dtype=dtype), meta(8, 512, 11008, dtype=dtype)
            table = meta(dim, dtype=torch.int32)
            yield (
                f"linear_sketch {TYPES[dtype]} {dim}",
                lambda a=inputs, g=grads, d=dim, t=table: linear.linear_sketch(a, g, d, t, t),
            )
    yield from pack_launches()


def pack_launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Heads of 192 numbers, tails and rests of thousands, whole sketches; blocks of 512 and 8,192."""
    from rapidin.kernels.pack import pack, unpack
    from rapidin.kernels.turn import turn, unit_blocks

    for dtype, numbers in (("int8", 1), ("int4", 2), ("sign", 8)):
        code = torch.int8 if dtype == "int8" else torch.uint8
        for width in (192, 13443):
            x, codes, scale = meta(600, width), meta(600, -(-width // numbers), dtype=code), meta(600)
            yield f"pack {dtype} {width}", partial(pack, x, codes, scale, dtype)
            out, half = meta(600, width), meta(600, dtype=torch.float16)
            yield f"unpack {dtype} {width}", partial(unpack, codes, half, out, dtype)
    for blocks, width in ((210, 512), (12, 8192)):
        x, kept = meta(600, blocks, width), meta(600, blocks * width // 8)
        parts = {"mean": meta(blocks, width), "size": meta(blocks)}
        begin = meta(blocks + 1, dtype=torch.int64)
        whole: dict[str, Any] = {"mean": None, "begin": None, "size": None}
        yield f"pack turn {width} cut", partial(turn, x, kept, seed=7, back=False, begin=begin, **parts)
        yield f"pack turn {width} whole", partial(turn, x, x.flatten(1), seed=7, back=False, **whole)
        yield f"pack turn {width} back", partial(turn, x, x.flatten(1), seed=7, back=True, **whole)
    for width in (512, 8192, 65536):
        x = meta(600, width)
        yield f"pack unit_blocks {width}", partial(unit_blocks, x, x, meta(600))

    yield from topk_scan_launches()


def topk_scan_launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    from rapidin.ops import Packed, packed_bytes
    from rapidin.ops import triton as backend

    def scan(cache: Any, queries: int, k: int = 100, **more: Any) -> Callable[[], Any]:
        given = {"scales": None, "offsets": None, "valid": None, "base": None} | more
        return lambda: backend.topk_scan_both_ends([cache], meta(queries, 4096), k, **given)

    n = 1_000_000
    yield "topk_scan float16 1 query", scan(meta(n, 4096, dtype=torch.float16), 1)
    yield "topk_scan float16 64 queries", scan(meta(n, 4096, dtype=torch.float16), 64)
    yield "topk_scan float16 16 queries, k 1024", scan(meta(n, 4096, dtype=torch.float16), 16, 1024)
    blocks = {"scales": meta(n, 7), "offsets": [0, 500, 1000, 1500, 2000, 2500, 3000, 4096]}
    yield "topk_scan float16 4 queries, blocks", scan(meta(n, 4096, dtype=torch.float16), 4, **blocks)
    yield "topk_scan float32 1 query", scan(meta(n, 4096), 1)
    yield "topk_scan float32 64 queries", scan(meta(n, 4096), 64)
    yield "topk_scan bfloat16 16 queries", scan(meta(n, 4096, dtype=torch.bfloat16), 16)
    for dtype, queries in (("int8", 1), ("int8", 32), ("int4", 1), ("int4", 32), ("sign", 1), ("sign", 32)):
        code = torch.int8 if dtype == "int8" else torch.uint8
        packed = Packed(meta(n, packed_bytes(4096, dtype), dtype=code), dtype, 4096, meta(n))
        yield f"topk_scan {dtype} {queries} queries", scan(packed, queries)
        if dtype == "sign":
            yield f"topk_scan {dtype} {queries} queries, blocks", scan(packed, queries, **blocks)


def main() -> None:
    wanted = sys.argv[1:]
    for name, run in launches():
        if wanted and not any(part in name for part in wanted):
            continue
        for launch in recorded(run):
            for arch in ARCHS:
                row = compiled(launch, arch)
                ptx = row.pop("ptx")
                row |= {"mma": len(re.findall(r"mma\.sync|wgmma\.mma", ptx))}
                kernel = launch.kernel.__name__.strip("_")
                print(json.dumps({"launch": name, "kernel": kernel, "arch": arch, **row}), flush=True)


if __name__ == "__main__":
    main()
