"""Compiles `rapidin.ops._cpu` and, where nvcc is found, `rapidin.ops._cuda`, with a C++ compiler and nvcc
alone.

python csrc/build_extensions.py [--force]      # into rapidin/, on all cores

setup.py uses this file too. It needs neither setuptools nor an installed pybind11, whose headers also come
with torch. Objects stay in build/objects, named by a hash of all their inputs, so that unchanged sources are
not compiled again.

RAPIDIN_CUDA=auto (where nvcc is found) | on (or fail) | off
RAPIDIN_CUDA_ARCHS="80 90": machine code for these; the last also as PTX, for what comes after it. By default
    those of 80, 90 and 100 that nvcc knows
RAPIDIN_CUDA_FLAGS: more flags for nvcc
RAPIDIN_BUILD_JOBS=N: files compiled at a time, by default one under setup.py and one for each core here
nvcc is looked for at CUDACXX, in CUDA_HOME/bin and on the PATH; the C++ compiler at CXX. CXXFLAGS and LDFLAGS
are used.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MACHINE = platform.machine().lower()
WINDOWS = sys.platform == "win32"
CPU, CUDA = "csrc/cpu/", "csrc/cuda/"
# No contraction: the rounding of a product and a sum must not depend on how a loop was unrolled.
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fwrapv", "-g0", "-ffp-contract=off", "-fno-math-errno"]
# On Windows: Clang against the libraries of MSVC, whose runtime Python uses too.
THREADS = [] if WINDOWS else ["-pthread"]
CXX_FLAGS += ["-fms-runtime-lib=dll"] if WINDOWS else ["-fPIC", "-fvisibility=hidden", *THREADS]
# One unit per instruction set, each with flags of its own: the rest must run on any machine.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
AVX512 += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 finds such uses in its own headers
NEON = ["-DRAPIDIN_NEON=1"]
X86_UNITS = {"isa_avx2.cpp": AVX2, "isa_avx512.cpp": AVX512}
ARM64_UNITS = {"isa_neon.cpp": NEON, "isa_neon_i8mm.cpp": [*NEON, "-march=armv8.2-a+i8mm"]}
# By machine: the macro that tells csrc/cpu/run.cpp of its units, and the flags of each.
UNITS = {
    **dict.fromkeys(("x86_64", "amd64"), ("-DRAPIDIN_X86=1", X86_UNITS)),
    **dict.fromkeys(("aarch64", "arm64"), ("-DRAPIDIN_ARM64=1", ARM64_UNITS)),
}
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"]
ARCHS = ("80", "90", "100")
RELEASED_ARCHS = (*ARCHS, "120")  # of the wheels of rapidin-cuda; machine code runs within its major version


class BuildError(Exception):
    """A compiler failed or is missing; the message holds what it said."""


@dataclass(frozen=True)
class Extension:
    """One extension module. macros: for its C++ sources, not for CUDA's. optional: the package does without
    it where it cannot be built. gpu_codes: what nvcc compiles for."""

    name: str
    sources: list[str]
    macros: list[str]
    link: list[str]
    optional: bool = False
    gpu_codes: list[str] = field(default_factory=list)


def find_nvcc() -> str | None:
    """nvcc, or None where CUDA kernels are not to be built."""
    wanted = os.environ.get("RAPIDIN_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        sys.exit(f"RAPIDIN_CUDA must be auto, on or off, got {wanted!r}")
    if wanted == "on" and not sys.platform.startswith("linux"):
        sys.exit("RAPIDIN_CUDA=on, but the CUDA kernels are built on Linux alone: leave RAPIDIN_CUDA out")
    if wanted == "off" or not sys.platform.startswith("linux"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("CUDACXX") or (home and f"{home}/bin/nvcc")
    found = shutil.which(named or "nvcc")
    if found is None and wanted == "on":
        sys.exit("RAPIDIN_CUDA=on, but nvcc was not found: put it on the PATH, or set CUDACXX")
    return found


def gpu_codes(nvcc: str, usual: tuple[str, ...] = ARCHS) -> list[str]:
    """The targets in nvcc's names: machine code sm_80, .. and PTX compute_100, for the requested
    architectures, or for those usual ones that this nvcc knows."""
    asked = os.environ.get("RAPIDIN_CUDA_ARCHS", "").split()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    archs = asked or [arch for arch in usual if f"sm_{arch}" in known]
    return [f"sm_{arch}" for arch in archs] + [f"compute_{arch}" for arch in archs[-1:]]


def arch_flags(codes: list[str]) -> list[str]:
    return [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes]


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders that may hold cudart_static, by what nvcc itself would link with."""
    shown = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next((line.split("TOP=")[1] for line in shown.splitlines() if line.startswith("#$ TOP=")), "")
    folders = (Path(top) / name for name in ("lib64", "lib", "targets/x86_64-linux/lib"))
    return [str(folder.resolve()) for folder in folders if folder.is_dir()]


def cpu_sources(machine: str = MACHINE) -> tuple[list[str], dict[str, list[str]]]:
    """The macros of the CPU kernels on a machine, as platform.machine() names it, and their sources, each
    with the flags that are its own; bind.cpp, which knows Python, comes besides."""
    macro, units = UNITS.get(machine, (None, {}))
    names = ["isa_base.cpp", "pool.cpp", "run.cpp", "tensor_sketch.cpp", "topk_scan.cpp", *units]
    return [macro] if macro else [], {CPU + name: units.get(name, []) for name in sorted(names)}


def extensions() -> list[Extension]:
    """Those that are to be built here."""
    macros, sources = cpu_sources()
    listed = [Extension("rapidin.ops._cpu", [CPU + "bind.cpp", *sources], macros, [])]
    if find_nvcc() is not None:
        listed.append(cuda_extension("rapidin.ops._cuda", ARCHS))
    return listed


def cuda_extension(name: str, archs: tuple[str, ...]) -> Extension:
    """The CUDA kernels as the module `name`, by the nvcc that there is. archs: by default, as gpu_codes takes
    them."""
    nvcc = find_nvcc()
    assert nvcc is not None
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CUDA).glob("*.cu"))
    # The runtime is linked in: whichever else there is, and without a GPU it loads.
    link = [f"-L{folder}" for folder in cuda_libraries(nvcc)]
    link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # With auto, an nvcc too old for the sources leaves a package without the extension, and says so.
    optional = os.environ.get("RAPIDIN_CUDA", "auto") == "auto"
    codes = gpu_codes(nvcc, archs)
    macros = ["-DRAPIDIN_MODULE=_cuda", f'-DRAPIDIN_ARCHS="{" ".join(codes)}"']
    return Extension(name, [CUDA + "bind.cpp", *kernels], macros, link, optional, codes)


def pybind11_headers() -> str:
    """The folder with pybind11/pybind11.h: the package's, or torch's copy of it, which is not imported."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec is not None else []:
            if (Path(folder) / "include/pybind11/pybind11.h").exists():
                return str(Path(folder) / "include")
    raise BuildError("pybind11's headers are neither in the package pybind11 nor in torch; install pybind11")


def cxx() -> list[str]:
    """The C++ compiler and its constant options."""
    others = ("clang++",) if WINDOWS else (sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    for named in (os.environ.get("CXX"), *others):
        words = (named or "").split()
        if words and shutil.which(words[0]):
            return words
    raise BuildError("no C++ compiler was found: install one, or set CXX")


def _commands(extension: Extension) -> dict[str, list[str]]:
    """The command that compiles each source, without the object's path."""
    more = os.environ.get("CXXFLAGS", "").split()
    include = [f"-I{pybind11_headers()}", f"-I{sysconfig.get_paths()['include']}"]
    plain = [*cxx(), *CXX_FLAGS, *include, *extension.macros]
    commands = {}
    for source in extension.sources:
        if source.endswith(".cu"):
            nvcc = find_nvcc()
            assert nvcc is not None
            asked = os.environ.get("RAPIDIN_CUDA_FLAGS", "").split()
            commands[source] = [nvcc, *NVCC_FLAGS, *asked, *arch_flags(extension.gpu_codes), "-c", source]
        else:
            commands[source] = [*plain, *cpu_sources()[1].get(source, []), *more, "-c", source]
    return commands


def _digest(command: list[str]) -> str:
    """A hash of all known inputs of a command's object."""
    digest = hashlib.sha256(repr(command).encode())
    compiler = shutil.which(command[0])
    if compiler is not None:
        digest.update(repr(Path(compiler).resolve().stat().st_mtime_ns).encode())
    headers = sorted((ROOT / "csrc").rglob("*.*h"))
    for path in (ROOT / command[-1], *headers, Path(pybind11_headers()) / "pybind11/detail/common.h"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout.strip():
        print(done.stdout.rstrip(), file=sys.stderr, flush=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nended with {done.returncode}: {done.stdout[-4000:]}")


def _object(name: str, command: list[str], force: bool, told: bool) -> Path:
    """The object of a command, compiled if it does not exist."""
    folder = ROOT / "build/objects" / name
    stem = command[-1].replace("/", ".")
    made = folder / f"{stem}.{_digest(command)}.o"
    if force or not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        scratch = folder / f"{stem}.{os.getpid()}.part.o"
        _run([*command, "-o", str(scratch)])
        for other in folder.glob(f"{stem}.*.o"):
            if other != scratch and ".part." not in other.name:
                other.unlink(missing_ok=True)
        scratch.replace(made)
        if told:
            print(f"compiled {command[-1]}: {time.monotonic() - start:.1f} s", flush=True)
    return made


def build(extension: Extension, out: Path, *, jobs: int = 1, force: bool = False, told: bool = False) -> None:
    """Compile an extension to the file `out`. Raises BuildError with what the compiler said."""
    commands = _commands(extension)
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        objects = list(pool.map(lambda c: _object(extension.name, c, force, told), commands.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f"{out.name}.{os.getpid()}.part")
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    flags = [*os.environ.get("LDFLAGS", "").split(), *THREADS]
    if WINDOWS:
        flags += ["-fuse-ld=lld", f"-L{Path(sys.base_prefix) / 'libs'}"]
    _run([*cxx(), *shared, *flags, *map(str, objects), *extension.link, "-o", str(scratch)])
    scratch.replace(out)  # atomic: a process may have the old one loaded


def in_place(extension: Extension) -> Path:
    """The path of an extension in this checkout."""
    return ROOT / f"{extension.name.replace('.', '/')}{sysconfig.get_config_var('EXT_SUFFIX')}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--force", action="store_true", help="recompile unchanged sources too")
    parser.add_argument("--only", metavar="NAME", help="build only this extension, _cpu or _cuda")
    args = parser.parse_args()
    jobs = int(os.environ.get("RAPIDIN_BUILD_JOBS") or os.cpu_count() or 1)
    chosen = [e for e in extensions() if args.only in (None, e.name.rpartition(".")[2])]
    status = 0
    # All of them at a time: each alone would wait for its slowest source.
    with ThreadPoolExecutor(len(chosen) or 1) as pool:
        running = [
            (e, pool.submit(build, e, in_place(e), jobs=jobs, force=args.force, told=True)) for e in chosen
        ]
        for extension, future in running:
            try:
                future.result()
                print(f"built {extension.name}", flush=True)
            except BuildError as error:
                in_place(extension).unlink(missing_ok=True)  # so that no outdated one is used
                print(f"{extension.name} was not built: {error}", file=sys.stderr, flush=True)
                status = 0 if extension.optional and not status else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
