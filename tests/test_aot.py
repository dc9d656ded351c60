"""Triton kernels compiled for GPUs without one fit the registers; so do the CUDA kernels that were built."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHS = (80, 90, 100)

# Bytes of stack a thread, which is where spilled registers go, of launches and kernels that need any.
STACK = {
    "topk_merge_kernel": 24,  # runs once a scan
    "linear_sketch bf16 64": 24,  # these two on sm_80 alone
    "linear_sketch bf16 512": 96,
    "linear_sketch bf16 1024": 200,
    "linear_sketch fp16 512": 368,
    "linear_sketch fp32 512": 368,
}
SHARED = 163 << 10  # of a block on sm_80; sm_90 and sm_100 have 227 KB


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "aot.py")],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_launch_is_compiled_for_every_architecture(compiled):
    launches = {row["launch"] for row in compiled}
    ops = {name.split()[0] for name in launches}
    assert ops >= {"linear_sketch", "flat_sketch", "topk_scan", "pack", "hash_words"}
    for name in launches:
        assert {row["arch"] for row in compiled if row["launch"] == name} == set(ARCHS), name


def test_kernels_fit_the_chip(compiled):
    for row in compiled:
        where = f"{row['launch']} ({row['kernel']}) on sm_{row['arch']}"
        assert row["local"] == 0, where
        allowed = max(STACK.get(row["launch"], 0), STACK.get(row["kernel"], 0))
        assert row["stack"] <= allowed, f"{where}: {row['stack']} bytes of stack"
        assert row["registers"] * row["warps"] * 32 <= 65536, where
        assert row["shared"] <= SHARED, where


def test_sketches_are_summed_on_tensor_cores(compiled):
    for row in compiled:
        if row["kernel"] == "linear_sketch_kernel" and row["arch"] < 100:  # there they have other names
            assert row["mma"] > 0, row["launch"]


@pytest.fixture(scope="module")
def built():
    """Resources of the kernels in the extension: {arch: {kernel: (registers, stack, shared)}}."""
    triton = pytest.importorskip("triton")
    try:
        from rapidin import _cuda
    except ImportError:
        pytest.skip("built without nvcc")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([tool, "-res-usage", _cuda.__file__], capture_output=True, text=True, check=True)
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    arch, name = 0, ""
    for line in shown.stdout.splitlines():
        if wanted := re.match(r"arch = sm_(\d+)", line.strip()):
            arch = int(wanted[1])
        elif wanted := re.match(r"Function (\S+):", line.strip()):
            name = wanted[1]
        elif wanted := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found.setdefault(arch, {})[name] = tuple(map(int, wanted.groups()))
    return found


def test_cuda_kernels_spill_nothing(built):
    assert built
    for arch, kernels in built.items():
        assert any("linear_sketch" in name for name in kernels)
        for name, (registers, stack, _) in kernels.items():
            # topk_scan of packed rows with blocks, more than 2 queries
            allowed = 8 if "ScanSteps" in name and "ELi2E" in name else 0
            assert stack <= allowed, f"{name} on sm_{arch}: {stack} bytes of stack"
            assert registers <= 255
