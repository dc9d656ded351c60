"""Tensors stay on the device of what they are made from; a GPU and the CPU agree.

Without a GPU what is made without saying where lands on the "meta" device, whose tensors mix with no others.
The whole flow on a GPU that is not there: test_gpu_flow.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_records import CACHE_FORMATS, cache_of, lora_attributor, sketch_of
from inputs import DEVICE, DTYPES, normal
from made_sketches import BLOCKS, WIDTH, examples, lengths, packed
from tiny import records, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

from rapidin import ops
from rapidin.attribution import methods
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.options import NORMALIZE
from rapidin.attribution.scan import scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.cache.codec import Basis, CodecConfig, FloatCodec, PackedCodec, fit_shape, learn_basis
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.load import load_model
from rapidin.gradients.parameters import find_targets
from rapidin.ops import backends
from rapidin.ops.transfer import Download, upload
from rapidin.tasks.causal import TokenBatch

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
FORMATS = (
    CodecConfig("sign"),
    CodecConfig("int8"),
    CodecConfig("int4"),
    CodecConfig("sign", 120),
    CodecConfig("sign", 110, 64),
    CodecConfig("sign", 160, 64),
    CodecConfig("int4", 300, 64),
    CodecConfig("sign", 3000, 64),
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def attributor() -> Attributor:
    return lora_attributor()


@pytest.fixture(scope="module", params=CACHE_FORMATS)
def cache(request: Any, attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return cache_of(attributor, request.param, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sketch(attributor: Attributor) -> Tensor:
    return sketch_of(attributor)


@functools.cache
def code_of(wanted: CodecConfig) -> PackedCodec:
    return packed(wanted, examples(wanted.sample, 5) if wanted.sample else None)


# ---- where tensors are made ----


@pytest.mark.parametrize("wanted", FORMATS, ids=str)
@pytest.mark.parametrize("dead", [False, True])
def test_codes_make_tensors_where_their_inputs_are(wanted: CodecConfig, dead: bool) -> None:
    code, x, length = code_of(wanted), examples(9, 1), lengths(9)
    if dead:
        x[3, 1], length[3, 1] = 0.0, 0.0
    vectors = normal(2, BLOCKS, WIDTH)
    with torch.device("meta"):
        again = PackedCodec(code.shape, WIDTH, code.seed, code.basis if wanted.sample else None)
        fields = again.encode(x, length)
        for normalize in NORMALIZE:
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
    code = FloatCodec("float16", BLOCKS, WIDTH)
    with torch.device("meta"):
        fields = code.encode(x, length)
        plan = code.prepare(vectors).plan(fields, code.lengths(fields))
        found = ops.topk_scan(plan.parts, plan.queries, 3, scales=plan.scales, offsets=plan.offsets)
        assert all(x.device == CPU for x in (*found, plan.constant, code.decode(fields)))


def test_what_is_learnt_lies_where_the_sample_is() -> None:
    sample, length = examples(64, 5), lengths(64)
    with torch.device("meta"):
        learnt = learn_basis(sample, 16)
        shape = fit_shape(CodecConfig("sign", 160, 64), BLOCKS, WIDTH, learnt)
        basis = Basis.of(learnt, shape, length, 3).rounded()
        again = Basis.of_tensors(basis.tensors(), shape, WIDTH).to(CPU)
    for name, value in packed(CodecConfig("sign", 160, 64), sample).basis.tensors().items():
        assert torch.equal(again.tensors()[name], value), name


@pytest.mark.parametrize("op", ["rotate", "unit_blocks", "pack", "unpack"])
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_ops_make_tensors_where_their_inputs_are(op: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    x = normal(3, 2, 64).to(DEVICE if backend == "triton" else CPU)
    rows = ops.pack(normal(3, 100), "sign")
    rows = ops.Packed(rows.codes.to(x.device), "sign", 100, rows.scale.to(x.device))
    with torch.device("meta"):
        if op == "rotate":
            got = ops.rotate(x, seed=1, cut=ops.Cut((3, 9), 64, x.device), backend=backend)
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
    wanted = GradientSketcher(model, targets, width=64, seed=0, projection=projection)(TokenBatch.of(texts))
    with torch.device("meta"):
        batch = TokenBatch.of(texts)
        got = GradientSketcher(model, targets, width=64, seed=0, projection=projection)(batch)
    for one, two in zip(got, wanted, strict=True):
        assert torch.equal(one, two)


def test_the_first_position_of_a_batch() -> None:
    assert TokenBatch.of([([1, 2, 3], [False] * 3)]).first == 0
    assert TokenBatch.of([([1, 2, 3], [True, False, False])]).first == 0
    assert TokenBatch.of([([1, 2, 3], [False, False, True]), ([1], [True])]).first == 1
    assert TokenBatch.of([([1, 2, 3], [False, False, True]), ([1, 2], [False, True])]).first == 0


# ---- the products of a GPU, on the CPU ----


@pytest.mark.parametrize("wanted", [w for w in FORMATS if w.sample], ids=str)
def test_blocks_along_their_directions_at_once(wanted: CodecConfig) -> None:
    basis, x = code_of(wanted).basis, examples(9, 1)
    along = basis.project(x)
    torch.testing.assert_close(basis.project_batched(x), along, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(basis.lift_batched(along), basis.lift(along), rtol=1e-5, atol=1e-6)


def test_blocks_with_unlike_numbers_of_directions_at_once() -> None:
    counts = (0, 3, 17, 64, 16, 1)
    empty = Basis.empty(BLOCKS, WIDTH)
    tail = [normal(WIDTH, p, seed=p) for p in counts]
    basis = Basis(
        empty.mean, empty.shared, tail, torch.ones(sum(counts)), empty.residual_rms, empty.residual_weight,
        empty.log_length_mean,
    )  # fmt: skip
    x = normal(5, BLOCKS, WIDTH)
    along = basis.project(x)
    torch.testing.assert_close(basis.project_batched(x), along, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(basis.lift_batched(along), basis.lift(along), rtol=1e-4, atol=1e-4)
    assert empty.project_batched(x).shape == (5, 0)


@pytest.fixture
def on_triton() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("wanted", FORMATS, ids=str)
def test_a_code_packs_alike_by_the_kernels_of_a_gpu(
    wanted: CodecConfig, on_triton: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    code, x, length = code_of(wanted), examples(9, 1), lengths(9)
    x[3, 1], length[3, 1], x[7], length[7] = 0.0, 0.0, 0.0, 0.0
    here = code.encode(x, length)
    known = code.decode(here)
    if DEVICE.type == "cpu":
        on_triton.enter_context(backends.using(lambda *_: "triton"))
        monkeypatch.setattr(Basis, "project", Basis.project_batched)
        monkeypatch.setattr(Basis, "lift", Basis.lift_batched)
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


# ---- copies ----


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
    batch = TokenBatch.of([([5, 6, 7, 8], [False, True, True, True])])
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
    for normalize in NORMALIZE:
        query = methods.prepare(sketch, normalize=normalize)
        (top, rows), (bottom, others) = scan_cache(CacheScan(cache, query), 6)
        (top2, rows2), (bottom2, others2) = scan_cache(CacheScan(cache, query), 6, torch.device("cuda"))
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
