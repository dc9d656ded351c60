"""What several files say of the package agrees: its version, its dependencies, the Pythons that it is for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rapidin

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "xxhash": "python-xxhash"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def workflow(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows" / name).read_text())
    return read


def test_the_version_is_in_one_place(project: dict[str, Any]) -> None:
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "rapidin.__version__"}
    assert f'__version__ = "{rapidin.__version__}"' in (ROOT / "rapidin/__init__.py").read_text().splitlines()


def test_the_citation_and_the_changelog_know_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rapidin.__version__
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]" or headings[0].startswith(f"[{rapidin.__version__}] - ")


def test_the_changelog_has_the_sections_of_keep_a_changelog() -> None:
    sections = re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    known = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    assert sections
    assert set(sections) <= set(known)


def test_rapidin_cuda_is_of_this_version(tmp_path: Path) -> None:
    """It needs the rapidin of its own version; its sources are named by the build of the checkout."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_120\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "CUDACXX": str(nvcc), "RAPIDIN_CUDA_ARCHS": ""}
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT / "csrc/rapidin_cuda", env=environment, check=True)
    lines = (tmp_path / "rapidin_cuda.egg-info/PKG-INFO").read_text().splitlines()
    assert f"Version: {rapidin.__version__}" in lines
    assert f"Requires-Dist: rapidin=={rapidin.__version__}" in lines


def test_the_extra_cuda_leaves_the_version_to_rapidin_cuda(project: dict[str, Any]) -> None:
    (needed,) = project["project"]["optional-dependencies"]["cuda"]
    assert needed.partition(" ;")[0] == "rapidin-cuda"


def test_the_conda_recipe_needs_what_the_package_needs(project: dict[str, Any]) -> None:
    recipe = (ROOT / ".ci/conda/meta.yaml").read_text()
    (run,) = re.findall(r"^  run:\n((?:    - .*\n)+)", recipe, re.MULTILINE)
    needed = {line.strip("- ").partition("#")[0].replace(" ", "") for line in run.splitlines()}
    wanted = {f"python{project['project']['requires-python']}"}
    for requirement in project["project"]["dependencies"]:
        name, bound = requirement.partition(";")[0].replace(" ", "").split(">=")
        wanted.add(f"{CONDA_NAMES.get(name, name)}>={bound}")
    assert needed == wanted


def test_all_pythons_are_built_and_tested(project: dict[str, Any]) -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = [c.removeprefix(prefix) for c in project["project"]["classifiers"] if c.startswith(prefix)]
    wheels = " ".join(f"cp3{minor}-*" for minor in minors)
    assert project["tool"]["cibuildwheel"]["build"] == wheels
    cuda = tomllib.loads((ROOT / "csrc/rapidin_cuda/pyproject.toml").read_text())
    assert cuda["tool"]["cibuildwheel"]["build"] == wheels
    tested = workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{minor}" for minor in minors]


def test_only_the_last_job_of_a_release_may_publish() -> None:
    jobs = workflow("release.yml")["jobs"]
    allowed = {name for name, job in jobs.items() if "write" in str(job.get("permissions", {}))}
    assert allowed == {"publish"}
    assert workflow("release.yml")["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
