"""Caching from end to end on a Llama of 1 billion random weights, beside what the model itself takes.

The bare loop is a forward and a backward pass over the same texts with all parameters frozen, so that only
input gradients are computed. Caching is `Attributor.cache`: texts to tokens, hooks, sketches, code and shards
on disk. The two take turns. The training step is transformers' and AdamW's on the same batches.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from on_gpu.cases import SMALL, Bench, Case, Mode
from on_gpu.models import KINDS, make_model, make_records
from on_gpu.plan import Facts
from rapidin import Attributor
from rapidin.cache.codec import FloatCodec, PackedCodec
from rapidin.data.encoding import Encoded, by_length
from rapidin.gradients.preconditioner import KFAC_SAMPLE, PreconditionerConfig
from rapidin.tasks.causal import TokenBatch, example_losses

CACHING_GOAL, PACK_GOAL = 0.93, 0.02
DTYPES = ("float16", "sign")


def size_of(mode: Mode) -> dict[str, Any]:
    size: dict[str, Any] = {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv_heads": 8}
    size |= {
        "vocabulary": 128256,
        "examples": 128,
        "words": (256, 768),
        "batch_tokens": 8192,
        "width": "auto",
    }
    if mode == "quick":
        size |= {"examples": 48}
    if mode in SMALL:
        size |= {"hidden": 32, "inner": 48, "layers": 1, "heads": 2, "kv_heads": 1, "vocabulary": 128}
        size |= {"examples": 6, "words": (6, 12), "batch_tokens": 32, "width": 64}
    return size


@dataclass
class Setting:
    """A model with its texts in batches, as the caching loop makes them."""

    attributor: Attributor  # with K-FAC's preconditioner, which is made already
    plain: Attributor  # without
    records: list[dict[str, str]]
    batches: list[list[Encoded]]

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.attributor.loaded.model
        return model

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for batch in self.batches for e in batch)


def _setting(bench: Bench, kind: str) -> Setting:
    def make() -> Setting:
        size = size_of(bench.mode)
        loaded = make_model(size, kind, bench.device, torch.bfloat16)
        _ = loaded.identity  # hashing the weights is done once for a cache, however many examples it has
        settings: dict[str, Any] = {"width": size["width"], "batch_tokens": size["batch_tokens"]}
        plain = Attributor(loaded, preconditioner="off", **settings)
        records = make_records(size)
        encoded = [plain.source.encoder(record) for record in records]
        # A short run is no place for the sample, which a cache takes once however many examples it has.
        unfitted = Attributor(loaded, preconditioner="kfac", **settings).source
        made = unfitted.fit_preconditioner(encoded[:KFAC_SAMPLE])
        choice = PreconditionerConfig("kfac", sample=KFAC_SAMPLE, fitted=made)
        attributor = Attributor(loaded, preconditioner=choice, **settings)
        chosen = by_length(range(len(encoded)), encoded, size["batch_tokens"])
        return Setting(
            attributor, plain, records, [[encoded[n] for n in batch] for batch in reversed(chosen)]
        )

    return bench.once(f"setting, {kind}", kind, make)


def _batch(texts: list[Encoded], device: torch.device) -> TokenBatch:
    return TokenBatch.of([(e.ids, e.target) for e in texts], device)


def bare(bench: Bench, setting: Setting) -> float:
    """Seconds of a forward and an input-only backward pass over all batches."""
    model = setting.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    hook = embeddings.register_forward_hook(lambda *args: args[2].requires_grad_())
    bench.machine.wait()
    start = time.perf_counter()
    for texts in setting.batches:
        with torch.enable_grad():
            example_losses(model, _batch(texts, bench.device)).sum().backward()
    bench.machine.wait()
    seconds = time.perf_counter() - start
    hook.remove()
    return seconds


@contextlib.contextmanager
def _timed_packing(bench: Bench) -> Iterator[list[float]]:
    """The seconds that each call of a code's `encode` takes meanwhile, with the device's work awaited."""
    taken: list[float] = []
    before = {kind: kind.encode for kind in (FloatCodec, PackedCodec)}

    def timed(encode: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            bench.machine.wait()
            start = time.perf_counter()
            result = encode(*args, **named)
            bench.machine.wait()
            taken.append(time.perf_counter() - start)
            return result

        return run

    try:
        for kind, encode in before.items():
            setattr(kind, "encode", timed(encode))  # noqa: B010
        yield taken
    finally:
        for kind, encode in before.items():
            setattr(kind, "encode", encode)  # noqa: B010


def cached(bench: Bench, setting: Setting, dtype: str, plain: bool) -> tuple[float, float]:
    """(seconds of caching all texts, of these for packing)."""
    with tempfile.TemporaryDirectory() as folder, _timed_packing(bench) as packing:
        bench.machine.wait()
        start = time.perf_counter()
        attributor = setting.plain if plain else setting.attributor
        attributor.cache(setting.records, Path(folder) / "cache", dtype=dtype, null=False)  # type: ignore[arg-type]
        bench.machine.wait()
        return time.perf_counter() - start, sum(packing)


def caching(kind: str, dtype: str, size: dict[str, Any], plain: bool = False) -> Case:
    def run(bench: Bench) -> Facts:
        setting = _setting(bench, kind)
        attributor = setting.plain if plain else setting.attributor
        bare(bench, setting)
        bench.machine.clear_peak()
        bare(bench, setting)
        bare_peak = bench.machine.peak_bytes()
        cached(bench, setting, dtype, plain)  # compiles kernels, makes tables
        bench.machine.clear_peak()
        cached(bench, setting, dtype, plain)
        peak = bench.machine.peak_bytes()
        pairs = [(bare(bench, setting), *cached(bench, setting, dtype, plain)) for _ in range(3)]
        alone, whole, packing = (statistics.median(column) for column in zip(*pairs, strict=True))
        facts: Facts = {
            "unit": "s",
            "seconds": whole,
            "width": attributor.source.width,
            "quartiles": [min(p[1] for p in pairs), max(p[1] for p in pairs)],
            "runs": len(pairs),
            "floor_seconds": alone,
            "bound": "bare loop",
            "of": {"bare loop": alone / whole, "packing": packing / whole},
            "tokens": setting.tokens,
            "tokens_per_s": setting.tokens / whole,
            "packing_seconds": packing,
            "all_seconds": [list(pair) for pair in pairs],
        }
        if peak is not None and bare_peak is not None:
            facts |= {"peak_bytes": peak, "bytes_above_bare": peak - bare_peak}
        return facts

    goals = {"bare loop": CACHING_GOAL, "packing": PACK_GOAL}
    way = f"rapidin, {dtype} rows, {'preconditioner off' if plain else 'K-FAC'}"
    return Case("caching", way, {"kind": kind} | size, run, goals)


def bare_case(kind: str, size: dict[str, Any]) -> Case:
    def run(bench: Bench) -> Facts:
        setting = _setting(bench, kind)
        bare(bench, setting)
        bench.machine.clear_peak()
        seconds = statistics.median(bare(bench, setting) for _ in range(3))
        rate = setting.tokens / seconds
        facts: Facts = {
            "unit": "s",
            "seconds": seconds,
            "tokens": setting.tokens,
            "tokens_per_s": rate,
            "of": {},
        }
        return facts | {"peak_bytes": bench.machine.peak_bytes()}

    return Case("caching", "bare loop", {"kind": kind} | size, run)


def training(kind: str, size: dict[str, Any]) -> Case:
    """One pass over the batches as a step each: forward, backward with weight gradients, AdamW."""

    def run(bench: Bench) -> Facts:
        setting = _setting(bench, kind)
        model = setting.model
        trained = set(setting.attributor.loaded.trained or ())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained or not trained)
        chosen = [p for p in model.parameters() if p.requires_grad]
        # No step size and no decay: the other cases are to find the weights as they were.
        optimizer = torch.optim.AdamW(chosen, lr=0.0, weight_decay=0.0, fused=not bench.machine.dry)
        batches = [_batch(texts, bench.device) for texts in setting.batches]

        def step(batch: TokenBatch) -> None:
            labels = batch.ids.masked_fill(~batch.target, -100)
            model(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        taken = []
        bench.machine.clear_peak()
        for _ in range(3):  # the first one warms up
            bench.machine.wait()
            start = time.perf_counter()
            for batch in batches:
                step(batch)
            bench.machine.wait()
            taken.append(time.perf_counter() - start)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        seconds = statistics.median(taken[1:])
        facts: Facts = {"unit": "s", "seconds": seconds, "tokens": setting.tokens, "of": {}}
        return facts | {"tokens_per_s": setting.tokens / seconds, "peak_bytes": bench.machine.peak_bytes()}

    return Case("caching", "training step, AdamW", {"kind": kind} | size, run)


def cases(mode: Mode) -> list[Case]:
    size = size_of(mode)
    # First what the defaults are, K-FAC and float16 rows.
    listed = [caching(kind, DTYPES[0], size) for kind in KINDS]
    listed += [bare_case(kind, size) for kind in KINDS]
    listed += [caching(kind, DTYPES[1], size) for kind in KINDS]
    listed += [caching(kind, DTYPES[0], size, plain=True) for kind in KINDS]
    return [*listed, *(training(kind, size) for kind in KINDS)]
