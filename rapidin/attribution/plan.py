"""What a cache would take: bytes from the layer table, time and memory from a short calibration."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rapidin import ops
from rapidin.cache import codec
from rapidin.cache.build import GROUP_BYTES
from rapidin.cache.codec import CodecConfig
from rapidin.data.encoding import Encoded, Status
from rapidin.data.examples import Examples
from rapidin.gradients.source import GradientSource

BUDGETS = (256, 1024, 2048, 8192, 16384)
TOKENS = 256  # of an example, where no data says


@dataclass(frozen=True, slots=True)
class Row:
    """One way to keep N examples.

    name: as on the command line; example: bytes of one; all: bytes of the cache, with what its code has
    learnt; scan: seconds of one query's scan from memory; learnt: bytes of memory that learning takes.
    """

    name: str
    example: int
    all: int
    scan: float
    learnt: int


@dataclass(frozen=True, slots=True)
class Plan:
    """tokens: of an example; seconds: to cache all; memory: bytes at the highest while caching."""

    examples: int
    layers: int
    width: int
    tokens: float
    seconds: float
    memory: int
    rows: list[Row]


def make_plan(
    source: GradientSource, examples: int, data: Examples | None = None, tokens: int | None = None
) -> Plan:
    """Measure a batch and the memory's speed, and say what caching `examples` examples would take.

    data: whose mean length counts, else `tokens` an example. Takes some seconds on a small model.
    """
    length = float(tokens) if tokens else _mean_length(source, data) if data is not None else float(TOKENS)
    length = min(length, float(source.encoder.max_length))
    first, each, memory = _calibrate(source, round(length))
    sampled = min(source.config.sample, examples)
    speed = _read_speed()
    blocks, width = source.blocks, source.width
    dim = blocks * width
    sample = min(codec.DEFAULT_SAMPLE, examples)
    rows = []
    for dtype in (*codec.FLOATS, *codec.PACKED):
        if dtype in codec.PACKED and width & (width - 1):
            continue
        size = CodecConfig(dtype).row_bytes(blocks, width)
        rows.append(Row(f"--dtype {dtype}", size, size * examples, size * examples / speed, 0))
    for budget in BUDGETS if not width & (width - 1) else ():
        if budget >= rows[0].example:  # float16 takes no more
            continue
        bits = max(0, budget - codec.ROW_OVERHEAD) * 8
        head = min(codec.shared_size(CodecConfig("sign", budget), blocks), sample)
        basis = 2 * (head * dim + min(bits, blocks * min(width, sample // 2)) * width) + 4 * dim
        # The sample in float16, and the directions of its halves and of all of it.
        learning = sample * dim * 4 + 3 * 4 * dim * head
        rows.append(
            Row(f"--bytes {budget}", budget, budget * examples + basis, budget * examples / speed, learning)
        )
    return Plan(examples, blocks, width, length, first * sampled + each * examples, memory, rows)


def _mean_length(source: GradientSource, data: Examples, most: int = 200) -> float:
    encoded = (source.encoder(data[row]) for row in range(min(most, len(data))))
    lengths = [len(e.ids) for e in encoded if e.status == Status.OK]
    return sum(lengths) / len(lengths) if lengths else float(TOKENS)


def _calibrate(source: GradientSource, length: int) -> tuple[float, float, int]:
    """(seconds that an example of the preconditioner's sample takes, seconds of every example, bytes of
    memory at
    the highest), of one batch, after one to warm up."""
    vocabulary = int(getattr(source.loaded.model.config, "vocab_size", 2))
    count = max(1, source.settings.batch_tokens // max(1, length))
    generator = torch.Generator().manual_seed(0)
    texts: Sequence[Encoded] = [
        Encoded(
            torch.randint(0, vocabulary, (max(2, length),), generator=generator).tolist(),
            [False] + [True] * (max(2, length) - 1),
            Status.OK,
        )
        for _ in range(count)
    ]
    source.sketches(texts[:1])[1].cpu()  # waits until it is made
    first = 0.0
    if source.config.kind in ("kfac", "sample"):
        start = time.perf_counter()
        preconditioner = source.fit_preconditioner(texts)
        first = (time.perf_counter() - start) / count
        source = source.with_preconditioner(preconditioner)
    start = time.perf_counter()
    sketch, _ = source.sketches(texts)
    ops.unit_blocks(sketch)[1].cpu()
    seconds = (time.perf_counter() - start) / count
    if source.loaded.device.type == "cuda":
        return first, seconds, torch.cuda.max_memory_allocated(source.loaded.device)
    return first, seconds, _highest_memory() + 2 * GROUP_BYTES


def _highest_memory() -> int:
    """Bytes of this process at its highest, 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, which has no /proc


def _read_speed(size: int = 256 << 20) -> float:
    """Bytes a second that this machine reads from memory."""
    words = torch.ones(size // 4, device="cpu")
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        words.sum()
        best = min(best, time.perf_counter() - start)
    return size / best
