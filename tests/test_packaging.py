"""What several files say of the package agrees: its version, its dependencies, the Pythons that it is for."""

from __future__ import annotations

import json
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


WORKFLOWS = sorted(path.name for path in (ROOT / ".github/workflows").iterdir())


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_run_what_there_is(name: str) -> None:
    """Scripts and folders that steps name are in the repository, and targets of make in the Makefile."""
    targets = {
        target
        for line in re.findall(r"^([^\t#\n]+?):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for target in line.split()
    }
    assert {"test", "test-full", "properties", ".venv/installed"} <= targets
    for job in workflow(name)["jobs"].values():
        assert "uses" in job or "runs-on" in job
        for step in job.get("steps", ()):
            assert ("uses" in step) is not ("run" in step), step
            words = step.get("run", "").split()
            if words[:1] == ["make"]:
                assert set(words[1:]) <= targets
            named = [word for word in words if word.startswith((".ci/", "tests/", "bench/"))]
            assert all((ROOT / word).exists() for word in named), named


def test_each_night_runs_the_fuzzer_the_properties_and_all_tests() -> None:
    nightly = workflow("nightly.yml")
    assert [list(each) for each in nightly[True]["schedule"]] == [["cron"]]  # YAML 1.1 reads "on" as true
    steps = [step["run"] for job in nightly["jobs"].values() for step in job["steps"] if "run" in step]
    assert "make properties" in steps
    assert ".ci/run" in steps
    (fuzzer,) = (step for step in steps if "fuzz_cache.py" in step)
    script = (ROOT / "tests/support/fuzz_cache.py").read_text()
    assert set(re.findall(r"--\w+", fuzzer)) <= set(re.findall(r'add_argument\("(--\w+)"', script))


def test_the_report_on_coverage_has_lines_branches_and_modules_below_its_limit(tmp_path: Path) -> None:
    def module(lines: int, percent: float) -> dict[str, Any]:
        return {"summary": {"num_statements": lines, "percent_covered": percent}}

    totals = {"covered_lines": 19, "num_statements": 20, "covered_branches": 3, "num_branches": 8}
    files = {"b.py": module(10, 89.9), "a.py": module(5, 70.0), "c.py": module(5, 90.0), "d.py": module(0, 0)}
    (tmp_path / "c.json").write_text(json.dumps({"totals": totals, "files": files}))
    command = [sys.executable, ROOT / ".ci/coverage.py", tmp_path / "c.json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        " 70.0%  a.py",
        " 89.9%  b.py",
        "95.0% of 20 lines in 3 modules",
        "37.5% of 8 branches in 3 modules",
        "2 modules have less than 90%",
    ]


def test_only_the_last_job_of_a_release_may_publish() -> None:
    jobs = workflow("release.yml")["jobs"]
    allowed = {name for name, job in jobs.items() if "write" in str(job.get("permissions", {}))}
    assert allowed == {"publish"}
    assert workflow("release.yml")["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
