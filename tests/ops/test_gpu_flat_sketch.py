"""flat_sketch on a GPU: against the reference, exact sums, the same bits each time."""

import pytest
import torch
from inputs import DEVICE, DTYPES, SEED, assert_close, integers, normal
from poison import poisoned

from rapidin import ops
from rapidin.ops import cuda
from rapidin.ops.flat_plan import flat_plan

DIMS = (1, 2, 16, 64, 128, 384, 2048)
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


@pytest.mark.parametrize("dim", DIMS)
def test_agrees_with_the_reference(gpu, dim):
    sizes = SIZES[:-2] if dim < 16 else SIZES
    check(gpu, mixed(sizes=sizes), dim)
    check(gpu, mixed(sizes=sizes, batch=(3,)), dim, batched=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_tensors_of_one_dtype(gpu, dtype):
    """Whole rows that are aligned go another way than the rest."""
    for dim, sizes in ((128, (128 * 40 + 5,)), (256, (128 * 60, 128 * 9))):
        check(gpu, mixed(sizes=sizes, dtypes=(dtype,)), dim, squares=True)
        check(gpu, mixed(integers, sizes, dtypes=(dtype,)), dim, tolerance=0)


@pytest.mark.parametrize("dim", [16, 128, 384])
def test_integers_are_exact_over_many_parts(gpu, dim):
    sizes = (200 * dim + 1, 7, 100 * dim)
    tensors = mixed(integers, sizes)
    assert flat_plan([x[None] for x in tensors], dim).parts > 1
    scales = torch.tensor([2.0, -1.0, 4.0], device=DEVICE)
    check(gpu, tensors, dim, tolerance=0, scales=scales, squares=True)


@pytest.mark.sanitized
@pytest.mark.parametrize("dim", [8, 128, 384])
def test_scales_and_squares(gpu, dim):
    tensors = mixed(batch=(2,), sizes=(5, 0, 300, 2000))
    scales = normal(4).to(DEVICE)
    _, squares = check(gpu, tensors, dim, batched=True, scales=scales, squares=True)
    assert squares.shape == (2, 4)
    _, squares = check(gpu, [x[0] for x in tensors], dim, scales=scales, squares=True)
    assert squares.shape == (4,)
    assert squares[1] == 0
    check(gpu, tensors, dim, batched=True, scales=torch.stack([scales, scales], 1)[:, 0])


def test_long_tensors_squared_in_slices(gpu):
    tensors = mixed(integers, (40_000, 9))
    assert flat_plan([x[None] for x in tensors], 2).slices > 1
    check(gpu, tensors, 2, tolerance=0, squares=True)


def test_layouts_change_nothing(gpu):
    x = normal(4, 30, 24).to(DEVICE)
    spread = torch.full((4, 60, 24), torch.nan, device=DEVICE)
    spread[:, ::2] = x
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    rows = torch.full((4, 900), torch.nan, device=DEVICE)
    rows[:, 3:723] = x.flatten(1)
    same = (spread[:, ::2], turned, rows[:, 3:723], x.flip(0).flip(0))
    wanted = ops.flat_sketch([x], 256, seed=1, batched=True, backend=gpu)
    for other in same:
        got = ops.flat_sketch([other], 256, seed=1, batched=True, backend=gpu)
        assert torch.equal(got, wanted)
    one = x[:1].expand(4, 30, 24)
    got = ops.flat_sketch([one], 256, seed=1, batched=True, backend=gpu)
    assert torch.equal(got, wanted[:1].expand(4, 256))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views(gpu, dtype):
    x = integers(128 * 20 + 9, dtype=dtype).to(DEVICE)
    check(gpu, [x[i : i + 128 * 17 + i] for i in range(9)], 128, tolerance=0, squares=True)


def test_every_lane_and_sign(gpu):
    """One element at a time: each of a row's 128 comes to its own bin with its own sign, in every dtype."""
    for dtype in DTYPES:
        # of nine rows one element each: one of the examples has it at every place of the last
        x = torch.zeros(16, 9, 128)
        for b in range(16):
            x[b, torch.arange(9), (8 * b + torch.arange(9)) % 128] = 1.0 + torch.arange(9)
        check(gpu, [x.to(dtype).to(DEVICE)], 128, tolerance=0, batched=True)


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


def test_outputs_are_written_whole(gpu):
    """What torch hands out as new memory may hold anything."""
    tensors = mixed(integers, (36_000, 0, 100))
    wanted = ops.flat_sketch(tensors, 128, seed=1, squares=True, backend="reference")
    with poisoned() as given:
        got = ops.flat_sketch(tensors, 128, seed=1, squares=True, backend=gpu)
    assert sum(x.is_floating_point() for x in given) >= 3
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


def test_nothing_to_sketch(gpu):
    sketch, squares = ops.flat_sketch([torch.zeros(0, device=DEVICE)], 128, seed=0, squares=True, backend=gpu)
    assert torch.equal(sketch.cpu(), torch.zeros(128))
    assert torch.equal(squares.cpu(), torch.zeros(1))
    empty = torch.zeros(0, 5, device=DEVICE)
    assert ops.flat_sketch([empty], 128, seed=0, batched=True, backend=gpu).shape == (0, 128)
    scalar = ops.flat_sketch([torch.tensor(3.0, device=DEVICE)], 128, seed=0, backend=gpu)
    assert scalar.abs().sum() == 3
    if DEVICE.type == "cpu":  # a list of nothing is on no GPU
        assert torch.equal(ops.flat_sketch([], 128, seed=0, backend=gpu), torch.zeros(128))


@pytest.mark.sanitized
def test_hundreds_of_small_tensors(gpu):
    sizes = [(37 * i) % 300 for i in range(300)]
    check(gpu, mixed(integers, sizes), 256, tolerance=0, squares=True)
    check(gpu, mixed(integers, sizes[:60]), 32, tolerance=0, squares=True)


def test_wide_sketches(gpu):
    dim = 1 << 17 if gpu == "cuda" and DEVICE.type == "cuda" else 128 * 24
    check(gpu, mixed(sizes=(60_000, 1)), dim)


def test_the_same_bits_each_time(gpu):
    tensors = mixed(sizes=(36_000, 3, 3000))
    first = ops.flat_sketch(tensors, 128, seed=1, squares=True, backend=gpu)
    again = ops.flat_sketch(tensors, 128, seed=1, squares=True, backend=gpu)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


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
