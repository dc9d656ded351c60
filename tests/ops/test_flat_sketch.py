"""flat_sketch: each backend against the reference, exact sums, and the estimate that it promises."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    DEVICE,
    DTYPES,
    FLAT_DIMS,
    FLAT_SIZES,
    INSTRUCTION_SETS,
    SEED,
    assert_close,
    instruction_set,
    integers,
    normal,
    torch_threads,
)
from poison import poisoned
from properties import tries

from rapidin import ops
from rapidin.ops import cuda
from rapidin.ops.flat_plan import flat_plan

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "sketches.json").read_text())


def some_tensors(make=normal, dtype=torch.float32, batch=()):
    return [make(*batch, *size, seed=i, dtype=dtype) for i, size in enumerate(FLAT_SIZES)]


@pytest.mark.parametrize("case", GOLDEN["flat"], ids=lambda c: f"{c['seed']}-{c['dim']}")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sketches_are_those_written_down(case, backend):
    tensors = [torch.tensor(x) for x in case["tensors"]]
    sketch = ops.flat_sketch(tensors, case["dim"], seed=case["seed"], backend=backend)
    assert torch.equal(sketch, torch.tensor(case["sketch"]))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", FLAT_DIMS)
def test_agrees_with_the_reference(dim, dtype, name):
    tensors, batched = some_tensors(dtype=dtype), some_tensors(dtype=dtype, batch=(3,))
    wanted = ops.flat_sketch(tensors, dim, seed=SEED, backend="reference")
    wanted_batched = ops.flat_sketch(batched, dim, seed=SEED, batched=True, backend="reference")
    with instruction_set(name):
        # 1e-5: in very few bins thousands of elements nearly cancel
        assert_close(ops.flat_sketch(tensors, dim, seed=SEED, backend="cpu"), wanted, 1e-5)
        assert_close(ops.flat_sketch(batched, dim, seed=SEED, batched=True), wanted_batched, 1e-5)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*FLAT_DIMS, 128 * 7, 128 * 33])
def test_integers_are_exact(dim, dtype, name):
    tensors = [*some_tensors(integers, dtype), integers(300_001, seed=9, dtype=dtype)]
    wanted = ops.flat_sketch(tensors, dim, seed=SEED, backend="reference")
    with instruction_set(name):
        assert torch.equal(ops.flat_sketch(tensors, dim, seed=SEED), wanted)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", [16, 128, 1024])
def test_threads_change_nothing(dim, name):
    tensors = [normal(2, 150_001), *some_tensors(batch=(2,))]
    sketches = []
    for threads in (1, 2, 3):
        with instruction_set(name), torch_threads(threads):
            sketches.append(ops.flat_sketch(tensors, dim, seed=SEED, batched=True))
            one = ops.flat_sketch([x[1] for x in tensors], dim, seed=SEED)
        assert torch.equal(sketches[0], sketches[-1])
        assert torch.equal(one, sketches[0][1])


def test_batches_agree_with_their_items_and_layouts_change_nothing():
    x = normal(4, 30, 20)
    spread = torch.empty(4, 60, 20)
    spread[:, ::2] = x
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = ops.flat_sketch([x], 256, seed=1, batched=True)
    for same in (spread[:, ::2], turned):
        assert torch.equal(ops.flat_sketch([same], 256, seed=1, batched=True), wanted)
    for b in range(4):
        assert torch.equal(ops.flat_sketch([x[b]], 256, seed=1), wanted[b])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nothing_to_sketch(backend):
    assert torch.equal(ops.flat_sketch([], 128, seed=0, backend=backend), torch.zeros(128))
    assert torch.equal(ops.flat_sketch([torch.zeros(0)], 128, seed=0, backend=backend), torch.zeros(128))
    empty = ops.flat_sketch([torch.zeros(0, 5)], 128, seed=0, batched=True, backend=backend)
    assert empty.shape == (0, 128)
    scalar = ops.flat_sketch([torch.tensor(3.0)], 128, seed=0, backend=backend)
    assert scalar.abs().sum() == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("at", [5, 700])  # within a whole row, and in the last short one
def test_not_finite_elements_show(bad, backend, at):
    x = normal(701)
    x[at] = bad
    assert (~ops.flat_sketch([x], 256, seed=0, backend=backend).isfinite()).sum() == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scales_and_squares(backend):
    tensors = [integers(3, 200, seed=i) for i in range(3)]
    scales = torch.tensor([2.0, 0.0, -1.0])
    named = {"seed": SEED, "batched": True, "backend": backend}
    sketch, squares = ops.flat_sketch(tensors, 128, scales=scales, squares=True, **named)
    scaled = [x * scale for x, scale in zip(tensors, scales, strict=True)]
    assert torch.equal(sketch, ops.flat_sketch(scaled, 128, **named))
    assert torch.equal(squares, torch.stack([x.square().sum(1) for x in tensors], 1))
    one, squares_of_one = ops.flat_sketch(
        [x[1] for x in tensors], 128, seed=SEED, scales=scales, squares=True, backend=backend
    )
    assert torch.equal(one, sketch[1])
    assert torch.equal(squares_of_one, squares[1])


def test_an_empty_tensor_takes_no_row():
    x, y = normal(200), normal(300, seed=1)
    apart = ops.flat_sketch([x, torch.zeros(0), y], 512, seed=0)
    assert torch.equal(apart, ops.flat_sketch([x, y], 512, seed=0))


@tries(30)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    dim=st.sampled_from([1, 4, 32, 128, 384, 1024]),
    seed=st.integers(0, 2**64 - 1),
    factor=st.integers(-5, 5),
)
def test_linear(sizes, dim, seed, factor):
    x = [integers(n, seed=i) for i, n in enumerate(sizes)]
    y = [integers(n, seed=100 + i) for i, n in enumerate(sizes)]
    together = ops.flat_sketch([a + factor * b for a, b in zip(x, y, strict=True)], dim, seed=seed)
    apart = ops.flat_sketch(x, dim, seed=seed) + factor * ops.flat_sketch(y, dim, seed=seed)
    assert torch.equal(together, apart)


def test_unbiased_with_at_most_the_variance_of_a_random_sketch():
    """Elements of two chunks meet in a bin with probability 1 / dim, those of one chunk never."""
    x = normal(6000, seed=1)
    x[::128] *= 8  # an outlier feature: always the same place in a row
    y = 0.3 * x + normal(6000, seed=2)
    exact = float(x @ y)
    dim, seeds = 512, 2000
    estimates = torch.empty(seeds)
    for seed in range(seeds):
        sketch = ops.flat_sketch([torch.stack([x, y])], dim, seed=seed, batched=True)
        estimates[seed] = sketch[0] @ sketch[1]
    variance = float(((x**2).sum() * (y**2).sum() + exact**2 - 2 * (x**2 * y**2).sum()) / dim)
    assert abs(float(estimates.mean()) - exact) < 4 * (variance / seeds) ** 0.5
    assert 0.75 < float(estimates.var()) / variance < 1.15


@pytest.mark.parametrize("dim", [0, 3, 100, 130, 200])
def test_dims_that_cannot_be(dim):
    with pytest.raises(ValueError, match="dim must be"):
        ops.flat_sketch([torch.zeros(4)], dim, seed=0)


def test_mistakes_are_named():
    with pytest.raises(TypeError, match=r"pass \[tensor\]"):
        ops.flat_sketch(torch.zeros(4), 128, seed=0)
    with pytest.raises(TypeError, match=r"tensors\[1\] must be float32, float16, bfloat16, got int64"):
        ops.flat_sketch([torch.zeros(4), torch.zeros(4, dtype=torch.int64)], 128, seed=0)
    with pytest.raises(ValueError, match="one batch size"):
        ops.flat_sketch([torch.zeros(2, 4), torch.zeros(3, 4)], 128, seed=0, batched=True)
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.flat_sketch([], 128, seed=0, batched=True)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        ops.flat_sketch([torch.zeros(4)], 128, seed=0, backend="gpu")
    with pytest.raises(ValueError, match="one entry for each of the 1 tensors, got 2"):
        ops.flat_sketch([torch.zeros(4)], 128, seed=0, scales=torch.ones(2))
    with pytest.raises(TypeError, match="scales must be float32"):
        ops.flat_sketch([torch.zeros(4)], 128, seed=0, scales=torch.ones(1, dtype=torch.float64))


# ---- on GPUs: Triton's kernels and CUDA's, which run on the CPU where there is no GPU ----


SIZES = (1, 127, 0, 128, 129, 150, 1280, 4000, 0)


def mixed(make=normal, sizes=SIZES, batch=(), dtypes=DTYPES):
    """Tensors of all dtypes in turn."""
    return [make(*batch, n, seed=i, dtype=dtypes[i % len(dtypes)]).to(DEVICE) for i, n in enumerate(sizes)]


def check(gpu, tensors, dim, tolerance=1e-5, **named):
    """Both backends' sketches, and the squared lengths where they are asked for."""
    wanted = ops.flat_sketch(tensors, dim, seed=SEED, backend="reference", **named)
    got = ops.flat_sketch(tensors, dim, seed=SEED, backend=gpu, **named)
    if not isinstance(got, tuple):
        wanted, got = (wanted,), (got,)
    for x, y in zip(got, wanted, strict=True):
        assert x.device == tensors[0].device
        assert_close(x, y, tolerance)
    return got


@pytest.mark.gpu
@pytest.mark.parametrize("dim", FLAT_DIMS)
def test_agrees_with_the_reference_on_gpus(gpu, dim):
    sizes = SIZES[:-2] if dim < 16 else SIZES
    check(gpu, mixed(sizes=sizes), dim)
    check(gpu, mixed(sizes=sizes, batch=(3,)), dim, batched=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_tensors_of_one_dtype(gpu, dtype):
    """Whole rows that are aligned go another way than the rest."""
    for dim, sizes in ((128, (128 * 40 + 5,)), (256, (128 * 60, 128 * 9))):
        check(gpu, mixed(sizes=sizes, dtypes=(dtype,)), dim, squares=True)
        check(gpu, mixed(integers, sizes, dtypes=(dtype,)), dim, tolerance=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 128, 384])
def test_integers_are_exact_over_many_parts(gpu, dim):
    sizes = (200 * dim + 1, 7, 100 * dim)
    tensors = mixed(integers, sizes)
    assert flat_plan([x[None] for x in tensors], dim).parts > 1
    scales = torch.tensor([2.0, -1.0, 4.0], device=DEVICE)
    check(gpu, tensors, dim, tolerance=0, scales=scales, squares=True)


@pytest.mark.gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("dim", [8, 128, 384])
def test_scales_and_squares_on_gpus(gpu, dim):
    tensors = mixed(batch=(2,), sizes=(5, 0, 300, 2000))
    scales = normal(4).to(DEVICE)
    _, squares = check(gpu, tensors, dim, batched=True, scales=scales, squares=True)
    assert squares.shape == (2, 4)
    _, squares = check(gpu, [x[0] for x in tensors], dim, scales=scales, squares=True)
    assert squares.shape == (4,)
    assert squares[1] == 0
    check(gpu, tensors, dim, batched=True, scales=torch.stack([scales, scales], 1)[:, 0])


@pytest.mark.gpu
def test_long_tensors_squared_in_slices(gpu):
    tensors = mixed(integers, (17_000, 9))
    assert flat_plan([x[None] for x in tensors], 1).slices > 1
    check(gpu, tensors, 1, tolerance=0, squares=True)


@pytest.mark.gpu
def test_layouts_change_nothing(gpu):
    x = normal(2, 30, 24).to(DEVICE)
    spread = torch.full((2, 60, 24), torch.nan, device=DEVICE)
    spread[:, ::2] = x
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    rows = torch.full((2, 900), torch.nan, device=DEVICE)
    rows[:, 3:723] = x.flatten(1)
    same = (spread[:, ::2], turned, rows[:, 3:723], x.flip(0).flip(0))
    wanted = ops.flat_sketch([x], 256, seed=1, batched=True, backend=gpu)
    for other in same:
        got = ops.flat_sketch([other], 256, seed=1, batched=True, backend=gpu)
        assert torch.equal(got, wanted)
    one = x[:1].expand(2, 30, 24)
    got = ops.flat_sketch([one], 256, seed=1, batched=True, backend=gpu)
    assert torch.equal(got, wanted[:1].expand(2, 256))


@pytest.mark.gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views(gpu, dtype):
    x = integers(128 * 20 + 9, dtype=dtype).to(DEVICE)
    check(gpu, [x[i : i + 128 * 17 + i] for i in range(9)], 128, tolerance=0, squares=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_lane_and_sign(gpu, dtype):
    """One element at a time: each of a row's 128 comes to its own bin with its own sign."""
    # of nine rows one element each: one of the examples has it at every place of the last
    x = torch.zeros(16, 9, 128)
    for b in range(16):
        x[b, torch.arange(9), (8 * b + torch.arange(9)) % 128] = 1.0 + torch.arange(9)
    check(gpu, [x.to(dtype).to(DEVICE)], 128, tolerance=0, batched=True)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_elements_stay_in_their_bins(gpu, bad, dtype):
    x = normal(3, 128 * 16 + 60, dtype=dtype).to(DEVICE)
    for at in (5, 128 * 16 + 3):  # in a whole row, and in the last short one
        y = x.clone()
        y[1, at] = bad
        sketch, squares = ops.flat_sketch([y], 256, seed=0, batched=True, squares=True, backend=gpu)
        assert (~sketch.isfinite()).sum(1).tolist() == [0, 1, 0]
        assert squares.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.gpu
def test_outputs_are_written_whole(gpu):
    """What torch hands out as new memory may hold anything."""
    tensors = mixed(integers, (4_500, 0, 100))
    assert flat_plan([x[None] for x in tensors], 16).parts > 1
    wanted = ops.flat_sketch(tensors, 16, seed=1, squares=True, backend="reference")
    with poisoned() as given:
        got = ops.flat_sketch(tensors, 16, seed=1, squares=True, backend=gpu)
    assert sum(x.is_floating_point() for x in given) >= 3
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_nothing_to_sketch_on_gpus(gpu):
    sketch, squares = ops.flat_sketch([torch.zeros(0, device=DEVICE)], 128, seed=0, squares=True, backend=gpu)
    assert torch.equal(sketch.cpu(), torch.zeros(128))
    assert torch.equal(squares.cpu(), torch.zeros(1))
    empty = torch.zeros(0, 5, device=DEVICE)
    assert ops.flat_sketch([empty], 128, seed=0, batched=True, backend=gpu).shape == (0, 128)
    scalar = ops.flat_sketch([torch.tensor(3.0, device=DEVICE)], 128, seed=0, backend=gpu)
    assert scalar.abs().sum() == 3
    if DEVICE.type == "cpu":  # a list of nothing is on no GPU
        assert torch.equal(ops.flat_sketch([], 128, seed=0, backend=gpu), torch.zeros(128))


@pytest.mark.gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.full)])
def test_hundreds_of_small_tensors(gpu, count):
    sizes = [(37 * i) % count for i in range(count)]
    check(gpu, mixed(integers, sizes), 256, tolerance=0, squares=True)
    check(gpu, mixed(integers, sizes[:60]), 32, tolerance=0, squares=True)


@pytest.mark.gpu
def test_wide_sketches(gpu):
    dim, size = (1 << 17, 60_000) if gpu == "cuda" and DEVICE.type == "cuda" else (128 * 24, 12_000)
    check(gpu, mixed(sizes=(size, 1)), dim)


@pytest.mark.gpu
def test_the_same_bits_each_time(gpu):
    tensors = mixed(sizes=(4_500, 3, 400))
    assert flat_plan([x[None] for x in tensors], 16).parts > 1
    first = ops.flat_sketch(tensors, 16, seed=1, squares=True, backend=gpu)
    again = ops.flat_sketch(tensors, 16, seed=1, squares=True, backend=gpu)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 128, 384])
def test_the_order_of_threads_changes_nothing(emulated_cuda, dim):
    if not cuda.emulated():
        pytest.skip("a GPU chooses its own order")
    tensors = mixed(sizes=(9000, 5, 128 * 33), batch=(2,))
    named = {"seed": 1, "batched": True, "squares": True, "backend": "cuda"}
    found = []
    try:
        for order in (0, 1, 2):
            emulated_cuda.set_order(order)
            found.append(ops.flat_sketch(tensors, dim, **named))
    finally:
        emulated_cuda.set_order(0)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])
