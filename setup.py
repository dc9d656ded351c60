"""Builds `rapidin._cpu` and, where nvcc is found, `rapidin._cuda`. The rest is in pyproject.toml.

RAPIDIN_CUDA=auto (where nvcc is found) | on (or fail) | off
RAPIDIN_CUDA_ARCHS="80 90": machine code for these; the last also as PTX, for what comes after it. By default
    those of 80, 90 and 100 that nvcc knows
RAPIDIN_CUDA_FLAGS: more flags for nvcc
RAPIDIN_BUILD_JOBS=N: files compiled at a time, by default one
RAPIDIN_EXTENSIONS=built: nothing is compiled; `build_ext --inplace` has done it
nvcc is looked for at CUDACXX, in CUDA_HOME/bin and on the PATH.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
CPU = "csrc/cpu/"
# One unit per instruction set, each with flags of its own: the rest must run on any machine.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
AVX512 += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 finds such uses in its own headers
FLAGS = {CPU + "isa_avx2.cpp": AVX2, CPU + "isa_avx512.cpp": AVX512} if X86 else {}


CUDA = "csrc/cuda/"
ARCHS = ("80", "90", "100")
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"]
NVCC_FLAGS += os.environ.get("RAPIDIN_CUDA_FLAGS", "").split()


def find_nvcc() -> str | None:
    """nvcc, or None where CUDA kernels are not to be built."""
    wanted = os.environ.get("RAPIDIN_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        sys.exit(f"RAPIDIN_CUDA must be auto, on or off, got {wanted!r}")
    if wanted == "off":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("CUDACXX") or (home and f"{home}/bin/nvcc")
    found = shutil.which(named or "nvcc")
    if found is None and wanted == "on":
        sys.exit("RAPIDIN_CUDA=on, but there is no nvcc: put it on the PATH, or say where with CUDACXX")
    return found


def gpu_codes(nvcc: str) -> list[str]:
    """What is compiled for, as nvcc names it: machine code sm_80, .. and PTX compute_100.

    Of the architectures asked for, or of those of ARCHS that this nvcc knows."""
    asked = os.environ.get("RAPIDIN_CUDA_ARCHS", "").split()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    archs = asked or [arch for arch in ARCHS if f"sm_{arch}" in known]
    return [f"sm_{arch}" for arch in archs] + [f"compute_{arch}" for arch in archs[-1:]]


def arch_flags(codes: list[str]) -> list[str]:
    return [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes]


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders that may hold cudart_static, by what nvcc itself would link with."""
    shown = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next((line.split("TOP=")[1] for line in shown.splitlines() if line.startswith("#$ TOP=")), "")
    folders = (Path(top) / name for name in ("lib64", "lib", "targets/x86_64-linux/lib"))
    return [str(folder.resolve()) for folder in folders if folder.is_dir()]


class BuildWithFlags(build_ext):
    """build_ext that adds FLAGS[source] to the compilation of that source, and takes .cu to nvcc."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile
        self.compiler.src_extensions.append(".cu")

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            if src.endswith(".cu"):
                self.spawn([nvcc, *NVCC_FLAGS, *gpu_flags, "-c", src, "-o", obj])
            else:
                compile_one(obj, src, ext, cc_args, extra_postargs + FLAGS.get(src, []), pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extensions()


sources = ["bind.cpp", "isa_base.cpp", "pool.cpp", "run.cpp", "tensor_sketch.cpp", "topk_scan.cpp"]
sources += ["isa_avx2.cpp", "isa_avx512.cpp"] if X86 else []
headers = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
extensions = [
    Pybind11Extension(
        "rapidin._cpu",
        sources=sorted(CPU + name for name in sources),
        depends=headers,
        define_macros=[("RAPIDIN_X86", "1")] if X86 else [],
        cxx_std=17,
        # No contraction: how a loop was unrolled must not decide how a product and a sum are rounded.
        extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
        extra_link_args=["-pthread"],
    )
]

nvcc = find_nvcc()
if nvcc is not None:
    codes = gpu_codes(nvcc)
    gpu_flags = arch_flags(codes)
    extensions.append(
        Pybind11Extension(
            "rapidin._cuda",
            sources=[CUDA + "bind.cpp", *sorted(str(path) for path in Path(CUDA).glob("*.cu"))],
            depends=headers,
            define_macros=[("RAPIDIN_MODULE", "_cuda"), ("RAPIDIN_ARCHS", f'"{" ".join(codes)}"')],
            # With auto, an nvcc too old for the sources leaves a package without the extension, and says so.
            optional=os.environ.get("RAPIDIN_CUDA", "auto") == "auto",
            cxx_std=17,
            # The runtime is linked in: whichever else there is, and without a GPU it loads.
            library_dirs=cuda_libraries(nvcc),
            libraries=["cudart_static", "dl", "rt", "pthread"],
        )
    )

ParallelCompile("RAPIDIN_BUILD_JOBS", default=1).install()
if os.environ.get("RAPIDIN_EXTENSIONS") == "built":
    extensions = []
setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithFlags})
