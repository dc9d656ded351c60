"""Builds `rapidin._cpu`. Everything else about the package is in pyproject.toml."""

import platform

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
CPU = "csrc/cpu/"
# One unit per instruction set, each with flags of its own: the rest must run on any machine.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 finds them in its own intrinsics
FLAGS = {CPU + "isa_avx2.cpp": AVX2, CPU + "isa_avx512.cpp": AVX512} if X86 else {}


class BuildWithFlags(build_ext):
    """build_ext that adds FLAGS[source] to the compilation of that source."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            compile_one(obj, src, ext, cc_args, extra_postargs + FLAGS.get(src, []), pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extensions()


sources = ["bind.cpp", "isa_base.cpp", "pool.cpp", "run.cpp", "topk_scan.cpp"]
sources += ["isa_avx2.cpp", "isa_avx512.cpp"] if X86 else []
extension = Pybind11Extension(
    "rapidin._cpu",
    sources=sorted(CPU + name for name in sources),
    depends=["csrc/sketch_hash.h", "csrc/args.h"]
    + [
        CPU + name + ".h"
        for name in (
            "flat_sketch",
            "kernels",
            "linear_sketch",
            "pack",
            "packed",
            "packed_scan",
            "pool",
            "run",
            "topk_scan",
            "vec8",
            "vec_bytes",
            "vec_wide",
        )
    ],
    define_macros=[("RAPIDIN_X86", "1")] if X86 else [],
    cxx_std=17,
    # No contraction: how a loop was unrolled must not decide how a product and a sum are rounded.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithFlags})
