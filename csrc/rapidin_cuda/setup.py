"""The distribution rapidin-cuda: the CUDA kernels of csrc/cuda alone, compiled by csrc/build_extensions.py.

It is built inside a checkout of rapidin, whose version it has: python -m build --wheel csrc/rapidin_cuda
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import build_extensions  # noqa: E402

NAME = "rapidin_cuda._cuda"


class Build(build_ext):
    """build_ext whose one extension build_extensions.py compiles."""

    def build_extension(self, ext: Extension) -> None:
        jobs = int(os.environ.get("RAPIDIN_BUILD_JOBS") or 1)
        try:
            out = Path(self.get_ext_fullpath(ext.name)).resolve()  # the compilers run in the checkout's root
            build_extensions.build(kernels, out, jobs=jobs)
        except build_extensions.BuildError as error:
            raise CompileError(str(error)) from None


def version() -> str:
    """The version of the checkout, from the one place where it is written."""
    text = (build_extensions.ROOT / "rapidin/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found, "rapidin/__init__.py has no line __version__"
    return found[1]


os.environ["RAPIDIN_CUDA"] = "on"
kernels = build_extensions.cuda_extension(NAME, build_extensions.RELEASED_ARCHS)
shutil.copy(build_extensions.ROOT / "LICENSE", HERE / "LICENSE")
setup(
    version=version(),
    install_requires=[f"rapidin=={version()}"],
    ext_modules=[Extension(NAME, kernels.sources)],
    cmdclass={"build_ext": Build},
)
