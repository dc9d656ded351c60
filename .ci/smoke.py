"""What an installed rapidin must do, from a folder outside of any checkout: python .ci/smoke.py

Its files are found where packages are installed, its version is that of its metadata, the command line
answers, and the compiled CPU kernels sketch, pack and scan as the reference does, in each instruction set of
this machine.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

import rapidin
from rapidin import ops
from rapidin.ops import _cpu


def check_installation() -> None:
    """Raises AssertionError where another rapidin than the installed one is imported."""
    where = Path(rapidin.__file__).resolve()
    assert where.is_relative_to(Path(sysconfig.get_paths()["platlib"]).resolve()), where
    assert metadata.version("rapidin") == rapidin.__version__
    command = [sys.executable, "-m", "rapidin", "--help"]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    assert "Find the training examples" in shown, shown


def check_kernels() -> None:
    """Raises AssertionError where a kernel's results are not those of the reference."""
    generator = torch.Generator().manual_seed(0)
    inputs, grads = torch.randn(3, 40, 130, generator=generator), torch.randn(3, 40, 70, generator=generator)
    rows, queries = torch.randn(200, 512, generator=generator), torch.randn(3, 512, generator=generator)
    flat = [torch.randn(3, 5000, generator=generator)]

    def results(backend: str) -> dict[str, torch.Tensor]:
        scores, indices = ops.topk_scan(rows, queries, 10, backend=backend)
        return {
            "linear_sketch": ops.linear_sketch(inputs, grads, 256, seed=1, backend=backend).float(),
            "flat_sketch": ops.flat_sketch(flat, 256, seed=1, backend=backend).float(),
            "topk_scan": scores.float(),
            "its indices": indices.float(),
        }

    wanted = results("reference")
    for name in _cpu.supported_sets():
        _cpu.use_set(name)
        for op, found in results("cpu").items():
            torch.testing.assert_close(found, wanted[op], rtol=1e-4, atol=1e-3, msg=f"{op} in {name}")
        packed = ops.pack(rows, "int8")
        torch.testing.assert_close(ops.unpack(packed), rows, rtol=0.0, atol=0.03)


if __name__ == "__main__":
    check_installation()
    check_kernels()
    print(f"rapidin {rapidin.__version__} works; instruction sets: {', '.join(_cpu.supported_sets())}")
