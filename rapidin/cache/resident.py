"""Keeps rows of caches on a GPU from one query to the next, as far as its memory allows.

The first scan of a cache uploads its rows and copies them, on the GPU, to memory that is kept; the next scan
of the same rows uploads nothing. A cache's rows are kept while its `Cache` object lives, until another cache
needs the memory: the least recently scanned cache is released first. A shard whose checksum in the manifest
has changed is uploaded again. With `Cache(path, resident=False)` every scan uploads.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from rapidin.cache.manifest import Shard
from rapidin.cache.reader import Cache
from rapidin.cache.shards import Rows
from rapidin.ops.transfer import stride_there

_RESERVED_FRACTION = 4  # one in so many bytes of the device's memory is left to other work
STATUS = "status"  # the name of the rows' status among the tensors of a held shard


class Memory(Protocol):
    """A device's memory, as `Resident` uses it."""

    def free(self) -> int:
        """Bytes that may still be allocated."""

    def allocate(self, like: Tensor, count: int) -> Tensor:
        """Memory for `count` rows like those of `like`, perhaps with padding. Raises
        torch.OutOfMemoryError."""


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory, less the part that is left to other work."""

    device: torch.device

    def free(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused - total // _RESERVED_FRACTION

    def allocate(self, like: Tensor, count: int) -> Tensor:
        if like.ndim != 2:
            return torch.empty(count, *like.shape[1:], dtype=like.dtype, device=self.device)
        stride = stride_there(like.shape[1], like.element_size())
        return torch.empty(count, stride, dtype=like.dtype, device=self.device)[:, : like.shape[1]]


@dataclass
class HeldShard:
    """A shard's tensors on the device, of which rows [low, high) are filled."""

    tensors: dict[str, Tensor]
    low: int = 0
    high: int = 0

    def has(self, low: int, high: int) -> bool:
        """Whether these rows are filled."""
        return self.low <= low and high <= self.high

    def rows(self, low: int, high: int) -> dict[str, Tensor]:
        """Rows [low, high) of each tensor."""
        return {name: value[low:high] for name, value in self.tensors.items()}

    def fill(self, low: int, high: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy rows [low, high) in, if they adjoin the rows that are filled; otherwise do nothing."""
        if self.low < self.high and not self.low <= low <= self.high:
            return
        for name, value in self.tensors.items():
            value[low:high].copy_(tensors[name])
        self.low, self.high = (low, high) if self.low == self.high else (self.low, max(self.high, high))


@dataclass
class _Held:
    """The shards of one cache that are held, by checksum. may_grow: whether there is memory for more."""

    shards: dict[str, HeldShard] = field(default_factory=dict)
    may_grow: bool = False


class Resident:
    """The rows that stay in a device's memory (see the top of this module). All work is on one stream."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._held: OrderedDict[int, _Held] = OrderedDict()  # by id(); the last scanned last

    def admit(self, caches: Iterable[Cache], within: tuple[int, int]) -> None:
        """Make room for rows of these caches, which are about to be scanned, by releasing older caches."""
        chosen = list({id(cache): cache for cache in caches if cache.resident}.values())
        for cache in chosen:
            if id(cache) not in self._held:
                self._held[id(cache)] = _Held()
                weakref.finalize(cache, self._held.pop, id(cache), None).atexit = False
            self._held.move_to_end(id(cache))
            held, known = self._held[id(cache)], {shard.sha256 for shard in cache.manifest.shards}
            held.shards = {name: shard for name, shard in held.shards.items() if name in known}
        taken = 0
        for cache in chosen:
            held = self._held[id(cache)]
            missing = [s for s in _shards(cache, within) if s.sha256 not in held.shards]
            needed = sum(_device_bytes(shard, cache) for shard in missing)
            while needed and taken + needed > self._memory.free() and self._release_oldest(chosen):
                pass
            held.may_grow = taken + needed <= self._memory.free()
            taken += needed if held.may_grow else 0

    def _release_oldest(self, but: Sequence[Cache]) -> bool:
        """Release the least recently scanned cache; False if there is none besides these."""
        kept = {id(cache) for cache in but}
        for number, held in self._held.items():
            if number not in kept and held.shards:
                held.shards = {}
                return True
        return False

    def shard(self, cache: Cache, first: int, rows: Rows) -> HeldShard | None:
        """The held shard with this first row, new and empty if there is room for it, else None."""
        held = self._held.get(id(cache))
        if held is None or not cache.resident:
            return None
        shard = next(s for s in cache.manifest.shards if s.first == first)
        if shard.sha256 not in held.shards and held.may_grow:
            tensors = {**rows.tensors, STATUS: rows.status}
            try:
                held_tensors = {
                    name: self._memory.allocate(value, shard.rows) for name, value in tensors.items()
                }
            except torch.OutOfMemoryError:  # the free memory is fragmented
                held.may_grow = False
                return None
            held.shards[shard.sha256] = HeldShard(held_tensors)
        return held.shards.get(shard.sha256)

    def holds_all(self, cache: Cache, within: tuple[int, int]) -> bool:
        """Whether all of these rows are held, so that a scan reads nothing from disk."""
        held = self._held.get(id(cache))
        return held is not None and all(
            (held_shard := held.shards.get(shard.sha256)) is not None
            and held_shard.has(max(0, within[0] - shard.first), min(shard.rows, within[1] - shard.first))
            for shard in _shards(cache, within)
        )

    def forget(self, cache: Cache | None = None) -> None:
        """Release the memory of this cache, or of all caches."""
        for number, held in self._held.items():
            if cache is None or number == id(cache):
                held.shards = {}


def _shards(cache: Cache, within: tuple[int, int]) -> Iterator[Shard]:
    low, high = within
    return (s for s in cache.manifest.shards if s.first < high and s.first + s.rows > low)


def _device_bytes(shard: Shard, cache: Cache) -> int:
    """Bytes that a shard takes on a device, padding included."""
    row_bytes = 1  # of the status
    for dtype, shape in cache.codec.tensor_specs().values():
        numbers = prod(shape)
        row_bytes += (stride_there(numbers, dtype.itemsize) if len(shape) == 1 else numbers) * dtype.itemsize
    return shard.rows * row_bytes


_by_stream: dict[tuple[torch.device, int], Resident] = {}


def resident_on(device: torch.device) -> Resident:
    """The `Resident` of a GPU and its current stream."""
    stream = torch.cuda.current_stream(device).cuda_stream
    return _by_stream.setdefault((device, stream), Resident(GpuMemory(device)))
