"""The candidates of a query whose top is a fused ranking (`rapidin.attribution.fusion`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rapidin.attribution.baselines import WORDS, Bools, Floats
from rapidin.attribution.duplicates import candidates_for
from rapidin.attribution.fusion import (
    DEPTH,
    EQUAL,
    GRADIENTS,
    FusedRows,
    best_rows,
    fuse,
    ranks_of,
)
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.rerank import Candidates, folded
from rapidin.attribution.scan import scores_of
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.data.examples import Examples


def fused_rows(
    candidates: Candidates,
    tables: Mapping[str, Floats],
    counted: Bools,
    weights: Sequence[float] | None = None,
    depth: int = DEPTH,
) -> list[FusedRows]:
    """The fused ranking of each generation.

    candidates: of the gradients; tables: of the other rankings by name, in the order of `fusion.RANKINGS`,
    scores [generations, rows], NaN for rows that are not compared; counted: [rows].
    """
    scores, rows = (x[:, :depth].tolist() for x in candidates.with_duplicates[0])
    found = []
    for n in range(len(next(iter(tables.values())))):
        pairs = [(row, score) for row, score in zip(rows[n], scores[n], strict=True) if row >= 0]
        rankings = {GRADIENTS: ranks_of([row for row, _ in pairs], [score for _, score in pairs])}
        for name, table in tables.items():
            rankings[name] = best_rows(table[n], counted, depth, nonzero=name == WORDS)
        found.append(fuse(rankings, EQUAL if weights is None else weights, depth))
    return found


def fused_candidates(
    scans: Sequence[CacheScan],
    candidates: Candidates,
    fused: Sequence[FusedRows],
    options: QueryOptions,
    data: Examples | None,
) -> Candidates:
    """The candidates with the fused rankings as the top of the generations, which come before the targets.

    scans: those that give the scores. Duplicates are folded if the options say so.
    """
    count = candidates_for(options.top_k) if options.fold else options.top_k
    most = max(len(ranking.rows) for ranking in fused)
    while True:
        top = _top(scans, candidates.ends[0], [ranking.rows[:count] for ranking in fused], count)
        if not options.fold:
            return replace(candidates, ends=(top, candidates.ends[1]))
        assert candidates.copies is not None
        nothing = top[0][:, :0], top[1][:, :0]
        without = folded(scans, (top, nothing), data)
        left = (without.ends[0][1][: len(fused)] >= 0).sum(1)
        if count >= most or bool((left >= options.top_k).all()):
            assert without.copies is not None
            return Candidates(
                (without.ends[0], candidates.ends[1]), (without.copies[0], candidates.copies[1])
            )
        count *= 4


def _top(
    scans: Sequence[CacheScan], top: tuple[Tensor, Tensor], chosen: Sequence[Sequence[int]], count: int
) -> tuple[Tensor, Tensor]:
    """The first `count` columns of an end (scores, rows), with these rows of the first queries instead."""
    width = max(count, top[1].shape[1])
    scores, rows = top[0].new_zeros(len(top[0]), width), top[1].new_full((len(top[1]), width), -1)
    scores[:, : top[0].shape[1]], rows[:, : top[1].shape[1]] = top
    every = sorted({row for of_query in chosen for row in of_query})
    position = {row: n for n, row in enumerate(every)}
    found = sum(scores_of(scan, torch.tensor(every, dtype=torch.int64, device="cpu")) for scan in scans)
    assert isinstance(found, Tensor)
    for n, of_query in enumerate(chosen):
        at = torch.tensor([position[row] for row in of_query], dtype=torch.int64, device="cpu")
        rows[n], scores[n] = -1, 0.0
        rows[n, : len(of_query)] = torch.tensor(of_query, dtype=torch.int64, device="cpu")
        scores[n, : len(of_query)] = found[n, at]
    return scores[:, :count], rows[:, :count]
