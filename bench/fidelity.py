"""How true are sketches? Scores from `linear_sketch` against exact gradient products on a real model.

    python bench/fidelity.py MODEL --data TEXTS.jsonl [--texts 120] [--widths 64,256,512] [--seeds 0,1,2]

For each text the factors of every linear layer of the blocks are taken once; the exact gradients are formed
from them a layer at a time, and the sketches are made from the same factors. Each text is then a query
against all others. Prints, for raw and layer-normalised scores: RMSE over the standard deviation of the exact
scores, for pairs of different texts ("relRMSE") and for all pairs, each text with itself among them ("relRMSE
all"); both parts of the first; the mean over queries of Spearman's correlation with the exact scores; and how
many of the exact top 10 are found. Layer-normalised scores are means over the layers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from rapidin import ops
from rapidin.attributor import Attributor
from rapidin.encoding import Status
from rapidin.examples import open_examples
from rapidin.hooks import Batch
from rapidin.layers import block_seed
from rapidin.methods import unit_blocks
from rapidin.model import load_model

Factors = list[list[tuple[Tensor, Tensor]]]  # [text][layer]


def take_factors(attributor: Attributor, data: str, texts: int) -> Factors:
    """The factors of the first `texts` examples that have any, one text at a time."""
    factors: Factors = []
    for record in open_examples(data):
        encoded = attributor.encoder(record)
        if encoded.status == Status.OK:
            batch = Batch.of([(encoded.ids, encoded.target)])
            with attributor.loaded.path.at(attributor.points[0]):
                factors.append([(a[0], g[0]) for a, g in attributor.sketcher.factors(batch)])
        if len(factors) == texts:
            break
    return factors


def exact_products(factors: Factors) -> tuple[Tensor, Tensor]:
    """(products [layers, N, N], squared lengths [layers, N]) of the formed gradients, float64."""
    products = []
    for layer in range(len(factors[0])):
        formed = torch.stack([(text[layer][1].T @ text[layer][0]).flatten() for text in factors])
        products.append((formed @ formed.T).double())
    stacked = torch.stack(products)
    return stacked, stacked.diagonal(dim1=1, dim2=2).contiguous()


def sketch_products(factors: Factors, names: list[str], width: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same from sketches of `width` numbers a layer."""
    products, lengths = [], []
    for layer, name in enumerate(names):
        sketch = torch.cat(
            [
                ops.linear_sketch(
                    text[layer][0][None], text[layer][1][None], width, seed=block_seed(seed, name)
                )
                for text in factors
            ]
        ).double()
        products.append(sketch @ sketch.T)
        lengths.append(unit_blocks(sketch)[1].double() ** 2)
    return torch.stack(products), torch.stack(lengths)


def scores(products: Tensor, squares: Tensor, normalize: str) -> np.ndarray:
    """[N, N] scores from per-layer products."""
    if normalize == "layer":
        length = squares.sqrt().clamp(min=1e-300)
        return (products / (length[:, :, None] * length[:, None, :])).mean(0).numpy()
    return products.sum(0).numpy()


def compare(got: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Each row is a query; its own column is left out but in "relRMSE all"."""
    n = len(exact)
    off = ~np.eye(n, dtype=bool)
    rmse, spread = np.sqrt(np.mean((got[off] - exact[off]) ** 2)), exact[off].std()
    whole = np.sqrt(np.mean((got - exact) ** 2)) / exact.std()
    ranks, found = [], []
    for q in range(n):
        a, b = exact[q][off[q]], got[q][off[q]]
        ranks.append(spearmanr(a, b)[0])
        found.append(len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])))
    return {
        "relRMSE": float(rmse / spread),
        "relRMSE all": float(whole),
        "RMSE": float(rmse),
        "spread": float(spread),
        "Spearman": float(np.mean(ranks)),
        "top 10": float(np.mean(found)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--texts", type=int, default=120)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--widths", default="64,256,512")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    attributor = Attributor(load_model(args.model), max_length=args.max_length)
    names = [target.name for target in attributor.targets]
    start = time.perf_counter()
    factors = take_factors(attributor, args.data, args.texts)
    exact = exact_products(factors)
    print(
        f"{len(factors)} texts, {len(names)} layers, exact products in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    found = []
    for width in map(int, args.widths.split(",")):
        for seed in map(int, args.seeds.split(",")):
            sketched = sketch_products(factors, names, width, seed)
            for normalize in ("none", "layer"):
                row: dict[str, float | str] = {"width": width, "seed": seed, "normalize": normalize}
                row |= compare(scores(*sketched, normalize), scores(*exact, normalize))
                found.append(row)
                print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"data": Path(args.data).name, "texts": len(factors), "rows": found}, indent=1)
        )


if __name__ == "__main__":
    main()
