"""The cache: a folder with a manifest and shards, bytes in and bytes out."""

from rapidin.cache.manifest import Manifest, Shard, other_model
from rapidin.cache.reader import Cache, CacheWriter, ShardWriter

__all__ = ["Cache", "CacheWriter", "Manifest", "Shard", "ShardWriter", "other_model"]
