"""Why does DataInf's own form find few flipped labels in this study?

    python studies/flipped_labels/datainf.py --seed 0 --seed 1 --seed 2
    python studies/flipped_labels/datainf.py --table    # the tables of the README

For the tuned models of `flipped_labels.py`, without preconditioner and with exact gradients instead of
sketches: other dampings, some of the parameters alone, and the inverse that DataInf approximates. A target
set of correct examples ranks the training examples, as in the README's rows `target set ...:none`, off, at 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables
import flipped
import flipped_labels

from rapidin.attribution.token_contributions import exact_gradients
from rapidin.gradients.source import GradientSource

RESULTS = Path(__file__).resolve().parent / "datainf.json"
DAMPINGS = (0.1, 10.0, 1000.0)
Record = dict[str, Any]
Gradients = Mapping[str, Tensor]  # of each parameter, [examples, elements] float64


def gradients(source: GradientSource, records: Sequence[Record]) -> Gradients:
    rows = []
    with source.at(0):
        for example in source.prepared([source.example(record) for record in records]):
            rows.append([g.as_formed().flatten() for g in exact_gradients(source, example, 0)])
    names = [target.name for target in source.targets]
    return {name: torch.stack(of).double() for name, of in zip(names, zip(*rows, strict=True), strict=True)}


def damped(y: Tensor, damping: float) -> Tensor:
    """DataInf's lambda for a parameter's gradients [N, d]: a share of the mean square of their elements."""
    return damping * y.square().mean()


def by_datainf(y: Tensor, v: Tensor, damping: float) -> Tensor:
    """Scores [N] for v [d]: the mean of the inverses of each example's own matrix."""
    size = damped(y, damping)
    weights = (y @ v) / (size + y.square().sum(1))
    return y @ (v - weights @ y / len(y)) / size


def by_inverse(y: Tensor, v: Tensor, damping: float) -> Tensor:
    """Scores [N]: the inverse of the examples' mean matrix, which DataInf approximates."""
    size = damped(y, damping)
    _, singular, directions = torch.linalg.svd(y, full_matrices=False)
    along = 1 / (size + singular.square() / len(y)) - 1 / size
    return y @ (v / size + directions.T @ (along * (directions @ v)))


def aucs(train: Gradients, target: Gradients, wrong: np.ndarray) -> dict[str, float]:
    """The AUC of each ranking of the training examples."""
    lora = [name for name in train if "lora_" in name]
    head = [name for name in train if "lora_" not in name]

    def found(names: Sequence[str], score: Callable[[Tensor, Tensor], Tensor]) -> float:
        total = sum(score(train[name], target[name].mean(0)) for name in names)
        assert isinstance(total, Tensor)
        return flipped.auc(-total.numpy(), wrong)

    rows = {"dot": found([*lora, *head], lambda y, v: y @ v)}
    for damping in DAMPINGS:
        rows[f"DataInf, damping {damping:g}"] = found(
            [*lora, *head], lambda y, v, d=damping: by_datainf(y, v, d)
        )
    for damping in DAMPINGS:
        rows[f"the inverse itself, damping {damping:g}"] = found(
            [*lora, *head], lambda y, v, d=damping: by_inverse(y, v, d)
        )
    for part, names in (("LoRA", lora), ("the head", head)):
        rows[f"DataInf, damping 0.1, {part} alone"] = found(names, lambda y, v: by_datainf(y, v, 0.1))
        rows[f"dot, {part} alone"] = found(names, lambda y, v: y @ v)
    return rows


def measure(quick: bool, seed: int, folder: Path) -> Record:
    """The AUCs of one seed, for each tuning."""
    train, target, _ = flipped_labels.make_examples(flipped_labels.sizes_of(quick), seed)
    wrong = np.array([record["flipped"] for record in train])
    row: Record = {"seed": seed, "accuracy": {}, "auc": {}}
    for name, attributor_of in flipped_labels.tunings(quick, seed, folder):
        source = attributor_of(at=1.0, preconditioner="off").source
        row["auc"][name] = aucs(gradients(source, train), gradients(source, target), wrong)
    return row


def table(rows: Sequence[Record]) -> str:
    """The AUCs of all seeds, as a Markdown table."""
    names = rows[0]["auc"]["short"]
    lines = [
        [
            name,
            *(" / ".join(f"{row['auc'][way][name]:.3f}" for row in rows) for way in flipped_labels.TUNINGS),
        ]
        for name in names
    ]
    return doc_tables.table([f"AUC of {len(rows)} seeds", *flipped_labels.TUNINGS], lines)


def main(arguments: list[str] | None = None) -> None:
    flipped.run(__doc__, RESULTS, measure, table, arguments)


if __name__ == "__main__":
    main()
