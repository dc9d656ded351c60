"""What do gradients of the output layer alone, which need no backward pass, say of retraining?

    python studies/readout/readout.py [--out FILE.json]
    python studies/readout/readout.py --table    # the table of the README, from readout.json

RISE (Ran et al., *Sketching the Readout of Large Language Models for Scalable Data Attribution and
Valuation*, arXiv 2604.16197) keeps two channels of an example, as its abstract describes them: with h_t the
hidden state that the output layer W reads at position t, and r_t the error of its probabilities,

    residual   sum_t r_t h_t^T          the output layer's own gradient
    projected  sum_t (W^T r_t) h_t^T    the error as the layer below receives it

each count-sketched by its two factors. Scores are the mean over the channels of their cosine. How the paper
weighs and normalizes them in detail is not reproduced here. Compared on the sets of ../lds with `dot:layer`
of exact gradients of the blocks' matrices. Rows of 2,048 bytes keep 512 numbers of a channel, 16 x 32, in
float16; three seeds of sketches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("common", "lds", "damping")]
import doc_tables
from damping import Way, exact_scores, preconditioned
from lds import CharGPT, RetrainedSet, block_matrices, sets
from subjects import gradients_of

from rapidin.evaluate.metrics import estimate
from rapidin.gradients.preconditioner import DAMPING

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "readout.json"
POINTS = {"tuned model": 1.0, "half-way": 0.5}
SHAPE = (16, 32)
SEEDS = 3


def factors(model: CharGPT, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each text [n, T + 1]: the errors r [n, T, V], the projected errors W^T r [n, T, E], and the hidden
    states h [n, T, E]."""
    kept: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, given: kept.append(given[0].detach()))
    with torch.no_grad():
        error = model(ids[:, :-1]).softmax(2)
        error.scatter_add_(2, ids[:, 1:, None], torch.full((*ids[:, 1:].shape, 1), -1.0))
    handle.remove()
    return error, error @ model.head.weight.detach(), kept[0]


def count_sketch(x: Tensor, size: int, seed: int) -> Tensor:
    """The last axis, count-sketched to this size."""
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(size, x.shape[-1:], generator=generator)
    signs = torch.randint(2, x.shape[-1:], generator=generator) * 2.0 - 1.0
    return torch.zeros(*x.shape[:-1], size).index_add_(-1, bins, x * signs)


def channels(model: CharGPT, ids: Tensor, seed: int | None = None) -> list[Tensor]:
    """The channels of texts [n, T + 1] by `channels_of`."""
    return channels_of(*factors(model, ids), seed)


def channels_of(error: Tensor, projected: Tensor, hidden: Tensor, seed: int | None = None) -> list[Tensor]:
    """The residual and the projected channel of each text at length 1, [n, numbers], of its `factors`; seed:
    of their sketches in float16, None for exact ones."""
    found = []
    for number, rows in enumerate((error, projected)):
        columns = hidden
        if seed is not None:
            rows = count_sketch(rows, SHAPE[0], 10 * seed + number)
            columns = count_sketch(hidden, SHAPE[1], 10 * seed + 5)
        unit = F.normalize((rows.mT @ columns).flatten(1))
        found.append(unit if seed is None else unit.half().float())
    return found


def readout_scores(made: tuple[list[Tensor], list[Tensor]]) -> dict[str, Tensor]:
    """Scores [test, train] by either channel, and by the mean of both."""
    (residual, projected), both = [q @ x.T for x, q in zip(*made, strict=True)], "both channels"
    return {
        "residual channel": residual,
        "projected channel": projected,
        both: (residual + projected) / 2,
    }


def measured(folder: Path) -> list[dict[str, Any]]:
    truth = RetrainedSet(folder)
    texts = truth.texts()
    found: list[dict[str, Any]] = []
    for point, at in POINTS.items():
        model = truth.model(at)

        def add(way: str, rows: str, by_seed: list[Tensor], point: str = point) -> None:
            values = torch.stack([torch.from_numpy(truth.by_text(scores)) for scores in by_seed]).mean(0)
            lds = estimate(values.numpy())
            of = {"set": folder.name, "point": point, "way": way, "rows": rows}
            found.append(of | {k: round(float(getattr(lds, k)), 4) for k in ("mean", "low", "high")})
            print(found[-1], flush=True)

        for rows, seeds in (("exact", [None]), ("2,048 bytes", list(range(SEEDS)))):
            made = [
                readout_scores((channels(model, texts[0], s), channels(model, texts[1], s))) for s in seeds
            ]
            for way in made[0]:
                add(way, rows, [scores[way] for scores in made])
        subject = gradients_of(truth, model, block_matrices(model), texts, truth.by_text)
        for way, ways in (
            ("blocks, no preconditioner", Way(None)),
            ("blocks, K-FAC", Way((DAMPING, DAMPING))),
        ):
            add(way, "exact", [exact_scores([preconditioned(subject, ways)], [1.0])["layer"]])
    return found


def table(results: list[dict[str, Any]]) -> str:
    """A row for each way, a column for each set and point."""
    columns = list(dict.fromkeys((row["set"], row["point"]) for row in results))
    lines = []
    for way, rows in dict.fromkeys((row["way"], row["rows"]) for row in results):
        cells = [way, rows]
        for name, point in columns:
            (found,) = [
                row
                for row in results
                if (row["set"], row["point"], row["way"], row["rows"]) == (name, point, way, rows)
            ]
            cells.append(f"{found['mean']:.3f} ({found['low']:.2f} to {found['high']:.2f})")
        lines.append(cells)
    return doc_tables.table(["gradients of", "rows", *(f"{name}, {point}" for name, point in columns)], lines)


def main(arguments: list[str] | None = None) -> None:
    out = doc_tables.results_or_table(arguments, __doc__, RESULTS, table)
    if out is None:
        return
    torch.set_num_threads(1)
    results = [row for folder in sets() for row in measured(folder)]
    out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
