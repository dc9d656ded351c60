"""linear_sketch, flat_sketch, matrix_sketch and embedding_sketch on the layers of real models."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from gradient_sketches import CountSketch, Shuffles
from torch import Tensor

from on_gpu import peers
from on_gpu.cases import SMALL, Bench, Case, Cost, Mode, backends_of, relative_error
from on_gpu.plan import BACKENDS, Facts
from rapidin import ops

SEED = 0x9E3779B97F4A7C15
# bfloat16 factors may be summed as such in a matrix product; of the sketch's own error this is nothing.
LINEAR_TOLERANCES = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-3}
FLAT_TOLERANCE = 1e-4
LINEAR_GOAL, FLAT_GOAL, SHUFFLES_GOAL = 0.7, 0.85, 100.0
SHUFFLES = "torch: RapidIn's shuffles"

LAYERS = (  # in, out: of Llamas of 1, 7 and 8 billion parameters, and LoRA of rank 16
    (2048, 2048),
    (4096, 4096),
    (4096, 16),
    (16, 4096),
    (2048, 8192),
    (4096, 14336),
    (4096, 11008),
)
# What width="auto" takes for models of 12 to hundreds of layers (rapidin.gradients.source.default_width).
DEFAULT_DIMS = (512, 1024, 2048, 4096, 8192)
RANK = 64  # directions of a side that K-FAC's preconditioner knows (rapidin.gradients.preconditioner.RANK)
# As rapidin.gradients.collector gives them on a GPU: a batch of some thousand tokens.
BATCH, TOKENS = 8, 512
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PLAIN, LOW_RANK, PRECONDITIONED = "none", "low rank", "float32 copies"


def _size(
    layer: tuple[int, int],
    k: int,
    dtype: str = "bfloat16",
    kfac: str = PLAIN,
    batch: int = BATCH,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """kfac: how the factors are preconditioned: not at all, by a LowRank of each side, or by float32 copies
    made before, whose time counts."""
    n_in, n_out = layer
    size = {"in": n_in, "out": n_out, "k": k, "dtype": dtype, "kfac": kfac}
    return size | {"batch": batch, "tokens": tokens}


def has_low_rank() -> bool:
    """Whether linear_sketch can precondition its factors."""
    return hasattr(ops, "LowRank")


def linear_sizes(mode: Mode) -> list[dict[str, Any]]:
    kfac = LOW_RANK if has_low_rank() else PRECONDITIONED
    if mode == "dry":
        few: dict[str, Any] = {"batch": 2, "tokens": 6}
        return [
            _size((40, 40), 64, **few),
            _size((40, 16), 64, "float32", **few),
            _size((150, 140), 64, kfac=kfac, **few),
        ]
    if mode == "smoke":
        odd: dict[str, Any] = {"batch": 3, "tokens": 37}
        listed = [_size((257, 131), k, dtype, **odd) for dtype in DTYPES for k in DEFAULT_DIMS]
        listed += [_size((257, 131), k, dtype, **odd) for dtype in DTYPES for k in (64, 1000)]
        return [
            *listed,
            *(_size((257, 141), k, dtype, kfac, **odd) for dtype in DTYPES for k in DEFAULT_DIMS),
        ]
    first, second = LAYERS[:2]
    # The defaults first: with K-FAC, for models of fewer and fewer layers.
    listed = [_size(first, k, kfac=kfac) for k in DEFAULT_DIMS]
    listed += [_size(first, k) for k in DEFAULT_DIMS]
    listed += [_size(first, k, "float32") for k in DEFAULT_DIMS]
    if mode == "quick":
        return listed[:8]
    listed += [_size(layer, 512) for layer in LAYERS[1:]]
    listed += [_size(second, 512, dtype) for dtype in ("float16", "float32")]
    listed += [_size(layer, 1024, kfac=kfac) for layer in LAYERS[1:5]]
    listed += [_size(layer, k) for k in (1024, 64, 256) for layer in LAYERS[1:]]
    return listed


def _factors(bench: Bench, size: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Sets of inputs and output gradients."""
    dtype = DTYPES[size["dtype"]]
    rows = size["batch"], size["tokens"]
    one = math.prod(rows) * (size["in"] + size["out"]) * dtype.itemsize
    key = tuple(size[name] for name in size if name not in ("k", "kfac"))

    def make() -> list[tuple[Tensor, Tensor]]:
        sets = range(bench.sets(one))
        return [
            (bench.normal(*rows, size["in"], dtype=dtype), bench.normal(*rows, size["out"], dtype=dtype))
            for _ in sets
        ]

    return bench.once("factors", key, make)


Side = tuple[Tensor, Tensor]  # basis [n, r] and gain [r] of what K-FAC does to a side


def _sides(bench: Bench, size: dict[str, Any]) -> tuple[Side, Side]:
    """Random orthonormal directions of both sides, which K-FAC takes down to the level of the others."""

    def side(features: int) -> Side:
        rank = min(RANK, features)
        basis = torch.linalg.qr(torch.randn(features, rank, device=bench.device)).Q.contiguous()
        return basis, torch.linspace(-0.99, -0.5, rank, device=bench.device)

    return bench.once("sides", (size["in"], size["out"]), lambda: (side(size["in"]), side(size["out"])))


def _preconditioned(x: Tensor, side: Side) -> Tensor:
    """x [B, T, n] preconditioned, in x's dtype where that is float64, else float32."""
    basis, gain = side
    x = x if x.dtype == torch.float64 else x.float()
    along = (x @ basis.to(x.dtype)) * gain.to(x.dtype)
    return torch.addmm(x.flatten(0, 1), along.flatten(0, 1), basis.T.to(x.dtype)).view_as(x)


def _linear_cost(size: dict[str, Any]) -> Cost:
    """Bytes of the factors; operations of the way with fewest: both sides binned, one transform a token. With
    K-FAC the products with the known directions, and the sums with their sketches, besides."""
    tokens, k = size["batch"] * size["tokens"], size["k"]
    features = size["in"] + size["out"]
    return Cost(
        read=tokens * features * DTYPES[size["dtype"]].itemsize,
        written=4 * size["batch"] * k,
        operations=tokens * (features + 5 * k * math.log2(k) + 6 * k),
        products=0.0 if size["kfac"] == PLAIN else tokens * 2 * RANK * (features + 2 * k),
    )


def linear(size: dict[str, Any], way: str) -> Case:
    k, kfac = size["k"], size["kfac"]

    def run(bench: Bench) -> Facts:
        if way in BACKENDS:
            bench.kernel("linear_sketch", way)
        sets = _factors(bench, size)
        if way not in BACKENDS:
            calls = [peers.double_sided(a, g, k) for a, g in sets]
            return bench.measured(calls, _linear_cost(size))
        left, right = _sides(bench, size) if kfac != PLAIN else (None, None)

        def call(a: Tensor, g: Tensor) -> Tensor:
            if left is None or right is None:
                return ops.linear_sketch(a, g, k, seed=SEED, backend=way)
            if kfac == PRECONDITIONED:
                preconditioned = _preconditioned(a, left), _preconditioned(g, right)
                return ops.linear_sketch(*preconditioned, k, seed=SEED, backend=way)
            low_rank = bench.once(
                "low rank", (size["in"], size["out"]), lambda: [ops.LowRank(*side) for side in (left, right)]
            )
            more: Any = {"inputs_low_rank": low_rank[0], "grads_low_rank": low_rank[1]}
            return ops.linear_sketch(a, g, k, seed=SEED, backend=way, **more)

        def exact() -> Tensor:
            a, g = sets[0]
            if (
                left is not None and right is not None
            ):  # rounding to float32 is negligible beside the tolerance
                a, g = (_preconditioned(x.double(), side).float() for x, side in ((a, left), (g, right)))
            return ops.linear_sketch(a, g, k, seed=SEED, backend="reference")

        key = ("linear", *size.items())
        return bench.measured(
            [partial(call, a, g) for a, g in sets],
            _linear_cost(size),
            lambda got: relative_error(got, bench.once("wanted", key, exact)),
            # Triton's interpreter cuts off what a GPU rounds to bfloat16: twice the error.
            LINEAR_TOLERANCES[size["dtype"]] * (2 if bench.mode == "dry" and kfac else 1),
        )

    goals = {"floor": LINEAR_GOAL} if way in BACKENDS else {}
    return Case("linear_sketch", way, size, run, goals)


# ------------------------------------------------------------------------------------------- flat_sketch


def model_shapes(mode: Mode) -> list[tuple[int, int]]:
    """The linear layers of a Llama of 1 billion parameters: 16 layers, 973 million weights."""
    hidden, inner, key_values, layers = (2048, 8192, 512, 16) if mode not in SMALL else (24, 41, 9, 1)
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
    if mode in SMALL:
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
            quick = "reference" if bench.small else "cpu"
            key = size["dtype"], size["batch"]
            host = bench.once("host", key, lambda: [x.cpu() for x in tensors])
            return ops.flat_sketch(host, dim, seed=SEED, batched=batched, backend=quick)

        key = ("flat", *size.items())
        return bench.measured(
            [lambda: ops.flat_sketch(tensors, dim, seed=SEED, batched=batched, backend=way)],
            cost,
            lambda got: relative_error(got.cpu(), bench.once("wanted", key, wanted)),
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
    if mode in SMALL:
        size |= {"in": 25, "out": 41, "k": 64, "batch": 2}
    elements = size["batch"] * size["in"] * size["out"]

    def run(bench: Bench) -> Facts:
        bench.kernel("matrix_sketch", way)
        shape = size["batch"], size["out"], size["in"]
        sets = bench.once(
            "formed",
            shape,
            lambda: [bench.normal(*shape).bfloat16() for _ in range(bench.sets(2 * elements))],
        )

        def call(x: Tensor, backend: str) -> Tensor:
            return ops.matrix_sketch(x, size["k"], seed=SEED, backend=backend)

        def wanted() -> Tensor:
            return bench.once("wanted", ("matrix", *size.items()), lambda: call(sets[0], "reference"))

        return bench.measured(
            [partial(call, x, way) for x in sets],
            Cost(read=2 * elements, written=4 * size["batch"] * size["k"]),
            lambda got: relative_error(got, wanted()),
            FLAT_TOLERANCE,
        )

    return Case("matrix_sketch", way, size, run)


def embedded(mode: Mode, way: str) -> Case:
    size: dict[str, Any] = {"vocabulary": 128256, "features": 2048, "k": 512, "dtype": "bfloat16"}
    size |= {"batch": BATCH, "tokens": TOKENS}
    if mode in SMALL:
        size |= {"vocabulary": 50, "features": 25, "k": 64, "batch": 2, "tokens": 7}
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
                for _ in range(bench.sets(read))
            ]

        sets = bench.once("embedded", tuple(size.items()), make)

        def call(ids: Tensor, grads: Tensor, backend: str) -> Tensor:
            return ops.embedding_sketch(ids, grads, size["k"], seed=SEED, backend=backend)

        def wanted() -> Tensor:
            # The reference forms the gradient of each example in float64: two will do.
            return call(sets[0][0][:2], sets[0][1][:2], "reference")

        key = ("embedding", *size.items())
        return bench.measured(
            [partial(call, ids, grads, way) for ids, grads in sets],
            Cost(read=read, written=4 * size["batch"] * size["k"]),
            lambda got: relative_error(got[:2], bench.once("wanted", key, wanted)),
            FLAT_TOLERANCE,
        )

    return Case("embedding_sketch", way, size, run)


def linear_cases(mode: Mode) -> list[Case]:
    listed: list[Case] = []
    for size in linear_sizes(mode):
        listed += [linear(size, way) for way in backends_of("linear_sketch")]
        if mode == "dry" or (
            size["kfac"] == PLAIN and size["k"] in (512, 1024) and size["dtype"] == "bfloat16"
        ):
            listed.append(linear(size, "torch: double-sided projection"))
    for op, make in (("matrix_sketch", formed), ("embedding_sketch", embedded)):
        listed += [make(mode, way) for way in backends_of(op)]
    return listed


def flat_cases(mode: Mode) -> list[Case]:
    listed: list[Case] = []
    for size in flat_sizes(mode):
        listed += [flat(size, way) for way in backends_of("flat_sketch")]
        if size["batch"] == 1:
            listed += [flat_peer(size, way) for way in (SHUFFLES, "torch: cat, index_add", "sjlt", "fast_jl")]
    return listed
