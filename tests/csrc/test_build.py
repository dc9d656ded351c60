"""The extension knows nothing of torch, and no unit lends code for one instruction set to another."""

import importlib.util
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

from rapidin import ops
from rapidin.ops import _cpu

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]


def test_the_extension_loads_without_torch():
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('rapidin.ops._cpu', {_cpu.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert module.supported_sets()[0] == 'base'; "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_build_needs_no_torch():
    imports = [
        line
        for name in ("setup.py", "csrc/build_extensions.py")
        for line in (ROOT / name).read_text().splitlines()
        if line.strip().startswith(("import ", "from "))
    ]
    assert not any("torch" in line for line in imports)
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
    assert any(name.startswith("rapidin/ops/_cpu.") and name.endswith((".so", ".pyd")) for name in inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not any(name.startswith(("tests/", "bench/", "studies/", "csrc/")) for name in inside)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols with nm")
def test_units_share_no_symbols(built):
    """A weak symbol of the AVX2 unit could be the one that the portable code is linked with."""
    units = list((built / "build/objects").glob("*/csrc.cpu.isa_*.o"))
    assert units
    for unit in units:
        listed = subprocess.run(
            ["nm", "-C", "--defined-only", unit], check=True, capture_output=True, text=True
        )
        shared = [line for line in listed.stdout.splitlines() if line.split()[1] in "WVuT"]
        assert shared == [], unit.name


# ---- csrc/build_extensions.py, by compilers that only note how they were called ----


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """A checkout with a few sources; its c++ and nvcc note what they were told, and make a file."""
    for name in ("cpu/bind.cpp", "cpu/topk_scan.cpp", "cuda/bind.cpp", "cuda/one.cu", "cuda/two.cu", "one.h"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(name)
    for name in ("c++", "nvcc"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            "#!/bin/sh\n"
            f'echo {name} "$@" >>{tmp_path}/calls\n'
            'case "$*" in *WRONG*) echo "no such thing"; exit 1;; esac\n'
            'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made >"$2"; shift; done\n'
        )
        tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "bin/c++"))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "bin/nvcc"))
    monkeypatch.setenv("RAPIDIN_CUDA", "on")
    monkeypatch.setenv("RAPIDIN_CUDA_ARCHS", "90")
    for name in ("CXXFLAGS", "LDFLAGS", "RAPIDIN_CUDA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    script = Path(shutil.copy(ROOT / "csrc/build_extensions.py", tmp_path / "csrc"))
    spec = importlib.util.spec_from_file_location("build_extensions_of_the_checkout", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def built_by(module, tmp_path):
    """The calls of the compilers while `_cuda` is built."""
    (tmp_path / "calls").unlink(missing_ok=True)
    extension = next(e for e in module.extensions() if e.name == "rapidin.ops._cuda")
    module.build(extension, module.in_place(extension), jobs=4)
    assert module.in_place(extension).exists()
    calls = (tmp_path / "calls").read_text().splitlines()
    return [call for call in calls if "-dryrun" not in call and "--list" not in call]


def test_only_what_has_changed_is_compiled_again(compilers, tmp_path):
    first = built_by(compilers, tmp_path)
    assert len(first) == 4  # bind.cpp, one.cu, two.cu, and all of them linked
    assert sum("code=sm_90" in call for call in first) == 2
    assert len(built_by(compilers, tmp_path)) == 1
    (tmp_path / "csrc/cuda/two.cu").write_text("other")
    again = built_by(compilers, tmp_path)
    assert [call for call in again if " -c " in call] == [
        call for call in again if "two.cu" in call and "-c" in call
    ]
    assert len(again) == 2
    (tmp_path / "csrc/one.h").write_text("other")
    assert len(built_by(compilers, tmp_path)) == 4


def test_another_architecture_is_compiled_anew(compilers, tmp_path, monkeypatch):
    built_by(compilers, tmp_path)
    monkeypatch.setenv("RAPIDIN_CUDA_ARCHS", "80 90")
    again = built_by(compilers, tmp_path)
    assert sum("code=sm_80" in call for call in again) == 2


def test_a_compiler_that_fails_is_heard(compilers, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPIDIN_CUDA_FLAGS", "WRONG")
    with pytest.raises(compilers.BuildError, match="no such thing"):
        built_by(compilers, tmp_path)


def test_torchs_copy_of_pybind11_will_do(compilers, tmp_path, monkeypatch):
    """Where the package pybind11 is not installed, as on machines that only have torch."""
    find = compilers.importlib.util.find_spec
    monkeypatch.setattr(
        compilers.importlib.util, "find_spec", lambda name: None if name == "pybind11" else find(name)
    )
    assert Path(compilers.pybind11_headers()) == Path(torch.__file__).parent / "include"
    assert len(built_by(compilers, tmp_path)) == 4
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compilers.BuildError, match="install pybind11"):
        compilers.pybind11_headers()


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
        f"import sys; sys.path.insert(0, {str(Path(_cpu.__file__).parents[2])!r})\n"
        "import os, torch; from rapidin import ops; torch.set_num_threads(2); x = torch.ones(500, 600);"
        "ops.topk_scan(x, x[:2], 3); pid = os.fork();\n"
        "if pid == 0: ops.topk_scan(x, x[:2], 3); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
