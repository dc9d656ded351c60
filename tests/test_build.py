"""The extension knows nothing of torch, and no unit lends code for one instruction set to another."""

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from inputs import INSTRUCTION_SETS, normal, torch_threads

from rapidin import _cpu, ops

ROOT = Path(__file__).parents[1]


def test_the_extension_loads_without_torch():
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('rapidin._cpu', {_cpu.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert module.supported_sets()[0] == 'base'; "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_build_needs_no_torch():
    assert "torch" not in (ROOT / "setup.py").read_text()
    requires = (ROOT / "pyproject.toml").read_text().split("requires = ")[1].splitlines()[0]
    assert "torch" not in requires


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the checkout in which a wheel was built, as `pip wheel .` does it."""
    copy = tmp_path_factory.mktemp("wheel") / "rapidin"
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", copy / "wheels"]
    environment = {**os.environ, "RAPIDIN_CUDA": "off", "RAPIDIN_BUILD_JOBS": str(os.cpu_count() or 1)}
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, copy], env=environment, check=True)
    return copy


def test_the_wheel_holds_every_file_of_the_package(built):
    (wheel,) = (built / "wheels").glob("rapidin-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    wanted = {
        str(path.relative_to(built))
        for path in (built / "rapidin").rglob("*")
        if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts
    }
    assert wanted - inside == set()
    assert any(name.startswith("rapidin/_cpu.") and name.endswith((".so", ".pyd")) for name in inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in inside)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols with nm")
def test_units_share_no_symbols(built):
    """A weak symbol of the AVX2 unit could be the one that the portable code is linked with."""
    units = list((built / "build").glob("temp*/csrc/cpu/isa_*.o"))
    assert units
    for unit in units:
        listed = subprocess.run(
            ["nm", "-C", "--defined-only", unit], check=True, capture_output=True, text=True
        )
        shared = [line for line in listed.stdout.splitlines() if line.split()[1] in "WVuT"]
        assert shared == [], unit.name


def test_the_best_set_is_used():
    assert _cpu.current_set() == INSTRUCTION_SETS[-1]
    if "avx2" in torch.backends.cpu.get_cpu_capability().lower():
        assert "avx2" in INSTRUCTION_SETS


def test_several_python_threads_may_call_at_once():
    x, q = normal(500, 300), normal(3, 300, seed=1)
    wanted = ops.topk_scan(x, q, 9), ops.flat_sketch([x], 256, seed=1)
    wrong = []

    def work():
        for _ in range(20):
            got = ops.topk_scan(x, q, 9), ops.flat_sketch([x], 256, seed=1)
            if not (torch.equal(got[0][1], wanted[0][1]) and torch.equal(got[1], wanted[1])):
                wrong.append(got)

    with torch_threads(2):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    code = (
        # the package that is tested, not a checkout that happens to be the working folder
        f"import sys; sys.path.insert(0, {str(Path(_cpu.__file__).parents[1])!r})\n"
        "import os, torch; from rapidin import ops; torch.set_num_threads(2); x = torch.ones(500, 600);"
        "ops.topk_scan(x, x[:2], 3); pid = os.fork();\n"
        "if pid == 0: ops.topk_scan(x, x[:2], 3); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
