"""Methods against their own formulas, in float64 from full gradients."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from fitted import fitted
from own_gradients import exact_gradients
from tiny import records, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

import rapidin
from rapidin import distributed
from rapidin.attribution import methods
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.generate import generations_of
from rapidin.attribution.methods import datainf, fisher, moment, vectors
from rapidin.attribution.query_sketch import sketch_generations
from rapidin.attribution.scan import scores_of
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.errors import UserError

ALL = [(m, n) for m in methods.METHODS for n in methods.NORMALIZE]
QUERIES = records(4, seed=9)
# LoRA matrices of rank 4 on 32 features have at most 128 numbers, and the flat projection to 128 bins gives
# each a bin of its own: such a sketch is exact, so a method on it must be exact too.
EXACT: dict[str, Any] = {"width": 128, "projection": "flat"}


@pytest.fixture(scope="module")
def attributor() -> Attributor:
    return Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), **EXACT)


@pytest.fixture(scope="module")
def cache(attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("methods")
    return attributor.cache(records(), folder, shard_rows=7, dtype="float32")


@pytest.fixture(scope="module")
def exact(attributor: Attributor, cache: Cache) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the cache's rows and of QUERIES, preconditioned as the cache is."""
    alone = fitted(attributor, cache)
    return gradients(alone, records()), gradients(alone, QUERIES)


def gradients(attributor: Attributor, rows: list[dict[str, Any]]) -> list[Tensor]:
    """Of each parameter [n, numbers] float64, by autograd's own factors, at the attributor's first point."""
    found = []
    with attributor.loaded.path.at(attributor.source.points[0]):
        for record in rows:
            encoded = attributor.source.encoder(record)
            exact = exact_gradients(attributor.source.sketcher, (encoded.ids, encoded.target))
            found.append([gradient.double().flatten() for gradient in exact])
    return [torch.stack(column) for column in zip(*found, strict=True)]


def factors_of(blocks: list[Tensor]) -> Tensor:
    """The fourth roots of the geometric means of the lengths of rows' blocks: [n]."""
    return torch.stack([g.norm(dim=1) for g in blocks]).log().mean(0).exp() ** 0.25


def scaled(blocks: list[Tensor], normalize: str, of_query: list[Tensor] | None = None) -> list[Tensor]:
    """of_query: the gradients of the rows, of which all are queries."""
    if normalize == "weighted" and of_query is not None:
        lengths = torch.stack([g.norm(dim=1) for g in blocks]).sum(0) * factors_of(of_query).mean()
        return [g / lengths[:, None] for g in blocks]
    if normalize == "weighted":
        factors = factors_of(blocks)[:, None]
        return [g / g.norm(dim=1, keepdim=True) * factors for g in blocks]
    if normalize == "layer":
        return [g / g.norm(dim=1, keepdim=True) for g in blocks]
    if normalize == "cosine":
        total = torch.cat(blocks, 1).norm(dim=1, keepdim=True)
        return [g / total for g in blocks]
    return blocks


def fisher_alone(y: Tensor, v: Tensor, n: int, damping: float | None, *, without: bool = True) -> Tensor:
    """[Q]: row n's products with v by the moment of the other rows, damped by that of all."""
    moment = y.T @ y / len(y)
    eye = torch.eye(y.shape[1], dtype=torch.float64)
    damped = (damping or fisher.WHITE_DAMPING) * (moment @ moment).trace() / moment.trace() * eye
    others = moment - torch.outer(y[n], y[n]) / len(y) if without else moment
    return v @ torch.linalg.solve(others + damped, y[n])


def by_formula(
    train: list[Tensor], query: list[Tensor], method: str, normalize: str, damping: float | None = None
) -> Tensor:
    """[Q, N] float64, as the papers write it: every matrix formed and inverted."""
    train, query = scaled(train, normalize), scaled(query, normalize, train)
    total = torch.zeros(len(query[0]), len(train[0]), dtype=torch.float64)
    for y, v in zip(train, query, strict=True):
        n, d = y.shape
        eye = torch.eye(d, dtype=torch.float64)
        if method == "dot":
            inverse = eye
        elif method == "fisher":
            total += torch.stack([fisher_alone(y, v, n, damping) for n in range(len(y))], 1)
            continue
        else:
            lam = (damping or datainf.DAMPING) * y.square().sum(1).mean() / d
            inverse = torch.zeros(d, d, dtype=torch.float64)
            for row in y:
                inverse += (eye - torch.outer(row, row) / (lam + row @ row)) / (n * lam)
        total += v @ inverse @ y.T
    return total / (len(train) if normalize == "layer" else 1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(("method", "normalize"), ALL)
def test_with_an_exact_sketch_a_method_is_its_formula(
    attributor: Attributor,
    cache: Cache,
    exact: tuple[list[Tensor], list[Tensor]],
    method: str,
    normalize: str,
) -> None:
    want = by_formula(*exact, method, normalize)
    got = attributor.scores(cache, QUERIES, method=method, normalize=normalize)  # type: ignore[arg-type]
    # DataInf takes away nearly all of a gradient that others share, and float32 gradients keep 7 digits.
    assert error(got, want) < (1e-3 if method == "datainf" else 1e-4)
    hits = attributor.query(cache, QUERIES, top_k=5, method=method, normalize=normalize)  # type: ignore[arg-type]
    for row, result in zip(got, hits, strict=True):
        assert [hit.row for hit in result.top] == row.argsort(descending=True, stable=True)[:5].tolist()
        assert (result.method, result.normalize) == (method, normalize)


@pytest.fixture(scope="module", params=[16, 256])
def sketched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Attributor, Cache, Tensor]:
    """A cache of as many bins, and the sketches of QUERIES; 16: fewer than rows, so the moment is kept as a
    matrix; 256: as rows."""
    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=request.param)
    cache = attributor.cache(records(), tmp_path_factory.mktemp("bins"), dtype="float32", shard_rows=11)
    return attributor, cache, query_of(attributor, cache)


@pytest.mark.parametrize(("method", "normalize"), ALL)
def test_with_any_sketch_a_method_is_its_formula_on_the_sketches(
    sketched: tuple[Attributor, Cache, Tensor], method: str, normalize: str
) -> None:
    attributor, cache, query = sketched
    width = cache.manifest.width
    shape = (-1, len(cache.layers), width)
    unit, lengths = cache.sketches().view(shape).double(), cache.lengths().double()
    query = query.double()
    # DataInf's damping counts the parameter's numbers, not the bins.
    numbers = [prod(block.shape) for block in cache.layers]
    train = [unit[:, b] * lengths[:, b, None] for b in range(shape[1])]
    queries = [query[:, b] for b in range(shape[1])]
    if method == "datainf":
        want = torch.zeros(len(QUERIES), len(unit), dtype=torch.float64)
        query_blocks = scaled(queries, normalize, train)
        per_block = zip(scaled(train, normalize), query_blocks, numbers, strict=True)
        for y, v, d in per_block:
            damping = datainf.DAMPING * width / d
            want += by_formula([y], [v], "datainf", "none", damping)
        want /= len(train) if normalize == "layer" else 1
    else:
        want = by_formula(train, queries, method, normalize)
    got = attributor.scores(cache, QUERIES, method=method, normalize=normalize)  # type: ignore[arg-type]
    assert error(got, want) < 1e-4


@pytest.mark.parametrize(
    ("method", "normalize"),
    [(m, n) for m, n in ALL if m != "dot" and n != "weighted"] + [("dot", "none")],
)
def test_self_influence_is_the_diagonal(
    cache: Cache, exact: tuple[list[Tensor], list[Tensor]], method: str, normalize: str
) -> None:
    train, _ = exact
    # A query is divided by the number of blocks, and so is an example's influence on itself.
    if method == "fisher":
        want = torch.stack(
            [
                sum(fisher_alone(y, y[n], n, None, without=False) for y in scaled(train, normalize))
                for n in range(30)
            ]
        ) / (len(train) if normalize == "layer" else 1)
    else:
        want = by_formula(train, train, method, normalize).diagonal()
    got = rapidin.self_influence(cache, method=method, normalize=normalize)
    assert error(got, want) < (1e-2 if method == "datainf" else 1e-4)


def test_several_points_are_blocks_of_their_own(tmp_path: Path) -> None:
    attributor = Attributor(
        tiny_lora(tiny_llama()), tiny_tokenizer(), at=[0.25, 0.75], preconditioner="off", **EXACT
    )
    cache = attributor.cache(records(), tmp_path, dtype="float32")
    got = attributor.scores(cache, QUERIES, method="fisher", normalize="layer")
    want = torch.zeros_like(got, dtype=torch.float64)
    for point in (0.25, 0.75):
        alone = Attributor(attributor.loaded, settings=replace(attributor.settings, at=point))
        want += by_formula(
            gradients(alone, records()),
            gradients(alone, QUERIES),
            "fisher",
            "layer",
            damping=fisher.DAMPING,
        )
    assert error(got, want / 2) < 1e-4


@pytest.mark.parametrize("method", ["datainf", "fisher"])
def test_damping_is_taken_and_said(
    attributor: Attributor, cache: Cache, exact: tuple[list[Tensor], list[Tensor]], method: Any
) -> None:
    want = by_formula(*exact, method, "weighted", damping=2.0)
    assert error(attributor.scores(cache, QUERIES, method=method, damping=2.0), want) < 1e-3
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="above 0, got"):
            attributor.scores(cache, QUERIES, method=method, damping=wrong)


def test_names_that_are_none(attributor: Attributor, cache: Cache) -> None:
    with pytest.raises(UserError, match=r"unknown method 'best'.*datainf"):
        attributor.query(cache, QUERIES, method="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown normalize"):
        rapidin.self_influence(cache, normalize="some")
    with pytest.raises(UserError, match="relative to a query"):
        rapidin.self_influence(cache, method="fisher", normalize="weighted")
    with pytest.raises(UserError, match="takes no `damping`"):
        attributor.query(cache, QUERIES, damping=0.1)
    with pytest.raises(UserError, match="the same self-influence"):
        rapidin.self_influence(cache, normalize="layer")


def query_of(attributor: Attributor, cache: Cache) -> Tensor:
    source = fitted(attributor, cache).source
    return sketch_generations(source, generations_of(source, QUERIES))


def test_a_moment_in_groups_of_blocks_is_the_same(attributor: Attributor, cache: Cache) -> None:
    query = query_of(attributor, cache)
    given: Any = {"method": "fisher", "normalize": "none"}
    whole = methods.prepare(query, cache, **given)
    assert len(vectors.block_groups(len(cache.layers), 1, 1)) == len(cache.layers)  # one block at a time
    one_by_one = methods.prepare(query, cache, **given, limits=methods.Limits(block_bytes=1))
    assert torch.equal(whole.vectors, one_by_one.vectors)
    assert whole.factors is not None
    assert one_by_one.factors is not None
    assert torch.equal(whole.factors, one_by_one.factors)


class Together(distributed.World):
    """The world of each of some threads, which gather as processes do."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._own = threading.local()
        super().__init__()
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: list[Any] = [None] * size
        self.rows: list[list[int]] = [[] for _ in range(size)]  # that a thread decoded, in all its passes
        whole = vectors.vectors_of

        def counted(*given: Any, **named: Any) -> Any:
            for found in whole(*given, **named):
                self.rows[self.rank] += found[0].tolist()
                yield found

        for module in (datainf, fisher, moment):
            monkeypatch.setattr(module, "vectors_of", counted)

    @property
    def rank(self) -> int:  # type: ignore[override]
        return int(self._own.rank)

    @rank.setter
    def rank(self, rank: int) -> None:
        self._own.rank = rank

    def run(self, make: Callable[[], Any]) -> list[Any]:
        """What `make` gives in each thread."""

        def one(rank: int) -> Any:
            self.rank = rank
            try:
                return make()
            except BaseException:
                self._barrier.abort()
                raise

        with distributed.using(self), ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))

    def gather(self, value: Any) -> list[Any]:
        self._given[self.rank] = pickle.dumps(value)
        self._barrier.wait()
        found = [pickle.loads(given) for given in self._given]
        self._barrier.wait()
        return found


@pytest.fixture(scope="module")
def in_many_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Attributor, Cache]:
    """More shards than lots."""
    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=16)
    return attributor, attributor.cache(records(75), tmp_path_factory.mktemp("shards"), shard_rows=2)


# 40: more than there are lots, shards or blocks
@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.full) for size in (5, 40))])
@pytest.mark.parametrize("method", ["datainf", "fisher"])
def test_processes_share_a_methods_work_and_get_the_bits_of_one(
    in_many_shards: tuple[Attributor, Cache], monkeypatch: pytest.MonkeyPatch, method: str, size: int
) -> None:
    attributor, cache = in_many_shards
    query = query_of(attributor, cache)
    limits = methods.Limits(sent_bytes=32 * 8 * query[0].numel() * 3)  # three queries at a time

    def turned() -> methods.ScanQuery:
        return methods.prepare(query, cache, method=method, normalize="none", limits=limits)

    want = methods.prepare(query, cache, method=method, normalize="none")
    together = Together(size, monkeypatch)
    for got in together.run(turned):
        assert torch.equal(got.vectors, want.vectors)
        assert (got.factors is None) == (want.factors is None)
        if got.factors is not None and want.factors is not None:
            assert torch.equal(got.factors, want.factors)
    if method == "datainf":
        assert sorted(row for rows in together.rows for row in rows) == list(range(75))  # each row once
        assert max(map(len, together.rows)) <= -(-75 // size) + 4
    else:  # a moment and the leverages: two passes for those that have blocks
        assert [len(rows) for rows in together.rows].count(2 * 75) == min(size, len(cache.layers))


def test_a_moment_of_some_rows_is_near_that_of_all(tmp_path: Path) -> None:
    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=16)
    cache = attributor.cache(records(200), tmp_path, shard_rows=33)
    query = query_of(attributor, cache)

    def scores(moment_rows: int | None) -> Tensor:
        limits = methods.Limits(moment_rows=moment_rows)
        scan = CacheScan(cache, methods.prepare(query, cache, method="fisher", limits=limits))
        return scores_of(scan, torch.arange(200))

    whole, half = scores(None), scores(100)
    assert 0 < error(half, whole.double()) < 0.5


def test_rows_that_do_not_count_are_in_no_moment(
    attributor: Attributor, cache: Cache, tmp_path: Path
) -> None:
    rows = records()
    mixed = [*rows[:9], {"prompt": "nothing: ", "completion": ""}, *rows[9:]]
    other = attributor.cache(mixed, tmp_path, dtype="float32", shard_rows=5)
    for method in methods.METHODS:
        got = attributor.scores(other, QUERIES, method=method)  # type: ignore[arg-type]
        assert got[:, 9].isnan().all()
        kept = torch.cat([got[:, :9], got[:, 10:]], 1)
        want = attributor.scores(cache, QUERIES, method=method)  # type: ignore[arg-type]
        assert error(kept, want.double()) < 1e-5
    assert rapidin.self_influence(other, method="fisher", normalize="layer").isnan().nonzero().tolist() == [
        [9]
    ]


@pytest.mark.parametrize("method", ["datainf", "fisher"])
def test_tiny_and_large_gradients_change_nothing(tmp_path: Path, method: Any) -> None:
    """The scale of the loss is the scale of all gradients: ranks must stay, far from 1 as well."""
    from rapidin.cache import CacheWriter, Manifest
    from rapidin.cache.shards import Rows

    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=16)
    made = attributor.cache(records(), tmp_path / "made", dtype="float32")
    query = query_of(attributor, made)
    want = methods.prepare(query, made, method=method, normalize="none").vectors.double()
    for factor in (1e-12, 1e12):
        manifest = Manifest.read(made.path)
        manifest.shards = []
        folder = tmp_path / f"times-{factor:g}"
        with CacheWriter(folder, manifest) as writer:
            for n, (_, part) in enumerate(made.shards()):
                code = part.tensors | {"length": part.tensors["length"] * factor}
                rows = Rows(code, part.index, part.status, part.truncated, part.record)
                writer.write(n, rows, {"ok": len(part.index)})
        got = methods.prepare(query * factor, Cache(folder), method=method, normalize="none").vectors
        assert error(got.double() * factor, want) < 1e-4


def test_a_layer_without_gradient_adds_nothing(attributor: Attributor, cache: Cache, tmp_path: Path) -> None:
    from rapidin.cache import CacheWriter, Manifest
    from rapidin.cache.shards import Rows

    manifest = Manifest.read(cache.path)
    manifest.shards = []
    with CacheWriter(tmp_path, manifest) as writer:
        shutil.copy(cache.path / "preconditioner.safetensors", tmp_path)
        for n, (_, part) in enumerate(cache.shards()):
            sketch, length = part.tensors["sketch"].clone(), part.tensors["length"].clone()
            sketch[:, :128], length[:, 0] = 0, 0
            rows = Rows(
                {"sketch": sketch, "length": length}, part.index, part.status, part.truncated, part.record
            )
            writer.write(n, rows, {"ok": len(part.index)})
    dead = Cache(tmp_path)
    for method, normalize in ALL:
        got = attributor.scores(dead, QUERIES, method=method, normalize=normalize)  # type: ignore[arg-type]
        assert got.isfinite().all()


def test_methods_on_two_kilobytes_are_near_those_on_all_numbers(tmp_path: Path) -> None:
    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=512)
    whole = attributor.cache(records(120), tmp_path / "whole")
    small = attributor.cache(records(120), tmp_path / "small", bytes=1000)
    for method in methods.METHODS:
        a, b = (attributor.scores(c, QUERIES, method=method).double() for c in (whole, small))  # type: ignore[arg-type]
        assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) > 0.9


def test_a_target_set_is_the_weighted_mean(attributor: Attributor, cache: Cache) -> None:
    each = attributor.scores(cache, QUERIES, method="fisher").double()
    weights = [1.0, 2.0, -1.0, 0.0]
    target = [record | {"weight": w} for record, w in zip(QUERIES, weights, strict=True)]
    got = attributor.scores(cache, target, method="fisher", together=True)
    assert got.shape == (1, 30)
    want = (torch.tensor(weights)[:, None] * each).sum(0) / 4
    assert error(got[0], want) < 1e-5
    (result,) = attributor.query(cache, target, method="fisher", together=True, top_k=3)
    assert result.together == 4
    assert [h.row for h in result.top] == got[0].argsort(descending=True)[:3].tolist()
    with pytest.raises(UserError, match="all zero"):
        attributor.scores(cache, [QUERIES[0] | {"weight": 0}], together=True)
    with pytest.raises(UserError, match="not a number"):
        attributor.scores(cache, [QUERIES[0] | {"weight": "much"}], together=True)


def test_the_factors_of_a_large_cache_have_the_mean_of_some_rows(tmp_path: Path) -> None:
    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=16, preconditioner="off")
    rows = [*records(1400), {"prompt": "no answer", "completion": ""}]
    cache = attributor.cache(rows, tmp_path, shard_rows=100, dtype="float32", null=False)
    factors = cache.lengths().double().log().mean(1).exp() ** 0.25
    # Every second of 15 shards is read, 800 rows and the last, which does not count.
    read = [n for n in range(1400) if n // 100 % 2 == 0]
    assert vectors.mean_factor(cache, "weighted") == pytest.approx(float(factors[read].mean()), rel=1e-6)
    assert vectors.mean_factor(cache, "layer") == 1.0
    assert vectors.mean_factor(Cache(tmp_path), "weighted") == vectors.mean_factor(cache, "weighted")
    first = cache.manifest.shards[0]
    cache.manifest = replace(cache.manifest, shards=[first])  # as of an unfinished cache
    assert vectors.mean_factor(cache, "weighted") == pytest.approx(float(factors[:100].mean()), rel=1e-6)
    cache.manifest = replace(cache.manifest, shards=[])
    assert vectors.mean_factor(cache, "weighted") == 1.0


def test_rows_without_layers_have_no_weights(tmp_path: Path) -> None:
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=512, projection="rapidgrad")
    rows = records()
    cache = attributor.cache(rows, tmp_path)
    for more in ({}, {"rescore": "exact", "examples": rows}):
        (weighted,), (layer,) = (
            attributor.query(cache, QUERIES[:1], normalize=normalize, **more)  # type: ignore[arg-type]
            for normalize in ("weighted", "layer")
        )
        assert [(hit.row, hit.score) for hit in weighted.top] == [(hit.row, hit.score) for hit in layer.top]
        assert weighted.normalize == "layer"
