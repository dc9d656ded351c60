"""Caches to measure on, without a model."""

from pathlib import Path

import torch

from rapidin import pack
from rapidin.cache import CacheWriter, Manifest
from rapidin.cache.shards import Rows
from rapidin.layers import Block


def write_cache(folder: Path, blocks: int, width: int, rows: int) -> None:
    """A cache folder of random float16 rows."""
    layers = [Block(f"layer{n}", (width, width), 1.0, n * width, width) for n in range(blocks)]
    manifest = Manifest(
        model={"source": {}, "identity": {}},
        sketch={"projection": "tensor", "width": width, "seed": 0, "hash": "lowbias32-1"},
        gradient={"at": [1.0], "loss": "mean", "include": [], "exclude": []},
        text={"eos": True, "max_length": 1, "too_long": "truncate"},
        data={},
        code=pack.Format("float16"),
        rows=rows,
        shard_rows=max(1, rows // 8),
        layers=layers,
    )
    with CacheWriter(folder, manifest) as writer:
        for n in writer.missing:
            count = manifest.rows_of(n)
            unit = torch.nn.functional.normalize(torch.randn(count, blocks, width), dim=-1)
            index = torch.arange(count) + n * manifest.shard_rows
            zeros = torch.zeros(count, dtype=torch.uint8)
            code = writer.code.encode(unit, torch.ones(count, blocks))
            writer.write(n, Rows(code, index, zeros, zeros.clone(), index.clone()), {"ok": count})
