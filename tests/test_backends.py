"""Which backend runs an op: the one asked for, or the best for the device; one line where there is none."""

import sys

import pytest
import torch

from rapidin import ops
from rapidin.ops import backends, cuda

X = torch.zeros(2, 3, 4)
GPU = torch.device("cuda", 0)


@pytest.fixture
def real(monkeypatch):
    """As for a user: no interpreter, nothing emulated."""
    monkeypatch.setattr(backends, "simulated", lambda backend: False)
    return monkeypatch


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_of_gpus_take_tensors_on_gpus(real, backend):
    with pytest.raises(ValueError, match=rf"backend '{backend}' takes tensors on a GPU, got device 'cpu'"):
        ops.linear_sketch(X, X, 8, seed=0, backend=backend)


def test_cuda_has_no_kernel_for_some_ops(real):
    with pytest.raises(ValueError, match="ask for backend='triton'"):
        ops.pack(X[0], "int8", backend="cuda")


@pytest.mark.parametrize(
    ("built", "installed", "dim", "wanted"),
    [
        (True, True, 512, "cuda"),
        (True, True, 100, "triton"),  # no CUDA kernel of this width
        (False, True, 512, "triton"),
    ],
)
def test_the_default_on_a_gpu(real, emulated_cuda, built, installed, dim, wanted):
    real.setattr(backends, "_has_cuda_extension", lambda: built)
    real.setattr(backends, "_has_triton", lambda: installed)
    assert backends._default("linear_sketch", GPU, (X, X, dim)) == wanted
    assert backends._default("pack", GPU, ()) == "triton"


def test_a_gpu_without_kernels_is_told_what_to_install(real):
    real.setattr(backends, "_has_cuda_extension", lambda: False)
    real.setattr(backends, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'rapidin\[gpu\]'"):
        backends._default("linear_sketch", GPU, (X, X, 512))


def test_a_missing_extension_is_one_line(monkeypatch):
    monkeypatch.setattr(sys.modules["rapidin.ops.cuda.extension"], "_extension", None)
    monkeypatch.setitem(sys.modules, "rapidin._cuda", None)
    monkeypatch.delattr("rapidin._cuda", raising=False)
    with pytest.raises(ImportError, match="install from source where nvcc is found"):
        cuda.extension()
