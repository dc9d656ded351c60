"""Which backend runs an op: the one asked for, or the best for the device; one line where there is none."""

import sys

import pytest
import torch
from changed import changed

import rapidin
from rapidin import ops
from rapidin.errors import UserError
from rapidin.ops import cuda
from rapidin.ops.backends import Installed, default
from rapidin.ops.cuda import devices

X = torch.zeros(2, 3, 4)
GPU = torch.device("cuda", 0)
BOTH = Installed(cuda=True, triton=True)


@pytest.fixture
def real(monkeypatch):
    """As for a user: no interpreter, nothing emulated."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with cuda.using(None):
        yield


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
def test_the_default_on_a_gpu(emulated_cuda, built, installed, dim, wanted):
    here = Installed(cuda=built, triton=installed)
    assert default("linear_sketch", GPU, (X, X, dim), here) == wanted
    assert default("pack", GPU, (), here) == "triton"


def test_a_gpu_without_kernels_is_told_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'rapidin\[gpu\]'"):
        default("linear_sketch", GPU, (X, X, 512), Installed(cuda=False, triton=False))


def test_a_missing_extension_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidin.ops._cuda", None)
    monkeypatch.delitem(vars(ops), "_cuda", raising=False)
    with cuda.using(None), pytest.raises(ImportError, match="install from source where nvcc is found"):
        cuda.extension()


@pytest.fixture
def distribution(monkeypatch, tmp_path):
    """Installs a rapidin-cuda of a version, whose kernels are a stub, beside a rapidin without any."""
    monkeypatch.setitem(sys.modules, "rapidin.ops._cuda", None)
    monkeypatch.delitem(vars(ops), "_cuda", raising=False)

    def install(version):
        (tmp_path / "rapidin_cuda").mkdir()
        (tmp_path / "rapidin_cuda/__init__.py").touch()
        (tmp_path / "rapidin_cuda/_cuda.py").write_text("architectures = 'sm_90'\nemulated = False\n")
        facts = tmp_path / f"rapidin_cuda-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rapidin-cuda\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    with cuda.using(None):
        yield install
    for name in ("rapidin_cuda", "rapidin_cuda._cuda"):
        sys.modules.pop(name, None)


def test_the_kernels_of_rapidin_cuda_are_found(distribution):
    assert not cuda.installed()
    distribution(rapidin.__version__)
    assert cuda.installed()
    assert cuda.extension().architectures == "sm_90"


def test_rapidin_cuda_of_another_version_is_refused(distribution):
    distribution("0.0.9")
    with pytest.raises(UserError, match=r"rapidin-cuda 0\.0\.9 .* must be of the same version"):
        cuda.extension()


@pytest.mark.parametrize(
    ("code", "runs_on", "not_on"),
    [
        ("sm_80", (80, 86, 89), (75, 90)),  # machine code: within a major version
        ("sm_86", (86, 89), (80, 90)),
        ("compute_80", (80, 90, 120), (75,)),  # PTX: on all that came later
        ("sm_90a", (90,), (80, 100)),
        ("compute_90a", (90,), (100,)),
        ("sm_100f", (100, 103), (90, 120)),
        ("compute_120f", (120, 121), (100,)),
    ],
)
def test_what_compiled_code_runs_on(code, runs_on, not_on):
    assert [devices.runs(code, capability) for capability in runs_on] == [True] * len(runs_on)
    assert [devices.runs(code, capability) for capability in not_on] == [False] * len(not_on)


@pytest.mark.parametrize(
    ("capability", "wanted"), [(75, "triton"), (80, "cuda"), (90, "cuda"), (120, "triton")]
)
def test_a_device_that_the_extension_was_not_built_for_takes_triton(emulated_cuda, capability, wanted):
    built = changed(emulated_cuda, capability=lambda device: capability, architectures="sm_80 sm_90 sm_100")
    with cuda.using(built):
        assert default("flat_sketch", GPU, (), BOTH) == wanted


def test_cuda_by_name_says_what_it_was_built_for(arch):
    arch(75)
    codes = "sm_80, sm_90, sm_100, compute_100"
    said = f"linear_sketch: backend 'cuda' was built for {codes}, and device 'cpu' is sm_75"
    with pytest.raises(ValueError, match=f"^{said}; ask for backend='triton'$"):
        ops.linear_sketch(X, X, 64, seed=0, backend="cuda")


def test_without_triton_the_reason_is_said(arch):
    arch(75)
    with pytest.raises(
        ValueError, match=r"^flat_sketch: rapidin's CUDA extension was built for .* is sm_75; pip"
    ):
        default("flat_sketch", GPU, (), Installed(cuda=True, triton=False))


def test_a_runtime_that_cannot_use_the_driver_is_no_default(emulated_cuda):
    def fails(device):
        raise RuntimeError(
            "cudaDeviceGetAttribute: CUDA driver version is insufficient for CUDA runtime version"
        )

    with cuda.using(changed(emulated_cuda, capability=fails)):
        assert default("flat_sketch", GPU, (), BOTH) == "triton"
        assert "cannot use device 'cuda:0': cudaDeviceGetAttribute: CUDA driver" in devices.excludes(GPU)
