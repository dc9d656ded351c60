"""The data of the fidelity study: exact gradient products and sketches of real texts, collected once.

    python studies/fidelity/collect.py MODEL --out STUDY [--adapter ADAPTER --at 0.5]
        --data alpaca=alpaca.jsonl:420:480:20 --data code=code.jsonl:80:120:5 ...

Each --data names a kind of text: a file of rapidin's forms, how many texts of it a codec may learn from (the
sample), how many are scored, and how many of the scored ones are queries. Every query also gets a
near-duplicate among the scored texts: the same text with one word of its completion changed.

STUDY/ then holds, for L layers, Q queries, S sample texts and N scored texts:

    study.json                names of the layers, kinds of the texts, which are queries and near-duplicates
    exact.safetensors         products [Q, N, L] of unit gradients (cosines by layer), length_scored [N, L],
                              length_query [Q, L], double-sided projections
    sketch-SEED.safetensors   sample [S, L, W] and scored [N, L, W] unit sketches in float16, their lengths

Exact gradients are kept as their factors or formed, whichever takes fewer numbers, in float32. The sketches
come from the same factors.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rapidin import ops
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.normalization import divide
from rapidin.attribution.token_contributions import exact_gradients
from rapidin.data.encoding import Encoded, Status
from rapidin.data.examples import open_examples
from rapidin.gradients.exact import ExactQueries
from rapidin.gradients.load import load_model
from rapidin.gradients.parameters import block_seed
from rapidin.ops import unit_blocks


def change_a_word(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The record with one word in the middle of its completion replaced by another of its words."""
    key = next(k for k in ("output", "completion", "text") if record.get(k))
    words = record[key].split(" ")
    place = min(len(words) // 3, 12)
    others = [w for w in words if w != words[place] and w.strip()] or ["another"]
    words[place] = rng.choice(others)
    return {**record, key: " ".join(words)}


class Collector:
    def __init__(self, names: list[str], seeds: dict[int, int], projected: int) -> None:
        self.names = names
        self.seeds = seeds
        self.projected = projected
        self.matrices: dict[tuple[str, int], Tensor] = {}

    def sketches(self, columns: Tensor, rows: Tensor, name: str) -> dict[int, tuple[Tensor, Tensor]]:
        made = {}
        for seed, width in self.seeds.items():
            unit, length = unit_blocks(
                ops.linear_sketch(columns, rows, width, seed=block_seed(seed, name))[:, None]
            )
            made[seed] = (unit[:, 0].half(), length[:, 0])
        return made

    def double_sided(self, columns: Tensor, rows: Tensor, name: str) -> Tensor:
        """The double-sided random projection (LoGra, Bergson): P_out G P_in^T, `projected` numbers a side."""
        sides = []
        for x, side in ((columns, 0), (rows, 1)):
            key = (name, side)
            if key not in self.matrices:
                generator = torch.Generator().manual_seed(block_seed(side, name) % 2**63)
                self.matrices[key] = torch.randn(x.shape[2], self.projected, generator=generator)
            sides.append(x @ self.matrices[key])
        small = torch.bmm(sides[1].transpose(1, 2), sides[0]).flatten(1)
        return torch.nn.functional.normalize(small, dim=1, eps=1e-30).half()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", action="append", required=True, metavar="KIND=FILE:SAMPLE:SCORED:QUERIES")
    parser.add_argument("--adapter")
    parser.add_argument("--at", type=float)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--seeds", default="0:1024,1:512,2:512", help="seed:width, ...")
    parser.add_argument(
        "--projected", type=int, default=32, help="numbers a side of the double-sided projection"
    )
    args = parser.parse_args(arguments)
    attributor = Attributor(
        load_model(args.model, adapter=args.adapter),
        max_length=args.max_length,
        at=args.at,
        preconditioner="off",
    )
    rng = random.Random(0)
    groups: dict[str, list[tuple[str, Encoded]]] = {"sample": [], "scored": []}
    queries: list[int] = []
    near: list[int] = []
    for text in args.data:
        kind, rest = text.split("=", 1)
        file, *counts = rest.rsplit(":", 3)
        n_sample, n_scored, n_query = map(int, counts)
        records = [r for r in open_examples(file) if attributor.source.encoder(r).status == Status.OK]
        if len(records) < n_sample + n_scored or n_query > n_scored:
            sys.exit(
                f"collect: '{text}' asks for {n_sample:,} + {n_scored:,} texts, of the latter {n_query:,} "
                f"queries, and the file has {len(records):,} texts that can be used; ask for fewer"
            )
        records = records[: n_sample + n_scored]
        groups["sample"] += [(kind, attributor.source.encoder(r)) for r in records[:n_sample]]
        for number, record in enumerate(records[n_sample:]):
            if number < n_query:
                queries.append(len(groups["scored"]))
            groups["scored"].append((kind, attributor.source.encoder(record)))
            if number < n_query:
                near.append(len(groups["scored"]))
                groups["scored"].append((kind, attributor.source.encoder(change_a_word(record, rng))))
    source = attributor.source
    collector = Collector(
        [target.name for target in source.targets],
        {int(s): int(w) for s, w in (p.split(":") for p in args.seeds.split(","))},
        args.projected,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    layers = len(collector.names)
    scored = groups["scored"]
    start = time.perf_counter()
    with source.at(0):
        exact = ExactQueries(exact_gradients(source, scored[n][1], 0) for n in queries)
    print(f"{len(queries)} queries after {time.perf_counter() - start:.0f} s", flush=True)
    products = torch.zeros(len(queries), len(scored), layers)
    lengths = torch.zeros(len(scored), layers)
    double = torch.zeros(len(scored), layers, args.projected**2, dtype=torch.float16)
    kept = {
        (group, seed): (
            torch.zeros(len(groups[group]), layers, width, dtype=torch.float16),
            torch.zeros(len(groups[group]), layers),
        )
        for group in groups
        for seed, width in collector.seeds.items()
    }
    with source.at(0):
        for group, texts in groups.items():
            for n, (_, encoded) in enumerate(texts):
                for layer, gradient in enumerate(exact_gradients(source, encoded, 0)):
                    assert gradient.factors is not None
                    assert gradient.factors.columns is not None
                    columns, rows = gradient.factors.columns[None], gradient.factors.rows[None]
                    name = collector.names[layer]
                    if group == "scored":
                        length = gradient.length()
                        scale = exact.lengths[:, layer] * length
                        products[:, n, layer] = divide(exact.products(layer, gradient), scale).float()
                        lengths[n, layer] = length
                        double[n, layer] = collector.double_sided(columns, rows, name)[0]
                    for seed, (unit, norm) in collector.sketches(columns, rows, name).items():
                        kept[group, seed][0][n, layer] = unit[0]
                        kept[group, seed][1][n, layer] = norm[0]
                if n % 100 == 99:
                    print(
                        f"{group}: {n + 1} of {len(texts)} after {time.perf_counter() - start:.0f} s",
                        flush=True,
                    )
    save_file(
        {
            "products": products,
            "length_scored": lengths,
            "length_query": exact.lengths.float(),
            "double": double,
        },
        args.out / "exact.safetensors",
    )
    for seed in collector.seeds:
        save_file(
            {
                f"{group}{suffix}": kept[group, seed][part]
                for group in groups
                for part, suffix in enumerate(("", "_length"))
            },
            args.out / f"sketch-{seed}.safetensors",
        )
    (args.out / "study.json").write_text(
        json.dumps(
            {
                "layers": collector.names,
                "shapes": [list(t.shape) for t in attributor.source.targets],
                "sample": [kind for kind, _ in groups["sample"]],
                "scored": [kind for kind, _ in scored],
                "tokens": sum(len(e.ids) for texts in groups.values() for _, e in texts),
                "queries": queries,
                "near_duplicates": near,
            }
        )
    )


if __name__ == "__main__":
    main()
