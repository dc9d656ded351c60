"""Builds the extensions by csrc/build_extensions.py; the rest is in pyproject.toml.

RAPIDIN_EXTENSIONS=built: nothing is compiled; csrc/build_extensions.py or `build_ext --inplace` has done it
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import build_extensions


class Build(build_ext):
    """build_ext whose extensions build_extensions.py compiles."""

    def build_extension(self, ext: Extension) -> None:
        jobs = int(os.environ.get("RAPIDIN_BUILD_JOBS") or 1)
        out = Path(self.get_ext_fullpath(ext.name))
        try:
            build_extensions.build(chosen[ext.name], out, jobs=jobs, force=bool(self.force))
        except build_extensions.BuildError as error:
            raise CompileError(str(error)) from None


built = os.environ.get("RAPIDIN_EXTENSIONS") == "built"
chosen = {} if built else {extension.name: extension for extension in build_extensions.extensions()}
setup(
    ext_modules=[Extension(name, e.sources, optional=e.optional) for name, e in chosen.items()],
    cmdclass={"build_ext": Build},
)
