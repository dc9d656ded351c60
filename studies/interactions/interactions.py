"""Do sums of scores with interactions predict what leaving a group out does?

    python studies/interactions/interactions.py [--out FILE.json]
    python studies/interactions/interactions.py --table    # the table of the README, from interactions.json

For each set that `retrain.py` has finished: gradients half-way between the base and the model tuned on all
rows, preconditioned by K-FAC with the default damping, sketched and stored in float16, in 2,048 bytes, or
kept exact. Sums of the scores of each group (`sum`) and `net_of_others` for some dampings are compared with
the rise of each query's loss when the group is left out. Of exact gradients the formula is computed without
a basis (`pairs of rows`).

`queries`: Spearman's correlation over the groups, the mean over the test texts and the texts that are asked
about. `own`: over the groups, of each group's effect on the text of its own that is asked about. `twice`:
the mean of these effects for the groups that come twice, divided by that of the others.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path += [
    str(Path(__file__).resolve().parents[1] / name) for name in ("common", "lds", "damping", "interactions")
]
import doc_tables
from damping import Way, preconditioned, sketched
from lds import BASE, RetrainedSet, block_matrices, sets
from make import tune
from random_cache import manifest_of
from retrain import GROUPS, HERE, TWICE, VERSIONS, queries_of, rows_of
from subjects import AT, Subject, gradients_of

from rapidin.attribution import methods
from rapidin.attribution.interactions import DAMPING, RowSketches, net_of_others
from rapidin.attribution.scan import all_scores
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache, CacheWriter
from rapidin.cache.codec import PACKED, CodecConfig
from rapidin.cache.shards import Rows
from rapidin.evaluate.metrics import spearman
from rapidin.gradients.preconditioner import DAMPING as KFAC_DAMPING

RESULTS = HERE / "interactions.json"
DAMPINGS = (0.004, DAMPING, 0.04, 0.125)
FORMATS = {"float16": CodecConfig("float16"), "2,048 bytes": CodecConfig("sign", 2048)}
Floats = npt.NDArray[np.float64]


def cache_of(folder: Path, rows: Tensor, code: CodecConfig) -> Cache:
    """A cache of sketches [n, blocks, width], whose codec has learnt nothing."""
    n, blocks, width = rows.shape
    manifest = manifest_of(blocks, width, n, code, at=AT, shard_rows=n)
    with CacheWriter(folder, manifest) as writer:
        if code.dtype in PACKED:
            writer.set_fitted_codec(code.shape(blocks, width), None, {})
        lengths = rows.norm(dim=2)
        fields = writer.codec.encode(F.normalize(rows, dim=2), lengths)
        zeros, index = torch.zeros(n, dtype=torch.uint8), torch.arange(n)
        writer.write(0, Rows(fields, index, zeros, zeros.clone(), index.clone()), {"ok": n})
    return Cache(folder)


def by_pairs(rows: list[Tensor], queries: list[Tensor], groups: Tensor, damping: float) -> Tensor:
    """`net` of exact gradients [n, numbers] of each block, by the products of all pairs of rows."""
    unit = [(F.normalize(x).double(), F.normalize(q).double()) for x, q in zip(rows, queries, strict=True)]
    among = torch.stack([x @ x.T for x, _ in unit]).mean(0)
    asked = torch.stack([q @ x.T for x, q in unit]).mean(0)
    net = []
    for group in range(GROUPS):
        inside = groups == group
        kernel = among[~inside][:, ~inside]
        kernel += damping * len(groups) * torch.eye(len(kernel), dtype=torch.float64)
        explained = torch.linalg.solve(kernel, among[~inside][:, inside].sum(1))
        net.append(asked[:, inside].sum(1) - asked[:, ~inside] @ explained)
    return torch.stack(net, 1)


def figures(found: Tensor, truth: Floats, version: str) -> dict[str, float]:
    """found, truth: [queries, groups]; the last queries are the groups' own."""
    values = found.double().numpy()
    own = np.arange(GROUPS), np.arange(GROUPS)
    ours, true = values[-GROUPS:][own], truth[-GROUPS:][own]
    named = {
        "queries": float(spearman(values, truth).mean()),
        "own": float(spearman(ours[None], true[None])[0]),
    }
    if version == "twice":
        doubled = np.isin(np.arange(GROUPS), [*range(TWICE), *range(GROUPS - TWICE, GROUPS)])
        named["twice"] = float(ours[doubled].mean() / ours[~doubled].mean())
    return {name: round(value, 4) for name, value in named.items()}


def measured(folder: Path, version: str) -> list[dict[str, Any]]:
    with np.load(HERE / f"{folder.name}-{version}.npz", allow_pickle=False) as file:
        without, whole = file["without"].astype(np.float64), file["whole"].astype(np.float64)
    if np.isnan(without).any() or np.isnan(whole).any():
        print(f"{folder.name}-{version} is unfinished: run retrain.py again")
        return []
    truth = (without.mean(1) - whole.mean(0)).T
    half = without.shape[1] // 2
    halves = [(without[:, s].mean(1) - whole[s].mean(0)).T for s in (slice(half), slice(half, None))]
    made = RetrainedSet(folder)
    rows, numbers = rows_of(made, version)
    queries, _ = queries_of(made, rows, numbers)
    ids, groups = made.texts()[0][torch.from_numpy(rows)], torch.from_numpy(numbers)
    base = made.weights(BASE)
    seed = made.description["seed"] * 1_000_000 + 500_000
    tuned = tune(base, ids, made.characters, made.description["epochs"], seed).state_dict()
    model = made.model({name: torch.lerp(base[name], tuned[name], AT) for name in base})
    subject: Subject = gradients_of(made, model, block_matrices(model), (ids, queries))
    train, test = preconditioned(subject, Way((KFAC_DAMPING, KFAC_DAMPING)))
    found: list[dict[str, Any]] = []

    def add(rows: str, way: str, values: Tensor, effects: Floats = truth) -> None:
        named = {"set": folder.name, "version": version, "rows": rows, "way": way}
        found.append(named | figures(values, effects, version))
        print(found[-1], flush=True)

    add("", "half of the seeds by the others", torch.from_numpy(halves[0]), halves[1])
    for damping in (float("inf"), *DAMPINGS):
        way = "sum" if damping == float("inf") else f"net, {damping:g}"
        add("exact, pairs of rows", way, by_pairs(train, test, groups, min(damping, 1e12)))
    sides = [sketched(subject, side, subject.width, 0) for side in (train, test)]
    for name, code in FORMATS.items():
        with tempfile.TemporaryDirectory() as place:
            scan = CacheScan(
                cache_of(Path(place) / "cache", sides[0], code), methods.prepare(sides[1], normalize="layer")
            )
            exact = RowSketches(sides[0].__getitem__)
            scores = all_scores(scan)
            add(name, "sum", torch.stack([scores[:, groups == g].sum(1) for g in range(GROUPS)], 1))
            for damping in DAMPINGS:
                add(
                    name,
                    f"net, {damping:g}",
                    net_of_others(scan, scores, groups, GROUPS, exact, damping=damping),
                )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """A row for each way, a column for each figure of each version of each set."""
    versions = list(dict.fromkeys((row["set"], row["version"]) for row in results))
    columns = [
        (*version, figure)
        for version in sorted(versions, key=lambda version: VERSIONS[::-1].index(version[1]))
        for figure in ("queries", "own", "twice")
        if figure != "twice" or version[1] == "twice"
    ]
    rows = []
    for stored, way in dict.fromkeys((row["rows"], row["way"]) for row in results):
        cells = [stored or "the retrainings", way]
        for name, version, figure in columns:
            found = next(
                row
                for row in results
                if (row["set"], row["version"], row["rows"], row["way"]) == (name, version, stored, way)
            )
            cells.append(f"{found[figure]:.2f}" if figure == "twice" else f"{found[figure]:.3f}")
        rows.append(cells)
    header = ["rows", "sums", *(f"{name} {version}: {figure}" for name, version, figure in columns)]
    return doc_tables.table(header, rows)


def main(arguments: list[str] | None = None) -> None:
    out = doc_tables.results_or_table(arguments, __doc__, RESULTS, table)
    if out is None:
        return
    torch.set_num_threads(1)
    results = [
        row
        for folder in sets()
        for version in VERSIONS
        if (HERE / f"{folder.name}-{version}.npz").exists()
        for row in measured(folder, version)
    ]
    out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
