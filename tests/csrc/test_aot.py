"""Triton kernels compiled for GPUs without one fit the registers; so do the CUDA kernels that were built."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)

# Bytes of stack a thread, which is where spilled registers go, of launches and kernels that need any.
STACK = {
    "topk_merge_kernel": 32,  # runs once a scan
    "topk_scan fp16 1 queries, unaligned": 16,
    "linear_sketch bf16 64": 24,  # these two on sm_80 alone
    "linear_sketch bf16 512": 96,
    "low_rank 64": 192,  # on sm_80 alone
    "fourier_sketch_kernel": 3800,  # at 2,048; less at the others
}
SHARED = 163 << 10  # of a block on sm_80; sm_90 and sm_100 have 227 KB


def run_aot(*arguments):
    """The rows that tests/support/aot.py prints, in a process of its own: here Triton may be interpreted."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "aot.py"), *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def compiled():
    return run_aot()


@pytest.fixture(scope="module")
def launched():
    return run_aot("--launches")


@pytest.fixture(scope="module")
def extreme():
    return run_aot("--extremes")


def test_every_launch_is_compiled(compiled):
    launches = {row["launch"] for row in compiled}
    ops = {name.split()[0] for name in launches}
    assert ops >= {"linear_sketch", "flat_sketch", "topk_scan", "pack", "rotate", "unit_blocks", "hash_words"}
    for op in ops - {"embedding_sketch"}:
        assert {row["arch"] for row in compiled if row["launch"].split()[0] == op} == set(ARCHS), op
    assert {row["arch"] for row in compiled if row["launch"] == "linear_sketch bf16 1024"} == set(ARCHS)


def test_kernels_fit_the_chip(compiled):
    for row in compiled:
        where = f"{row['launch']} ({row['kernel']}) on sm_{row['arch']}"
        assert row["local"] == 0, where
        allowed = max(STACK.get(row["launch"], 0), STACK.get(row["kernel"], 0))
        assert row["stack"] <= allowed, f"{where}: {row['stack']} bytes of stack"
        assert row["registers"] * row["warps"] * 32 <= 65536, where
        assert row["shared"] <= SHARED, where


SUMMED = ("linear_sketch_kernel", "fourier_sketch_kernel", "add_low_rank_kernel")


def test_sketches_are_summed_on_tensor_cores(compiled):
    for row in compiled:
        if row["kernel"] in SUMMED and row["arch"] < 100:  # there they have other names
            assert row["mma"] > 0, row["launch"]


def test_scores_of_packed_rows_are_rounded_as_on_the_cpu(compiled):
    """A product that is not rounded before it is added has other bits; of blocks nobody promises them."""
    packed = re.compile(r"topk_scan (of a code|int8|int4|sign)(?!.*blocks).*")
    found = [
        row for row in compiled if packed.fullmatch(row["launch"]) and row["kernel"] == "topk_scan_kernel"
    ]
    assert len(found) > 6
    for row in found:
        assert row["fused doubles"] == 0, row["launch"]


def test_signatures_are_those_that_triton_announces(launched):
    """What is compiled here is what Triton tells its hook that it would compile: types, constants, alignment,
    options."""
    assert len(launched) > 100
    for row in launched:
        assert row["recorded"] == row["announced"], row["launch"]


def test_signatures_know_what_triton_specialises(launched):
    """64-bit types from 2^31 on; divisibility of what is aligned, and not of what is not."""
    told = {(row["launch"], row["kernel"]): row for row in launched}
    integers = told["signature: integers", "hash_words_kernel"]["recorded"]["signature"]
    assert (integers["first"], integers["n"]) == ("i64", "i32")
    assert "words_ptr" in told["signature: an aligned view", "hash_words_kernel"]["divisible"]
    assert "words_ptr" not in told["signature: an unaligned view", "hash_words_kernel"]["divisible"]
    scan = told["topk_scan sign 16 queries, unaligned", "topk_scan_kernel"]
    assert "stride_row" in scan["divisible"]  # 2,048 bytes
    assert not {"rows_ptr", "width"} & set(scan["divisible"])  # from the 200th byte on, 1,785 of them


def test_defaults_are_among_the_launches(launched):
    """Each default dimension with each dtype that reaches a kernel: no default is without a kernel."""
    from rapidin.gradients.source import default_width
    from rapidin.kernels import fourier_sketch, linear_sketch

    names = {row["launch"] for row in launched}
    defaults = {default_width(blocks, budget) for blocks in range(1, 400) for budget in (None, 16384)}
    assert {512, 1024} <= defaults
    assert defaults <= {*linear_sketch.DIMS, *fourier_sketch.DIMS}
    for dim in defaults:
        assert {f"linear_sketch {dtype} {dim}" for dtype in ("bf16", "fp16", "fp32")} <= names
    for dim in defaults:
        assert {f"unit_blocks {dim}", f"rotate {dim} cut", f"matrix_sketch bias {dim}"} <= names


def test_grids_are_within_their_limits(extreme):
    """CUDA takes 2^31 - 1 programs on axis 0, and 65,535 on the two others."""
    assert any(max(row["grid"]) > 65535 for row in extreme)
    for row in extreme:
        x, y, z = row["grid"]
        where = f"{row['launch']} ({row['kernel']}): grid {x}, {y}, {z}"
        assert x < 2**31, where
        assert max(y, z) <= 65535, where


def test_cuda_kernels_spill_next_to_nothing():
    pytest.importorskip("triton")  # which brings the tool that reads the extension
    try:
        from rapidin.ops import _cuda
    except ImportError:
        pytest.skip("built without nvcc")
    from machine_code import extension_resources

    rows = list(extension_resources(Path(_cuda.__file__)))
    for arch in {arch for arch, *_ in rows}:
        assert any("linear_sketch" in name for other, name, *_ in rows if other == arch)
    assert rows
    for arch, name, registers, stack in rows:
        allowed = (
            16 if "ScanSteps" in name and name.endswith(", 2>") else 0
        )  # packed rows, blocks, over 2 queries
        assert stack <= allowed, f"{name} on sm_{arch}: {stack} bytes of stack"
        assert registers <= 255
