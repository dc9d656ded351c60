"""Compiles for GPUs what the launchers launch, with no GPU: `python tests/support/aot.py [NAME ...]`.

`--launches` prints instead what the compiler is told of each launch, `--extremes` the grids of the largest.

Each call of launches.py is made with tensors such as users have, but of the "meta" device, and goes
through Triton's own launching code (the binder, the specialisation of arguments, the key of its cache) up to
the compiler, with a stand-in for the GPU's driver. So the signatures that are compiled here, for sm_80, sm_90
and sm_100, are those that a GPU would get from the installed Triton. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ARCHS = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A kernel as it would have been launched.

    source: what Triton's JIT gave the compiler, of the kernel, its signature, constants and attributes.
    """

    source: Any
    options: dict[str, Any]
    grid: tuple[int, int, int]
    arguments: dict[str, Any]

    @property
    def kernel(self) -> str:
        name: str = self.source.fn.__name__
        return name.strip("_")

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of each argument: "*fp16", "i32", .. or "constexpr"."""
        return dict(self.source.signature)

    @property
    def constants(self) -> dict[str, Any]:
        """Constants by name: those of the kernel, and arguments that are None or 1."""
        names = self.source.fn.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items()}

    @property
    def divisible(self) -> set[str]:
        """Arguments that the compiler is told to be multiples of 16."""
        names = self.source.fn.arg_names
        return {
            names[path[0]]
            for path, attributes in self.source.attrs.items()
            if ["tt.divisibility", 16] in attributes
        }


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, as far as a launcher can see on the GPU; its address is a multiple of 16."""
    return torch.empty(*shape, dtype=dtype, device="meta")


class _Driver:
    """What the JIT asks of a GPU's driver."""

    def __init__(self, arch: int, name: str) -> None:
        self.arch, self.name = arch, name

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"{self.name} sm_{self.arch}"  # the JIT keeps a cache of kernels for each

    def get_current_stream(self, device: str) -> int:
        return 0


class _Recorded:
    """Stands in for a compiled kernel: the JIT keeps it in its cache, and starts it."""

    function = packed_metadata = None

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self.source, self.options = source, options

    def launch_metadata(self, *ignored: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert _launches is not None
        arguments = rest[len(rest) - len(self.source.fn.arg_names) :]
        named = dict(zip(self.source.fn.arg_names, arguments, strict=True))
        _launches.append(Launch(self.source, self.options, (x, y, z), named))


_launches: list[Launch] | None = None
_compile = triton.compiler.compile


def _compile_or_record(source: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
    # JIT functions keep the compiler that they found when they first ran on a device.
    if _launches is None:
        return _compile(source, target=target, options=options, **more)
    return _Recorded(source, options)


@contextmanager
def _without_gpu(arch: int, name: str) -> Iterator[None]:
    before = dict(vars(driver))
    driver.set_active(_Driver(arch, name))
    triton.compiler.compile = _compile_or_record
    try:
        yield
    finally:
        triton.compiler.compile = _compile
        vars(driver).update(before)


def recorded(run: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """The launches that `run` would make on a GPU of this architecture."""
    global _launches
    _launches = made = []
    try:
        with _without_gpu(arch, "recorded"):
            run()
    finally:
        _launches = None
    return made


def announced(run: Callable[[], Any], arch: int = 90) -> list[dict[str, Any]]:
    """What Triton tells its hook of each kernel that `run` would have compiled first: signature, constants,
    attributes and options. Nothing is launched; a kernel that was announced before is announced again."""
    told: list[dict[str, Any]] = []

    def hook(*ignored: Any, compile: dict[str, Any], fn: Any, **more: Any) -> bool:
        told.append({"kernel": fn.jit_function.fn.__name__.strip("_"), **compile})
        return True  # leave it uncompiled, and so unlaunched

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        with _without_gpu(arch, "announced"):
            run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return told


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel in machine code, by Triton's own cache; recorded for this architecture."""
    return _compile(launch.source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump reads from a cubin: registers a thread, bytes of stack (which is where spills go)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", shown)
    registers, stack, _, local = map(int, found[-1])
    return {"registers": registers, "stack": stack, "local": local}


def _plain(signature: Any, constants: Any, attributes: Any, options: Any) -> dict[str, Any]:
    """What the compiler is told of a launch, as JSON knows it; constants and attributes by their paths."""
    return {
        "signature": dict(signature),
        "constants": {str(path): str(value) for path, value in constants.items()},
        "attributes": {str(path): str(value) for path, value in attributes.items()},
        "options": {name: str(value) for name, value in sorted(options.items())},
    }


def _print_launches() -> None:
    """Each kernel of each launch, once as it is compiled here and once as Triton announces it to its hook."""
    from launches import launches, signatures

    for name, run in [*((name, run) for name, run, _ in launches()), *signatures()]:
        told = [
            _plain(x["signature"], x["constants"], x["configs"][0], {"num_warps": x["num_warps"]})
            for x in announced(run)
        ]
        for launch, announcement in zip(recorded(run), told, strict=True):
            source, options = launch.source, {"num_warps": launch.options["num_warps"]}
            mine = _plain(source.signature, source.constants, source.attrs, options)
            row = {"launch": name, "kernel": launch.kernel, "announced": announcement, "recorded": mine}
            print(json.dumps(row | {"divisible": sorted(launch.divisible)}))


def _print_extremes() -> None:
    from launches import extremes

    for name, run in extremes():
        for launch in recorded(run):
            print(json.dumps({"launch": name, "kernel": launch.kernel, "grid": launch.grid}))


def _print_compiled(wanted: list[str]) -> None:
    from launches import launches

    for name, run, archs in launches():
        if wanted and not any(part in name for part in wanted):
            continue
        for arch in archs:
            for launch in recorded(run, arch):
                made = compiled(launch, arch)
                row: dict[str, Any] = {"launch": name, "kernel": launch.kernel, "arch": arch}
                row |= resources(made.asm["cubin"])
                row |= {"shared": made.metadata.shared, "warps": made.metadata.num_warps}
                row |= {"mma": len(re.findall(r"mma\.sync|wgmma\.mma", made.asm["ptx"]))}
                row |= {"fused doubles": made.asm["ptx"].count("fma.rn.f64")}
                print(json.dumps(row), flush=True)


def main() -> None:
    if sys.argv[1:] == ["--launches"]:
        _print_launches()
    elif sys.argv[1:] == ["--extremes"]:
        _print_extremes()
    else:
        _print_compiled(sys.argv[1:])


if __name__ == "__main__":
    main()
