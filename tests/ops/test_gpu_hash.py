"""Bins and signs on a GPU: the same bits as everywhere."""

import pytest
import torch
from inputs import DEVICE, SEED

from rapidin.ops import _cpu


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
