"""Builds csrc/cuda for the CPU, with emulator.h in place of CUDA, and imports it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
SANITIZERS = [
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]


@cache
def emulated() -> ModuleType:
    """The extension with emulated kernels; built where its sources have changed.

    RAPIDIN_SANITIZE=1 in the environment builds it with the address and undefined-behaviour sanitizers, for a
    process in which their library is loaded first.
    """
    import pybind11

    sanitize = os.environ.get("RAPIDIN_SANITIZE") == "1"
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/cuda/bind.cpp", HERE / "emulator.cpp"]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h"), *HERE.glob("*.h")]
    flags = [*FLAGS, *(SANITIZERS if sanitize else [])]
    digest = hashlib.sha256(repr((flags, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in sorted({*sources, *headers}):
        digest.update(path.read_bytes())
    name = f"_cuda_emulated{'_sanitized' if sanitize else ''}"
    folder = ROOT / "build" / "emulated" / digest.hexdigest()[:16]
    built = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
        scratch.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        compiler = os.environ.get("CXX", "c++")
        compiling = []
        for source in sources:
            unit = scratch / f"{source.name}.o"
            command = [
                compiler,
                *flags,
                *includes,
                f"-DRAPIDIN_MODULE={name}",
                "-DRAPIDIN_EMULATE",
                "-c",
                "-x",
                "c++",
            ]
            compiling.append((unit, subprocess.Popen([*command, str(source), "-o", str(unit)])))
        ended = [process.wait() for _, process in compiling]
        if any(ended):
            raise RuntimeError("the emulated kernels did not compile; see above")
        units = [str(unit) for unit, _ in compiling]
        library = scratch / built.name
        link = [compiler, "-shared", *(SANITIZERS if sanitize else []), *units, "-o", str(library)]
        subprocess.run(link, check=True)
        folder.mkdir(exist_ok=True)
        os.replace(library, built)
        shutil.rmtree(scratch)
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
