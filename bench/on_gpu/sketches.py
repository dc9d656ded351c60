"""linear_sketch, flat_sketch, matrix_sketch and embedding_sketch on the layers of real models."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from bench_sketching import CountSketch, Shuffles
from torch import Tensor

from on_gpu import peers
from on_gpu.cases import BACKENDS, Bench, Case, Cost, Facts, Mode, relative_error
from rapidin import ops

SEED = 0x9E3779B97F4A7C15
# bfloat16 factors may be summed as such in a matrix product; of the sketch's own error this is nothing.
LINEAR_TOLERANCE = 1e-2
FLAT_TOLERANCE = 1e-4
LINEAR_GOAL, FLAT_GOAL, SHUFFLES_GOAL = 0.7, 0.85, 100.0
SHUFFLES = "torch: RapidIn's shuffles"

LAYERS = (  # in, out: of Llamas of 1, 7 and 8 billion parameters, and LoRA of rank 16
    (4096, 4096),
    (2048, 2048),
    (4096, 16),
    (16, 4096),
    (2048, 8192),
    (4096, 14336),
    (4096, 11008),
)
# As rapidin.hooks gives them on a GPU: a batch of some thousand tokens.
BATCH, TOKENS = 8, 512
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def linear_sizes(mode: Mode) -> list[dict[str, Any]]:
    def size(layer: tuple[int, int], k: int, dtype: str = "bfloat16") -> dict[str, Any]:
        few = mode == "dry"
        n_in, n_out = (min(n, 40) for n in layer) if few else layer
        batch, tokens = (2, 6) if few else (BATCH, TOKENS)
        return {"in": n_in, "out": n_out, "k": k, "dtype": dtype, "batch": batch, "tokens": tokens}

    if mode == "dry":
        return [size(LAYERS[0], 64), size(LAYERS[2], 64, "float32")]
    widths = (512, 64, 256, 1024) if mode == "full" else (512,)
    layers = LAYERS if mode == "full" else LAYERS[:4]
    listed = [size(layer, k) for k in widths for layer in layers]
    listed[2:2] = [size(LAYERS[0], 512, "float32"), size(LAYERS[0], 512, "float16")]
    return listed


def _factors(bench: Bench, size: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Sets of inputs and output gradients."""
    dtype = DTYPES[size["dtype"]]
    rows = size["batch"], size["tokens"]
    one = math.prod(rows) * (size["in"] + size["out"]) * dtype.itemsize
    key = tuple(size[name] for name in size if name != "k")

    def make() -> list[tuple[Tensor, Tensor]]:
        sets = range(bench.machine.sets(one))
        return [
            (bench.normal(*rows, size["in"], dtype=dtype), bench.normal(*rows, size["out"], dtype=dtype))
            for _ in sets
        ]

    return bench.once("factors", key, make)


def _linear_cost(size: dict[str, Any]) -> Cost:
    """Bytes of the factors; operations of the way with fewest: both sides binned, one transform a token."""
    tokens, k = size["batch"] * size["tokens"], size["k"]
    features = size["in"] + size["out"]
    return Cost(
        read=tokens * features * DTYPES[size["dtype"]].itemsize,
        written=4 * size["batch"] * k,
        operations=tokens * (features + 5 * k * math.log2(k) + 6 * k),
    )


def linear(size: dict[str, Any], way: str) -> Case:
    def run(bench: Bench) -> Facts:
        if way in BACKENDS:
            bench.kernel("linear_sketch", way)
        sets = _factors(bench, size)
        if way not in BACKENDS:
            calls = [peers.double_sided(a, g, size["k"]) for a, g in sets]
            return bench.measured(calls, _linear_cost(size))

        wanted = bench.once(
            "wanted",
            ("linear", *size.items()),
            lambda: ops.linear_sketch(*sets[0], size["k"], seed=SEED, backend="reference"),
        )
        return bench.measured(
            [partial(ops.linear_sketch, a, g, size["k"], seed=SEED, backend=way) for a, g in sets],
            _linear_cost(size),
            lambda got: relative_error(got, wanted),
            LINEAR_TOLERANCE,
        )

    goals = {"floor": LINEAR_GOAL} if way in BACKENDS else {}
    return Case("linear_sketch", way, size, run, goals)


# ------------------------------------------------------------------------------------------- flat_sketch


def model_shapes(mode: Mode) -> list[tuple[int, int]]:
    """The linear layers of a Llama of 1 billion parameters: 16 layers, 973 million weights."""
    hidden, inner, key_values, layers = (2048, 8192, 512, 16) if mode != "dry" else (24, 40, 8, 1)
    if mode == "quick":
        layers = 4
    block = [(hidden, hidden), (key_values, hidden), (key_values, hidden), (hidden, hidden)]
    return [*block, (inner, hidden), (inner, hidden), (hidden, inner)] * layers


def flat_sizes(mode: Mode) -> list[dict[str, Any]]:
    elements = sum(math.prod(shape) for shape in model_shapes(mode))
    listed = [
        {"elements": elements, "dim": dim, "dtype": dtype, "batch": batch}
        for dtype, batch in (("bfloat16", 1), ("float32", 1), ("bfloat16", 4))
        for dim in (65536, 4096)
    ]
    if mode == "dry":
        return [size | {"dim": 256, "batch": min(2, size["batch"])} for size in listed[::2]]
    return listed if mode == "full" else listed[:2]


def _gradient(bench: Bench, size: dict[str, Any]) -> list[Tensor]:
    """Tensors of the model's shapes, [batch, ...] where the batch is more than one. Gigabytes: no L2 holds
    them, so one set will do."""

    def make() -> list[Tensor]:
        batch = [size["batch"]] if size["batch"] > 1 else []
        return [bench.normal(*batch, *s, dtype=DTYPES[size["dtype"]]) for s in model_shapes(bench.mode)]

    return bench.once("gradient", (size["dtype"], size["batch"]), make)


def flat(size: dict[str, Any], way: str) -> Case:
    dim, batched = size["dim"], size["batch"] > 1
    cost = Cost(
        read=size["elements"] * size["batch"] * DTYPES[size["dtype"]].itemsize,
        written=4 * dim * size["batch"],
    )

    def run(bench: Bench) -> Facts:
        bench.kernel("flat_sketch", way)
        tensors = _gradient(bench, size)

        def wanted() -> Tensor:
            # The reference hashes on the CPU, in int64: for a whole model the CPU's kernel stands in for it.
            quick = "reference" if bench.mode == "dry" else "cpu"
            key = size["dtype"], size["batch"]
            host = bench.once("host", key, lambda: [x.cpu() for x in tensors])
            return ops.flat_sketch(host, dim, seed=SEED, batched=batched, backend=quick)

        right = bench.once("wanted", ("flat", *size.items()), wanted)
        return bench.measured(
            [lambda: ops.flat_sketch(tensors, dim, seed=SEED, batched=batched, backend=way)],
            cost,
            lambda got: relative_error(got.cpu(), right),
            FLAT_TOLERANCE,
        )

    goals = {"read": FLAT_GOAL} | ({SHUFFLES: SHUFFLES_GOAL} if not batched else {})
    return Case("flat_sketch", way, size, run, goals)


def flat_peer(size: dict[str, Any], way: str) -> Case:
    dim = size["dim"]
    itemsize = DTYPES[size["dtype"]].itemsize

    def run(bench: Bench) -> Facts:
        device = str(bench.device)
        if way == "fast_jl":
            peers.needed("fast_jl")
            # A dense projection of all of it would take minutes; the size says of how much this is.
            few = min(size["elements"], 1 << 24)
            x = bench.normal(8, few, dtype=torch.float16)
            measured = bench.measured(
                [peers.fast_jl(x, dim, bench.machine.units)], Cost(read=x.nbytes, written=32 * dim)
            )
            return measured | {"elements_projected": few, "examples_projected": 8}
        cost = Cost(read=size["elements"] * itemsize, written=4 * dim)
        if way == "sjlt":
            project = peers.sjlt(size["elements"], dim, bench.device)
        elif way == SHUFFLES:
            project = Shuffles(size["elements"], dim, device=device)
        else:
            project = CountSketch(size["elements"], dim, device=device)
        tensors = _gradient(bench, size)
        return bench.measured([lambda: project(tensors)], cost)

    return Case("flat_sketch", way, size, run)


# ----------------------------------------------------------------------------------- formed and embedded


def formed(mode: Mode, way: str) -> Case:
    size: dict[str, Any] = {"in": 2048, "out": 8192, "k": 512, "dtype": "bfloat16", "batch": 4}
    if mode == "dry":
        size |= {"in": 24, "out": 40, "k": 64, "batch": 2}
    elements = size["batch"] * size["in"] * size["out"]

    def run(bench: Bench) -> Facts:
        bench.kernel("matrix_sketch", way)
        shape = size["batch"], size["out"], size["in"]
        sets = bench.once(
            "formed",
            shape,
            lambda: [bench.normal(*shape).bfloat16() for _ in range(bench.machine.sets(2 * elements))],
        )

        def call(x: Tensor, backend: str) -> Tensor:
            return ops.matrix_sketch(x, size["k"], seed=SEED, backend=backend)

        wanted = bench.once("wanted", ("matrix", *size.items()), lambda: call(sets[0], "reference"))
        return bench.measured(
            [partial(call, x, way) for x in sets],
            Cost(read=2 * elements, written=4 * size["batch"] * size["k"]),
            lambda got: relative_error(got, wanted),
            FLAT_TOLERANCE,
        )

    return Case("matrix_sketch", way, size, run)


def embedded(mode: Mode, way: str) -> Case:
    size: dict[str, Any] = {"vocabulary": 128256, "features": 2048, "k": 512, "dtype": "bfloat16"}
    size |= {"batch": BATCH, "tokens": TOKENS}
    if mode == "dry":
        size |= {"vocabulary": 50, "features": 24, "k": 64, "batch": 2, "tokens": 6}
    rows = size["batch"], size["tokens"]
    read = math.prod(rows) * (2 * size["features"] + 8)

    def run(bench: Bench) -> Facts:
        bench.kernel("embedding_sketch", way)

        def make() -> list[tuple[Tensor, Tensor]]:
            return [
                (
                    torch.randint(size["vocabulary"], rows, device=bench.device),
                    bench.normal(*rows, size["features"], dtype=torch.bfloat16),
                )
                for _ in range(bench.machine.sets(read))
            ]

        sets = bench.once("embedded", tuple(size.items()), make)

        def call(ids: Tensor, grads: Tensor, backend: str) -> Tensor:
            return ops.embedding_sketch(ids, grads, size["k"], seed=SEED, backend=backend)

        def wanted() -> Tensor:
            # The reference forms the gradient of each example in float64: two will do.
            return call(sets[0][0][:2], sets[0][1][:2], "reference")

        right = bench.once("wanted", ("embedding", *size.items()), wanted)
        return bench.measured(
            [partial(call, ids, grads, way) for ids, grads in sets],
            Cost(read=read, written=4 * size["batch"] * size["k"]),
            lambda got: relative_error(got[:2], right),
            FLAT_TOLERANCE,
        )

    return Case("embedding_sketch", way, size, run)


def linear_cases(mode: Mode) -> list[Case]:
    ways = (*BACKENDS, "torch: double-sided projection")
    listed = [linear(size, way) for size in linear_sizes(mode) for way in ways]
    return [*listed, *(make(mode, way) for make in (formed, embedded) for way in BACKENDS)]


def flat_cases(mode: Mode) -> list[Case]:
    listed: list[Case] = []
    for size in flat_sizes(mode):
        listed += [flat(size, way) for way in BACKENDS]
        if size["batch"] == 1:
            listed += [flat_peer(size, way) for way in (SHUFFLES, "torch: cat, index_add", "sjlt", "fast_jl")]
    return listed
