"""Writes the rows in this folder, with the names that rapidin's Python interface had in format version 2.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/cache/rows_of_format_2/write.py

inputs.safetensors holds the unit blocks and lengths of ten rows; float16, int4 and fitted are caches of them,
whose shards today's codecs must write byte for byte. `fitted` stores one bit a number in a basis fitted to
sixteen rows.
"""

import random
import shutil
from pathlib import Path

import torch
from rapidin.attributor import HASH
from rapidin.layers import Block
from rapidin.pack import Basis, Format, fit, head_for, learn
from safetensors.torch import save_file
from torch import Tensor

from rapidin.cache import CacheWriter, Manifest
from rapidin.cache.shards import Rows

HERE = Path(__file__).parent
WIDTH, ROWS, SHARD_ROWS, SAMPLE = 32, 10, 4, 16
SHAPES = {"a.weight": (3, 4), "b.weight": (5, 2), "c.weight": (6, 6)}
LAYERS = [Block(name, shape, 0.5, n * WIDTH, WIDTH) for n, (name, shape) in enumerate(SHAPES.items())]


def blocks(count: int, seed: int) -> Tensor:
    """[count, 3, WIDTH]: multiples of 1/16, in blocks of length about 1."""
    draw, numbers = random.Random(seed), 3 * WIDTH
    rows = [[draw.randint(-3, 3) + 2 * draw.choice((-1, 1)) for _ in range(numbers)] for _ in range(count)]
    return torch.tensor(rows).view(count, 3, WIDTH) / 16


def lengths(count: int, seed: int) -> Tensor:
    """[count, 3]: from 1/16 to 4, one of them 0."""
    draw = random.Random(seed)
    found = torch.tensor([[draw.randint(1, 64) / 16 for _ in range(3)] for _ in range(count)])
    found[5, 1] = 0.0
    return found


def manifest(code: Format) -> Manifest:
    return Manifest(
        model={"source": {"model": "m"}, "identity": {"model": "1"}},
        sketch={"projection": "tensor", "width": WIDTH, "seed": 3, "hash": HASH},
        gradient={"at": [0.5], "loss": "mean", "include": [], "exclude": [], "geometry": "off"},
        text={"eos": True, "max_length": 128, "too_long": "truncate"},
        data={"path": None, "form": "text", "identity": "0" * 64},
        code=code,
        rows=ROWS,
        shard_rows=SHARD_ROWS,
        layers=list(LAYERS),
    )


def fill(folder: Path, code: Format, unit: Tensor, length: Tensor) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with CacheWriter(folder, manifest(code)) as writer:
        if code.sample:
            learnt = learn(blocks(SAMPLE, 2), head_for(code, len(LAYERS)))
            shape = fit(code, len(LAYERS), WIDTH, learnt)
            basis = Basis.of(learnt, shape, lengths(SAMPLE, 2), 3).rounded()
            writer.set_packing(shape, basis, {"sample": float(SAMPLE), **learnt.outside()})
        elif code.dtype == "int4":
            writer.set_packing(code.shape(len(LAYERS), WIDTH), None, {})
        for n in writer.missing:
            at = torch.arange(n * SHARD_ROWS, n * SHARD_ROWS + writer.manifest.rows_of(n))
            zeros = torch.zeros(len(at), dtype=torch.uint8)
            rows = Rows(writer.code.encode(unit[at], length[at]), at, zeros, zeros.clone(), at * 7)
            writer.write(n, rows, {"ok": len(at)})
    (folder / ".lock").unlink()


if __name__ == "__main__":
    torch.set_num_threads(1)
    unit, length = blocks(ROWS, 1), lengths(ROWS, 1)
    unit[length == 0] = 0.0
    save_file({"unit": unit, "length": length}, HERE / "inputs.safetensors")
    for name, code in (
        ("float16", Format("float16")),
        ("int4", Format("int4")),
        ("fitted", Format("sign", 120, SAMPLE)),
    ):
        fill(HERE / name, code, unit, length)
