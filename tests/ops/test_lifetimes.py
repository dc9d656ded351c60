"""What kernels are given the addresses of is there when they read it, on other streams and in graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from gpu_flow import CUDA, Gpu, Graph, Stream
from inputs import normal
from torch import Tensor

from rapidin import ops
from rapidin.ops import flat_plan, tables
from rapidin.ops.lifetimes import Kept, kept

CPU = torch.device("cpu")
OTHER_CALLS = 100
RESERVE = 64 << 10


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    """With emulated kernels, and nothing kept from before."""
    units = import_module("rapidin.ops.cuda.scan").unit_tables.tables
    with (
        units.emptied(2_000),
        tables.kept_tables.emptied(4_000),
        flat_plan.kept_tables.emptied(4_000),
        Gpu("cuda")() as found,
    ):
        yield found
    assert found.problems == []


def numbers(n: int, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.full((size,), n, dtype=torch.int64, device="cpu")


# ---- what is kept ----


def test_the_least_recently_used_goes_first() -> None:
    made: list[int] = []

    def get(n: int) -> None:
        def make() -> Tensor:
            made.append(n)
            return numbers(n)()

        assert store.get(n, CPU, make).tolist() == [n] * 8

    store = Kept(3 * 64)
    for n in (0, 1, 2, 0, 3, 0, 1):
        get(n)
    assert made == [0, 1, 2, 3, 1]
    store.get("large", CPU, numbers(9, 1000))  # larger than all that is kept: it alone
    assert store.sizes() == [8_000]


def test_a_function_of_kept_tables() -> None:
    calls: list[int] = []

    @kept(1 << 20)
    def pair(n: int) -> tuple[Tensor, Tensor]:
        calls.append(n)
        return numbers(n)(), numbers(-n)()

    assert [x.tolist() for x in pair(3, CPU)] == [[3] * 8, [-3] * 8]
    assert pair(3, CPU)[0] is pair(3, CPU)[0]
    assert calls == [3]


def test_nothing_waits_for_what_is_made(gpu: Gpu) -> None:
    assert Kept(1000).get("a", CUDA, numbers(4)).device == CUDA
    assert not gpu.waits


def test_another_stream_reads_what_is_there(gpu: Gpu) -> None:
    store = Kept(1000)
    store.get("a", CUDA, numbers(4))
    with torch.cuda.stream(Stream()):  # no event orders it after the first
        assert (store.get("a", CUDA, numbers(4)) + 1).tolist() == [5] * 8


def test_what_goes_is_not_given_away_while_another_stream_reads(gpu: Gpu) -> None:
    store = Kept(64)
    gone, side = weakref.ref(store.get("a", CUDA, numbers(4))), Stream()
    with torch.cuda.stream(side):
        x = store.get("a", CUDA, numbers(4)) + 1
    for n in range(3):
        store.get(n, CUDA, numbers(n))
    assert gone() is None
    with torch.cuda.stream(side):
        assert x.tolist() == [5] * 8


@pytest.mark.parametrize("known", [True, False])
def test_a_graph_reads_what_is_there_and_unchanged(known: bool, gpu: Gpu) -> None:
    store = Kept(64, reserve_bytes=RESERVE)
    store.get("before" if not known else "a", CUDA, numbers(4))
    with gpu.capture() as graph:
        store.get("a", CUDA, numbers(4)) + 1
    for n in range(OTHER_CALLS):
        store.get(n, CUDA, numbers(n))
        with gpu.capture():
            store.get(("captured", n), CUDA, numbers(n)) + 1
    assert bool(graph.memory) == known
    assert bool(graph.pinned) != known
    assert graph.lost() == []


def test_a_graph_without_reserve_asks_for_a_call_before(gpu: Gpu) -> None:
    for store in (Kept(64), Kept(64, reserve_bytes=RESERVE)):
        with gpu.capture(), pytest.raises(RuntimeError, match="make the same call once before the capture"):
            store.get("a", CUDA, numbers(4))


def test_what_a_graph_has_lost_is_told(gpu: Gpu) -> None:
    x, host = torch.ones(3, device=CUDA), torch.ones(3).pin_memory()
    with gpu.capture() as graph:
        x + host.to(CUDA, non_blocking=True)
    assert graph.lost() == []
    host.fill_(2)
    assert "written anew" in graph.lost()[0]
    del x, host
    assert sorted(each.split(",")[-1] for each in graph.lost()) == [
        " which is freed", "a captured copy reads pinned memory that is freed",
    ]  # fmt: skip


# ---- what kernels get ----


def flat(seed: int) -> list[Tensor]:
    """A list as gradients are, in memory of its own."""
    return [normal(3, 50, seed=seed).to(CUDA), normal(7, seed=seed + 1).to(CUDA)]


def call(op: str, n: int, given: list[Any]) -> Any:
    """An op on other inputs, of other sizes, by another seed, for each n.

    given: what holds the inputs, so that none lie where others lay.
    """
    if op == "flat_sketch":
        given.append(flat(n))
        return ops.flat_sketch(given[-1], 128 * (1 + n % 3), seed=n % 7, squares=bool(n % 2))
    if op == "linear_sketch":
        sides = normal(1, 2, 20 + n, seed=n), normal(1, 2, 30, seed=n + 1)
        return ops.linear_sketch(*(x.bfloat16().to(CUDA) for x in sides), 64, seed=n)
    dtype = ("sign", "int8", "int4")[n % 3]
    rows = ops.pack(normal(5, 64 + n, seed=n), dtype)  # type: ignore[arg-type]
    rows = ops.Packed(rows.codes.to(CUDA), rows.dtype, rows.width, rows.scale.to(CUDA))  # type: ignore[union-attr]
    queries = normal(2, 64 + n, seed=n + 1).to(CUDA)
    if n % 2:
        return ops.topk_scan(rows, queries, 2)
    return ops.topk_scan_both_ends(
        [rows], queries, 2, scales=torch.ones(5, 2, device=CUDA), offsets=[0, 30, 64 + n]
    )


@pytest.mark.parametrize("op", ["flat_sketch", "linear_sketch", "topk_scan"])
@pytest.mark.parametrize("way", ["captured", "another stream"])
def test_all_that_a_kernel_gets_outlives_other_calls(op: str, way: str, gpu: Gpu) -> None:
    if op == "flat_sketch":
        given = flat(1000)
        run = lambda: ops.flat_sketch(given, 256, seed=3)  # noqa: E731
    elif op == "linear_sketch":
        sides = normal(1, 2, 40).bfloat16().to(CUDA), normal(1, 2, 30).bfloat16().to(CUDA)
        run = lambda: ops.linear_sketch(*sides, 64, seed=3)  # noqa: E731
    else:
        codes = ops.pack(normal(5, 200), "sign").codes.to(CUDA)
        rows, queries = ops.Packed(codes, "sign", 200, None), normal(2, 200).to(CUDA)
        scales = torch.ones(5, 2, device=CUDA)
        run = lambda: ops.topk_scan(rows, queries, 2, scales=scales, offsets=[0, 90, 200])[0]  # noqa: E731
    wanted = run().cpu()  # tables come before the capture
    graph, side = Graph(), Stream()
    if way == "captured":
        with gpu.capture() as graph:
            got = run()
    else:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = run()
        for x in (
            given if op == "flat_sketch" else sides if op == "linear_sketch" else (codes, queries, scales)
        ):
            x.record_stream(side)
    others: list[Any] = []
    for n in range(OTHER_CALLS):
        call(op, n, others)
    assert graph.lost() == []
    assert way != "captured" or graph.memory
    if way != "captured":
        side.synchronize()
    assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("made", ["high_and_low", "matrix", "table", "to"])
def test_a_graph_makes_nothing_that_a_preconditioner_keeps(made: str, gpu: Gpu) -> None:
    """It would lie in memory of the graph: without numbers until the replay, and gone with the graph."""
    basis = torch.linalg.qr(normal(4 if made == "matrix" else 40, 2)).Q
    low_rank = ops.LowRank(*(x if made == "to" else x.to(CUDA) for x in (basis, torch.full((2,), -0.5))))
    run: Callable[[], Any] = {
        "high_and_low": lambda: low_rank.high_and_low,
        "matrix": lambda: low_rank.matrix,
        "table": lambda: low_rank.table(3, tables.IN, 64),
        "to": lambda: low_rank.to(CUDA),
    }[made]
    with gpu.capture(), pytest.raises(RuntimeError, match="once before the capture"):
        run()
    found = run()
    assert found is not None
    with gpu.capture():
        assert run() is found


def test_a_captured_sketch_of_a_list_that_lay_nowhere_before(gpu: Gpu) -> None:
    ops.flat_sketch(flat(0), 256, seed=3)
    with gpu.capture() as graph:
        x = torch.ones(3, 50, device=CUDA)
        got = ops.flat_sketch([x, x[0]], 256, seed=3)
    others: list[Any] = []
    for n in range(OTHER_CALLS):
        call("flat_sketch", n, others)
    assert graph.pinned
    assert graph.lost() == []
    assert torch.equal(
        got.cpu(), ops.flat_sketch([torch.ones(3, 50), torch.ones(50)], 256, seed=3, backend="cpu")
    )


def test_the_reserve_is_made_larger_before_it_is_used_up(gpu: Gpu) -> None:
    store = Kept(1 << 20, reserve_bytes=256)
    graphs = []
    for n in range(30):
        store.get(n, CUDA, numbers(n))
        with gpu.capture() as graph:
            store.get(("captured", n), CUDA, numbers(n))
        graphs.append(graph)
    assert [graph.lost() for graph in graphs] == [[]] * 30
    with gpu.capture(), pytest.raises(RuntimeError, match="once before the capture"):
        [store.get(("more", n), CUDA, numbers(n)) for n in range(30)]
