"""linear_sketch and embedding_sketch: every way, instruction set and GPU kernel against the formed
gradient."""

import json
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from changed import changed
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    DEVICE,
    DTYPES,
    INSTRUCTION_SETS,
    LINEAR_DIMS,
    LINEAR_SHAPES,
    SEED,
    assert_close,
    instruction_set,
    integers,
    layouts,
    normal,
    torch_threads,
)
from properties import tries

from rapidin import ops
from rapidin.ops import cpu, cuda, reference, tables
from rapidin.ops.cuda import sketches
from rapidin.ops.low_rank import coefficients, products_with_high_and_low

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "sketches.json").read_text())

WAYS = {
    "fft": cpu.by_fft,
    "torch's fft": cpu.by_torch_fft,
    "product": lambda a, g, k, seed, *ranks: cpu.by_product(a, g, k, seed, False, False, *ranks),
    "product, in": lambda a, g, k, seed, *ranks: cpu.by_product(a, g, k, seed, True, False, *ranks),
    "product, out": lambda a, g, k, seed, *ranks: cpu.by_product(a, g, k, seed, False, True, *ranks),
    "product, both": lambda a, g, k, seed, *ranks: cpu.by_product(a, g, k, seed, True, True, *ranks),
}


def factors(shape, dtype=torch.float32, grads_dtype=None, make=normal):
    batch, tokens, n_in, n_out = shape
    inputs = make(batch, tokens, n_in, seed=1, dtype=dtype)
    return inputs, make(batch, tokens, n_out, seed=2, dtype=grads_dtype or dtype)


@pytest.mark.parametrize("case", GOLDEN["linear"], ids=lambda c: f"{c['seed']}-{c['dim']}")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sketches_are_those_written_down(case, backend):
    inputs, grads = torch.tensor(case["inputs"]), torch.tensor(case["grads"])
    sketch = ops.linear_sketch(inputs, grads, case["dim"], seed=case["seed"], backend=backend)
    assert_close(sketch, torch.tensor(case["sketch"]))


@cache
def wanted_sketch(shape, dim):
    return ops.linear_sketch(*factors(shape), dim, seed=SEED, backend="reference")


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", LINEAR_DIMS)
def test_ways_agree_with_the_reference(way, dim, name):
    for shape in LINEAR_SHAPES:
        inputs, grads = factors(shape)
        if not inputs.numel() or not grads.numel():
            continue  # answered before a way is chosen: test_nothing_to_sketch
        with instruction_set(name):
            assert_close(WAYS[way](inputs, grads, dim, SEED), wanted_sketch(shape, dim), 4e-6)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [7, 64])
def test_layouts_and_dtypes(dtype, dim, name):
    inputs, grads = factors((2, 9, 150, 37), dtype)
    wanted = ops.linear_sketch(inputs, grads, dim, seed=SEED, backend="reference")
    with instruction_set(name):
        for a, g in zip(layouts(inputs).values(), layouts(grads).values(), strict=True):
            assert_close(ops.linear_sketch(a, g, dim, seed=SEED, backend="cpu"), wanted, 4e-6)
            for way in WAYS.values():
                assert_close(way(a, g, dim, SEED), wanted, 4e-6)


def test_factors_of_two_dtypes():
    inputs, grads = factors((2, 9, 150, 37))
    got = ops.linear_sketch(inputs.bfloat16(), grads.half(), 64, seed=1)
    wanted = ops.linear_sketch(inputs.bfloat16(), grads.half(), 64, seed=1, backend="reference")
    assert_close(got, wanted, 4e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nothing_to_sketch(shape, backend):
    inputs, grads = factors(shape)
    sketch = ops.linear_sketch(inputs, grads, 16, seed=0, backend=backend)
    assert torch.equal(sketch, torch.zeros(shape[0], 16))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("way", [w for w in WAYS if "fft" not in w])
def test_integers_are_exact(way, name):
    inputs, grads = factors((2, 6, 70, 90), make=integers)
    wanted = ops.linear_sketch(inputs, grads, 64, seed=SEED, backend="reference")
    with instruction_set(name):
        assert torch.equal(WAYS[way](inputs, grads, 64, SEED), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6])
def test_factors_of_very_different_sizes(way, scale):
    inputs, grads = factors((2, 20, 200, 100))
    inputs[:, :, 3] *= 1000  # an outlier feature, as language models have them
    grads *= scale * torch.logspace(-3, 3, 20)[:, None]  # and tokens that count more than others
    wanted = ops.linear_sketch(inputs, grads, 64, seed=SEED, backend="reference")
    assert_close(WAYS[way](inputs, grads, 64, SEED), wanted, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_not_finite_examples_stay_apart(way):
    inputs, grads = factors((4, 5, 60, 40))
    clean = WAYS[way](inputs, grads, 32, SEED)
    inputs[1, 2, 3], grads[2, 0, 0] = torch.nan, torch.inf
    sketch = WAYS[way](inputs, grads, 32, SEED)
    assert not sketch[1].isfinite().all()
    assert not sketch[2].isfinite().all()
    assert torch.equal(sketch[[0, 3]], clean[[0, 3]])


def test_padding_and_batch_change_nothing():
    inputs, grads = factors((3, 7, 90, 50))
    padded_inputs = torch.cat([inputs, normal(3, 4, 90)], dim=1)
    padded_grads = torch.cat([grads, torch.zeros(3, 4, 50)], dim=1)
    whole = ops.linear_sketch(padded_inputs, padded_grads, 64, seed=3)
    for b in range(3):
        alone = ops.linear_sketch(inputs[b : b + 1], grads[b : b + 1], 64, seed=3)
        assert_close(whole[b : b + 1], alone)


@pytest.mark.parametrize("way", WAYS)
def test_threads_change_nothing(way):
    inputs, grads = factors((5, 33, 200, 120))
    sketches = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            sketches.append(WAYS[way](inputs, grads, 64, SEED))
    assert_close(sketches[1], sketches[0])
    assert_close(sketches[2], sketches[0])


FUSED = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", FUSED)
def test_every_width_of_the_fused_kernel(dim, name):
    # The reference forms the gradient, so only one side at a time is as long as the widest sketch.
    for shape in ((2, 17, 70, 45), (1, 2, 2 * dim + 9, min(dim, 512)), (1, 2, 21, dim), (1, 5, dim - 3, 3)):
        with instruction_set(name):
            assert_close(cpu.by_fft(*factors(shape), dim, SEED), wanted_sketch(shape, dim), 4e-6)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("batch", [1, 5, 19])
@pytest.mark.parametrize("tokens", [1, 3, 15, 16, 33, 128, 129, 300])
def test_any_number_of_tokens_and_examples(tokens, batch, name):
    shape = (batch, tokens, 25, 40)
    inputs, grads = factors(shape)
    with instruction_set(name):
        sketch = cpu.by_fft(inputs, grads, 32, SEED)
        assert_close(sketch, wanted_sketch(shape, 32), 4e-6)
        for b in {0, batch // 2, batch - 1}:
            alone = cpu.by_fft(inputs[b : b + 1], grads[b : b + 1], 32, SEED)
            assert torch.equal(alone[0], sketch[b])


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", [16, 64, 512])
def test_threads_change_no_bit_of_the_fused_kernel(dim, name):
    inputs, grads = factors((5, 140, 90, 61))
    with instruction_set(name), torch_threads(1):
        one = cpu.by_fft(inputs, grads, dim, SEED)
    for threads in (2, 3, 7):
        with instruction_set(name), torch_threads(threads):
            assert torch.equal(cpu.by_fft(inputs, grads, dim, SEED), one)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("exponents", [(0, -100), (-100, 0), (60, -110), (-70, -30)])
def test_tiny_gradients_keep_all_their_bits(exponents, name):
    inputs, grads = factors((2, 20, 70, 50))
    with instruction_set(name):
        wanted = cpu.by_fft(inputs, grads, 64, SEED)
        scaled = cpu.by_fft(inputs * 2.0 ** exponents[0], grads * 2.0 ** exponents[1], 64, SEED)
    assert_close(scaled * 2.0 ** -sum(exponents), wanted)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_tokens_with_a_zero_factor_add_nothing(name):
    inputs, grads = factors((1, 20, 70, 50))
    inputs[:, 3:9], grads[:, 9:] = 0, 0
    inputs[:, 9:] *= 1e10
    with instruction_set(name):
        assert_close(cpu.by_fft(inputs, grads, 64, SEED), cpu.by_fft(inputs[:, :3], grads[:, :3], 64, SEED))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_examples_stay_apart_in_the_fused_kernel(bad, name):
    inputs, grads = factors((18, 7, 60, 40))
    with instruction_set(name):
        clean = cpu.by_fft(inputs, grads, 32, SEED)
        inputs[1, 2, 3], grads[17, 0, 0], inputs[4] = bad, bad, bad
        sketch = cpu.by_fft(inputs, grads, 32, SEED)
    touched = torch.zeros(18, dtype=torch.bool)
    touched[[1, 4, 17]] = True
    assert torch.equal(sketch[~touched], clean[~touched])
    assert not sketch[touched].isfinite().all(1).any()


@tries(40)
@given(
    tokens=st.integers(1, 200),
    n_in=st.integers(1, 5000),
    n_out=st.integers(1, 5000),
    k=st.integers(1, 2000),
)
def test_no_way_forms_the_gradient(tokens, n_in, n_out, k):
    way = cpu.choose_way(tokens, n_in, n_out, k)
    if way is not None:
        rows, cols = k if way[0] else n_in, k if way[1] else n_out
        assert rows * cols <= max(k * k, 1 << 16)


def test_cheap_ways_are_chosen():
    assert cpu.choose_way(128, 576, 8, 512) == (False, False)  # a LoRA factor
    assert cpu.choose_way(128, 4096, 4096, 30) == (True, True)  # a narrow sketch, no power of two
    assert cpu.choose_way(128, 4096, 4096, 500) is None  # a wide one
    assert cpu.choose_way(128, 576, 576, 64) is None


@tries(25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)),
    dim=st.integers(1, 70),
    seed=st.integers(0, 2**64 - 1),
)
def test_agrees_with_the_formed_gradient(shape, dim, seed):
    inputs, grads = factors(shape)
    formed = torch.einsum("bto,bti->boi", grads.double(), inputs.double())
    wanted = ops.matrix_sketch(formed.float(), dim, seed=seed, backend="reference")
    got = ops.linear_sketch(inputs, grads, dim, seed=seed)
    # against the gradient's length: opposite elements may meet in a bin
    assert float((got - wanted).norm()) <= 1e-5 * float(inputs.norm() * grads.norm()) + 1e-12


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", [1, 7, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_sketch(dim, dtype, name):
    ids = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[0, :4] = 7  # a row that several tokens share
    grads = normal(3, 9, 50, dtype=dtype)
    grads[1, 5:] = 0
    wanted = ops.embedding_sketch(ids, grads, dim, seed=SEED, backend="reference")
    with instruction_set(name):
        for g in layouts(grads).values():
            assert_close(ops.embedding_sketch(ids, g, dim, seed=SEED, backend="cpu"), wanted)
    formed = torch.zeros(3, 300, 50, dtype=torch.float64)
    for b in range(3):
        formed[b].index_add_(0, ids[b], grads[b].double())
    assert_close(ops.matrix_sketch(formed.float(), dim, seed=SEED), wanted)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_embedding_sketch_of_nothing(shape):
    sketch = ops.embedding_sketch(torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 5), 16, seed=0)
    assert torch.equal(sketch, torch.zeros(shape[0], 16))


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X, X[:1], 8), ValueError, "same batch and tokens"),
        ((X[0], X, 8), ValueError, "3 axes"),
        ((X.double(), X, 8), TypeError, "float64"),
        ((X, X, 0), ValueError, "dim must be at least 1"),
        ((X, X, 8.0), TypeError, "dim must be an int"),
        ((X.numpy(), X, 8), TypeError, "torch.Tensor"),
    ],
)
def test_mistakes_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.linear_sketch(*arguments, seed=0)


def test_more_mistakes_are_named():
    with pytest.raises(ValueError, match="seed must be at least 0"):
        ops.linear_sketch(X, X, 8, seed=-1)
    with pytest.raises(ValueError, match=r"unknown backend 'numpy'; known are reference, cpu"):
        ops.linear_sketch(X, X, 8, seed=0, backend="numpy")
    with pytest.raises(ValueError, match=r"\.cpu\(\) first"):
        ops.linear_sketch(X.to("meta"), X.to("meta"), 8, seed=0, backend="cpu")
    with pytest.raises(ValueError, match="no kernel for device 'meta'"):
        ops.linear_sketch(X.to("meta"), X.to("meta"), 8, seed=0)
    with pytest.raises(ValueError, match="one device"):
        ops.linear_sketch(X.to("meta"), X, 8, seed=0)
    with pytest.raises(ValueError, match="ids must be at least 0"):
        ops.embedding_sketch(torch.tensor([[-100]]), torch.zeros(1, 1, 4), 8, seed=0)


def test_zero_gradients_give_exactly_zero_however_large_the_inputs() -> None:
    inputs = 1e4 * torch.randn(2, 40, 300, generator=torch.Generator().manual_seed(0))
    for way in (cpu.by_fft, cpu.by_torch_fft):
        assert torch.equal(way(inputs, torch.zeros(2, 40, 200), 64, 0), torch.zeros(2, 64))
        assert torch.equal(way(torch.zeros(2, 40, 200), inputs, 64, 0), torch.zeros(2, 64))


# ---- a LowRank on a side ----


def low_rank(n: int, rank: int, seed: int = 0, gain: float = -0.95) -> ops.LowRank:
    """Directions that are nearly taken away, the strongest most."""
    rank = min(n, rank)
    basis = torch.linalg.qr(normal(n, rank, seed=seed)).Q
    return ops.LowRank(basis.contiguous(), torch.linspace(gain, gain / 2, rank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dim", [7, 64, 256])
def test_a_low_rank_is_applied_to_its_side(dim: int, sides: tuple[bool, bool], dtype: torch.dtype) -> None:
    for shape in LINEAR_SHAPES:
        inputs, grads = factors(shape, dtype)
        ranks = [low_rank(n, 5, seed=n) if on else None for n, on in zip(shape[2:], sides, strict=True)]
        turned = [
            x.double() + (x.double() @ r.basis.double() * r.gain) @ r.basis.T.double() if r else x.double()
            for x, r in zip((inputs, grads), ranks, strict=True)
        ]
        formed = turned[1].mT @ turned[0]
        wanted = ops.matrix_sketch(formed.float(), dim, seed=SEED, backend="reference").double()
        for backend in ("reference", "cpu"):
            got = ops.linear_sketch(
                inputs,
                grads,
                dim,
                seed=SEED,
                inputs_low_rank=ranks[0],
                grads_low_rank=ranks[1],
                backend=backend,
            )
            assert_close(got, wanted, 1e-5)


# (batch, tokens, in, out, rank): whole matrices and not, more and fewer features than bins, odd ranks
RANKED_SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 3, 8, 5, 8),
    (2, 9, 129, 40, 7),
    (1, 40, 41, 300, 16),
    (2, 33, 257, 130, 64),
)


@cache
def ranked(shape, rank, dtype, dim):
    """Factors, a LowRank on both sides or on one of them, and their sketch."""
    inputs, grads = factors(shape, dtype)
    both = [low_rank(n, rank, seed=n) for n in shape[2:]]
    return [
        (
            inputs,
            grads,
            ranks,
            reference.linear_sketch(
                inputs, grads, dim, seed=SEED, inputs_low_rank=ranks[0], grads_low_rank=ranks[1]
            ),
        )
        for ranks in (both, [both[0], None], [None, both[1]])
    ]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [7, 64, 256])
def test_every_way_applies_a_low_rank(way: str, dim: int, name: str) -> None:
    for *shape, rank in RANKED_SHAPES:
        for dtype in DTYPES:
            for inputs, grads, ranks, wanted in ranked(tuple(shape), rank, dtype, dim):
                with instruction_set(name):
                    got = WAYS[way](inputs, grads, dim, SEED, *ranks)
                assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_low_rank_of_any_layout(dtype: torch.dtype, name: str) -> None:
    inputs, grads = factors((2, 21, 150, 37), dtype)
    ranks = [low_rank(150, 9), low_rank(37, 9)]
    for dim in (32, 256):
        wanted = reference.linear_sketch(
            inputs, grads, dim, seed=SEED, inputs_low_rank=ranks[0], grads_low_rank=ranks[1]
        )
        with instruction_set(name):
            for a, g in zip(layouts(inputs).values(), layouts(grads).values(), strict=True):
                for way in WAYS.values():
                    assert_close(way(a, g, dim, SEED, *ranks), wanted, 1e-5)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", [32, 512])
def test_neither_threads_nor_other_examples_change_a_bit_of_a_low_rank(dim: int, name: str) -> None:
    inputs, grads = factors((5, 140, 190, 161))
    ranks = [low_rank(190, 20), low_rank(161, 20)]
    with instruction_set(name):
        with torch_threads(1):
            one = cpu.by_fft(inputs, grads, dim, SEED, *ranks)
            assert torch.equal(cpu.by_fft(inputs[3:4], grads[3:4], dim, SEED, *ranks)[0], one[3])
        with torch_threads(3):
            assert torch.equal(cpu.by_fft(inputs, grads, dim, SEED, *ranks), one)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_examples_stay_apart_with_a_low_rank(way: str, bad: float) -> None:
    inputs, grads = factors((4, 5, 60, 40))
    for dim in (16, 64):
        ranks = [low_rank(60, 6), low_rank(40, 6)]
        clean = WAYS[way](inputs, grads, dim, SEED, *ranks)
        a, g = inputs.clone(), grads.clone()
        a[1, 2, 3], g[2, 0, 0] = bad, bad
        sketch = WAYS[way](a, g, dim, SEED, *ranks)
        assert not sketch[1].isfinite().all()
        assert not sketch[2].isfinite().all()
        assert torch.equal(sketch[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [64, 512])
def test_what_is_far_larger_than_the_rest_is_taken_away_exactly(way: str, dim: int, name: str) -> None:
    # One feature a thousand times the others, which its direction takes down to their level: bfloat16 sides
    # must not be rounded again, nor what is left be transformed beside something a thousand times as large.
    ranks = []
    sides = factors((2, 20, 200, 140), torch.bfloat16)
    for x in sides:
        x[:, :, 3] *= 1000
        basis = torch.linalg.qr(torch.cat([torch.eye(x.shape[2])[:, 3:4], normal(x.shape[2], 5)], 1)).Q
        ranks.append(ops.LowRank(basis, torch.tensor([-0.999, -0.9, -0.8, -0.5, -0.2, 0.3])))
    wanted = reference.linear_sketch(
        *sides, dim, seed=SEED, inputs_low_rank=ranks[0], grads_low_rank=ranks[1]
    )
    with instruction_set(name):
        assert_close(WAYS[way](*sides, dim, SEED, *ranks), wanted, 2e-5)


def test_cheap_ways_are_chosen_with_a_low_rank() -> None:
    assert cpu.choose_way(128, 576, 8, 1024, 64, 8) == (False, False)  # a LoRA factor
    assert cpu.choose_way(128, 576, 576, 512, 64, 64) is None


@pytest.mark.parametrize("side", [tables.IN, tables.OUT])
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (5, 64), (64, 64), (300, 64), (129, 7)])
def test_the_table_of_a_low_rank_sketches_its_basis(n: int, dim: int, side: tuple[int, int]) -> None:
    ranks = low_rank(n, 6)
    table = ranks.table(SEED, side, dim)
    assert table is ranks.table(SEED, side, dim)
    entries = tables.rows(SEED, side, n, dim)
    bins, signs = (entries & 0x7FFFFFFF).long(), torch.where(entries < 0, -1.0, 1.0)
    wanted = (
        torch.zeros(dim, ranks.rank).double().index_add_(0, bins, (ranks.basis * signs[:, None]).double())
    )
    torch.testing.assert_close(table.double(), wanted, rtol=1e-6, atol=1e-6)


def test_two_bfloat16_parts_of_a_basis_give_the_products_with_it() -> None:
    ranks = low_rank(500, 12)
    high, low = ranks.high_and_low.float().split(12, 1)
    assert ranks.high_and_low.dtype == torch.bfloat16
    assert float(((high + low - ranks.basis).abs() / ranks.basis.abs()).max()) <= 2**-16
    x = normal(3, 9, 500, dtype=torch.bfloat16)
    x[..., 7] *= 1000
    wanted = x.double() @ ranks.basis.double()
    length = x.double().norm(dim=-1, keepdim=True)
    of_both = products_with_high_and_low(x, ranks).view(3, 9, 2, 12).sum(2)
    for got in (coefficients(x, ranks) / ranks.gain, of_both):
        assert got.dtype == torch.float32
        assert float(((got - wanted).abs() / length).max()) < 2**-16


def test_a_low_rank_goes_to_a_device_once() -> None:
    ranks = low_rank(40, 4)
    assert ranks.to(torch.device("cpu")) is ranks
    there = ranks.to(torch.device("meta"))
    assert there.device.type == "meta"
    assert ranks.to(torch.device("meta")) is there


def test_mistakes_of_a_low_rank_are_named() -> None:
    basis, gain = torch.zeros(4, 2), torch.zeros(2)
    with pytest.raises(TypeError, match=r"basis must be a float32 tensor, got torch\.float64"):
        ops.LowRank(basis.double(), gain)
    with pytest.raises(TypeError, match="gain must be a float32 tensor, got list"):
        ops.LowRank(basis, [0.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gain must have 1 axes"):
        ops.LowRank(basis, basis)
    with pytest.raises(ValueError, match="a column for each gain"):
        ops.LowRank(basis, torch.zeros(3))
    with pytest.raises(ValueError, match="on one device"):
        ops.LowRank(basis, gain.to("meta"))
    ranks = ops.LowRank(basis, gain)
    with pytest.raises(TypeError, match=r"inputs_low_rank must be a rapidin.ops.LowRank, got tuple"):
        ops.linear_sketch(X, X, 8, seed=0, inputs_low_rank=(basis, gain))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grads_low_rank must have a row for each feature of grads, got 4"):
        ops.linear_sketch(X, X[..., :3], 8, seed=0, grads_low_rank=ranks)
    with pytest.raises(ValueError, match=r"one device, got .* inputs_low_rank on 'meta'"):
        ops.linear_sketch(X, X, 8, seed=0, inputs_low_rank=ranks.to(torch.device("meta")))
    nothing = ops.LowRank(torch.zeros(4, 0), torch.zeros(0))
    x = normal(2, 3, 4)
    assert torch.equal(
        ops.linear_sketch(x, x, 8, seed=0, inputs_low_rank=nothing), ops.linear_sketch(x, x, 8, seed=0)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_known_vocabulary_changes_nothing(backend):
    ids, grads = torch.tensor([[0, 5, 2], [4, 4, 1]]), normal(2, 3, 7)
    wanted = ops.embedding_sketch(ids, grads, 64, seed=SEED, backend=backend)
    for vocabulary in (6, 9, 1000):
        got = ops.embedding_sketch(ids, grads, 64, seed=SEED, vocabulary=vocabulary, backend=backend)
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match=r"vocabulary must be from 1 to 2\*\*31, got 0"):
        ops.embedding_sketch(ids, grads, 64, seed=SEED, vocabulary=0, backend=backend)


# ---- on GPUs: Triton's kernels and CUDA's, which run on the CPU where there is no GPU ----


FOURIER = (1024, 2048, 4096, 8192)  # by Fourier transforms, all in float32
GPU_DIMS = (32, 64, 128, 256, 512, *FOURIER)
TRITON_ONLY = (7, 100, 16384)  # widths without a kernel: torch's FFT
# Few tokens, as they take long where they are emulated, but more than are transformed at a time
FEW_TOKENS = ((0, 3, 4, 5), (2, 0, 4, 5), (1, 1, 1, 1), (2, 3, 33, 70), (1, 5, 300, 8))


def sketch(inputs, grads, dim, backend, seed=SEED):
    found = ops.linear_sketch(inputs.to(DEVICE), grads.to(DEVICE), dim, seed=seed, backend=backend)
    assert found.dtype == torch.float32
    assert found.shape == (len(inputs), dim)
    return found.cpu()


def reference_sketch(inputs, grads, dim, seed=SEED):
    return ops.linear_sketch(inputs, grads, dim, seed=seed, backend="reference")


def tolerance(*dtypes, dim=64):
    """Relative error of an example's sketch. Both sides bfloat16: one rounding more of either, 2^-9 at most;
    the interpreter cuts digits off where a GPU rounds."""
    if dim in FOURIER or any(dtype != torch.bfloat16 for dtype in dtypes):
        return 1e-5
    return 4e-3 if DEVICE.type == "cuda" else 1e-2


def takes(backend, dim):
    return backend == "triton" or dim in GPU_DIMS


def skip_if_slow(backend, dim):
    """Triton's Fourier kernel reads rows of all widths by the same lines; interpreted, wider take long."""
    if backend == "triton" and DEVICE.type == "cpu" and dim > 1024:
        pytest.skip("interpreted, it takes long")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*GPU_DIMS, *TRITON_ONLY])
def test_shapes_widths_and_dtypes(gpu, dim, dtype):
    if not takes(gpu, dim):
        pytest.skip("no kernel: Triton's is the default there")
    for shape in FEW_TOKENS if dim >= 1024 else LINEAR_SHAPES:
        inputs, grads = factors(shape, dtype)
        found = sketch(inputs, grads, dim, gpu)
        assert_close(found, reference_sketch(inputs, grads, dim), tolerance(dtype, dim=dim))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 512, 1024])
def test_rows_longer_than_a_stage_and_many_tiles(gpu, dim):
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((2, 37, 1200, 2100), (1, 150, 70, 40)) if dim <= 512 else ((2, 13, 1200, 2100),):
            inputs, grads = factors(shape, dtype)
            found = sketch(inputs, grads, dim, gpu)
            assert_close(found, reference_sketch(inputs, grads, dim), tolerance(dtype, dim=dim))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 1024, 2048, 8192])
def test_layouts(gpu, dtype, dim):
    skip_if_slow(gpu, dim)
    tokens = 9 if dim == 64 else 3
    inputs, grads = factors((2, tokens, 150, 36), dtype)
    wanted = reference_sketch(inputs, grads, dim)
    for a, g in zip(layouts(inputs).values(), layouts(grads).values(), strict=True):
        # as strided views on the device too
        a = torch.as_strided(_whole(a).to(DEVICE), a.shape, a.stride(), a.storage_offset())
        g = torch.as_strided(_whole(g).to(DEVICE), g.shape, g.stride(), g.storage_offset())
        assert_close(sketch(a, g, dim, gpu), wanted, tolerance(dtype, dim=dim))


def _whole(x):
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


@pytest.mark.gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("dim", GPU_DIMS)
def test_cuda_at_every_width(emulated_cuda, dim):
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((2, 17 if dim <= 512 else 5, 33, 70), (1, 3, 2 * dim + 5, 8)):
            inputs, grads = factors(shape, dtype)
            found = sketch(inputs, grads, dim, "cuda")
            assert_close(found, reference_sketch(inputs, grads, dim), tolerance(dtype, dim=dim))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, *FOURIER])
def test_rows_that_lie_apart(gpu, dim):
    """Rows with a stride of whole vectors, so that wide loads stay in use, but must not run over."""
    skip_if_slow(gpu, dim)
    inputs, grads = factors((2, 3, 96, 40), torch.bfloat16)
    wide = torch.full((2, 3, 160), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :, 8:104] = inputs.to(DEVICE)
    found = sketch(wide[:, :, 8:104], grads, dim, gpu)
    assert_close(found, reference_sketch(inputs, grads, dim), tolerance(torch.bfloat16, dim=dim))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 1024, 8192])
def test_two_dtypes(gpu, dim):
    skip_if_slow(gpu, dim)
    for one in DTYPES:
        for other in DTYPES:
            inputs, grads = factors((2, 9, 150, 37) if dim == 64 else (1, 2, 150, 37), one, other)
            found = sketch(inputs, grads, dim, gpu)
            assert_close(found, reference_sketch(inputs, grads, dim), tolerance(one, other, dim=dim))


@pytest.mark.gpu
def test_the_rounding_of_bfloat16_is_what_is_said(emulated_cuda):
    """0.002 of a sketch's length, far below its own noise of 1 / sqrt(512) = 0.044."""
    inputs, grads = factors((4, 100, 512, 512), torch.bfloat16)
    got, wanted = sketch(inputs, grads, 512, "cuda").double(), reference_sketch(inputs, grads, 512).double()
    error = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error.max()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_factors_of_very_different_sizes_on_gpus(gpu, scale):
    inputs, grads = factors((2, 20, 200, 100))
    inputs[:, :, 3] *= 1000  # an outlier feature, as language models have them
    grads *= scale * torch.logspace(-3, 3, 20)[:, None]
    assert_close(sketch(inputs, grads, 64, gpu), reference_sketch(inputs, grads, 64), 1e-5)
    inputs, grads = inputs.bfloat16(), grads.bfloat16()
    found, wanted = sketch(inputs, grads, 64, gpu), reference_sketch(inputs, grads, 64)
    assert_close(found, wanted, tolerance(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", FOURIER)
def test_squares_of_a_side_leave_no_rounding_in_the_cross_term(gpu, dim):
    """Only 2i P Q of (P + i Q)^2 is wanted, and grads are a 10^12th of inputs, or nothing, or far fewer."""
    inputs, grads = factors((1, 4, 200, 100))
    inputs[:, :, 3] *= 1000
    grads *= 1e-12 * torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None]
    assert_close(sketch(inputs, grads, dim, gpu), reference_sketch(inputs, grads, dim), 5e-6)
    inputs, grads = factors((1, 2, dim, 8))
    assert_close(sketch(inputs, grads, dim, gpu), reference_sketch(inputs, grads, dim), 5e-6)
    grads[:, 0] = 0
    assert_close(sketch(inputs[:, :1], grads[:, :1], dim, gpu), torch.zeros(1, dim), 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 512, 1024, 8192])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_examples_stay_apart_on_gpus(gpu, bad, dim):
    skip_if_slow(gpu, dim)
    inputs, grads = factors((4, 5, 60, 40), torch.bfloat16)
    clean = sketch(inputs, grads, dim, gpu)
    inputs[1, 2, 3], grads[2, 0, 0] = bad, bad
    found = sketch(inputs, grads, dim, gpu)
    assert not found[1].isfinite().all()
    assert not found[2].isfinite().all()
    assert torch.equal(found[[0, 3]], clean[[0, 3]])


def low_rank_of_feature_3(n, rank, seed, gain=-0.999):
    """Of which the first direction has all of feature 3."""
    basis = normal(n, rank, seed=seed)
    basis[:, 0] = 0
    basis[3] = 0
    basis[3, 0] = 1
    return ops.LowRank(torch.linalg.qr(basis).Q.contiguous(), torch.full((rank,), gain))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 64, 100])
def test_low_rank_beside_a_massive_activation(gpu, dtype, rank, dim):
    """Feature 3 is a thousand times the others until its direction is taken down: what is left of x and of
    the term that cancels it is right to the one rounding of bfloat16."""
    inputs, grads = factors((2, 5 if dim == 64 else 2, 260, 270), dtype)
    inputs[:, :, 3] *= 1000
    of_inputs, of_grads = low_rank_of_feature_3(260, rank, 1), low_rank_of_feature_3(270, rank, 2, gain=-0.5)

    def sketched(backend, device):
        return ops.linear_sketch(
            inputs.to(device), grads.to(device), dim, seed=SEED, backend=backend,
            inputs_low_rank=of_inputs.to(device), grads_low_rank=of_grads.to(device),
        ).cpu()  # fmt: skip

    found = sketched(gpu, DEVICE)
    within = 1.5 * tolerance(dtype) if dtype == torch.bfloat16 else 1e-4  # one rounding more
    assert_close(found, sketched("reference", torch.device("cpu")), within)


@pytest.mark.gpu
def test_low_rank_of_any_layout_and_size(gpu):
    """Rows that lie apart, several tiles of tokens and features, a side of which all directions are known."""
    inputs, grads = factors((3, 50, 300, 30), torch.bfloat16)
    wide = torch.full((3, 50, 600), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :, ::2] = inputs.to(DEVICE)
    of_inputs, of_grads = low_rank_of_feature_3(300, 64, 1), low_rank_of_feature_3(30, 30, 2)
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

    def count_sketch(x, low_rank_of_feature_3, side):
        x, basis = x.double(), low_rank_of_feature_3.basis.double()
        x = x + (x @ basis * low_rank_of_feature_3.gain.double()) @ basis.T
        entries = tables.rows(SEED, side, x.shape[2], dim)
        signs = torch.where(entries < 0, -1.0, 1.0)
        bins = torch.zeros(*x.shape[:2], dim, dtype=torch.float64)
        return bins.index_add_(2, (entries & 0x7FFFFFFF).long(), x * signs)

    a, g = count_sketch(inputs, of_inputs, tables.IN), count_sketch(grads, of_grads, tables.OUT)
    return torch.fft.irfft((torch.fft.rfft(a) * torch.fft.rfft(g)).sum(1), dim)


@pytest.mark.gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_cuda_adds_a_low_rank_to_count_sketches(emulated_cuda, dim, monkeypatch):
    """With the rounding of the operands alone, which that of preconditioned features would add to; odd sizes,
    more tokens than a tile, one side or both. Feature 3 is a thousand times the others."""
    inputs, grads = factors((2, 37, 301, 197), torch.bfloat16)
    inputs[:, :, 3] *= 1000
    grads[:, :, 3] *= 1000
    nothing = ops.LowRank(torch.zeros(197, 16), torch.zeros(16))
    of_inputs, of_grads = low_rank_of_feature_3(301, 64, 1), low_rank_of_feature_3(197, 64, 2)
    fewer = low_rank_of_feature_3(301, 16, 1), low_rank_of_feature_3(197, 48, 2)
    as_they_are = {None: lambda x: x}  # features, of sides with a LowRank, too
    monkeypatch.setattr(sketches, "preconditioned", lambda x, low_rank: as_they_are[low_rank](x))
    for of_both in ((of_inputs, of_grads), fewer, (of_inputs, nothing), (of_inputs, None)):
        wanted = exactly(inputs, grads, dim, of_both[0], of_both[1] or nothing)
        names = "inputs_low_rank", "grads_low_rank"
        named = {name: side and side.to(DEVICE) for name, side in zip(names, of_both, strict=True)}
        found = ops.linear_sketch(inputs, grads, dim, seed=SEED, backend="cuda", **named)
        error = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert float(error.max()) < 3e-3


@pytest.mark.gpu
def test_a_term_that_does_not_fit_is_refused(emulated_cuda):
    most = emulated_cuda.linear_sketch_low_rank(512)
    assert most >= 64
    assert [emulated_cuda.linear_sketch_low_rank(dim) for dim in (64, 1024)] == [0, 0]
    # beyond it, features are preconditioned
    inputs, grads = factors((1, 3, 2 * most + 40, 50), torch.bfloat16)
    of_inputs, of_grads = low_rank_of_feature_3(2 * most + 40, most + 16, 1), low_rank_of_feature_3(50, 10, 2)
    named = {"inputs_low_rank": of_inputs, "grads_low_rank": of_grads}
    found = ops.linear_sketch(inputs, grads, 512, seed=SEED, backend="cuda", **named)
    assert_close(found, exactly(inputs, grads, 512, of_inputs, of_grads), 1.5 * tolerance(torch.bfloat16))
    with pytest.raises(ValueError, match="cannot add a term of this rank"):
        emulated_cuda.linear_sketch(
            0, 2, 8, (8, 8, 1), 0, (1, 0, 0, most + 16), 0, 2, 8, (8, 8, 1), 0, (0, 0, 0, 0),
            1, 1, 512, 1, 16, 0, 0, (0, 0),
        )  # fmt: skip


@pytest.mark.gpu
def test_one_bfloat16_of_a_basis_would_not_do(gpu):
    """What test_low_rank_beside_a_massive_activation would see if the low parts were left out."""
    from rapidin.kernels.low_rank import add_low_rank
    from rapidin.ops.low_rank import products_with_high_and_low

    if gpu == "cuda":
        pytest.skip("both backends run the same kernel")
    x = normal(1, 8, 260, dtype=torch.bfloat16)
    x[:, :, 3] *= 1000
    done = low_rank_of_feature_3(260, 64, 1)
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


@pytest.mark.gpu
def test_padding_adds_nothing(gpu):
    inputs, grads = factors((2, 19, 90, 50))
    padded_inputs = torch.cat([inputs, normal(2, 30, 90)], dim=1)
    padded_grads = torch.cat([grads, torch.zeros(2, 30, 50)], dim=1)
    assert_close(sketch(padded_inputs, padded_grads, 64, gpu), sketch(inputs, grads, 64, gpu), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_to_sketch_on_gpus(gpu, shape):
    inputs, grads = factors(shape)
    assert torch.equal(sketch(inputs, grads, 64, gpu), torch.zeros(shape[0], 64))


@pytest.mark.gpu
def test_the_same_bits_again(gpu):
    inputs, grads = factors((3, 40, 130, 70), torch.bfloat16)
    first = sketch(inputs, grads, 256, gpu)
    assert torch.equal(sketch(inputs, grads, 256, gpu), first)


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_how_blocks_share_an_example_changes_little(gpu):
    """Many examples leave a block each, one is cut in as many parts as it has tiles."""
    inputs, grads = factors((1, 70, 20, 12))
    alone = sketch(inputs, grads, 64, gpu)
    many, run, named = 300, ops.linear_sketch, {"backend": gpu}
    if gpu == "triton" and DEVICE.type == "cpu":  # interpreted, 300 take half a minute
        many = 9
        run, named = import_module("rapidin.ops.triton").linear_sketch, {"blocks": many}
    all_inputs, all_grads = (x.to(DEVICE).expand(many, -1, -1) for x in (inputs, grads))
    among = run(all_inputs, all_grads, 64, seed=SEED, **named)[7:8]
    assert_close(among.cpu(), alone, 1e-5)


@pytest.mark.gpu
def test_a_width_without_a_kernel_is_refused_by_name(emulated_cuda):
    inputs, grads = factors((1, 2, 8, 8))
    with pytest.raises(ValueError, match="no kernel for dim 100"):
        sketch(inputs, grads, 100, "cuda")


@pytest.mark.gpu
def test_what_the_cuda_kernels_take_is_said_by_shared_memory(emulated_cuda):
    """sm_86 and sm_89 let a block have 99 KB: all Fourier kernels fit, but not 512 numbers of float32."""

    def with_shared(number):
        return cuda.using(changed(emulated_cuda, shared_bytes=lambda device: number))

    sides = [torch.empty(1, 1, 8, dtype=dtype, device=DEVICE) for dtype in DTYPES]
    with with_shared(99 << 10):
        for x in sides:
            for dim in (32, 256, *FOURIER):
                assert cuda.supports("linear_sketch", x, x, dim), (dim, x.dtype)
            assert not cuda.supports("linear_sketch", x, x, 512)
            assert not cuda.supports("linear_sketch", x, x, 16384)
    with with_shared(163 << 10):
        for x in sides:
            assert cuda.supports("linear_sketch", x, x, 512)


@pytest.mark.gpu
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
