"""The cache: a folder with a manifest and shards.

layout, names, manifest, schema, differences: what a cache is; shards, learned_files: its files; reader,
writer, receipts, merge: opening and writing; build, progress, signals: the caching loop; resident: rows on a
GPU; codec: how rows are stored.
"""

from rapidin.cache.differences import other_model
from rapidin.cache.manifest import Manifest, Shard
from rapidin.cache.reader import Cache
from rapidin.cache.writer import CacheWriter, ShardWriter

__all__ = ["Cache", "CacheWriter", "Manifest", "Shard", "ShardWriter", "other_model"]
