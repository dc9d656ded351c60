"""What leaving a group out changes, given the others: by the formula, and on data that says things twice."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.attribution.interactions import (
    DAMPING,
    RowSketches,
    net_of_others,
)
from rapidin.attribution.methods.vectors import stored_sketches
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.scan import all_scores
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.errors import UserError
from rapidin.results.saved import query_of

WORDS = ["red", "blue", "green", "old", "new", "far", "near", "warm"]
ROWS = [
    {"prompt": f"Name {n} {word} things.", "completion": f" The {word} ones, {n} of them.", "source": word}
    for word in WORDS
    for n in range(3)
]
# The first source comes again under another name.
TWICE = ROWS + [dict(row, source="again") for row in ROWS[:3]]
DAMPING_HERE = 3.0 / len(TWICE)
QUERIES = [{key: row[key] for key in ("prompt", "completion")} for row in (ROWS[1], ROWS[10])]


def attributor_of(**options: Any) -> Attributor:
    return Attributor(tiny_llama(), tiny_tokenizer(), **{"width": 64, "preconditioner": "off"} | options)


def scan_of(attributor: Attributor, cache: Cache, normalize: str) -> tuple[CacheScan, Tensor]:
    from rapidin.attribution import methods

    texts = [attributor.source.example(query) for query in QUERIES]
    query = methods.prepare(attributor.source.sketches(texts)[0], normalize=normalize)
    scan = CacheScan(cache, query)
    return scan, all_scores(scan)


def by_formula(scan: CacheScan, group_of_row: Tensor, count: int, damping: float) -> Tensor:
    """`net` without a basis: by the products of all pairs of rows."""
    cache = scan.cache
    blocks = len(cache.layers)
    unit = cache.sketches().view(len(cache), blocks, -1).double()
    divisor = 1
    if scan.query.normalize != "cosine":
        divisor = blocks
    else:
        lengths = cache.lengths().double()
        unit = unit * (lengths / lengths.norm(dim=1, keepdim=True))[:, :, None]
    rows = unit.flatten(1) / divisor**0.5
    if scan.query.normalize == "weighted":
        rows = rows * cache.lengths().double().log().mean(1, keepdim=True).exp() ** 0.25
    damping *= float(rows.square().sum(1).mean())
    queries = scan.query.vectors.double().flatten(1) * divisor**0.5
    net = torch.zeros(len(queries), count, dtype=torch.float64)
    for group in range(count):
        inside, others = rows[group_of_row == group], rows[group_of_row != group]
        kernel = others @ others.T + damping * len(rows) * torch.eye(len(others), dtype=torch.float64)
        explained = torch.linalg.solve(kernel, others @ inside.sum(0))
        net[:, group] = queries @ inside.sum(0) - (queries @ others.T) @ explained
    return net


@pytest.mark.parametrize("normalize", ["layer", "cosine", "weighted"])
def test_with_groups_of_one_row_it_is_the_formula(normalize: str, tmp_path: Path) -> None:
    attributor = attributor_of()
    cache = attributor.cache(TWICE, tmp_path, dtype="float32")
    scan, scores = scan_of(attributor, cache, normalize)
    each = torch.arange(len(TWICE))
    sketches = RowSketches(partial(stored_sketches, cache))
    for damping in (0.02, DAMPING_HERE, 2.0):
        got = net_of_others(scan, scores, each, len(TWICE), sketches, damping=damping)
        want = by_formula(scan, each, len(TWICE), damping)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def groups() -> tuple[Tensor, int]:
    names = [*WORDS, "again"]
    return torch.tensor([names.index(str(row["source"])) for row in TWICE]), len(names)


@pytest.mark.parametrize("stored", [{"dtype": "float16"}, {"bytes": 512, "sample": 0}])
def test_what_is_said_twice_counts_less(stored: dict[str, Any], tmp_path: Path) -> None:
    attributor = attributor_of()
    cache = attributor.cache(TWICE, tmp_path, **stored)
    scan, scores = scan_of(attributor, cache, "layer")
    group_of_row, count = groups()
    sums = torch.stack([scores[:, group_of_row == g].sum(1) for g in range(count)], 1)
    texts = [attributor.source.example(row) for row in TWICE]
    exact = attributor.source.sketches(texts)[0]
    net = net_of_others(
        scan, scores, group_of_row, count, RowSketches(exact.__getitem__), damping=DAMPING_HERE
    )
    share = net / sums
    # The first query is of the source that comes twice, the second of one that comes once.
    alone = int((group_of_row[10]).item())
    assert share[0, 0] < 0.75
    assert share[0, 0] == pytest.approx(float(share[0, -1]), abs=0.05)
    assert share[1, alone] > share[0, 0] + 0.15
    whole = by_formula(
        CacheScan(attributor.cache(TWICE, tmp_path / "fine", dtype="float32"), scan.query),
        group_of_row,
        count,
        DAMPING,
    )
    assert torch.corrcoef(torch.stack([net.flatten(), whole.flatten()]))[0, 1] > 0.9


def test_without_damping_others_hardly_matter_and_rows_without_a_group_stay(tmp_path: Path) -> None:
    attributor = attributor_of()
    cache = attributor.cache(TWICE, tmp_path, dtype="float32")
    scan, scores = scan_of(attributor, cache, "layer")
    group_of_row, count = groups()
    sums = torch.stack([scores[:, group_of_row == g].sum(1) for g in range(count)], 1).double()
    sketches = RowSketches(partial(stored_sketches, cache))
    far = net_of_others(scan, scores, group_of_row, count, sketches, damping=1e9)
    torch.testing.assert_close(far, sums, rtol=1e-4, atol=1e-4)
    # Rows that belong to no group are no group of their own, but are still there.
    some = torch.where(group_of_row == count - 1, -1, group_of_row)
    found = net_of_others(scan, scores, some, count - 1, sketches, damping=DAMPING_HERE)
    assert found[0, 0] < 0.75 * sums[0, 0]
    # Rows that do not count are not.
    gone = scores.clone()
    gone[:, group_of_row == count - 1] = torch.nan
    assert (
        net_of_others(scan, gone, some, count - 1, sketches, damping=DAMPING_HERE)[0, 0] > found[0, 0] + 0.1
    )


@pytest.mark.parametrize("stored", [{}, {"bytes": 512, "sample": 0}])
def test_a_query_by_column(stored: dict[str, Any], tmp_path: Path) -> None:
    attributor = attributor_of()
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TWICE))
    cache = attributor.cache(str(path), tmp_path / "cache", **stored)
    plain, net = (
        attributor.query(cache, QUERIES[:1], by="source", interactions=on)[0] for on in (False, True)
    )
    assert [group.net for group in plain.groups] == [None] * len(plain.groups)
    sums = {group.value: group.total for group in plain.groups}
    assert {group.value: group.total for group in net.groups} == pytest.approx(sums)
    nets = [group.net for group in net.groups]
    assert nets == sorted(nets, reverse=True)
    assert 0 < next(g.net / g.total for g in net.groups if g.value == "red") < 0.75
    value = net.to_json()
    assert "net" in value["by"]["groups"][0]
    assert query_of(value).groups == net.groups
    assert "net" not in plain.to_json()["by"]["groups"][0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "between the groups of a column; name it with `by`"),
        ({"by": "source", "normalize": "none"}, "not known for 'dot:none'"),
        ({"by": "source", "method": "datainf"}, "not known for 'datainf:weighted'"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        QueryOptions(interactions=True, **options)


def test_several_caches_are_refused(tmp_path: Path) -> None:
    attributor = attributor_of()
    members = [
        Member(attributor.cache(ROWS, tmp_path / name).path, 1.0, attributor.source) for name in ("a", "b")
    ]
    with pytest.raises(UserError, match="work with a single cache"):
        Ensemble(members).query(QUERIES, by="source", interactions=True, examples=ROWS)
