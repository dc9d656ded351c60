"""Caches of random rows, to measure on without a model; shared by `bench/` and `studies/`."""

from pathlib import Path

import torch

from rapidin.cache import CacheWriter, Manifest, build, codec
from rapidin.cache.layout import Block
from rapidin.cache.shards import Rows

_DISTINCT = 256  # packed rows that are made; the others repeat them


def manifest_of(
    blocks: int, width: int, rows: int, code: codec.CodecConfig, *, at: float = 1.0, shard_rows: int = 1
) -> Manifest:
    """The manifest of rows of no model, of `blocks` layers of this sketch dimension."""
    return Manifest(
        model={"source": {}, "identity": {}},
        sketch={"projection": "tensor", "width": width, "seed": 0, "hash": "lowbias32-1"},
        gradient={"at": [at], "loss": "mean", "include": [], "exclude": []},
        text={"eos": True, "max_length": 1, "too_long": "truncate"},
        data={},
        codec=code,
        rows=rows,
        shard_rows=shard_rows,
        layers=[Block(f"layer{n}", (width, width), 1.0, n * width, width) for n in range(blocks)],
    )


def write_cache(
    folder: Path,
    blocks: int,
    width: int,
    rows: int,
    code: codec.CodecConfig | None = None,
    *,
    shards: int | None = 8,
) -> None:
    """A cache folder of random rows, by default float16. shards: how many, None: as `rapidin cache` makes."""
    manifest = manifest_of(blocks, width, rows, code or codec.CodecConfig("float16"))
    manifest.shard_rows = build.shard_rows(manifest) if shards is None else max(1, rows // shards)
    with CacheWriter(folder, manifest) as writer:
        if manifest.codec.dtype in codec.PACKED:
            writer.set_fitted_codec(manifest.codec.shape(blocks, width), None, {})
        few: dict[str, torch.Tensor] = {}  # packed rows, made once
        for n in writer.missing:
            count = manifest.rows_of(n)
            if not few or manifest.codec.dtype not in codec.PACKED:
                made = min(count, _DISTINCT) if manifest.codec.dtype in codec.PACKED else count
                unit = torch.nn.functional.normalize(torch.randn(made, blocks, width), dim=-1)
                few = writer.codec.encode(unit, torch.ones(made, blocks))
            again = torch.arange(count) % made
            fields = few if made == count else {name: value[again] for name, value in few.items()}
            index = torch.arange(count) + n * manifest.shard_rows
            zeros = torch.zeros(count, dtype=torch.uint8)
            writer.write(n, Rows(fields, index, zeros, zeros.clone(), index.clone()), {"ok": count})
