"""Builds csrc/cuda for the CPU, with emulator.h in place of CUDA, and imports it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "emulated"
# Read before any test runs: peft's BOFT leaves CXX at gcc where its CUDA extension cannot be built, and that
# links no libstdc++.
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
SANITIZERS = ["-O1", "-fno-omit-frame-pointer"]
SANITIZERS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Each access as the source has it: not cut up, joined, or moved to another line.
WATCHED = [
    "-O1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-sra",
    "-fno-ipa-sra",
]
WATCHED += ["-fno-store-merging", "-fno-crossjumping", "-fno-tree-tail-merge", "-Wno-deprecated-copy"]
VARIANTS = ("plain", "sanitized", "watched")


@cache
def emulated(variant: str | None = None) -> ModuleType:
    """The extension with emulated kernels; built where its sources have changed.

    variant: "plain"; "sanitized": with the address and undefined-behaviour sanitizers, for a process in which
        their library is loaded first; "watched": finds races and counts accesses (watch.h). By default what
        RAPIDIN_EMULATED says in the environment, or "plain"
    """
    if variant is None:
        return emulated(os.environ.get("RAPIDIN_EMULATED", "plain"))
    if variant not in VARIANTS:
        raise ValueError(f"an emulated build is one of {', '.join(VARIANTS)}, got {variant!r}")
    spec = importlib.util.spec_from_file_location(_name(variant), build(variant))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(variant: str) -> str:
    return f"_cuda_emulated{'' if variant == 'plain' else '_' + variant}"


def build(variant: str) -> Path:
    """Compiles and links what has changed, in one process at a time: others find what it built. Returns the
    path of the extension."""
    import fcntl  # which Windows has not, where this module is imported too

    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        return _build(variant)


def _build(variant: str) -> Path:
    import pybind11

    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    kernels += [HERE / "faulty.cu"] if variant == "watched" else []
    others = [ROOT / "csrc/cuda/bind.cpp", *sorted(HERE.glob("*.cpp"))]
    sources = [*kernels, *others]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h"), *HERE.glob("*.h")]
    flags = {"plain": FLAGS, "sanitized": [*FLAGS, *SANITIZERS], "watched": [*FLAGS, "-DRAPIDIN_WATCH"]}[
        variant
    ]
    of_kernels = [*flags, *(WATCHED if variant == "watched" else [])]
    name = _name(variant)
    common = [f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    common += [f"-DRAPIDIN_MODULE={name}", "-DRAPIDIN_EMULATE"]
    seen = hashlib.sha256(sysconfig.get_config_var("EXT_SUFFIX").encode())
    for path in sorted(headers):
        seen.update(path.read_bytes())
    units, compiling = [], []
    for source in sources:
        command = [
            COMPILER,
            *(of_kernels if source in kernels else flags),
            *common,
            "-c",
            "-x",
            "c++",
            str(source),
        ]
        of_unit = seen.copy()
        of_unit.update(repr(command).encode() + source.read_bytes())
        units.append(FOLDER / f"{source.name}.{of_unit.hexdigest()[:16]}.o")
        if not units[-1].exists():
            scratch = units[-1].with_suffix(f".{os.getpid()}")
            compiling.append((scratch, units[-1], subprocess.Popen([*command, "-o", str(scratch)])))
    for scratch, unit, process in compiling:
        if process.wait():
            raise RuntimeError("the emulated kernels did not compile; see above")
        os.replace(scratch, unit)
    of_all = hashlib.sha256(" ".join(unit.name for unit in units).encode()).hexdigest()[:16]
    built = FOLDER / of_all / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        scratch = built.with_suffix(f".{os.getpid()}")
        link = [COMPILER, "-shared", *(SANITIZERS if variant == "sanitized" else []), *map(str, units)]
        subprocess.run([*link, "-o", str(scratch)], check=True)
        os.replace(scratch, built)
    return built


if __name__ == "__main__":  # before the tests, which would wait for it
    build("plain")
