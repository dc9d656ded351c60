"""The keyed hash of docs/reference/sketch.md in Triton: the same bits as csrc/sketch_hash.h."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MASK = 0xFFFFFFFF


@triton.jit
def mix32(x):
    """lowbias32 of uint32 words of any shape."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def hash_word(index, key_a, key_b):
    """The words of a stream at `index` (uint32, any shape); key_a, key_b: uint32 from `stream_key`."""
    return mix32(mix32(index ^ key_a) + key_b)


def stream_key(seed: int, stream: int) -> tuple[int, int]:
    """(a, b) of a stream, for the host to hand to a kernel."""
    a = _mix32((seed & MASK) + 0x9E3779B9 * (2 * stream + 1))
    return a, _mix32(((seed >> 32) ^ a) + 0x85EBCA6B)


def signed_stream_key(seed: int, stream: int) -> tuple[int, int]:
    """The same bits as signed integers: one type of argument for all keys, so that one kernel serves them.

    The kernel's arguments must be in do_not_specialize, and be cast to uint32 by bitcast.
    """
    a, b = stream_key(seed, stream)
    return a - (a >> 31 << 32), b - (b >> 31 << 32)


def _mix32(x: int) -> int:
    x &= MASK
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


@triton.jit(do_not_specialize=["key_a", "key_b", "first"])
def _hash_words_kernel(words_ptr, key_a, key_b, first, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key_a, key_b = key_a.to(tl.uint32, bitcast=True), key_b.to(tl.uint32, bitcast=True)
    words = hash_word((i + first).to(tl.uint32), key_a, key_b)
    tl.store(words_ptr + i, words.to(tl.int32, bitcast=True), mask=i < n)


def hash_words(words: Tensor, seed: int, stream: int, first: int) -> None:
    """Fill words [n] int32 with the hash's words of first, first + 1, ...: for tests."""
    n = len(words)
    _hash_words_kernel[(triton.cdiv(n, 256),)](words, *signed_stream_key(seed, stream), first, n, BLOCK=256)
