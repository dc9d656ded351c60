"""The whole flow on a GPU that is not there (`gpu_flow`): the right device, order, lifetimes, and no waiting.

What comes out is held against the same on the CPU: the numbers are real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_flow import CPU, CUDA, Event, Gpu, Stream, to_gpu
from test_attributor import records
from tiny import tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

from rapidin import methods, ops
from rapidin.attributor import Attributor
from rapidin.cache import Cache
from rapidin.caching import CachingLoop
from rapidin.geometry import Moments
from rapidin.hooks import GradientSketcher
from rapidin.scan import Source, scan_cache, scores_of
from rapidin.select import best_rows
from rapidin.transfer import Conveyor, Download, GpuOrder, upload

ROWS = 22

# Once a pass transformers asks whether its attention mask is full; without a mask it asks about positions.
ALLOWED = {"transformers/masking_utils.py:_ignore_causal_mask_sdpa aten::_local_scalar_dense"}


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with Gpu()() as found:
        yield found
    assert found.problems == []


def model(kind: str) -> Any:
    if kind == "all":
        return tiny_llama()
    return tiny_lora(tiny_gpt2() if kind == "gpt2" else tiny_llama())


def attributor(kind: str, *, on_gpu: bool, **settings: Any) -> Attributor:
    made = model(kind)
    return Attributor(to_gpu(made) if on_gpu else made, tiny_tokenizer(), **{"width": 64, "geometry": "off", "batch_tokens": 128} | settings)


CACHES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "float16": ("lora", {}, {}),
    "float32, two points": ("lora", {"at": (0.5, 1.0)}, {"dtype": "float32"}),
    "int8": ("lora", {}, {"dtype": "int8"}),
    "int4, adam": ("lora", {"geometry": "sample"}, {"dtype": "int4"}),
    "sign, kfac": ("lora", {"geometry": "kfac"}, {"dtype": "sign"}),
    "sample": ("lora", {}, {"bytes": 250, "sample": 16}),
    "sample, kfac, two points": ("lora", {"geometry": "kfac", "at": (0.0, 1.0)}, {"bytes": 400, "sample": 16, "dtype": "int4"}),
    "bytes": ("lora", {}, {"bytes": 300, "sample": 0}),
    "flat": ("lora", {"projection": "flat"}, {}),
    "rapidgrad": ("lora", {"projection": "rapidgrad", "width": 256}, {}),
    "gpt2, kfac": ("gpt2", {"geometry": "kfac"}, {}),
    "all layers, kfac": ("all", {"include": ["*"], "geometry": "kfac"}, {}),
    "all layers, adam": ("all", {"include": ["*"], "geometry": "sample"}, {}),
    "one at a time": ("lora", {"batch_tokens": 1}, {}),
}  # fmt: skip


def make(name: str, folder: Path, *, on_gpu: bool) -> Cache:
    kind, settings, options = CACHES[name]
    made = attributor(kind, on_gpu=on_gpu, **settings)
    return made.cache(records(ROWS), folder, **{"shard_rows": 6} | options)


def watched(gpu: Gpu, patch: pytest.MonkeyPatch, owner: Any, name: str) -> set[str]:
    """Where a function's last call waits for the GPU: earlier ones make what is kept."""
    function, found = getattr(owner, name), set()

    def run(*args: Any, **named: Any) -> Any:
        before = Counter(gpu.waits)
        made = function(*args, **named)
        found.clear()
        found.update(gpu.waits - before)
        return made

    patch.setattr(owner, name, run)
    return found


@pytest.mark.parametrize("name", list(CACHES))
def test_a_cache_is_made_without_waiting(
    name: str, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = watched(gpu, monkeypatch, CachingLoop, "_shard")
    moments = watched(gpu, monkeypatch, GradientSketcher, "add_moments")
    squares = watched(gpu, monkeypatch, Moments, "add")
    got = make(name, tmp_path, on_gpu=True)
    assert shards | moments | squares <= ALLOWED
    assert len(got) == ROWS
    assert gpu.calls["unit_blocks"] > 0
    assert Cache.verify(got.path) == []
