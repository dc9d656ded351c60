"""Calls whose kernels aot.py compiles: what the defaults reach, and sizes at the limits of a launch.

The sketch dimensions, number formats and row layouts are taken from the package's own defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from aot import ARCHS, meta
from torch import Tensor

Call = Callable[[], Any]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MULTIPROCESSORS = 132  # of an H100 or H200
ONE_ARCH = (90,)
# Launches that differ little from others, which are compiled for every architecture.
ONE_ARCH_NAMES = re.compile(
    r"(embedding_sketch|matrix_sketch bias) .*|linear_sketch fp(16|32) (64|256|[1248]\d{3})"
    r"|low_rank (?!64)\d+"
    r"|(un)?pack \w+ (?!192$|13443$)\d+|(rotate|unit_blocks) (1024|2048|4096)( \w+)?"
    r"|topk_scan (of a code|bf16 (1|64)|fp(16|32) 16|.*valid).*"
)


def default_dims() -> dict[int, int]:
    """{sketch dimension: a number of blocks for which it is the default}."""
    from rapidin.gradients.source import default_width

    return {
        default_width(blocks, budget): blocks
        for budget in (None, 1 << 14)  # bytes an example: none asked for, and many
        for blocks in (1024, 512, *range(400, 0, -1))
    }


def default_codes() -> Iterator[tuple[str, int]]:
    """(packed dtype, numbers of a packed row) of the codes of some models, by default and by budget."""
    from rapidin.cache.codec import CodecConfig, shared_size

    for dim, blocks in default_dims().items():
        for dtype in ("sign", "int8", "int4"):
            yield dtype, sum(CodecConfig(dtype).shape(blocks, dim).residual)
    for budget in (256, 2048):
        code = CodecConfig("sign", budget)
        yield "int8", shared_size(code, 210)
        yield (
            "sign",
            8 * (budget - shared_size(code, 210)) - 1,
        )  # as many as are left, and seldom a round number


def launches() -> Iterator[tuple[str, Call, tuple[int, ...]]]:
    """(name, call, architectures) of each call whose kernels are compiled."""
    for name, run in (*_sketches(), *_packing(), *_scans()):
        yield name, run, ONE_ARCH if ONE_ARCH_NAMES.fullmatch(name) else ARCHS
    # How arguments are aligned is told the compiler, which makes other kernels of it.
    for name, run in _unaligned():
        yield name, run, ONE_ARCH


def _sketches() -> Iterator[tuple[str, Call]]:
    from rapidin.kernels.fold import fold
    from rapidin.kernels.low_rank import add_low_rank
    from rapidin.kernels.sketch_hash import hash_words
    from rapidin.ops import triton as gpu

    def flat(
        dtype: torch.dtype,
        *,
        norms: torch.dtype | None = None,
        squares: bool = False,
        scales: bool = False,
        dim: int = 65536,
    ) -> None:
        tensors = [meta(4096, 4096, dtype=dtype), meta(4096, dtype=norms or dtype)] * 4
        factors = meta(8) if scales else None
        gpu.flat_sketch([x[None] for x in tensors], dim, seed=1, scales=factors, squares=squares)

    yield "flat_sketch bfloat16", lambda: flat(torch.bfloat16)
    yield "flat_sketch bfloat16 and float32", lambda: flat(torch.bfloat16, norms=torch.float32)
    yield "flat_sketch float32", lambda: flat(torch.float32)
    yield "flat_sketch bfloat16 squares", lambda: flat(torch.bfloat16, squares=True, scales=True)
    yield "flat_sketch bfloat16 narrow", lambda: flat(torch.bfloat16, dim=16)
    yield "hash_words", lambda: hash_words(meta(600, dtype=torch.int32), 1, 2, 3)
    yield "matrix_sketch 576", lambda: gpu.matrix_sketch(meta(8, 576, 576, dtype=torch.bfloat16), 512, seed=1)
    yield "fold of a product", lambda: fold(meta(8, 512, 512), None, None, 512)
    for dim in sorted({64, 256} | default_dims().keys()):
        yield f"matrix_sketch bias {dim}", partial(gpu.matrix_sketch, meta(8, 2048, 1), dim, seed=1)
        ids = meta(8, 512, dtype=torch.int32)  # the entries of tokens' rows in the table of the vocabulary
        columns = meta(-(-4096 // dim) * dim, dtype=torch.int32)
        for dtype in FLOATS:
            embedded = meta(8, 512, 4096, dtype=dtype)
            yield f"embedding_sketch {SHORT[dtype]} {dim}", partial(fold, embedded, ids, columns, dim)
            inputs, grads = meta(8, 512, 4096, dtype=dtype), meta(8, 512, 11008, dtype=dtype)
            call = partial(gpu.linear_sketch, inputs, grads, dim, seed=1)
            yield f"linear_sketch {SHORT[dtype]} {dim}", call
    for rank in (8, 64, 256):
        x, along = meta(8, 512, 4096, dtype=torch.bfloat16), meta(8 * 512, 2 * rank)
        parts = meta(4096, 2 * rank, dtype=torch.bfloat16)
        yield f"low_rank {rank}", partial(add_low_rank, x, along, meta(rank), parts)


def _packing() -> Iterator[tuple[str, Call]]:
    """Heads of some hundred numbers, tails and rests of thousands, whole sketches; blocks of each size."""
    from rapidin.kernels.pack import pack, unpack
    from rapidin.kernels.rotate import rotate, unit_blocks
    from rapidin.ops import packed_bytes

    codes = {(dtype, width) for dtype, width in default_codes()}
    codes |= {(dtype, width) for dtype in ("int8", "int4", "sign") for width in (192, 13443)}
    for dtype, width in sorted(codes):
        kind = torch.int8 if dtype == "int8" else torch.uint8
        rows = meta(600, packed_bytes(width, dtype), dtype=kind)
        x, scale, half = meta(600, width), meta(600), meta(600, dtype=torch.float16)
        yield f"pack {dtype} {width}", partial(pack, x, rows, scale, dtype)
        yield f"unpack {dtype} {width}", partial(unpack, rows, half, x, dtype)
    for width, blocks in sorted(default_dims().items()):
        x, kept = meta(600, blocks, width), meta(600, blocks * width // 8)
        parts = {"mean": meta(blocks, width), "size": meta(blocks)}
        begin = meta(blocks + 1, dtype=torch.int64)
        whole: dict[str, Any] = {"mean": None, "begin": None, "size": None}
        yield f"rotate {width} cut", partial(rotate, x, kept, seed=7, inverse=False, begin=begin, **parts)
        yield f"rotate {width} whole", partial(rotate, x, x.flatten(1), seed=7, inverse=False, **whole)
        yield f"rotate {width} inverse", partial(rotate, x, x.flatten(1), seed=7, inverse=True, **whole)
    for width in sorted({65536} | default_dims().keys()):
        yield f"unit_blocks {width}", partial(unit_blocks, meta(600, width), meta(600, width), meta(600))


def _scan(cache: Any, queries: int, k: int = 100, **more: Any) -> Call:
    from rapidin.ops import gpu_scan
    from rapidin.ops.triton.scan import ScanKernels

    # How many programs there are is a constant of the merging kernel.
    _, both_ends = gpu_scan.ops(ScanKernels(lambda device: MULTIPROCESSORS))
    parts = cache if isinstance(cache, list) else [cache]
    width = sum(part.shape[1] if isinstance(part, Tensor) else part.width for part in parts)
    given: dict[str, Any] = {"scales": None, "offsets": None, "valid": None, "base": None} | more

    def call() -> None:
        both_ends(parts, meta(queries, width), k, **given)

    return call


def _packed(n: int, width: int, dtype: Any) -> Any:
    from rapidin.ops import Packed, packed_bytes

    kind = torch.int8 if dtype == "int8" else torch.uint8
    return Packed(meta(n, packed_bytes(width, dtype), dtype=kind), dtype, width, meta(n, dtype=torch.float16))


def _scans() -> Iterator[tuple[str, Call]]:
    n = 1_000_000
    for dtype in FLOATS:
        for queries in (1, 16, 64):
            rows = meta(n, 4096, dtype=dtype)
            yield f"topk_scan {SHORT[dtype]} {queries} queries", _scan(rows, queries)
    half = meta(n, 4096, dtype=torch.float16)
    yield "topk_scan fp16 16 queries, k 1024", _scan(half, 16, 1024)
    blocks = {"scales": meta(n, 7), "offsets": [0, 500, 1000, 1500, 2000, 2500, 3000, 4096]}
    yield "topk_scan fp16 4 queries, blocks", _scan(half, 4, **blocks)
    valid = {"valid": meta(n, dtype=torch.bool), "base": meta(16, n)}
    yield "topk_scan fp16 16 queries, valid, base", _scan(half, 16, **valid)
    for dtype in ("int8", "int4", "sign"):
        for queries in (1, 32):
            packed = _packed(n, 4096, dtype)
            yield f"topk_scan {dtype} {queries} queries", _scan(packed, queries)
            yield f"topk_scan {dtype} {queries} queries, blocks", _scan(packed, queries, **blocks)
    code = [_packed(n, 192, "int8"), _packed(n, 3000, "sign"), _packed(n, 9911, "sign")]
    yield "topk_scan of a code, 16 queries", _scan(code, 16)


def _unaligned() -> Iterator[tuple[str, Call]]:
    """Views that begin at an odd place, and rows whose lengths are no multiple of 16."""
    from rapidin.kernels.pack import unpack
    from rapidin.ops import Packed
    from rapidin.ops import triton as gpu

    for dtype in (torch.bfloat16, torch.float32):
        rows = meta(8, 512, 4097, dtype=dtype)[:, :, 1:]
        call = partial(gpu.linear_sketch, rows, rows, 512, seed=1)
        yield f"linear_sketch {SHORT[dtype]} 512 unaligned", call
    n = 1_000_000
    # A code of 2,048 bytes an example: rows of 1,785 bytes.
    file = meta(n, 2048, dtype=torch.uint8)
    sign = Packed(file[:, 200:1985], "sign", 8 * 1785, file[:, :4].view(torch.float32)[:, 0])
    for queries in (1, 16):
        yield f"topk_scan sign {queries} queries, unaligned", _scan(sign, queries)
    half = meta(n, 1001, dtype=torch.float16)
    for queries in (1, 16):
        yield f"topk_scan fp16 {queries} queries, unaligned", _scan(half[:, 1:], queries)
    yield "unpack sign 14280 unaligned", partial(unpack, sign.codes, sign.scale, meta(n, sign.width), "sign")
    yield "unit_blocks 512 unaligned", lambda: gpu.unit_blocks(meta(600, 513)[:, 1:])


def signatures() -> Iterator[tuple[str, Call]]:
    """Launches that show how Triton types its arguments, and are not compiled."""
    from rapidin.kernels.sketch_hash import hash_words

    words = meta(600, dtype=torch.int32)
    yield "signature: integers", partial(hash_words, words, 1, 2, 3_000_000_000)
    yield "signature: an aligned view", partial(hash_words, words[4:], 1, 2, 3)
    yield "signature: an unaligned view", partial(hash_words, words[1:], 1, 2, 3)


def extremes() -> Iterator[tuple[str, Call]]:
    """The most of each thing that a GPU's memory has room for, and more: nothing is compiled or allocated."""
    from rapidin.kernels import fourier_sketch as fourier
    from rapidin.kernels import linear_sketch as linear
    from rapidin.kernels.fold import fold
    from rapidin.kernels.pack import pack, unpack
    from rapidin.kernels.rotate import rotate, unit_blocks
    from rapidin.kernels.sum_parts import sum_parts
    from rapidin.ops import packed_bytes
    from rapidin.ops import triton as gpu

    many, most = 70_000, 3_000_000_000
    for dim in sorted({*linear.DIMS, *fourier.DIMS}):
        x, table = meta(many, 3, 64, dtype=torch.bfloat16), meta(max(dim, 64), dtype=torch.int32)
        sketch = fourier.fourier_sketch if dim in fourier.DIMS else linear.linear_sketch
        yield f"linear_sketch of many examples {dim}", partial(sketch, x, x, dim, table, table)
    x, table = meta(2, 1 << 20, 1 << 14, dtype=torch.bfloat16), meta(1 << 14, dtype=torch.int32)
    yield "linear_sketch of many tokens", partial(linear.linear_sketch, x, x, 512, table, table)
    yield "fold of many examples", partial(fold, meta(many, 4, 4), None, None, 64)
    vocabulary = meta(1 << 20, 1 << 13, dtype=torch.bfloat16)[None]
    rows, columns = meta(1 << 20, dtype=torch.int32), meta(1 << 13, dtype=torch.int32)
    yield "fold of a huge vocabulary", partial(fold, vocabulary, rows, columns, 512)
    yield "fold to many numbers", partial(fold, meta(1, 1 << 16, 1 << 16), None, None, 1 << 24)
    big = [meta(1, 1 << 18, 1 << 14, dtype=torch.bfloat16), meta(1, 4096)]
    yield "flat_sketch of a huge matrix", partial(gpu.flat_sketch, big, 1 << 20, seed=1, squares=True)
    small = [meta(many, 64), meta(many, 3, 5)]
    yield "flat_sketch of many examples", partial(gpu.flat_sketch, small, 1024, seed=1, squares=True)
    yield "sum_parts", partial(sum_parts, meta(300, 1 << 26), meta(1 << 26))
    for dtype in ("int8", "int4", "sign"):
        kind = torch.int8 if dtype == "int8" else torch.uint8
        for n, width in ((most, 3), (2, most), (4, 200_000_000)):
            codes = meta(n, packed_bytes(width, dtype), dtype=kind)  # type: ignore[arg-type]
            yield f"pack {dtype} {n} x {width}", partial(pack, meta(n, width), codes, meta(n), dtype)
            yield f"unpack {dtype} {n} x {width}", partial(unpack, codes, None, meta(n, width), dtype)
    whole: dict[str, Any] = {"mean": None, "begin": None, "size": None}
    for n, blocks, width in ((most, 1, 2), (10_000_000, 1, 16), (5_000_000, 2, 8192), (3, 1 << 20, 512)):
        x = meta(n, blocks, width)
        call = partial(rotate, x, x.flatten(1), seed=(1 << 63) + 5, inverse=False, **whole)
        yield f"rotate {n} x {blocks} x {width}", call
    for n, width in ((most, 2), (3, most)):
        yield f"unit_blocks {n} x {width}", partial(unit_blocks, meta(n, width), meta(n, width), meta(n))
    for n, queries, width in ((2**31 - 1, 1, 16), (2**31 - 1, 256, 16), (100, 256, 1 << 26)):
        rows = meta(n, width, dtype=torch.float16)
        yield f"topk_scan fp16 {n} x {width}, {queries} queries", _scan(rows, queries)
    for dtype in ("int8", "int4", "sign"):
        yield f"topk_scan {dtype} {2**31 - 1} rows", _scan(_packed(2**31 - 1, 64, dtype), 16)
