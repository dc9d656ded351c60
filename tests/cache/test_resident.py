"""Rows of caches that stay on a device between queries, and how rows lie there, without a GPU."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_records import CACHE_FORMATS, cache_of, lora_attributor, sketch_of
from torch import Tensor

from rapidin.attribution import methods
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.scan import joined_ends, scored_pieces
from rapidin.attribution.scan_pieces import CacheScan, Piece, pieces, prefetched
from rapidin.cache import Cache
from rapidin.cache.resident import HeldShard, Resident
from rapidin.ops.transfer import Prefetcher, stride_there

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def attributor() -> Attributor:
    return lora_attributor()


@pytest.fixture(scope="module", params=CACHE_FORMATS)
def cache(request: Any, attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return cache_of(attributor, request.param, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sketch(attributor: Attributor) -> Tensor:
    return sketch_of(attributor)


class LateOrder:
    """A GPU at its slowest: copies are made only when something is told to come after them; memory that may
    be written anew is spoilt at once."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
        self._sent = 0
        self.events: list[str] = []

    def buffers(self, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        return like.new_empty(rows, *like.shape[1:]), like.new_empty(rows, *like.shape[1:])

    def send(self, pairs: Any, after: Any) -> int:
        for _, there in pairs:
            there.zero_()  # as the copy may come at any time from now on: what reads it still was too late
        self._sent += 1
        self._pending.append((self._sent, list(pairs)))
        self.events.append(f"send {self._sent} after {after}")
        return self._sent

    def before(self, mark: Any) -> None:
        while self._pending and self._pending[0][0] <= mark:
            for host, there in self._pending.pop(0)[1]:
                there.copy_(host)
        self.events.append(f"use {mark}")

    def now(self) -> str:
        used = self.events[-1]
        return f"({used})"

    def wait(self, mark: Any) -> None:
        if mark is not None:
            self.before(mark)
            self.events.pop()


@pytest.mark.parametrize(
    ("low", "high", "filled"),
    [
        (3, 6, (3, 6)),  # the same rows
        (3, 8, (3, 8)),  # from the same row on
        (4, 5, (3, 6)),
        (6, 9, (3, 9)),  # right behind them
        (7, 9, (3, 6)),  # apart: rows 6 and 7 would seem to be filled
        (0, 3, (3, 6)),
        (0, 9, (3, 6)),
    ],
)
def test_a_shard_is_filled_by_rows_that_adjoin(low: int, high: int, filled: tuple[int, int]) -> None:
    held = HeldShard({"x": torch.zeros(9), "y": torch.zeros(9, 2)})
    assert not held.has(3, 6)
    for first, last, value in ((3, 6, 1.0), (low, high, 2.0)):
        rows = {"x": torch.full((last - first,), value), "y": torch.full((last - first, 2), value)}
        held.fill(first, last, rows)
    assert (held.low, held.high) == filled
    assert held.has(*filled)
    assert held.has(4, 5)
    assert not held.has(filled[0] - 1, 5)
    assert not held.has(4, filled[1] + 1)
    expected = torch.zeros(9)
    expected[3:6] = 1.0
    if 3 <= low <= 6:
        expected[low:high] = 2.0
    assert torch.equal(held.tensors["x"], expected)
    assert torch.equal(held.rows(2, 7)["y"], expected[2:7, None].expand(-1, 2))


@pytest.mark.parametrize(
    ("width", "dtype", "stride"),
    [(1785, torch.uint8, 1792), (129, torch.int8, 144), (112, torch.uint8, 112), (113, torch.uint8, 113),
     (3, torch.float16, 3), (100, torch.float16, 104), (1001, torch.float32, 1004), (0, torch.uint8, 0)],
)  # fmt: skip
def test_rows_are_carried_to_where_wide_loads_begin(width: int, dtype: torch.dtype, stride: int) -> None:
    """By one copy of memory without gaps, and nothing else of the rows is changed."""
    order = LateOrder()
    copied: list[tuple[Tensor, Tensor]] = []
    send = order.send
    order.send = lambda pairs, after: (copied.extend(pairs), send(pairs, after))[1]  # type: ignore[method-assign]
    x = torch.arange(7 * (width + 3)).remainder(100).to(dtype).view(7, width + 3)[:, 1 : width + 1]
    for _, there in Prefetcher[int, str](order, 2).carry([(0, {"a": x}), (1, {"a": x[:5]})]):
        assert torch.equal(there["a"], x[: len(there["a"])])
        assert there["a"].stride(0) == stride or not width
    assert all(host.is_contiguous() and device.is_contiguous() for host, device in copied)


class SmallMemory:
    """A device's memory of so many bytes, spoilt where nothing was written."""

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0

    def free(self) -> int:
        return self.size - self.taken

    def allocate(self, like: Tensor, count: int) -> Tensor:
        numbers = 1 if like.ndim == 1 else like.shape[1]
        stride = numbers if like.ndim == 1 else stride_there(numbers, like.element_size())
        memory = torch.full((count, stride), 85).to(like.dtype)
        self.taken += memory.nbytes
        weakref.finalize(memory.untyped_storage(), self._give_back, memory.nbytes)
        return memory[:, 0] if like.ndim == 1 else memory[:, : like.shape[1]]

    def _give_back(self, size: int) -> None:
        self.taken -= size


class Sent(LateOrder):
    """Counts the bytes that are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def send(self, pairs: Any, after: Any) -> int:
        self.bytes += sum(host.nbytes for host, _ in pairs)
        return super().send(pairs, after)


def scanned(
    resident: Resident,
    sources: list[CacheScan],
    within: tuple[int, int] = (0, 10**9),
) -> tuple[int, list[Tensor]]:
    """Bytes sent, and what was found."""
    order = Sent()
    found = found_in(sources, prefetched(order, resident, sources, within))
    return order.bytes, found


def found_in(sources: list[CacheScan], read: Iterable[Piece]) -> list[Tensor]:
    """Scores and rows of both ends."""
    ends = joined_ends([piece.ends for piece in scored_pieces(sources, CPU, read, top_k=6)], 6)
    return [x for end in ends for x in end]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("normalize", ["layer", "cosine"])
def test_the_second_query_carries_nothing(cache: Cache, sketch: Tensor, normalize: str) -> None:
    source = CacheScan(cache, methods.prepare(sketch, normalize=normalize))
    wanted = found_in([source], pieces([source]))
    resident = Resident(SmallMemory(1 << 30))
    sent, found = scanned(resident, [source])
    assert sent > cache.bytes // 2
    assert same(found, wanted)
    assert resident.holds_all(cache, (0, 10**9))
    for _ in range(2):
        sent, found = scanned(resident, [source])
        assert sent == 0
        assert same(found, wanted)
    resident.forget()
    assert scanned(resident, [source])[0] > 0


@pytest.mark.parametrize("cache", ["learnt"], indirect=True)
def test_zero_gradients_are_looked_for_where_they_matter_alone(cache: Cache, sketch: Tensor) -> None:
    """Also of rows that were scanned with another normalization before."""
    for normalize, known in (("none", None), ("layer", False), ("none", None), ("layer", False)):
        scan = CacheScan(cache, methods.prepare(sketch, normalize=normalize))
        assert {piece.caches[0].zero_gradient for piece in pieces([scan])} == {known}


@pytest.mark.parametrize("cache", ["learnt"], indirect=True)
def test_several_caches_stay_and_parts_of_them(cache: Cache, sketch: Tensor, tmp_path: Path) -> None:
    """Shards of unlike lengths, of which another process scans the rest."""
    other = Cache(cache.path)
    query = methods.prepare(sketch, normalize="none")
    sources = [CacheScan(cache, query), CacheScan(other, query)]
    wanted = found_in(sources, pieces(sources))
    resident = Resident(SmallMemory(1 << 30))
    for part in ((0, 18), (9, 18), (18, 27)):
        scanned(resident, sources, part)
    assert scanned(resident, sources, (0, 27))[0] == 0
    sent, found = scanned(resident, sources)
    assert 0 < sent < cache.bytes
    assert same(found, wanted)
    sent, found = scanned(resident, sources)
    assert sent == 0
    assert same(found, wanted)


@pytest.mark.parametrize("cache", ["learnt"], indirect=True)
def test_the_cache_scanned_longest_ago_makes_room(cache: Cache, sketch: Tensor) -> None:
    query = methods.prepare(sketch, normalize="layer")
    memory = SmallMemory(1 << 30)
    first, second, third = (Cache(cache.path) for _ in range(3))
    resident = Resident(memory)
    _, wanted = scanned(resident, [CacheScan(first, query)])
    each = memory.taken
    memory.size = 2 * each + each // 2
    assert scanned(resident, [CacheScan(second, query)])[0] > 0
    assert scanned(resident, [CacheScan(first, query)])[0] == 0  # now the second is the older one
    sent, found = scanned(resident, [CacheScan(third, query)])
    assert sent > 0
    assert same(found, wanted)
    assert memory.taken == 2 * each
    assert scanned(resident, [CacheScan(first, query)])[0] == 0
    assert scanned(resident, [CacheScan(third, query)])[0] == 0
    assert scanned(resident, [CacheScan(second, query)])[0] > 0
    assert scanned(resident, [CacheScan(first, query)])[0] > 0
    # Two that are scanned together do not push each other out, and one too many is prefetched each time.
    memory.size = each + each // 2
    together = [CacheScan(second, query), CacheScan(third, query)]
    for _ in range(2):
        sent, _ = scanned(resident, together)
        assert sent > 0
        assert memory.taken <= memory.size
    memory.size = each // 2
    resident.forget()
    assert (
        scanned(resident, [CacheScan(first, query)])[0] == scanned(resident, [CacheScan(first, query)])[0] > 0
    )
    assert memory.taken == 0


@pytest.mark.parametrize("cache", ["learnt"], indirect=True)
def test_what_stays_goes_with_its_cache(cache: Cache, sketch: Tensor) -> None:
    query = methods.prepare(sketch, normalize="layer")
    memory = SmallMemory(1 << 30)
    resident = Resident(memory)
    opened = Cache(cache.path)
    scanned(resident, [CacheScan(opened, query)])
    assert memory.taken > 0
    shards = opened.manifest.shards
    # A shard that has become another one is prefetched anew, and the one before let go.
    opened.manifest.shards = [replace(shards[0], sha256="0" * 64), *shards[1:]]
    taken, rows = memory.taken, shards[0].rows
    sent, _ = scanned(resident, [CacheScan(opened, query)])
    assert 0 < sent <= 2 * rows * taken // sum(s.rows for s in shards)
    gc.collect()
    assert memory.taken == taken
    del opened
    gc.collect()
    assert memory.taken == 0
    never = Cache(cache.path, resident=False)
    assert (
        scanned(resident, [CacheScan(never, query)])[0] == scanned(resident, [CacheScan(never, query)])[0] > 0
    )
    assert memory.taken == 0


@pytest.mark.parametrize("cache", ["learnt"], indirect=True)
def test_an_attributor_opens_a_folder_once(cache: Cache, attributor: Attributor, tmp_path: Path) -> None:
    """As long as its manifest is the same, so that what stays on a GPU serves the next query."""
    folder = tmp_path / "copy"
    shutil.copytree(cache.path, folder)
    opened = attributor._alone(folder).caches[0]
    assert attributor._alone(str(folder)).caches[0] is opened
    changed = replace(opened.manifest, shards=opened.manifest.shards[:-1])
    changed.write(folder)
    assert attributor._alone(folder).caches[0] is not opened
    assert len(attributor._alone(folder).caches[0]) < len(opened)
