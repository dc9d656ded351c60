"""Which kernel `linear_sketch` takes by default, model by model, on three generations of GPUs.

python bench/kernels_reached.py           # prints the table of docs/reference/kernels.md; --write puts it
there

No kernel runs: the package itself is asked for the default sketch dimension of each model and for the backend
of bfloat16 factors with K-FAC's preconditioner on both sides, as if on a GPU of each compute capability. Uses
the extension, built for setup.py's default architectures, or else builds the emulated one in
tests/support/emulator.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rapidin import ops
from rapidin.gradients.kfac import SideMoment
from rapidin.gradients.preconditioner import RANK
from rapidin.gradients.source import default_width
from rapidin.ops import backends, cuda
from rapidin.ops.low_rank import preconditioned_dtype

sys.path.append(str(Path(__file__).resolve().parents[1] / "studies" / "common"))
import doc_tables

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = "sm_80 sm_90 sm_100 compute_100"  # what setup.py compiles for
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}  # that a block may have, by compute capability
BATCH, TOKENS = 8, 512
BOTH = backends.Installed(cuda=True, triton=True)
LORA_RANK = 16


class Model(NamedTuple):
    """layers: how many blocks of layers; linear: (in, out) of each one's linear layers; adapted: those that
    LoRA changes by default (peft)."""

    name: str
    layers: int
    linear: tuple[tuple[int, int], ...]
    adapted: tuple[tuple[int, int], ...]


def llama(name: str, layers: int, hidden: int, attended: int, kv: int, intermediate: int) -> Model:
    """attended: numbers of all heads' queries; kv: of their keys."""
    q, k = (hidden, attended), (hidden, kv)
    mlp = (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)
    return Model(name, layers, (q, k, k, (attended, hidden), *mlp), (q, k))


def gpt(name: str, layers: int, hidden: int) -> Model:
    qkv, mlp = (hidden, 3 * hidden), ((hidden, 4 * hidden), (4 * hidden, hidden))
    return Model(name, layers, (qkv, (hidden, hidden), *mlp), (qkv,))


MODELS = (
    gpt("GPT-2", 12, 768),
    llama("SmolLM2-135M", 30, 576, 576, 192, 1536),
    llama("Qwen3-0.6B", 28, 1024, 2048, 1024, 3072),
    gpt("Pythia-1.4B", 24, 2048),
    llama("Llama-3.2-1B", 16, 2048, 2048, 512, 8192),
    llama("Llama-3-8B", 32, 4096, 4096, 1024, 14336),
)


class Pretended:
    """An extension that says it is on a GPU of another compute capability."""

    def __init__(self, extension: Any, capability: int) -> None:
        self._extension = extension
        self._capability = capability
        self.architectures = ARCHITECTURES
        self.emulated = False

    def capability(self, device: int) -> int:
        return self._capability

    def shared_bytes(self, device: int) -> int:
        return SHARED_BYTES[self._capability]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)


def sides(model: Model, kind: str) -> list[tuple[int, int]]:
    """(in, out) of each parameter that counts in one of the model's layers: a sketch each."""
    if kind == "linear layers":
        return list(model.linear)
    return [side for n_in, n_out in model.adapted for side in ((n_in, LORA_RANK), (LORA_RANK, n_out))]


def low_rank(n: int) -> ops.LowRank:
    rank = SideMoment(n, RANK, 0, torch.device("meta"), diagonal=True).rank
    return ops.LowRank(torch.empty(n, rank, device="meta"), torch.empty(rank, device="meta"))


def reached(n_in: int, n_out: int, dim: int) -> str:
    """The kernel that factors of a layer of this shape take."""
    factors = [torch.empty(BATCH, TOKENS, n, dtype=torch.bfloat16, device="meta") for n in (n_in, n_out)]
    low_ranks = [low_rank(n) for n in (n_in, n_out)]
    backend = backends.default("linear_sketch", torch.device("cuda", 0), (*factors, dim, *low_ranks), BOTH)
    module = import_module(f"rapidin.ops.{backend}.sketches")
    kernel = backend
    if backend == "triton" and dim not in (*module.linear_kernels.DIMS, *module.fourier_kernels.DIMS):
        kernel = "torch's FFT"
    read = {preconditioned_dtype(torch.bfloat16, each) for each in low_ranks}
    return f"{kernel}, {' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in read))}"


def table(extension: Any) -> str:
    """The table of the page; extension: rapidin.ops._cuda, or the emulated one."""
    rows = []
    for model in MODELS:
        for kind in ("linear layers", "LoRA"):
            shapes = sides(model, kind)
            blocks = model.layers * len(shapes)
            dim = default_width(blocks)
            found = []
            for capability in SHARED_BYTES:
                with cuda.using(Pretended(extension, capability)):
                    found.append("; ".join(sorted({reached(*shape, dim) for shape in shapes})))
            rows.append([model.name, kind, str(blocks), f"{dim:,}", *found])
    return doc_tables.table(
        ["model", "what counts", "blocks", "dimension", *(f"sm_{each}" for each in SHARED_BYTES)], rows
    )


def built_extension() -> Any:
    try:
        return cuda.extension()
    except ImportError:
        sys.path.append(str(ROOT / "tests" / "support"))
        return import_module("emulator.build").emulated()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="Put the table into docs/reference/kernels.md.")
    text = table(built_extension())
    if parser.parse_args().write:
        doc_tables.write(doc_tables.DOCS / "reference" / "kernels.md", "kernels reached", text)
    print(text, end="")
