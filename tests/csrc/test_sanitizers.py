"""Emulated CUDA kernels under the address and undefined-behaviour sanitizers, and watched for races: what is
marked for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def runtime(name):
    """A sanitizer's library, which must be loaded before Python is, or None."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout
    return found.strip() if os.path.isabs(found.strip()) else None


LIBRARIES = [runtime("libasan.so"), runtime("libubsan.so")]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(None in LIBRARIES, reason="this compiler has no sanitizers' libraries"),
]


def emulated(variant, *command):
    environment = {
        **os.environ,
        "RAPIDIN_EMULATED": variant,
        "LD_PRELOAD": " ".join(map(str, LIBRARIES)) if variant == "sanitized" else "",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("variant", ["sanitized", "watched"])
def test_kernels_stay_in_their_memory_and_order(variant):
    files = [
        str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.sanitized" in path.read_text()
    ]
    chosen = ["-m", "sanitized", "-k", "not triton", *sorted(files)]
    done = emulated(variant, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


BEYOND = """
import torch
from emulator.build import emulated
from rapidin.ops import cuda
cuda.use(emulated())
inputs, out = torch.ones(1, 20, 64), torch.empty(1, 64)
table = torch.zeros(64, dtype=torch.int32)
side = (inputs.data_ptr(), 0, 64, inputs.stride(), table.data_ptr(), (0, 0, 0, 0))
emulated().linear_sketch(*side, *side, 1, {tokens}, 64, 1, 64, 0, out.data_ptr(), (0, 0))
print("done")
"""


@pytest.mark.parametrize("tokens", [20, 21])
def test_a_read_beyond_a_tensor_would_be_seen(tokens):
    done = emulated("sanitized", "-c", BEYOND.format(tokens=tokens))
    if tokens == 20:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "done" in done.stdout
    else:
        assert done.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
