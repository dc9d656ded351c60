"""Without a GPU, the GPU's kernels run on the CPU: Triton's interpreted, CUDA's in support/emulator."""

import os

import pytest
import torch
from emulator.build import emulated
from poison import poisoned
from repeats import mark_repeats

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported


@pytest.fixture(scope="session")
def emulated_cuda():
    """The CUDA kernels on the CPU, where there is no GPU to run them."""
    from rapidin.ops import cuda

    if not torch.cuda.is_available():
        cuda.use(emulated())
    return cuda.extension()


@pytest.fixture
def arch(emulated_cuda):
    """arch(86): from here to the test's end launches of emulated kernels are held to what that one allows."""
    if not emulated_cuda.emulated:
        pytest.skip("a GPU is of one architecture")
    yield emulated_cuda.set_arch
    emulated_cuda.set_arch(90)


@pytest.fixture
def poison():
    """Memory that ops allocate holds what must not be left in it."""
    with poisoned():
        yield


@pytest.fixture
def triton():
    """Triton, whose kernels are interpreted where there is no GPU."""
    pytest.importorskip("triton")


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    """The name of each backend for GPUs; its tensors belong on inputs.DEVICE."""
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
    else:
        pytest.importorskip("triton")
    return request.param


def pytest_collection_modifyitems(items):
    mark_repeats(items)
