"""The cost of a cache: bytes from the layer table, time and memory from a short calibration."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rapidin import ops
from rapidin.cache import codec
from rapidin.cache.build import GROUP_BYTES
from rapidin.cache.codec import CodecConfig
from rapidin.data.encoding import AnyExample, Encoded, Status
from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.gradients.check import GradientCheck
from rapidin.gradients.coverage import Coverage
from rapidin.gradients.kept import KEPT_BYTES, KeptGradients
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import Causal

BUDGETS = (256, 1024, 2048, 8192, 16384)
TOKENS = 256  # of an example, if no data is given
_LEAST = 4  # examples that are measured


@dataclass(frozen=True, slots=True)
class FormatCost:
    """The cost of a cache in one storage format.

    name: as on the command line; example_bytes: of one example; cache_bytes: of the cache, including what its
    codec has learnt; scan_seconds: of one query's scan from memory; fitting_bytes: the memory that fitting
    the codec takes.
    """

    name: str
    example_bytes: int
    cache_bytes: int
    scan_seconds: float
    fitting_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The cost of a cache in all formats.

    tokens: mean per example; seconds: to cache all examples; memory: peak bytes while caching; coverage: what
    of the model counts; check: how gradients compare with autograd's, None if that was not found out.
    """

    examples: int
    layers: int
    width: int
    tokens: float
    seconds: float
    memory: int
    formats: list[FormatCost]
    coverage: Coverage
    check: GradientCheck | None


def make_plan(
    source: GradientSource,
    examples: int,
    data: Examples | None = None,
    tokens: int | None = None,
    *,
    measured_seconds: float = 4.0,
) -> Plan:
    """Measures passes over examples and the memory's speed, and estimates the cost of caching `examples`
    examples.

    data: the mean length of its examples is used, else `tokens`; measured_seconds: of the passes, about, if
    the model is on a CPU. Takes some seconds on a small model.
    """
    assert source.settings.max_length is not None
    texts = [] if data is None else _examples(source, data)
    length = sum(each.length for each in texts) / len(texts) if texts else float(TOKENS)
    if tokens:
        length = float(tokens)
    if isinstance(source.task, Causal):
        length = min(length, float(source.settings.max_length))
        texts = _texts(source, round(length))
    elif not texts or tokens:
        raise UserError(f"the task '{source.task.name}' is measured on examples", "give `data`, not `tokens`")
    check = source.checked(texts)
    one, several = _calibrate(source.with_check(check), texts, measured_seconds)
    sample = source.config.sample_of(examples)
    kept, reused = kept_of_sample(several.kept, several.count, sample)
    total = _fitting(one, several, sample) + several.seconds / several.count * (examples - reused)
    formats = _formats(source.blocks, source.width, examples, _read_speed())
    memory = several.memory + max(0, kept - several.kept)
    return Plan(examples, source.blocks, source.width, length, total, memory, formats, source.coverage, check)


def kept_of_sample(kept: int, count: int, sample: int) -> tuple[int, int]:
    """Bytes of the gradients that are kept of a sample's examples, and how many of these are kept, so that
    their sketches take no pass of their own.

    kept: bytes of those of `count` examples, 0 if they are not kept; sample: examples in the sample.
    """
    if not kept:
        return 0, 0
    reused = min(sample, KEPT_BYTES * count // kept)
    return kept * reused // count, reused


def _fitting(one: _Passes, several: _Passes, sample: int) -> float:
    """The seconds of fitting the preconditioner to a sample; what it takes besides passes is counted once."""
    if several.count == one.count:
        return one.fit_seconds * sample
    each = max(0.0, several.fit_seconds - one.fit_seconds) / (several.count - one.count)
    return each * sample + max(0.0, one.fit_seconds - each)


def _formats(blocks: int, width: int, examples: int, speed: float) -> list[FormatCost]:
    """The cost of each format; speed: bytes per second of a scan."""
    dim, sample = blocks * width, min(codec.DEFAULT_SAMPLE, examples)
    power_of_two = not width & (width - 1)
    formats = []
    for dtype in codec.DTYPES:
        if dtype in codec.PACKED and not power_of_two:
            continue
        size = CodecConfig(dtype).row_bytes(blocks, width)
        formats.append(FormatCost(f"--dtype {dtype}", size, size * examples, size * examples / speed, 0))
    for budget in BUDGETS if power_of_two else ():
        if budget >= formats[0].example_bytes:  # float16 takes no more
            continue
        bits = max(0, budget - codec.ROW_OVERHEAD) * 8
        shared = min(codec.shared_size(CodecConfig("sign", budget), blocks), sample)
        basis = 2 * (shared * dim + min(bits, blocks * min(width, sample // 2)) * width) + 4 * dim
        # The sample in float16, and the bases of its halves and of all of it.
        fitting = sample * dim * 4 + 3 * 4 * dim * shared
        seconds = budget * examples / speed
        formats.append(FormatCost(f"--bytes {budget}", budget, budget * examples + basis, seconds, fitting))
    return formats


def _examples(source: GradientSource, data: Examples, most: int = 200) -> list[AnyExample]:
    """The first examples, without those that have no sketch."""
    examples = (source.example(data[row]) for row in range(min(most, len(data))))
    return [each for each in examples if each.status == Status.OK]


def _texts(source: GradientSource, length: int) -> list[AnyExample]:
    """A batch of random texts of so many tokens."""
    vocabulary = int(getattr(source.loaded.model.config, "vocab_size", 2))
    count = max(1, source.settings.batch_tokens // max(1, length))
    generator = torch.Generator().manual_seed(0)
    return [
        Encoded(
            torch.randint(0, vocabulary, (max(2, length),), generator=generator).tolist(),
            [False] + [True] * (max(2, length) - 1),
            Status.OK,
        )
        for _ in range(count)
    ]


@dataclass(frozen=True, slots=True)
class _Passes:
    """Passes over `count` examples: the seconds of fitting the preconditioner and of sketching, the peak
    bytes of memory, and `kept`, the bytes of it that gradients take which the fit keeps."""

    count: int
    fit_seconds: float
    seconds: float
    memory: int
    kept: int


def _calibrate(
    source: GradientSource, texts: Sequence[AnyExample], measured_seconds: float
) -> tuple[_Passes, _Passes]:
    """Passes over one text and over several after a warm-up, the latter with the memory of a whole batch.

    Several are all of the batch, or, where that would take long, as many as take about `measured_seconds`, at
    least `_LEAST`, whose memory is then extrapolated to the batch.
    """
    source.sketches(texts[:1])[1].cpu()  # waits for the GPU
    before = 0 if source.loaded.device.type == "cuda" else _peak_memory()  # loading may have taken more
    counts_anew = source.loaded.device.type != "cuda" and _restart_peak_memory()
    one = _passes(source, texts[:1])
    count = len(texts)
    if counts_anew:
        _restart_peak_memory()
        alone = one.fit_seconds + one.seconds
        count = min(count, max(_LEAST, int(measured_seconds / max(alone, 1e-6))))
    several = _passes(source, texts[:count])
    memory = several.memory
    if count < len(texts):
        memory += max(0, memory - one.memory) * (len(texts) - count) // (count - 1)
    return one, replace(several, memory=max(memory, before))


def _passes(source: GradientSource, texts: Sequence[AnyExample]) -> _Passes:
    on_gpu, fit_seconds = source.loaded.device.type == "cuda", 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(source.loaded.device)
    start = time.perf_counter()
    kept_bytes = 0
    if source.config.kind in ("kfac", "sample"):
        kept = KeptGradients() if source.keeps_gradients else None
        preconditioner = source.fit_preconditioner(texts, kept=kept)
        kept_bytes = 0 if kept is None else kept.bytes
        del kept
        fit_seconds = time.perf_counter() - start
        source = source.with_preconditioner(preconditioner)
    start = time.perf_counter()
    sketch, _ = source.sketches(texts)
    ops.unit_blocks(sketch)[1].cpu()
    seconds = time.perf_counter() - start
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(source.loaded.device)
    else:
        peak = _peak_memory() + 2 * GROUP_BYTES
    return _Passes(len(texts), fit_seconds, seconds, peak, kept_bytes)


def _restart_peak_memory() -> bool:
    """Counts this process's peak memory anew; False where the system (Linux alone does) cannot do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory() -> int:
    """The peak bytes of this process."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, which has no /proc


def _read_speed(size: int = 256 << 20) -> float:
    """Bytes per second that this machine reads from memory."""
    words = torch.ones(size // 4, device="cpu")
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        words.sum()
        best = min(best, time.perf_counter() - start)
    return size / best
