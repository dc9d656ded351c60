"""pack, unpack and the random rotation: what becomes of sketches before they are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from on_gpu import peers
from on_gpu.cases import SMALL, Bench, Case, Cost, Mode, backends_of, relative_error
from on_gpu.plan import BACKENDS, Facts
from on_gpu.sketches import DTYPES
from rapidin import ops
from rapidin.ops import Packed

SEED = 7
TOLERANCE = 1e-4  # of the scales; codes must be equal but where a number lies on the edge of two steps
EDGE = 1e-5  # share of bytes that may differ for that


def pack_sizes(mode: Mode) -> list[dict[str, Any]]:
    rows, width = (5, 151 if mode == "smoke" else 144) if mode in SMALL else (16384, 16384)
    listed = [("int8", "float32"), ("int4", "float32"), ("sign", "float32"), ("sign", "bfloat16")]
    return [{"to": to, "from": x, "rows": rows, "numbers": width} for to, x in listed]


def _rows(bench: Bench, size: dict[str, Any]) -> Tensor:
    shape = size["rows"], size["numbers"]
    return bench.once(
        "rows", (size["from"], *shape), lambda: bench.normal(*shape, dtype=DTYPES[size["from"]])
    )


def _cost(size: dict[str, Any]) -> Cost:
    kept = ops.packed_bytes(size["numbers"], size["to"]) + 4
    read = size["rows"] * size["numbers"] * DTYPES[size["from"]].itemsize
    return Cost(read=read, written=size["rows"] * kept)


def _pack_error(wanted: Packed, got: tuple[Tensor, Tensor]) -> float:
    codes, scale = got
    if codes.shape != wanted.codes.shape:
        return float("nan")
    if float((codes != wanted.codes).float().mean()) > EDGE:
        return float("inf")
    assert wanted.scale is not None
    return relative_error(scale[None], wanted.scale[None])


def packing(size: dict[str, Any], way: str) -> Case:
    few = 64  # rows that the reference packs: it is slow, and rows are packed one by one

    def run(bench: Bench) -> Facts:
        if way not in BACKENDS:
            x = _rows(bench, size)
            return bench.measured([lambda: peers.torch_pack(x, size["to"])], _cost(size))
        bench.kernel("pack", way)
        x = _rows(bench, size)

        def call() -> tuple[Tensor, Tensor]:
            made = ops.pack(x, size["to"], backend=way)
            assert made.scale is not None
            return made.codes, made.scale

        chosen = torch.linspace(0, len(x) - 1, min(few, len(x)), device=x.device).long()
        key = ("pack", *size.items())

        def error(got: tuple[Tensor, Tensor]) -> float:
            wanted = bench.once("wanted", key, lambda: ops.pack(x[chosen], size["to"], backend="reference"))
            return _pack_error(wanted, (got[0][chosen], got[1][chosen]))

        return bench.measured([call], _cost(size), error, TOLERANCE)

    return Case("pack", way, size, run)


def unpacking(size: dict[str, Any], way: str) -> Case:
    cost = _cost(size)
    reversed_cost = Cost(read=cost.written, written=4 * size["rows"] * size["numbers"])

    def run(bench: Bench) -> Facts:
        if way in BACKENDS:
            bench.kernel("unpack", way)
        bytes_kept = ops.packed_bytes(size["numbers"], size["to"])

        def make() -> Packed:
            codes = torch.empty(size["rows"], bytes_kept, dtype=torch.uint8, device=bench.device).random_(
                0, 256
            )
            kind = codes.view(torch.int8) if size["to"] == "int8" else codes
            return Packed(
                kind, size["to"], size["numbers"], torch.rand(len(codes), device=bench.device) + 0.5
            )

        packed = bench.once("packed", tuple(size.items()), make)
        assert packed.scale is not None
        scale = packed.scale
        if way not in BACKENDS:
            return bench.measured(
                [lambda: peers.unpacked(packed, 0, size["rows"]).float() * scale[:, None]], reversed_cost
            )
        few = Packed(packed.codes[:64], packed.dtype, packed.width, scale[:64])
        return bench.measured(
            [lambda: ops.unpack(packed, backend=way)],
            reversed_cost,
            lambda got: relative_error(got[:64], ops.unpack(few, backend="reference")),
            TOLERANCE,
        )

    return Case("unpack", way, size, run)


def rotate_size(mode: Mode) -> dict[str, Any]:
    rows, blocks, width = (3, 2, 64) if mode in SMALL else (2048, 112, 512)
    return {"rows": rows, "blocks": blocks, "width": width}


def rotating(size: dict[str, Any], way: str) -> Case:
    """The random orthogonal rotation on the device, and the same in torch."""

    def run(bench: Bench) -> Facts:
        shape = size["rows"], size["blocks"], size["width"]
        x = bench.once("unrotated", shape, lambda: bench.normal(*shape))
        cost = Cost(read=x.nbytes, written=x.nbytes)
        if way not in BACKENDS:
            signs = bench.normal(size["blocks"], size["width"]).sign()
            return bench.measured([lambda: peers.torch_rotate(x, signs)], cost)
        bench.kernel("rotate", way)
        key = ("rotate", *size.items())

        def error(got: Tensor) -> float:
            wanted = bench.once("wanted", key, lambda: ops.rotate(x[:64].cpu(), seed=SEED))
            return relative_error(got[:64].cpu().flatten(1), wanted.flatten(1))

        return bench.measured(
            [lambda: ops.rotate(x, seed=SEED, backend=way)],
            cost,
            error,
            TOLERANCE,
        )

    return Case("rotate", way, size, run)


def cases(mode: Mode) -> list[Case]:
    def ways(op: str) -> tuple[str, ...]:
        return (*backends_of(op), "torch")

    listed = [packing(size, way) for size in pack_sizes(mode) for way in ways("pack")]
    listed += [rotating(rotate_size(mode), way) for way in ways("rotate")]
    sizes = [size for size in pack_sizes(mode) if size["from"] == "float32"]
    return [*listed, *(unpacking(size, way) for size in sizes for way in ways("unpack"))]
