"""LDS of scores from few bytes: do a cache's stored rows predict retraining as well as exact gradients?

    python studies/lds/codes.py [--extra FOLDER] [--out FILE.json]

Gradients of the blocks' twelve matrices (331,776 numbers) half-way from the base to the tuned model. A
training text is what its codec keeps of it; a test text, the query, is in floats. Three scores: `layer`, the
mean over the matrices of cosines, and `fisher` with damping 0.1 and 1, for which the second moment of the
training texts is that of these rows, matrix by matrix (see exact.py; damping times the mean of the
eigenvalues that are not zero).

Beside the codecs, projections at the same bytes, all in float16. Those of the whole gradient (dense, sparse,
RapidIn's shuffle-and-sum) get a gradient whose matrices are scaled to length 1 first, since they cannot be
normalized by layer afterwards; their Fisher score has one moment for all matrices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from exact import gradients
from lds import RetrainedSet, block_matrices, sets
from scoring import Grams, dot, fisher
from torch import Tensor, nn

from rapidin import ops
from rapidin.cache.codec import (
    ROW_OVERHEAD,
    Basis,
    CodecConfig,
    PackedCodec,
    fit_shape,
    learn_basis,
    shared_size,
)
from rapidin.errors import UserError
from rapidin.gradients.parameters import block_seed

AT = 0.5
WIDTH = 4096
BUDGETS = (256, 1024, 2048, 8192, 16384)
DENSE = 2048  # bytes: a dense matrix for more takes minutes to draw
DAMPINGS = (0.1, 1.0)
SHUFFLES = 20  # rounds of shuffle-and-sum


def judged(truth: RetrainedSet, grams: Grams) -> dict[str, float]:
    """LDS of the three scores."""
    found = {"layer": truth.lds(dot(grams))}
    for damping in DAMPINGS:
        found[f"fisher {damping}"] = truth.lds(fisher(grams, damping, "count"))
    return {key: round(value, 4) for key, value in found.items()}


class Judge:
    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def keep(
        self, truth: RetrainedSet, codec: str, size: int, rows: Tensor, queries: Tensor, **about: Any
    ) -> None:
        found = judged(truth, Grams.of(rows.unbind(1), queries.unbind(1)))
        self.results.append({"set": truth.folder.name, "codec": codec, "bytes": size, **about, **found})
        print(truth.folder.name, codec, size, about, found, flush=True)


def floats(numbers: int, lengths: int) -> int:
    """Bytes of a row in float16, its lengths in float32."""
    return 2 * numbers + 4 * lengths + ROW_OVERHEAD


def sketches(group: list[Tensor], layers: Mapping[str, nn.Linear], width: int, seed: int) -> Tensor:
    """Gradients [n, numbers] of each matrix -> [n, blocks, width]."""
    blocks = [
        ops.matrix_sketch(g.view(-1, *layer.weight.shape), width, seed=block_seed(seed, name))
        for (name, layer), g in zip(layers.items(), group, strict=True)
    ]
    return torch.stack(blocks, 1)


def folded(sketch: Tensor, width: int) -> Tensor:
    """The sketch of a smaller dimension."""
    return sketch.unflatten(2, (-1, width)).sum(2)


def coded(units: Tensor, lengths: Tensor, rows: Tensor | None, wanted: CodecConfig, seed: int) -> PackedCodec:
    """The codec of a cache of blocks [n, blocks, width] with these lengths [n, blocks], which learns from
    some of its rows, or from none."""
    blocks, width = units.shape[1:]
    learnt = None if rows is None else learn_basis(units[rows], shared_size(wanted, blocks))
    shape = fit_shape(wanted, blocks, width, learnt)
    basis = None if learnt is None else Basis.of(learnt, shape, lengths[rows], seed).rounded()
    return PackedCodec(shape, width, seed, basis)


def packed(
    judge: Judge, truth: RetrainedSet, train: Tensor, lengths: Tensor, test: Tensor, seed: int
) -> None:
    """The codecs of a cache: nothing learnt, learnt from a random half, learnt from all."""
    half = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(train) // 2]
    for name, rows in (
        ("nothing learnt", None), ("learnt from half", half), ("learnt from all", torch.arange(len(train)))
    ):  # fmt: skip
        last = None
        for budget in BUDGETS:
            try:
                codec = coded(train, lengths, rows, CodecConfig("sign", budget), seed)
            except UserError:
                continue
            if codec.shape == last:  # the budget is more than one bit for each number
                continue
            last = codec.shape
            decoded = codec.decode(codec.encode(train, lengths))
            judge.keep(truth, name, codec.row_bytes + ROW_OVERHEAD, decoded, test, seed=seed, budget=budget)


def to_bins(x: Tensor, bins: Tensor, signs: Tensor, count: int) -> Tensor:
    """Numbers with signs, added up in bins: columns of [numbers, n] -> rows [n, count]."""
    return torch.zeros(count, x.shape[1]).index_add_(0, bins, x * signs[:, None]).T


def sparse(x: Tensor, count: int, seed: int) -> Tensor:
    """Each number goes to one bin drawn at random, with a random sign (what GraSS calls SJLT)."""
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(count, (len(x),), generator=generator)
    return to_bins(x, bins, torch.randint(2, (len(x),), generator=generator) * 2.0 - 1, count)


def shuffle_and_sum(x: Tensor, count: int, seed: int) -> Tensor:
    """RapidIn's: the numbers as a matrix, its rows and its columns permuted, over and over; random signs;
    sums of neighbours."""
    generator = torch.Generator().manual_seed(seed)
    numbers = len(x)
    place = torch.arange(numbers)
    side = next(s for s in range(int(numbers**0.5), 0, -1) if numbers % s == 0)
    for shuffle in range(SHUFFLES):
        matrix = place.view(side if shuffle % 2 else numbers // side // 4, -1)
        matrix = matrix[torch.randperm(matrix.shape[0], generator=generator)]
        place = matrix[:, torch.randperm(matrix.shape[1], generator=generator)].flatten()
    bins = torch.empty(numbers, dtype=torch.int64)
    bins[place] = torch.arange(numbers) * count // numbers
    return to_bins(x, bins, torch.randint(2, (numbers,), generator=generator) * 2.0 - 1, count)


def dense(x: Tensor, count: int, seed: int) -> Tensor:
    """Rows times a matrix of normal numbers, drawn in pieces."""
    generator = torch.Generator().manual_seed(seed)
    pieces = (piece @ torch.randn(piece.shape[1], count, generator=generator) for piece in x.split(8192, 1))
    return sum(pieces)  # type: ignore[return-value]


def whole_projections(judge: Judge, truth: RetrainedSet, train: Tensor, test: Tensor, seed: int) -> None:
    """Projections of whole gradients [n, numbers], scaled to length 1 matrix by matrix."""

    def keep(name: str, size: int, rows: Tensor, queries: Tensor, budget: int) -> None:
        rows, queries = (F.normalize(x)[:, None] for x in (rows, queries))
        judge.keep(truth, name, size, rows.half().float(), queries, seed=seed, budget=budget)

    def numbers(budget: int) -> int:
        return (budget - floats(0, 1)) // 2

    both = torch.cat((train, test))
    n, most = len(train), numbers(DENSE)
    columns = both.T.contiguous()
    drawn = dense(both, most, seed)
    for budget in BUDGETS:
        count = numbers(budget)
        size = floats(count, 1)
        if count <= most:
            keep("dense projection", size, drawn[:n, :count], drawn[n:, :count], budget)
        for name, way in (("sparse JL", sparse), ("shuffle and sum", shuffle_and_sum)):
            made = way(columns, count, seed)
            keep(name, size, made[:n], made[n:], budget)


def two_sides(
    groups: Sequence[list[Tensor]], shapes: list[torch.Size], side: int, seed: int
) -> list[list[Tensor]]:
    """P_out G P_in^T of each matrix of each group, [n, side, side], with Gaussian matrices."""
    generator = torch.Generator().manual_seed(seed)
    made: list[list[Tensor]] = [[] for _ in groups]
    for number, (o, i) in enumerate(shapes):
        left, right = (torch.randn(k, side, generator=generator) for k in (o, i))
        for group, out in zip(groups, made, strict=True):
            out.append(left.T @ group[number].view(-1, o, i) @ right)
    return made


def double_sided(
    judge: Judge,
    truth: RetrainedSet,
    train: list[Tensor],
    test: list[Tensor],
    shapes: list[torch.Size],
    seed: int,
) -> None:
    """P_out G P_in^T of each matrix, as many numbers a side as the budget has room for."""
    room = [int(((budget - floats(0, len(shapes))) / 2 / len(shapes)) ** 0.5) for budget in BUDGETS]
    made = two_sides((train, test), shapes, max(room), seed)
    for budget, side in zip(BUDGETS, room, strict=True):
        rows, queries = (
            torch.stack([F.normalize(x[:, :side, :side].flatten(1)) for x in group], 1) for group in made
        )
        size = floats(side * side * len(shapes), len(shapes))
        judge.keep(truth, "double-sided", size, rows.half().float(), queries, seed=seed, budget=budget)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extra", type=Path, help="one more set, a folder like those beside this file")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = Judge()
    for folder in [*sets(), *([args.extra] if args.extra else [])]:
        truth = RetrainedSet(folder)
        model = truth.model(AT)
        layers = block_matrices(model)
        shapes = [layer.weight.shape for layer in layers.values()]
        train, test = (gradients(truth, model, ids) for ids in truth.texts())
        whole = [torch.cat([F.normalize(g) for g in group], 1) for group in (train, test)]
        named = judged(truth, Grams.of(train, test).normalized("layer"))
        size = 4 * whole[0].shape[1] + ROW_OVERHEAD
        judge.results.append({"set": folder.name, "codec": "exact", "bytes": size, **named})
        print(folder.name, "exact", named, flush=True)
        for seed in map(int, args.seeds.split(",")):
            sketched = [sketches(group, layers, WIDTH, seed) for group in (train, test)]
            for width in (4096, 1024, 512):
                rows, queries = (F.normalize(folded(x, width), dim=2) for x in sketched)
                size = floats(width * len(layers), len(layers))
                judge.keep(truth, "float16", size, rows.half().float(), queries, seed=seed, width=width)
            lengths = sketched[0].norm(dim=2)
            rows, queries = (F.normalize(x, dim=2) for x in sketched)
            packed(judge, truth, rows, lengths, queries, seed)
            whole_projections(judge, truth, *whole, seed)
            double_sided(judge, truth, train, test, shapes, seed)
            if args.out is not None:
                lines = ",\n".join(json.dumps(entry) for entry in judge.results)
                args.out.write_text(f'{{"at": {AT}, "width": {WIDTH}, "results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
