"""The whole flow on a GPU that is not there (`gpu_flow`): the right device, order, lifetimes, and no waiting.

What comes out is held against the same on the CPU: the numbers are real.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_flow import CPU, CUDA, Event, Gpu, Stream, to_gpu
from tiny import records, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

from rapidin.attribution import methods, scan
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.generate import generations_of
from rapidin.attribution.query_sketch import sketch_generations
from rapidin.attribution.scan import scan_cache, scores_of
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.selection import best_rows
from rapidin.cache import Cache
from rapidin.cache.build import CachingLoop
from rapidin.data.examples import open_examples
from rapidin.gradients.adam import Moments
from rapidin.gradients.collector import GradientSketcher
from rapidin.ops.transfer import Download, GpuCopyStream, Prefetcher, upload

pytestmark = pytest.mark.gpu

ROWS = 12

# Once a pass transformers asks whether its attention mask is full; without a mask it asks about positions.
ALLOWED = {"transformers/masking_utils.py:_ignore_causal_mask_sdpa aten::_local_scalar_dense"}


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with Gpu()() as found:
        yield found
    assert found.problems == []


def model(kind: str) -> Any:
    if kind == "all":
        return tiny_llama()
    return tiny_lora(tiny_gpt2() if kind == "gpt2" else tiny_llama())


def attributor(kind: str, *, on_gpu: bool, **settings: Any) -> Attributor:
    made = model(kind)
    return Attributor(
        to_gpu(made) if on_gpu else made,
        tiny_tokenizer(),
        **{"width": 64, "preconditioner": "off", "batch_tokens": 128} | settings,
    )


CACHES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "float16": ("lora", {}, {}),
    "float32, two points": ("lora", {"at": (0.5, 1.0)}, {"dtype": "float32"}),
    "int8": ("lora", {}, {"dtype": "int8"}),
    "int4, adam": ("lora", {"preconditioner": "sample"}, {"dtype": "int4"}),
    "sign, kfac": ("lora", {"preconditioner": "kfac"}, {"dtype": "sign"}),
    "sample": ("lora", {}, {"bytes": 250, "sample": 8}),
    "sample, kfac, two points": (
        "lora", {"preconditioner": "kfac", "at": (0.0, 1.0)}, {"bytes": 400, "sample": 8, "dtype": "int4"},
    ),
    "bytes": ("lora", {}, {"bytes": 300, "sample": 0}),
    "flat": ("lora", {"projection": "flat"}, {}),
    "rapidgrad": ("lora", {"projection": "rapidgrad", "width": 256}, {}),
    "gpt2, kfac": ("gpt2", {"preconditioner": "kfac"}, {}),
    "all layers, kfac": ("all", {"include": ["*"], "preconditioner": "kfac"}, {}),
    "all layers, adam": ("all", {"include": ["*"], "preconditioner": "sample"}, {}),
    "one at a time": ("lora", {"batch_tokens": 1}, {}),
}  # fmt: skip


def make(name: str, folder: Path, *, on_gpu: bool) -> Cache:
    kind, settings, options = CACHES[name]
    made, texts = attributor(kind, on_gpu=on_gpu, **settings), records(ROWS)
    with torch.device("meta"):  # what is made without saying where mixes with nothing
        return made.cache(texts, folder, **{"shard_rows": 4} | options)


def watched(gpu: Gpu, patch: pytest.MonkeyPatch, owner: Any, name: str) -> set[str]:
    """Where a function's last call waits for the GPU: earlier ones make what is kept."""
    function, found = getattr(owner, name), set()

    def run(*args: Any, **named: Any) -> Any:
        before = Counter(gpu.waits)
        made = function(*args, **named)
        found.clear()
        found.update(gpu.waits - before)
        return made

    patch.setattr(owner, name, run)
    return found


COMPARED = ("float16", "float32, two points", "sample", "sign, kfac", "all layers, adam")  # with the CPU's


QUICK = ("float32, two points", "sample", "sign, kfac", "all layers, adam", "one at a time")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CACHES]
)
def test_a_cache_is_made_without_waiting(
    name: str, gpu: Gpu, cpu_caches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = cpu_caches(name) if name in COMPARED else None
    shards = watched(gpu, monkeypatch, CachingLoop, "make_shard")
    moments = watched(gpu, monkeypatch, GradientSketcher, "add_moments")
    squares = watched(gpu, monkeypatch, Moments, "add")
    got = make(name, tmp_path, on_gpu=True)
    assert shards | moments | squares <= ALLOWED
    assert gpu.calls["unit_blocks"] > 0
    assert Cache.verify(got.path) == []
    if want is not None:
        assert torch.equal(got.status(), want.status())
        torch.testing.assert_close(got.lengths(), want.lengths(), rtol=2e-2, atol=1e-6)
        assert float(torch.cosine_similarity(got.sketches(), want.sketches()).min()) > 0.999


@pytest.fixture(scope="module")
def cpu_caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of `CACHES` made on the CPU."""
    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp("cache"), on_gpu=False))


# ---- queries ----

SCANNED = ["float16", "sign, kfac", "sample"]
TEXTS = [(r["prompt"], r["completion"]) for r in records(2, seed=5)]


@pytest.fixture(scope="module")
def sketches() -> Tensor:
    """Of generations, as the query has them: [2, 8, 64], on the CPU."""
    made = attributor("lora", on_gpu=False)
    return sketch_generations(made.source, generations_of(made.source, TEXTS))


@pytest.mark.parametrize("name", SCANNED)
@pytest.mark.parametrize("normalize", methods.NORMALIZE)
@pytest.mark.parametrize("method", methods.METHODS)
def test_a_scan_of_carried_shards_finds_the_same(
    name: str, normalize: str, method: str, cpu_caches: Any, sketches: Tensor, gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cache = cpu_caches(name)
    want = scan_cache(
        CacheScan(cache, methods.prepare(sketches, cache, method=method, normalize=normalize)), 5
    )
    rest = stepped(gpu, monkeypatch)
    there = sketches.to(CUDA)
    with torch.device("meta"):
        source = CacheScan(cache, methods.prepare(there, cache, method=method, normalize=normalize))
        got, waits = scan_cache(source, 5), set(rest)
        chosen = scores_of(source, got[0][1][0].sort().values)
    assert source.query.vectors.device == CUDA
    assert waits == set()
    for (scores, rows), (scores2, rows2) in zip(got, want, strict=True):
        torch.testing.assert_close(scores, scores2, rtol=1e-3, atol=1e-5)
        assert torch.equal(rows, rows2)
    torch.testing.assert_close(chosen[0].sort(descending=True).values, got[0][0][0], rtol=1e-4, atol=1e-6)


def stepped(gpu: Gpu, patch: pytest.MonkeyPatch) -> set[str]:
    """Where a scan waits for the GPU between its pieces, the first apart."""
    function, found = scan.scored_pieces, set()

    def run(*args: Any, **named: Any) -> Iterator[Any]:
        pieces = function(*args, **named)
        for number in count():
            before = Counter(gpu.waits)
            piece = next(pieces, None)
            if piece is None:
                return
            if number:
                found.update(gpu.waits - before)
            yield piece

    patch.setattr(scan, "scored_pieces", run)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": "tokens", "layers": True, "histogram": True},
        {"contributions": True, "method": "fisher", "fold": True},
        {"rescore": "exact", "normalize": "cosine", "candidates": 3},
        {"together": True, "method": "datainf", "normalize": "none", "baselines": True},
        {"fuse": True, "fold": True, "targets": "tokens"},
    ],
    ids=lambda options: ", ".join(options),
)
def test_a_query_finds_the_same(options: dict[str, Any], cpu_caches: Any, gpu: Gpu) -> None:
    cache, given = cpu_caches("float32, two points"), {"top_k": 3, "examples": open_examples(records(ROWS))}
    settings: dict[str, Any] = {"at": (0.5, 1.0)}
    want = attributor("lora", on_gpu=False, **settings).query(cache, TEXTS, **options, **given)
    made = attributor("lora", on_gpu=True, **settings)
    with torch.device("meta"):
        got = made.query(Cache(cache.path), TEXTS, **options, **given)
    for one, two in zip(got, want, strict=True):
        assert [hit.row for hit in one.top] == [hit.row for hit in two.top]
        assert [hit.row for hit in one.bottom] == [hit.row for hit in two.bottom]
        for hit, wanted in zip(one.top, two.top, strict=True):
            assert hit.score == pytest.approx(wanted.score, rel=1e-3, abs=1e-6)


def test_a_missing_completion_is_written_on_the_gpu(cpu_caches: Any, gpu: Gpu) -> None:
    made = attributor("lora", on_gpu=True)
    got = made.query(cpu_caches("float16"), [("one two", None)], max_new_tokens=4, examples=False)
    assert len(got[0].top) > 0


@pytest.mark.parametrize("method", ["datainf", "fisher"])
@pytest.mark.parametrize("name", SCANNED)
def test_self_influence(name: str, method: str, cpu_caches: Any, gpu: Gpu) -> None:
    cache = cpu_caches(name)
    want = methods.self_influence(cache, method=method, normalize="layer")
    with torch.device("meta"):
        got = methods.self_influence(Cache(cache.path), method=method, normalize="layer", device="cuda")
    assert got.device == CPU
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_examples_are_selected_for_groups(cpu_caches: Any, gpu: Gpu) -> None:
    cache = cpu_caches("sign, kfac")
    want = attributor("lora", on_gpu=False, preconditioner="kfac").scores(cache, TEXTS, groups=[[0], [1]])
    made = attributor("lora", on_gpu=True, preconditioner="kfac")
    with torch.device("meta"):
        got = made.scores(cache, TEXTS, groups=[[0], [1]])
        assert best_rows(got, 4) == best_rows(want, 4)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-5)


# ---- copies ----


def batches(count: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for n in range(count):
        rows = 5 if n % 3 else 8 + n
        yield n, {"a": torch.full((rows, 2), float(n)), "b": torch.full((rows,), n, dtype=torch.uint8)}


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 8])
def test_batches_arrive_whole_and_in_order(lanes: int, size: int, gpu: Gpu) -> None:
    given, seen = [], []

    def noted() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for n, tensors in batches(size):
            given.append(n)
            yield n, tensors

    for n, tensors in Prefetcher[int, str](GpuCopyStream(CUDA), lanes).carry(noted()):
        assert len(given) == min(size, n + lanes)  # those after it are on their way
        # Copies by the GPU, which the CPU does not wait for: what is sent next must.
        seen.append((n, {name: value.clone() for name, value in tensors.items()}))
    assert len(seen) == size
    for (n, tensors), (number, wanted) in zip(seen, batches(size), strict=True):
        assert n == number
        for name, value in wanted.items():
            assert tensors[name].device == CUDA
            assert torch.equal(tensors[name].cpu(), value)


def test_what_is_carried_may_be_broken_off(gpu: Gpu) -> None:
    def begin() -> None:
        for _ in Prefetcher[int, str](GpuCopyStream(CUDA), 3).carry(batches(8)):
            break

    begin()
    assert gpu.live_bytes == 0  # that of copies on their way, too


def test_memory_of_a_carried_cache_is_that_of_its_lanes(gpu: Gpu) -> None:
    given = ((n, {"a": torch.zeros(64, 128)}) for n in range(40))
    before = gpu.live_bytes
    gpu.most_bytes = before
    for _ in Prefetcher[int, str](GpuCopyStream(CUDA), 3).carry(given):
        pass
    assert gpu.most_bytes - before == 3 * 64 * 128 * 4


def test_downloads_are_of_one_device(gpu: Gpu) -> None:
    with pytest.raises(ValueError, match=r"one device, got cuda:0, cpu; move those"):
        Download([torch.zeros(2, device=CUDA), torch.zeros(2)])


def test_a_download_of_a_view_holds_its_memory(gpu: Gpu) -> None:
    x = torch.arange(12.0, device=CUDA).view(3, 4)
    download = Download([x[:, 1], x[2]])
    del x  # and its memory may be anyone's
    assert [each.tolist() for each in download.wait()] == [[1, 5, 9], [8, 9, 10, 11]]


def test_an_upload_is_pinned_and_not_waited_for(gpu: Gpu) -> None:
    x = upload(torch.arange(3), CUDA)
    assert x.device == CUDA
    assert not gpu.waits
    assert x.tolist() == [0, 1, 2]


# ---- the GPU that is not there sees what it is for ----


def problems(run: Any) -> list[str]:
    with Gpu()() as gpu:
        run()
    return gpu.problems


def test_what_no_event_orders_is_reported() -> None:
    def race() -> None:
        x = torch.zeros(4, device=CUDA)
        with torch.cuda.stream(Stream()):
            x + 1

    def ordered() -> None:
        x, side = torch.zeros(4, device=CUDA), Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        torch.cuda.current_stream().wait_stream(side)
        y.record_stream(torch.cuda.current_stream())
        y + x

    assert "no event orders them" in problems(race)[0]
    assert problems(ordered) == []


def test_memory_freed_too_early_is_reported() -> None:
    def use(*, recorded: bool) -> None:
        x, side = torch.zeros(4, device=CUDA), Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        if recorded:
            x.record_stream(side)
        del x

    assert "is freed while stream" in problems(lambda: use(recorded=False))[0]
    assert problems(lambda: use(recorded=True)) == []


def test_pinned_memory_used_too_early_is_reported() -> None:
    def look(*, waited: bool) -> None:
        host = torch.zeros(4).pin_memory()
        host.copy_(torch.ones(4, device=CUDA), non_blocking=True)
        event = Event()
        event.record()
        if waited:
            event.synchronize()
        assert host.sum() == 4

    def write(*, waited: bool) -> None:
        host = torch.zeros(4).pin_memory()
        host.to(CUDA, non_blocking=True)
        if waited:
            torch.cuda.synchronize()
        host.fill_(1)

    assert "the CPU reads pinned memory" in problems(lambda: look(waited=False))[0]
    assert "the CPU writes pinned memory" in problems(lambda: write(waited=False))[0]
    assert problems(lambda: look(waited=True)) == problems(lambda: write(waited=True)) == []


def test_mixed_devices_are_refused_and_waits_are_counted(gpu: Gpu) -> None:
    x = torch.arange(4.0, device=CUDA)
    with pytest.raises(RuntimeError, match="found at least two devices"):
        x + torch.ones(4)
    with pytest.raises(RuntimeError, match="found at least two devices"):
        torch.cat([x, torch.ones(4)])
    assert (x * torch.tensor(2.0)).device == CUDA  # a single number may come from the CPU
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor"):
        x.numpy()
    assert not gpu.waits
    for wait in (x[1].item, x.tolist, x.cpu, x.nonzero, lambda: x[x > 1], lambda: bool((x > 1).any())):
        before = gpu.waits.total()
        wait()
        assert gpu.waits.total() == before + 1


# ---- the kernels' own Python ----


@pytest.mark.parametrize("name", ["sign, kfac", "flat"])
def test_the_flow_on_emulated_kernels(name: str, cpu_caches: Any, tmp_path: Path) -> None:
    """What the CUDA backend does besides its kernels: devices, waits, and each address that a kernel gets."""
    kind, settings, _ = CACHES[name]
    want = attributor(kind, on_gpu=False, **settings)
    wanted = want.query(cpu_caches(name), TEXTS, top_k=3, examples=False, errors=False)
    with Gpu("cuda")() as gpu:
        got = make(name, tmp_path, on_gpu=True)
        made = attributor(kind, on_gpu=True, **settings)
        waits = Counter(gpu.waits)
        found = made.query(got, TEXTS, top_k=3, examples=False, errors=False)
        none = made.query(got, TEXTS[:1], top_k=3, examples=False, errors=False, normalize="none")
    assert gpu.problems == []
    once = "rapidin/ops/rotate.py:__init__"  # of a code, with which it is kept
    assert not [each for each in gpu.waits - waits if "rapidin/ops/" in each and once not in each]
    assert len(none[0].top) == 3
    for one, two in zip(found, wanted, strict=True):
        for hit, other in zip(one.top, two.top, strict=True):
            assert hit.score == pytest.approx(other.score, abs=0.02)
