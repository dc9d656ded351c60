"""Caches of a few made-up rows, of no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rapidin.cache import CacheWriter, Manifest
from rapidin.cache.codec import CodecConfig
from rapidin.cache.layout import Block
from rapidin.cache.shards import Rows

LAYERS = [Block("a.weight", (3, 4), 0.5, 0, 8), Block("b.weight", (5, 2), 0.5, 8, 8)]


def manifest(**changes: Any) -> Manifest:
    parts: dict[str, Any] = {
        "model": {"source": {"model": "m"}, "identity": {"model": "1"}},
        "sketch": {"projection": "tensor", "width": 8, "seed": 0},
        "gradient": {"at": [0.5], "loss": "mean", "include": [], "exclude": []},
        "text": {"eos": True, "max_length": 64, "too_long": "truncate"},
        "data": {"path": "train.jsonl", "identity": "2"},
        "codec": CodecConfig("float16"),
        "rows": 10,
        "shard_rows": 4,
        "layers": list(LAYERS),
    }
    return Manifest(**parts | changes)


def rows(n: int, count: int) -> Rows:
    generator = torch.Generator().manual_seed(n)
    return Rows(
        tensors={
            "sketch": torch.randn(count, 16, generator=generator).half(),
            "length": torch.rand(count, 2, generator=generator),
        },
        index=torch.arange(count) + 4 * n,
        status=torch.zeros(count, dtype=torch.uint8),
        truncated=torch.zeros(count, dtype=torch.uint8),
        record=torch.arange(count) * 7,
    )


def fill(folder: Path, shards: int = 3, **changes: Any) -> None:
    with CacheWriter(folder, manifest(**changes)) as writer:
        for n in writer.missing[:shards]:
            writer.write(n, rows(n, writer.manifest.rows_of(n)), {"ok": writer.manifest.rows_of(n)})
