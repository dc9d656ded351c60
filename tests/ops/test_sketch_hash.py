"""The keyed hash: the same words and permutations everywhere, and those that were written down once."""

import json
from pathlib import Path

import pytest
import torch
from inputs import DEVICE, SEED

from rapidin.ops import _cpu, tables
from rapidin.ops.reference import sketch_hash

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "hash.json").read_text())


def cpu_words(seed: int, stream: int, first: int, n: int) -> list[int]:
    out = torch.full((n,), -1, dtype=torch.int32)
    _cpu.hash_words(seed, stream, first, n, out.data_ptr())
    return [w & 0xFFFFFFFF for w in out.tolist()]


def cpu_permutation(seed: int, stream: int, first: int, n: int) -> list[int]:
    out = torch.full((n,), -1, dtype=torch.int32)
    _cpu.permutation(seed, stream, first, n, out.data_ptr())
    return out.tolist()


@pytest.mark.parametrize("case", GOLDEN["words"], ids=lambda c: f"{c['seed']}-{c['stream']}-{c['first']}")
def test_words_are_those_written_down(case):
    index = case["first"] + torch.arange(len(case["words"]))
    assert sketch_hash.words(case["seed"], case["stream"], index).tolist() == case["words"]
    assert cpu_words(case["seed"], case["stream"], case["first"], len(case["words"])) == case["words"]


@pytest.mark.parametrize("case", GOLDEN["permutations"], ids=lambda c: f"{c['seed']}-{c['first']}-{c['n']}")
def test_permutations_are_those_written_down(case):
    where = (case["seed"], case["stream"], case["first"], case["n"])
    assert sketch_hash.permutation(*where).tolist() == case["permutation"]
    assert cpu_permutation(*where) == case["permutation"]


def test_words_wrap_at_the_largest_index():
    first = 2**32 - 3
    wrapped = sketch_hash.words(SEED, 4, torch.tensor([first, first + 1, first + 2, 0, 1])).tolist()
    assert cpu_words(SEED, 4, first, 5) == wrapped


@pytest.mark.parametrize("n", [1, 2, 7, 128, 1000])
def test_permutation_is_one(n):
    assert sorted(cpu_permutation(SEED, 8, 5 * n, n)) == list(range(n))


@pytest.mark.parametrize(("n", "k"), [(0, 4), (1, 4), (9, 4), (8, 4), (1000, 1), (1000, 64)])
def test_tables_hold_bins_and_signs_of_the_definition(n, k):
    bins = sketch_hash.bins(SEED, sketch_hash.IN_BINS, n, k)
    signs = sketch_hash.signs(SEED, sketch_hash.IN_SIGNS, torch.arange(n))
    rows = tables.rows(SEED, tables.IN, n, k).long()
    assert torch.equal(rows & 0x7FFFFFFF, bins)
    assert torch.equal(rows < 0, signs < 0)
    columns = tables.columns(SEED, tables.IN, n, k).long().reshape(-1, k)
    assert torch.equal((columns & 0x7FFFFFFF).sort(dim=1).values, torch.arange(k).expand_as(columns))
    for i in range(n):
        entry = int(columns[i // k, bins[i]])
        assert entry & 0x7FFFFFFF == i % k
        assert (entry < 0) == (signs[i] < 0)


def test_seeds_and_streams_differ():
    some = {tuple(cpu_words(seed, stream, 0, 4)) for seed in (0, 1, 2**32, 2**63) for stream in range(16)}
    assert len(some) == 4 * 16


def test_signs_and_bits_are_fair():
    words = sketch_hash.words(7, 1, torch.arange(1 << 16))
    for bit in range(32):
        share = (words >> bit & 1).double().mean()
        assert abs(share - 0.5) < 5 * 0.5 / 256  # five standard deviations


def test_tables_are_bounded():
    with tables.kept_tables.emptied(10_000):
        for seed in range(20):
            tables.rows(seed, tables.OUT, 500, 10)
        assert tables.kept_tables.sizes() == [2_000] * 5


# ---- on GPUs ----


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, SEED, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 3, 12, 17])
@pytest.mark.parametrize("first", [0, 2**31 - 300, 2**32 - 300])
def test_words_have_the_same_bits(gpu, seed, stream, first):
    n = 600
    wanted = torch.empty(n, dtype=torch.int32)
    _cpu.hash_words(seed, stream, first, n, wanted.data_ptr())
    got = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    if gpu == "triton":
        from rapidin.kernels.sketch_hash import hash_words

        hash_words(got, seed, stream, first)
    else:
        from rapidin.ops import cuda

        cuda.extension().hash_words(seed, stream, first, n, got.data_ptr(), cuda.device_and_stream(got))
    assert torch.equal(got.cpu(), wanted)
