"""Tensors stay on the device of what they are made from; shards are carried to a GPU in order; both agree.

Without a GPU what is made without saying where lands on the "meta" device, whose tensors mix with no others.
"""

from __future__ import annotations

import functools
import gc
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import DEVICE, DTYPES, normal
from test_attributor import records
from test_pack import BLOCKS, WIDTH, examples, lengths, packed
from tiny import tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

from rapidin import methods, ops
from rapidin.attributor import Attributor
from rapidin.cache import Cache
from rapidin.hooks import Batch, GradientSketcher
from rapidin.layers import find_targets
from rapidin.model import load_model
from rapidin.ops import backends
from rapidin.pack import Basis, FloatCode, Format, PackedCode, fit, learn
from rapidin.resident import Resident
from rapidin.scan import Source, _pieces, all_scores, carried, scan_cache, scan_pieces
from rapidin.transfer import Conveyor, Download, stride_there, upload

CPU = torch.device("cpu")
FORMATS = (
    Format("sign"),
    Format("int8"),
    Format("int4"),
    Format("sign", 120),
    Format("sign", 110, 64),
    Format("sign", 160, 64),
    Format("int4", 300, 64),
    Format("sign", 3000, 64),
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def attributor() -> Attributor:
    return Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=64)


@pytest.fixture(scope="module", params=["float16", "sign", "learnt"])
def cache(request: Any, attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    settings: dict[str, Any] = {
        "float16": {"dtype": "float16"},
        "sign": {"dtype": "sign"},
        "learnt": {"bytes": 250, "sample": 24},
    }[request.param]
    return attributor.cache(records(40), tmp_path_factory.mktemp("cache"), shard_rows=9, **settings)


@pytest.fixture(scope="module")
def sketch(attributor: Attributor) -> Tensor:
    texts = [attributor.encoder(record) for record in records(3, seed=5)]
    return attributor._sketch(texts)[0]


@functools.cache
def code_of(wanted: Format) -> PackedCode:
    return packed(wanted, examples(wanted.sample, 5) if wanted.sample else None)


# ---- where tensors are made ----


@pytest.mark.parametrize("wanted", FORMATS, ids=str)
@pytest.mark.parametrize("dead", [False, True])
def test_codes_make_tensors_where_their_inputs_are(wanted: Format, dead: bool) -> None:
    code, x, length = code_of(wanted), examples(9, 1), lengths(9)
    if dead:
        x[3, 1], length[3, 1] = 0.0, 0.0
    vectors = normal(2, BLOCKS, WIDTH)
    with torch.device("meta"):
        again = PackedCode(code.shape, WIDTH, code.seed, code.basis if wanted.sample else None)
        fields = again.encode(x, length)
        for normalize in ("layer", "none", "cosine"):
            query = methods.prepare(vectors, normalize=normalize)
            scales = query.scales(again, fields)
            plan = again.prepare(query.vectors).plan(fields, scales)
            found = ops.topk_scan_both_ends(
                plan.parts, plan.queries, 3, scales=plan.scales, offsets=plan.offsets, base=plan.base
            )
            assert all(x.device == CPU for x in (*found, plan.constant))
        decoded, known = again.decode(fields), again.lengths(fields)
    assert torch.equal(decoded, code.decode(code.encode(x, length)))
    assert torch.equal(known, code.lengths(fields))


def test_float_codes_make_tensors_where_their_inputs_are() -> None:
    x, length, vectors = examples(9, 1), lengths(9), normal(2, BLOCKS, WIDTH)
    code = FloatCode("float16", BLOCKS, WIDTH)
    with torch.device("meta"):
        fields = code.encode(x, length)
        plan = code.prepare(vectors).plan(fields, code.lengths(fields))
        found = ops.topk_scan(plan.parts, plan.queries, 3, scales=plan.scales, offsets=plan.offsets)
        assert all(x.device == CPU for x in (*found, plan.constant, code.decode(fields)))


def test_what_is_learnt_lies_where_the_sample_is() -> None:
    sample, length = examples(64, 5), lengths(64)
    with torch.device("meta"):
        learnt = learn(sample, 16)
        shape = fit(Format("sign", 160, 64), BLOCKS, WIDTH, learnt)
        basis = Basis.of(learnt, shape, length, 3).rounded()
        again = Basis.of_tensors(basis.tensors(), shape, WIDTH).to(CPU)
    for name, value in packed(Format("sign", 160, 64), sample).basis.tensors().items():
        assert torch.equal(again.tensors()[name], value), name


@pytest.mark.parametrize("op", ["turn", "unit_blocks", "pack", "unpack"])
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_ops_make_tensors_where_their_inputs_are(op: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    x = normal(3, 2, 64).to(DEVICE if backend == "triton" else CPU)
    rows = ops.pack(normal(3, 100), "sign")
    rows = ops.Packed(rows.codes.to(x.device), "sign", 100, rows.scale.to(x.device))
    with torch.device("meta"):
        if op == "turn":
            got = ops.turn(x, seed=1, cut=ops.Cut((3, 9), 64, x.device), backend=backend)
        elif op == "unit_blocks":
            got = ops.unit_blocks(x, backend=backend)[0]
        elif op == "pack":
            got = ops.pack(x.flatten(1), "int4", backend=backend).codes
        else:
            got = ops.unpack(rows, backend=backend)
    assert got.device == x.device


@pytest.mark.parametrize("projection", ["tensor", "flat", "rapidgrad"])
@pytest.mark.parametrize("include", [(), ("*",)])
def test_hooks_make_tensors_where_the_batch_is(projection: Any, include: tuple[str, ...]) -> None:
    model = tiny_llama()
    targets = find_targets(model, trained=None, include=include, exclude=())
    texts = [([5, 6, 7, 8], [False, False, True, True]), ([9, 3], [False, True])]
    wanted = GradientSketcher(model, targets, width=64, seed=0, projection=projection)(Batch.of(texts))
    with torch.device("meta"):
        batch = Batch.of(texts)
        got = GradientSketcher(model, targets, width=64, seed=0, projection=projection)(batch)
    for one, two in zip(got, wanted, strict=True):
        assert torch.equal(one, two)


def test_the_first_position_of_a_batch() -> None:
    assert Batch.of([([1, 2, 3], [False] * 3)]).first == 0
    assert Batch.of([([1, 2, 3], [True, False, False])]).first == 0
    assert Batch.of([([1, 2, 3], [False, False, True]), ([1], [True])]).first == 1
    assert Batch.of([([1, 2, 3], [False, False, True]), ([1, 2], [False, True])]).first == 0


@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_the_scan_makes_tensors_where_the_query_is(cache: Cache, sketch: Tensor, normalize: str) -> None:
    query = methods.prepare(sketch, normalize=normalize)
    wanted = scan_cache(Source(cache, query), 7)
    list(Cache(cache.path).shards())
    with torch.device("meta"):
        got = scan_cache(Source(cache, query), 7)
    for one, two in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["datainf", "fisher"])
def test_methods_make_tensors_where_the_query_is(cache: Cache, sketch: Tensor, method: str) -> None:
    wanted = methods.prepare(sketch, cache, method=method).vectors
    own = methods.self_influence(cache, method=method, normalize="layer")
    again = Cache(cache.path)
    with torch.device("meta"):
        got = methods.prepare(sketch, again, method=method)
        scores = all_scores(Source(again, got))
        self_scores = methods.self_influence(again, method=method, normalize="layer")
    assert torch.equal(got.vectors, wanted)
    assert scores.shape == (3, 40)
    assert torch.equal(self_scores, own)


# ---- the products of a GPU, on the CPU ----


@pytest.mark.parametrize("wanted", [w for w in FORMATS if w.sample], ids=str)
def test_blocks_along_their_directions_at_once(wanted: Format) -> None:
    basis, x = code_of(wanted).basis, examples(9, 1)
    along = basis.along(x)
    torch.testing.assert_close(basis.along_at_once(x), along, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(basis.back_at_once(along), basis.back(along), rtol=1e-5, atol=1e-6)


def test_blocks_with_unlike_numbers_of_directions_at_once() -> None:
    counts = (0, 3, 17, 64, 16, 1)
    empty = Basis.empty(BLOCKS, WIDTH)
    tail = [normal(WIDTH, p, seed=p) for p in counts]
    basis = Basis(
        empty.mean, empty.head, tail, torch.ones(sum(counts)), empty.rest_size, empty.rest_weight,
        empty.length_mean,
    )  # fmt: skip
    x = normal(5, BLOCKS, WIDTH)
    along = basis.along(x)
    torch.testing.assert_close(basis.along_at_once(x), along, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(basis.back_at_once(along), basis.back(along), rtol=1e-4, atol=1e-4)
    assert empty.along_at_once(x).shape == (5, 0)


@pytest.mark.parametrize("wanted", FORMATS, ids=str)
def test_a_code_packs_alike_by_the_kernels_of_a_gpu(wanted: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    code, x, length = code_of(wanted), examples(9, 1), lengths(9)
    x[3, 1], length[3, 1], x[7], length[7] = 0.0, 0.0, 0.0, 0.0
    here = code.encode(x, length)
    known = code.decode(here)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(backends, "_default", lambda *_: "triton")
        monkeypatch.setattr(Basis, "along", Basis.along_at_once)
        monkeypatch.setattr(Basis, "back", Basis.back_at_once)
    moved = code.to(DEVICE)
    there = moved.encode(x.to(DEVICE), length.to(DEVICE))
    for name, value in here.items():
        assert there[name].dtype == value.dtype
        if name in ("scale", "size"):
            torch.testing.assert_close(there[name].cpu(), value, rtol=2e-3, atol=1e-6)
        else:
            different = (there[name].cpu() != value).float().mean()
            assert float(different) < 0.01, name
    torch.testing.assert_close(moved.decode({n: v.to(DEVICE) for n, v in here.items()}).cpu(), known)


# ---- the conveyor ----


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


def batches(count: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for n in range(count):
        rows = 5 if n % 3 else 8
        yield n, {"a": torch.full((rows, 2), float(n)), "b": torch.full((rows,), n, dtype=torch.uint8)}


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_batches_arrive_whole_and_in_order(lanes: int, count: int) -> None:
    order = LateOrder()
    seen = 0
    for n, tensors in Conveyor[int](order, lanes).carry(batches(count)):
        assert n == seen
        for name, value in dict(list(batches(count))[n][1]).items():
            assert torch.equal(tensors[name], value)
        seen += 1
    assert seen == count
    if count == 8 and lanes == 2:
        # A batch is sent before the one ahead of it is used, into memory whose last use is over.
        assert order.events[:6] == [
            "send 1 after None", "send 2 after None", "use 1", "send 3 after (use 1)", "use 2",
            "send 4 after (use 2)",
        ]  # fmt: skip


@pytest.mark.parametrize("normalize", ["layer", "none", "cosine"])
def test_a_scan_of_carried_shards_finds_the_same(cache: Cache, sketch: Tensor, normalize: str) -> None:
    query = methods.prepare(sketch, normalize=normalize)
    wanted = scan_cache(Source(cache, query), 6)
    carried = Conveyor[Any](LateOrder(), 2).carry(_pieces([Source(cache, query)]))
    got = scan_pieces([Source(cache, query)], CPU, carried, top_k=6)
    for one, two in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(one, two)


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
    for _, there in Conveyor[int](order, 2).carry([(0, {"a": x}), (1, {"a": x[:5]})]):
        assert torch.equal(there["a"], x[: len(there["a"])])
        assert there["a"].stride(0) == stride or not width
    assert all(host.is_contiguous() and device.is_contiguous() for host, device in copied)


# ---- what stays on a device ----


class SmallMemory:
    """A device's memory of so many bytes, spoilt where nothing was written."""

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0

    def free(self) -> int:
        return self.size - self.taken

    def rows(self, like: Tensor, count: int) -> Tensor:
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
    resident: Resident, sources: list[Source], within: tuple[int, int] = (0, 10**9), most: int | None = None
) -> tuple[int, list[Tensor]]:
    """Bytes sent, and what was found."""
    order = Sent()
    ends = scan_pieces(sources, CPU, carried(order, resident, sources, within, most), top_k=6)
    return order.bytes, [x for end in ends for x in end]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("normalize", ["layer", "cosine"])
@pytest.mark.parametrize("most", [None, 4])
def test_the_second_query_carries_nothing(
    cache: Cache, sketch: Tensor, normalize: str, most: int | None
) -> None:
    source = Source(cache, methods.prepare(sketch, normalize=normalize))
    streamed = list(scan_pieces([source], CPU, _pieces([source], most=most), top_k=6))
    wanted = [x for end in streamed for x in end]
    resident = Resident(SmallMemory(1 << 30))
    sent, found = scanned(resident, [source], most=most)
    assert sent > cache.bytes // 2
    assert same(found, wanted)
    assert resident.all_there(cache, (0, 10**9))
    for piece in (most, most, 7):
        sent, found = scanned(resident, [source], most=piece)
        assert sent == 0
        assert torch.equal(found[1], wanted[1])
        assert same(found, wanted) or piece != most
    resident.forget()
    assert scanned(resident, [source], most=most)[0] > 0


@pytest.mark.parametrize("cache", ["learnt"], indirect=True)
def test_several_caches_stay_and_parts_of_them(cache: Cache, sketch: Tensor, tmp_path: Path) -> None:
    """Shards of unlike lengths, of which another process scans the rest."""
    other = Cache(cache.path)
    query = methods.prepare(sketch, normalize="none")
    sources = [Source(cache, query), Source(other, query)]
    wanted = [x for end in scan_pieces(sources, CPU, _pieces(sources), top_k=6) for x in end]
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
    _, wanted = scanned(resident, [Source(first, query)])
    each = memory.taken
    memory.size = 2 * each + each // 2
    assert scanned(resident, [Source(second, query)])[0] > 0
    assert scanned(resident, [Source(first, query)])[0] == 0  # now the second is the older one
    sent, found = scanned(resident, [Source(third, query)])
    assert sent > 0
    assert same(found, wanted)
    assert memory.taken == 2 * each
    assert scanned(resident, [Source(first, query)])[0] == 0
    assert scanned(resident, [Source(third, query)])[0] == 0
    assert scanned(resident, [Source(second, query)])[0] > 0
    assert scanned(resident, [Source(first, query)])[0] > 0
    # Two that are scanned together do not push each other out, and one too many is carried each time.
    memory.size = each + each // 2
    together = [Source(second, query), Source(third, query)]
    for _ in range(2):
        sent, _ = scanned(resident, together)
        assert sent > 0
        assert memory.taken <= memory.size
    memory.size = each // 2
    resident.forget()
    assert scanned(resident, [Source(first, query)])[0] == scanned(resident, [Source(first, query)])[0] > 0
    assert memory.taken == 0


@pytest.mark.parametrize("cache", ["learnt"], indirect=True)
def test_what_stays_goes_with_its_cache(cache: Cache, sketch: Tensor) -> None:
    query = methods.prepare(sketch, normalize="layer")
    memory = SmallMemory(1 << 30)
    resident = Resident(memory)
    opened = Cache(cache.path)
    scanned(resident, [Source(opened, query)])
    assert memory.taken > 0
    shards = opened.manifest.shards
    # A shard that has become another one is carried anew, and the one before let go.
    opened.manifest.shards = [replace(shards[0], sha256="0" * 64), *shards[1:]]
    taken, rows = memory.taken, shards[0].rows
    sent, _ = scanned(resident, [Source(opened, query)])
    assert 0 < sent <= 2 * rows * taken // sum(s.rows for s in shards)
    gc.collect()
    assert memory.taken == taken
    del opened
    gc.collect()
    assert memory.taken == 0
    never = Cache(cache.path, resident=False)
    assert scanned(resident, [Source(never, query)])[0] == scanned(resident, [Source(never, query)])[0] > 0
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


def test_tensors_of_the_cpu_are_not_copied() -> None:
    x = torch.ones(3)
    assert upload(x, CPU) is x
    download = Download([x])
    assert download.ready()
    assert download.wait()[0] is x


# ---- models ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_any_dtype_are_sketched(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    targets = find_targets(model, trained=None, include=(), exclude=())
    batch = Batch.of([([5, 6, 7, 8], [False, True, True, True])])
    sketch, loss = GradientSketcher(model, targets, width=64, seed=0)(batch)
    assert sketch.dtype == loss.dtype == torch.float32
    exact, _ = GradientSketcher(model.float(), targets, width=64, seed=0)(batch)
    assert float(torch.cosine_similarity(sketch.flatten(), exact.flatten(), dim=0)) > 0.99


# ---- with a GPU ----


@needs_gpu
@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "int8"}, {"bytes": 250, "sample": 24}])
def test_a_cache_of_a_gpu_is_that_of_the_cpu(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_lora(tiny_llama())
    here = Attributor(model, tiny_tokenizer(), width=64)
    one = here.cache(records(60), tmp_path / "cpu", shard_rows=16, **settings)
    texts = [(r["prompt"], r["completion"]) for r in records(4, seed=5)]
    results = {"cpu on cpu": here.query(one, texts, top_k=10, examples=False)}
    model.to("cuda")
    there = Attributor(model, tiny_tokenizer(), width=64)
    two = there.cache(records(60), tmp_path / "gpu", shard_rows=16, **settings)
    results["gpu on gpu"] = there.query(two, texts, top_k=10, examples=False)
    results["cpu on gpu"] = there.query(one, texts, top_k=10, examples=False)
    model.to("cpu")
    results["gpu on cpu"] = Attributor(model, tiny_tokenizer(), width=64).query(
        two, texts, top_k=10, examples=False
    )
    torch.testing.assert_close(two.lengths(), one.lengths(), rtol=0.1, atol=1e-6)
    similar = torch.cosine_similarity(one.sketches(), two.sketches(), dim=1)
    assert float(similar.min()) > 0.99
    for name, found in results.items():
        for got, wanted in zip(found, results["cpu on cpu"], strict=True):
            shared = {hit.row for hit in got.top} & {hit.row for hit in wanted.top}
            assert len(shared) >= 9, name
            assert got.top[0].score == pytest.approx(wanted.top[0].score, abs=0.02)
    assert Cache.verify(two.path) == []


@needs_gpu
def test_a_scan_on_a_gpu_finds_what_the_cpu_finds(cache: Cache, sketch: Tensor) -> None:
    for normalize in ("layer", "none", "cosine"):
        query = methods.prepare(sketch, normalize=normalize)
        (top, rows), (bottom, others) = scan_cache(Source(cache, query), 6)
        (top2, rows2), (bottom2, others2) = scan_cache(Source(cache, query), 6, torch.device("cuda"))
        torch.testing.assert_close(top2, top, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(bottom2, bottom, rtol=1e-3, atol=1e-5)
        assert float((rows == rows2).float().mean()) > 0.9
        assert float((others == others2).float().mean()) > 0.9


@needs_gpu
def test_a_half_precision_checkpoint_is_read_as_bfloat16(tmp_path: Path) -> None:
    tiny_llama().half().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.device.type == "cuda"
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.source["dtype"] == "bfloat16"
