"""A cache of a tiny model's gradients in one of three formats, and sketches to scan it for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import records, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

from rapidin import Attributor, Cache

CACHE_FORMATS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16"},
    "sign": {"dtype": "sign"},
    "learnt": {"bytes": 250, "sample": 24},
}


def lora_attributor() -> Attributor:
    return Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=64)


def cache_of(attributor: Attributor, name: str, folder: Path) -> Cache:
    """40 records in shards of 9, in one of `CACHE_FORMATS`."""
    return attributor.cache(records(40), folder, shard_rows=9, **CACHE_FORMATS[name])


def sketch_of(attributor: Attributor) -> Tensor:
    """Of three other records: [3, blocks, 64]."""
    texts = [attributor.source.encoder(record) for record in records(3, seed=5)]
    return attributor.source.sketches(texts)[0]
