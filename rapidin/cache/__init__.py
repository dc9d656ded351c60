"""The cache: a folder with a manifest and shards, bytes in and bytes out."""

from rapidin.cache.cache import Cache, CacheWriter, ShardWriter
from rapidin.cache.manifest import Manifest, Shard, other_model

__all__ = ["Cache", "CacheWriter", "Manifest", "Shard", "ShardWriter", "other_model"]
