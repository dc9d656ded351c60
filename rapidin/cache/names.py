"""The names of the files and folders of a cache."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
BASIS = "basis.safetensors"
PRECONDITIONER = "preconditioner.safetensors"
PRECONDITIONER_FILES = (PRECONDITIONER, "geometry.safetensors")  # the latter in caches of format version 2
SAMPLE = "sample"
FITTED = "fitted"
RECEIPTS = "receipts"
DECOYS = "decoys"


def shard_name(n: int) -> str:
    """File name of shard n."""
    return f"shard-{n:06d}.safetensors"


def grown(path: Path) -> Path:
    """The path of a shard that replaces one with fewer rows, until the manifest records it."""
    return path.with_name(f"grown-{path.name}")
