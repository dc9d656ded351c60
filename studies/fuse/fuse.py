"""What fusing the rankings of gradients, BM25 and hidden states is worth, and what weights would be best.

    python studies/fuse/fuse.py --set FOLDER ... --out FILE.json
    python studies/fuse/fuse.py --poison NAME CACHE QUERIES ... --out FILE.json
    python studies/fuse/fuse.py --facts NAME CACHE QUESTIONS ... --out FILE.json

--set is a set of retrained models (../lds): LDS, with exact gradients of the blocks' matrices half-way,
preconditioned by K-FAC with the default damping, scored by `dot:layer`; hidden states are those of the tuned
model. --poison is a cache of data with a field `poisoned` and answers to trace, --facts one of the data of
`rapidin eval facts` with its questions. A fused score is the sum of weight / (60 + rank) over the rankings of
all rows, as `rapidin query --fuse` adds them up, so that LDS can add it up over the rows of a subset. FILE
keeps what it has of other subjects. `fuse_report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rapidin.attribution import baselines, fusion
from rapidin.attribution.ensemble import Ensemble
from rapidin.data.examples import open_examples
from rapidin.evaluate import metrics
from rapidin.evaluate.lds import correlations
from rapidin.evaluate.methods import parse_methods
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, boolean_column, open_training_data
from rapidin.gradients.preconditioner import DAMPING

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("damping", "lds")]
import damping
from lds import CharGPT, RetrainedSet
from subjects import Subject as Gradients
from subjects import of_set

Floats = npt.NDArray[np.float64]
METHOD = "dot:layer"
WAYS: dict[str, tuple[float, ...]] = {
    "gradients": (1, 0, 0),
    "BM25": (0, 1, 0),
    "hidden states": (0, 0, 1),
    "fused": (1, 1, 1),
    "without gradients": (0, 1, 1),
    "without BM25": (1, 0, 1),
    "without hidden states": (1, 1, 0),
}
# Weights beside gradients of weight 1 that are tried for all rankings.
STEPS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Truth:
    """Scores of three rankings [queries, rows] by name, and of what they are judged by.

    masks, losses: of retrainings, for LDS; relevant: [queries, rows], for the other figures; sketched: the
    scores of gradients through two sketches with other seeds, if measured.
    """

    name: str
    kind: str
    scores: dict[str, Floats]
    masks: Any = None
    losses: Any = None
    relevant: npt.NDArray[np.bool_] | None = None
    sketched: tuple[Floats, Floats] | None = None

    def figures(self, scores: Floats) -> dict[str, Floats]:
        """Figures of scores [queries, rows] for each query."""
        if self.relevant is None:
            return {"LDS": correlations(self.masks, self.losses, scores)}
        if self.kind == "poison":
            return {
                "auPRC": metrics.auprc(scores, self.relevant),
                "precision at 10": metrics.precision_at(scores, self.relevant, 10),
            }
        return {
            "MRR": metrics.reciprocal_rank(scores, self.relevant),
            "recall at 10": metrics.recall_at(scores, self.relevant, 10),
        }


def reciprocal(name: str, scores: Floats) -> Floats:
    """1 / (60 + rank) of all rows in one ranking [queries, rows], 0 for rows without a rank."""
    found = np.zeros(scores.shape)
    counted = np.ones(scores.shape[1], dtype=np.bool_)
    for query, of_query in enumerate(scores):
        ranks = fusion.best_rows(of_query, counted, nonzero=name == fusion.WORDS)
        for row, rank in ranks.items():
            found[query, row] = 1 / (fusion.CONSTANT + rank)
    return found


def fused(parts: Mapping[str, Floats], weights: Sequence[float]) -> Floats:
    """The fused scores of `reciprocal` parts of the rankings, in their order."""
    return sum(
        (weight * parts[name] for name, weight in zip(fusion.RANKINGS, weights, strict=True)),
        start=np.zeros_like(parts[fusion.GRADIENTS]),
    )


def common(one: Floats, other: Floats, name: str) -> list[int]:
    """For each query how many of the ten best rows of one ranking are among the ten best of another, which
    has this name; counted as a query counts them."""
    counted = np.ones(one.shape[1], dtype=np.bool_)
    found = []
    for first, second in zip(one, other, strict=True):
        best = fusion.best_rows(second, counted, nonzero=name == fusion.WORDS)
        rankings = {fusion.GRADIENTS: fusion.best_rows(first, counted), fusion.WORDS: best, fusion.STATES: {}}
        found.append(fusion.fuse(rankings).fusion.common)
    return found


def measured(truth: Truth) -> dict[str, Any]:
    """The figures of every way for each query, and the mean first figure of all weights."""
    parts = {name: reciprocal(name, scores) for name, scores in truth.scores.items()}
    ways = {}
    for name, weights in WAYS.items():
        scores = truth.scores[name] if name in truth.scores else fused(parts, weights)
        ways[name] = {figure: rounded(values) for figure, values in truth.figures(scores).items()}
    ranks = {
        name: {figure: rounded(values) for figure, values in truth.figures(parts[name]).items()}
        for name in fusion.RANKINGS
    }
    grid = {}
    for words, states in product(STEPS, STEPS):
        figures = truth.figures(fused(parts, (1, words, states)))
        grid[f"{words:g} {states:g}"] = round(float(np.nanmean(next(iter(figures.values())))), 4)
    return {
        "subject": truth.name,
        "kind": truth.kind,
        "rows": int(parts[fusion.GRADIENTS].shape[1]),
        "common": common(*(truth.scores[name] for name in (fusion.GRADIENTS, fusion.WORDS)), fusion.WORDS),
        **({"two sketches": common(*truth.sketched, fusion.GRADIENTS)} if truth.sketched else {}),
        "ways": ways,
        "ranks alone": ranks,
        "weights": grid,
    }


def rounded(values: Floats) -> list[float]:
    return [round(float(value), 4) for value in values]


def of_retrained(folder: Path) -> Truth:
    """A set of retrained models."""
    truth, subject = RetrainedSet(folder), of_set(folder)
    way = damping.Way((DAMPING, DAMPING))
    sides = damping.preconditioned(subject, way)
    gradients = damping.exact_scores([sides], [1.0])["layer"]
    first, second = (sketched_scores(subject, sides, seed) for seed in (0, 1))
    texts = [truth.description[part] for part in ("train", "test")]
    states = [mean_states(truth.model(), ids) for ids in truth.texts()]
    scores = {
        fusion.GRADIENTS: gradients.double().numpy(),
        fusion.WORDS: baselines.bm25(*texts),
        fusion.STATES: (states[1] @ states[0].T).numpy(),
    }
    return Truth(folder.name, "LDS", scores, truth.masks, truth.losses, sketched=(first, second))


def sketched_scores(subject: Gradients, sides: tuple[damping.Group, damping.Group], seed: int) -> Floats:
    """The scores of `dot:layer` through sketches of the subject's dimension."""
    made = [damping.sketched(subject, side, subject.width, seed) for side in sides]
    rows, queries = (torch.nn.functional.normalize(x, dim=2) for x in made)
    return torch.einsum("qbk,nbk->qn", queries, rows).double().numpy()


@torch.no_grad()
def mean_states(model: CharGPT, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states, averaged over a text's characters, at length 1: [texts, width] float64."""
    x = model.embed(ids[:, :-1]) + model.position.weight[: ids.shape[1] - 1]
    for block in model.blocks:
        x = block(x)
    return torch.nn.functional.normalize(model.norm(x).mean(1).double(), dim=1)


def of_cache(name: str, kind: str, cache: str, queries: str) -> Truth:
    """A cache with queries: `kind` is poison or facts."""
    ensemble = Ensemble([cache])
    subject = Subject(ensemble, open_training_data(ensemble))
    records = list(open_examples(queries))
    found = subject.scores(records, parse_methods(METHOD), Result(kind, {}, {}), with_baselines=True)
    scores = {fusion.GRADIENTS if each == METHOD else each: of for each, of in found}
    if kind == "poison":
        marked = boolean_column(subject.examples, "poisoned")
        relevant = np.broadcast_to(marked, scores[fusion.GRADIENTS].shape)
    else:
        relevant = np.zeros(scores[fusion.GRADIENTS].shape, dtype=np.bool_)
        relevant[np.arange(len(records)), [record["fact"] for record in records]] = True
    return Truth(name, kind, scores, relevant=relevant)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", dest="sets", action="append", type=Path, default=[])
    for kind in ("poison", "facts"):
        parser.add_argument(f"--{kind}", action="append", nargs=3, default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    truths: dict[str, Callable[[], Truth]] = {
        folder.name: partial(of_retrained, folder) for folder in options.sets
    }
    for kind in ("poison", "facts"):
        for name, *where in getattr(options, kind):
            truths[name] = partial(of_cache, name, kind, *where)
    for name, make in truths.items():
        found = measured(make())
        results = [row for row in results if row["subject"] != name] + [found]
        lines = ",\n".join(json.dumps(row) for row in results)
        options.out.write_text(f"[\n{lines}\n]\n")
        for way, figures in found["ways"].items():
            print(
                name,
                way,
                {figure: round(float(np.nanmean(of)), 4) for figure, of in figures.items()},
                flush=True,
            )
        print(name, "in common", found["common"], flush=True)


if __name__ == "__main__":
    main()
