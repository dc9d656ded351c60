"""linear_sketch on GPUs: both backends against the reference."""

import pytest
import torch
from inputs import DEVICE, DTYPES, LINEAR_SHAPES, SEED, layouts, normal

from rapidin import ops
from rapidin.ops import tables
from rapidin.ops.cuda import sketches

FOURIER = (1024, 2048, 4096, 8192)  # by Fourier transforms, all in float32
DIMS = (32, 64, 128, 256, 512, *FOURIER)
TRITON_ONLY = (7, 100, 16384)  # widths without a kernel: torch's FFT
# Few tokens, as they take long where they are emulated, but more than are transformed at a time
FEW_TOKENS = ((0, 3, 4, 5), (2, 0, 4, 5), (1, 1, 1, 1), (2, 3, 33, 70), (1, 5, 300, 8))


def factors(shape, dtype=torch.float32, other=None):
    batch, tokens, n_in, n_out = shape
    inputs = normal(batch, tokens, n_in, seed=1, dtype=dtype)
    return inputs, normal(batch, tokens, n_out, seed=2, dtype=other or dtype)


def sketch(inputs, grads, dim, backend, seed=SEED):
    found = ops.linear_sketch(inputs.to(DEVICE), grads.to(DEVICE), dim, seed=seed, backend=backend)
    assert found.dtype == torch.float32
    assert found.shape == (len(inputs), dim)
    return found.cpu()


def reference(inputs, grads, dim, seed=SEED):
    return ops.linear_sketch(inputs, grads, dim, seed=seed, backend="reference")


def tolerance(*dtypes, dim=64):
    """Relative error of an example's sketch. Both sides bfloat16: one rounding more of either, 2^-9 at most;
    the interpreter cuts digits off where a GPU rounds."""
    if dim in FOURIER or any(dtype != torch.bfloat16 for dtype in dtypes):
        return 1e-5
    return 4e-3 if DEVICE.type == "cuda" else 1e-2


def assert_close(got, wanted, within):
    error = (got.double() - wanted.double()).norm(dim=1)
    size = wanted.double().norm(dim=1)
    assert bool((error <= within * size + 1e-30).all()), f"{float((error / size.clamp_min(1e-30)).max()):.1e}"


def takes(backend, dim):
    return backend == "triton" or dim in DIMS


def skip_if_slow(backend, dim):
    """Triton's Fourier kernel reads rows of all widths by the same lines; interpreted, wider take long."""
    if backend == "triton" and DEVICE.type == "cpu" and dim > 1024:
        pytest.skip("interpreted, it takes long")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*DIMS, *TRITON_ONLY])
def test_shapes_widths_and_dtypes(gpu, dim, dtype):
    if not takes(gpu, dim):
        pytest.skip("no kernel: Triton's is the default there")
    for shape in FEW_TOKENS if dim >= 1024 else LINEAR_SHAPES:
        inputs, grads = factors(shape, dtype)
        found = sketch(inputs, grads, dim, gpu)
        assert_close(found, reference(inputs, grads, dim), tolerance(dtype, dim=dim))


@pytest.mark.parametrize("dim", [64, 512, 1024])
def test_rows_longer_than_a_stage_and_many_tiles(gpu, dim):
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((2, 37, 1200, 2100), (1, 150, 70, 40)) if dim <= 512 else ((2, 13, 1200, 2100),):
            inputs, grads = factors(shape, dtype)
            found = sketch(inputs, grads, dim, gpu)
            assert_close(found, reference(inputs, grads, dim), tolerance(dtype, dim=dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 1024, 2048, 8192])
def test_layouts(gpu, dtype, dim):
    skip_if_slow(gpu, dim)
    tokens = 9 if dim == 64 else 3
    inputs, grads = factors((2, tokens, 150, 36), dtype)
    wanted = reference(inputs, grads, dim)
    for a, g in zip(layouts(inputs).values(), layouts(grads).values(), strict=True):
        # as strided views on the device too
        a = torch.as_strided(_whole(a).to(DEVICE), a.shape, a.stride(), a.storage_offset())
        g = torch.as_strided(_whole(g).to(DEVICE), g.shape, g.stride(), g.storage_offset())
        assert_close(sketch(a, g, dim, gpu), wanted, tolerance(dtype, dim=dim))


def _whole(x):
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


@pytest.mark.sanitized
@pytest.mark.parametrize("dim", DIMS)
def test_cuda_at_every_width(emulated_cuda, dim):
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((2, 17 if dim <= 512 else 5, 33, 70), (1, 3, 2 * dim + 5, 8)):
            inputs, grads = factors(shape, dtype)
            found = sketch(inputs, grads, dim, "cuda")
            assert_close(found, reference(inputs, grads, dim), tolerance(dtype, dim=dim))


@pytest.mark.parametrize("dim", [128, *FOURIER])
def test_rows_that_lie_apart(gpu, dim):
    """Rows with a stride of whole vectors, so that wide loads stay in use, but must not run over."""
    skip_if_slow(gpu, dim)
    inputs, grads = factors((2, 3, 96, 40), torch.bfloat16)
    wide = torch.full((2, 3, 160), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :, 8:104] = inputs.to(DEVICE)
    found = sketch(wide[:, :, 8:104], grads, dim, gpu)
    assert_close(found, reference(inputs, grads, dim), tolerance(torch.bfloat16, dim=dim))


@pytest.mark.parametrize("dim", [64, 1024, 8192])
def test_two_dtypes(gpu, dim):
    skip_if_slow(gpu, dim)
    for one in DTYPES:
        for other in DTYPES:
            inputs, grads = factors((2, 9, 150, 37) if dim == 64 else (1, 2, 150, 37), one, other)
            found = sketch(inputs, grads, dim, gpu)
            assert_close(found, reference(inputs, grads, dim), tolerance(one, other, dim=dim))


def test_the_rounding_of_bfloat16_is_what_is_said(emulated_cuda):
    """0.002 of a sketch's length, far below its own noise of 1 / sqrt(512) = 0.044."""
    inputs, grads = factors((4, 100, 512, 512), torch.bfloat16)
    got, wanted = sketch(inputs, grads, 512, "cuda").double(), reference(inputs, grads, 512).double()
    error = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error.max()) < 3e-3


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_factors_of_very_different_sizes(gpu, scale):
    inputs, grads = factors((2, 20, 200, 100))
    inputs[:, :, 3] *= 1000  # an outlier feature, as language models have them
    grads *= scale * torch.logspace(-3, 3, 20)[:, None]
    assert_close(sketch(inputs, grads, 64, gpu), reference(inputs, grads, 64), 1e-5)
    inputs, grads = inputs.bfloat16(), grads.bfloat16()
    found, wanted = sketch(inputs, grads, 64, gpu), reference(inputs, grads, 64)
    assert_close(found, wanted, tolerance(torch.bfloat16))


@pytest.mark.parametrize("dim", FOURIER)
def test_squares_of_a_side_leave_no_rounding_in_the_cross_term(gpu, dim):
    """Only 2i P Q of (P + i Q)^2 is wanted, and grads are a 10^12th of inputs, or nothing, or far fewer."""
    inputs, grads = factors((1, 4, 200, 100))
    inputs[:, :, 3] *= 1000
    grads *= 1e-12 * torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None]
    assert_close(sketch(inputs, grads, dim, gpu), reference(inputs, grads, dim), 5e-6)
    inputs, grads = factors((1, 2, dim, 8))
    assert_close(sketch(inputs, grads, dim, gpu), reference(inputs, grads, dim), 5e-6)
    grads[:, 0] = 0
    assert_close(sketch(inputs[:, :1], grads[:, :1], dim, gpu), torch.zeros(1, dim), 0.0)


@pytest.mark.parametrize("dim", [32, 512, 1024, 8192])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_examples_stay_apart(gpu, bad, dim):
    skip_if_slow(gpu, dim)
    inputs, grads = factors((4, 5, 60, 40), torch.bfloat16)
    clean = sketch(inputs, grads, dim, gpu)
    inputs[1, 2, 3], grads[2, 0, 0] = bad, bad
    found = sketch(inputs, grads, dim, gpu)
    assert not found[1].isfinite().all()
    assert not found[2].isfinite().all()
    assert torch.equal(found[[0, 3]], clean[[0, 3]])


def low_rank(n, rank, seed, gain=-0.999):
    """Of which the first direction has all of feature 3."""
    basis = normal(n, rank, seed=seed)
    basis[:, 0] = 0
    basis[3] = 0
    basis[3, 0] = 1
    return ops.LowRank(torch.linalg.qr(basis).Q.contiguous(), torch.full((rank,), gain))


@pytest.mark.parametrize("dim", [64, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 64, 100])
def test_low_rank_beside_a_massive_activation(gpu, dtype, rank, dim):
    """Feature 3 is a thousand times the others until its direction is taken down: what is left of x and of
    the term that cancels it is right to the one rounding of bfloat16."""
    inputs, grads = factors((2, 5 if dim == 64 else 2, 260, 270), dtype)
    inputs[:, :, 3] *= 1000
    of_inputs, of_grads = low_rank(260, rank, 1), low_rank(270, rank, 2, gain=-0.5)

    def sketched(backend, device):
        return ops.linear_sketch(
            inputs.to(device), grads.to(device), dim, seed=SEED, backend=backend,
            inputs_low_rank=of_inputs.to(device), grads_low_rank=of_grads.to(device),
        ).cpu()  # fmt: skip

    found = sketched(gpu, DEVICE)
    within = 1.5 * tolerance(dtype) if dtype == torch.bfloat16 else 1e-4  # one rounding more
    assert_close(found, sketched("reference", torch.device("cpu")), within)


def test_low_rank_of_any_layout_and_size(gpu):
    """Rows that lie apart, several tiles of tokens and features, a side of which all directions are known."""
    inputs, grads = factors((3, 50, 300, 30), torch.bfloat16)
    wide = torch.full((3, 50, 600), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :, ::2] = inputs.to(DEVICE)
    of_inputs, of_grads = low_rank(300, 64, 1), low_rank(30, 30, 2)
    found = ops.linear_sketch(
        wide[:, :, ::2], grads.to(DEVICE), 64, seed=SEED, backend=gpu,
        inputs_low_rank=of_inputs.to(DEVICE), grads_low_rank=of_grads.to(DEVICE),
    )  # fmt: skip
    wanted = ops.linear_sketch(
        inputs, grads, 64, seed=SEED, backend="reference",
        inputs_low_rank=of_inputs, grads_low_rank=of_grads,
    )  # fmt: skip
    assert_close(found.cpu(), wanted, 1.5 * tolerance(torch.bfloat16))


def exactly(inputs, grads, dim, of_inputs, of_grads):
    """The sketch in float64."""

    def count_sketch(x, low_rank, side):
        x, basis = x.double(), low_rank.basis.double()
        x = x + (x @ basis * low_rank.gain.double()) @ basis.T
        entries = tables.rows(SEED, side, x.shape[2], dim)
        signs = torch.where(entries < 0, -1.0, 1.0)
        bins = torch.zeros(*x.shape[:2], dim, dtype=torch.float64)
        return bins.index_add_(2, (entries & 0x7FFFFFFF).long(), x * signs)

    a, g = count_sketch(inputs, of_inputs, tables.IN), count_sketch(grads, of_grads, tables.OUT)
    return torch.fft.irfft((torch.fft.rfft(a) * torch.fft.rfft(g)).sum(1), dim)


@pytest.mark.sanitized
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_cuda_adds_a_low_rank_to_count_sketches(emulated_cuda, dim, monkeypatch):
    """With the rounding of the operands alone, which that of preconditioned features would add to; odd sizes,
    more tokens than a tile, one side or both. Feature 3 is a thousand times the others."""
    inputs, grads = factors((2, 37, 301, 197), torch.bfloat16)
    inputs[:, :, 3] *= 1000
    grads[:, :, 3] *= 1000
    nothing = ops.LowRank(torch.zeros(197, 16), torch.zeros(16))
    of_inputs, of_grads = low_rank(301, 64, 1), low_rank(197, 64, 2)
    monkeypatch.setattr(sketches, "preconditioned", None)  # features stay as they are
    for of_both in ((of_inputs, of_grads), (of_inputs, nothing)):
        wanted = exactly(inputs, grads, dim, *of_both)
        named = {"inputs_low_rank": of_both[0].to(DEVICE), "grads_low_rank": of_both[1].to(DEVICE)}
        found = ops.linear_sketch(inputs, grads, dim, seed=SEED, backend="cuda", **named)
        error = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert float(error.max()) < 3e-3


def test_a_term_that_does_not_fit_is_refused(emulated_cuda):
    most = emulated_cuda.linear_sketch_low_rank(512)
    assert most >= 64
    assert [emulated_cuda.linear_sketch_low_rank(dim) for dim in (64, 1024)] == [0, 0]
    # beyond it, features are preconditioned
    inputs, grads = factors((1, 3, 2 * most + 40, 50), torch.bfloat16)
    of_inputs, of_grads = low_rank(2 * most + 40, most + 16, 1), low_rank(50, 10, 2)
    named = {"inputs_low_rank": of_inputs, "grads_low_rank": of_grads}
    found = ops.linear_sketch(inputs, grads, 512, seed=SEED, backend="cuda", **named)
    assert_close(found, exactly(inputs, grads, 512, of_inputs, of_grads), 1.5 * tolerance(torch.bfloat16))
    with pytest.raises(ValueError, match="cannot add a term of this rank"):
        emulated_cuda.linear_sketch(
            0, 2, 8, (8, 8, 1), 0, (1, 0, 0, most + 16), 0, 2, 8, (8, 8, 1), 0, (0, 0, 0, 0),
            1, 1, 512, 1, 16, 0, 0, (0, 0),
        )  # fmt: skip


def test_one_bfloat16_of_a_basis_would_not_do(gpu):
    """What test_low_rank_beside_a_massive_activation would see if the low parts were left out."""
    from rapidin.kernels.low_rank import add_low_rank
    from rapidin.ops.low_rank import products_with_high_and_low

    if gpu == "cuda":
        pytest.skip("both backends run the same kernel")
    x = normal(1, 8, 260, dtype=torch.bfloat16)
    x[:, :, 3] *= 1000
    done = low_rank(260, 64, 1)
    # directions that share feature 3, as those of a sample do
    done = ops.LowRank(torch.linalg.qr(done.basis @ normal(64, 64, seed=5)).Q.contiguous(), done.gain)
    wanted = done(x.double().float()).double()
    x, on = x.to(DEVICE), done.to(DEVICE)

    def error(parts, along):
        found = add_low_rank(x, along, on.gain, parts).cpu().double()
        return float((found - wanted).norm() / wanted.norm())

    along = products_with_high_and_low(x, on)
    assert error(on.high_and_low, along) < (3e-3 if DEVICE.type == "cuda" else 8e-3)
    high = on.high_and_low.clone()
    high[:, 64:] = 0
    assert error(high, along) > 2e-2


def test_padding_adds_nothing(gpu):
    inputs, grads = factors((2, 19, 90, 50))
    padded_inputs = torch.cat([inputs, normal(2, 30, 90)], dim=1)
    padded_grads = torch.cat([grads, torch.zeros(2, 30, 50)], dim=1)
    assert_close(sketch(padded_inputs, padded_grads, 64, gpu), sketch(inputs, grads, 64, gpu), 1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_to_sketch(gpu, shape):
    inputs, grads = factors(shape)
    assert torch.equal(sketch(inputs, grads, 64, gpu), torch.zeros(shape[0], 64))


def test_the_same_bits_again(gpu):
    inputs, grads = factors((3, 40, 130, 70), torch.bfloat16)
    first = sketch(inputs, grads, 256, gpu)
    assert torch.equal(sketch(inputs, grads, 256, gpu), first)


@pytest.mark.parametrize("dim", [32, 128, 512, *FOURIER])
def test_no_order_of_threads_changes_a_bit(emulated_cuda, dim):
    if not emulated_cuda.emulated:
        pytest.skip("a GPU orders its threads itself")
    inputs, grads = factors((1, 35 if dim <= 512 else 5, 70, 1100), torch.bfloat16)
    found = []
    for order in (0, 1, 2):
        emulated_cuda.set_order(order)
        try:
            found.append(sketch(inputs, grads, dim, "cuda"))
        finally:
            emulated_cuda.set_order(0)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_how_blocks_share_an_example_changes_little(gpu, monkeypatch):
    """Many examples leave a block each, one is cut in as many parts as it has tiles."""
    many = 300
    if gpu == "triton" and DEVICE.type == "cpu":  # interpreted, 300 take half a minute
        from rapidin.kernels.linear_sketch import linear_sketch

        many = 9
        monkeypatch.setattr(linear_sketch, "__defaults__", (many,))  # blocks
    inputs, grads = factors((1, 70, 60, 40))
    alone = sketch(inputs, grads, 64, gpu)
    among = sketch(inputs.expand(many, -1, -1), grads.expand(many, -1, -1), 64, gpu)[7:8]
    assert_close(among, alone, 1e-5)


def test_a_width_without_a_kernel_is_refused_by_name(emulated_cuda):
    inputs, grads = factors((1, 2, 8, 8))
    with pytest.raises(ValueError, match="no kernel for dim 100"):
        sketch(inputs, grads, 100, "cuda")


def test_what_the_cuda_kernels_take_is_said_by_shared_memory(emulated_cuda, monkeypatch):
    """sm_86 and sm_89 let a block have 99 KB: all Fourier kernels fit, but not 512 numbers of float32."""
    from rapidin.ops import cuda

    monkeypatch.setattr(emulated_cuda, "shared_bytes", lambda device: 99 << 10)
    for dtype in DTYPES:
        x = torch.empty(1, 1, 8, dtype=dtype, device=DEVICE)
        for dim in (32, 256, *FOURIER):
            assert cuda.supports("linear_sketch", x, x, dim), (dim, dtype)
        assert not cuda.supports("linear_sketch", x, x, 512)
        assert not cuda.supports("linear_sketch", x, x, 16384)
    monkeypatch.setattr(emulated_cuda, "shared_bytes", lambda device: 163 << 10)
    for dtype in DTYPES:
        assert cuda.supports("linear_sketch", x.to(dtype), x.to(dtype), 512)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dim", [512, 2048])
def test_a_graph_replays_it(backend, dim):
    inputs, grads = (x.to(DEVICE) for x in factors((2, 64, 256, 512), torch.bfloat16))
    wanted = ops.linear_sketch(inputs, grads, dim, seed=1, backend=backend)  # tables come before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear_sketch(inputs, grads, dim, seed=1, backend=backend)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, wanted)
