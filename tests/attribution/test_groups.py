"""Histograms count every finite score; groups add up to the whole, whatever stands in the column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from tiny import tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.groups import BINS, check_column, group_rows, groups_of, histogram
from rapidin.cache import Cache
from rapidin.data.examples import Examples, open_examples
from rapidin.data.sources import Files
from rapidin.errors import UserError
from rapidin.results.types import Group


@tries(100)
@given(st.lists(st.floats(width=32), max_size=200))
def test_a_histogram_counts_every_finite_score(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    finite = scores[scores.isfinite()]
    found = histogram(scores)
    assert sum(found.counts) == len(finite)
    assert len(found.edges) == (len(found.counts) + 1 if len(finite) else 0)
    assert list(found.edges) == sorted(set(found.edges))
    if len(finite):
        assert found.edges[0] <= float(finite.min())
        assert float(finite.max()) <= found.edges[-1]
    assert len(found.counts) <= BINS


def test_bins_are_equal_and_one_far_score_does_not_hide_the_rest() -> None:
    scores = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    plain = histogram(scores)
    widths = torch.tensor(plain.edges).diff()
    assert widths.max() - widths.min() < 1e-4
    far = histogram(torch.cat([scores, torch.tensor([1e6])]))
    assert far.edges[-1] == 1e6
    assert far.counts[-1] == 1
    assert sum(count > 0 for count in far.counts) > 6
    inner = torch.tensor(far.edges[1:-1]).diff()
    assert inner.max() - inner.min() < 1e-4


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-12])
def test_equal_scores_are_one_bin(value: float) -> None:
    for n in (1, 5):
        found = histogram(torch.tensor([value] * n + [torch.nan]))
        assert found.counts == (n,)
        assert found.edges[0] < value < found.edges[1]
    assert histogram(torch.tensor([torch.nan])).counts == ()


def test_groups_by_hand() -> None:
    scores = torch.tensor([[0.5, -0.25, torch.nan, 0.25, -0.75], [0.0, 0.0, 0.0, 0.0, torch.nan]])
    first, second = groups_of(scores, torch.tensor([0, 1, 0, 1, 0]), ["a", "b"])
    assert [(g.value, g.count, g.total, g.helpful, g.harmful) for g in first] == [
        ("b", 2, 0.0, 1 / 3, 0.25),
        ("a", 2, -0.25, 2 / 3, 0.75),
    ]
    assert [(g.value, g.count, g.total, g.helpful, g.harmful) for g in second] == [
        ("a", 2, 0.0, 0.0, 0.0),
        ("b", 2, 0.0, 0.0, 0.0),
    ]


@tries(100)
@given(st.integers(1, 5), st.lists(st.tuples(st.floats(-1, 1), st.integers(-1, 4)), min_size=1, max_size=60))
def test_groups_add_up(names: int, rows: list[tuple[float, int]]) -> None:
    scores = torch.tensor([[score for score, _ in rows]])
    which = torch.tensor([min(group, names - 1) for _, group in rows])
    (found,) = groups_of(scores, which, [str(n) for n in range(names)])
    counted = scores[0][which >= 0].double()
    assert sum(g.count for g in found) == len(counted)
    assert sum(g.total for g in found) == pytest.approx(float(counted.sum()), abs=1e-9)
    for share, part in (("helpful", counted > 0), ("harmful", counted < 0)):
        total = sum(getattr(g, share) for g in found)
        assert total == pytest.approx(1.0 if bool(part.any()) else 0.0)
    assert [g.total for g in found] == sorted((g.total for g in found), reverse=True)


RECORDS: list[Any] = [
    {"prompt": f"Say {n} ", "completion": "" if n == 4 else f"it is {n}", **extra}
    for n, extra in enumerate(
        [
            {"source": "web"},
            {"source": None},
            {},
            {"source": ["a", 1]},
            {"source": "never counted"},
            {"source": True},
            {"source": {"b": 1, "a": "é"}},
            {"source": 3},
            {"source": "web"},
        ]
    )
]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Path]:
    folder = tmp_path_factory.mktemp("overview")
    path = folder / "train.jsonl"
    path.write_text("\n\n".join(map(json.dumps, RECORDS)))
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=16, at=1.0, preconditioner="off")
    return attributor.cache(str(path), folder / "cache", shard_rows=4), path


def scores_of(cache: Cache) -> torch.Tensor:
    scores = torch.arange(1.0, 1 + len(cache)).repeat(2, 1)
    scores[:, cache.status() != 0] = torch.nan
    return scores


def groups(cache: Cache, examples: Examples, column: str, scores: torch.Tensor) -> list[list[Group]]:
    return groups_of(scores, *group_rows(cache, examples, column, (~scores.isnan()).any(0)))


def test_values_of_all_kinds_and_none(cached: tuple[Cache, Path]) -> None:
    cache, path = cached
    examples = open_examples(str(path), checked=False)
    first, second = groups(cache, examples, "source", scores_of(cache))
    assert first == second
    assert {g.value: g.count for g in first} == {
        "web": 2,
        "(none)": 2,
        '["a", 1]': 1,
        "true": 1,
        '{"a": "é", "b": 1}': 1,
        "3": 1,
    }
    assert first[0].value == "web"
    assert first[0].total == 1 + 9


def test_an_unknown_column_and_other_data_are_refused(cached: tuple[Cache, Path], tmp_path: Path) -> None:
    cache, path = cached
    with pytest.raises(
        UserError, match=r"no training example has a column 'sorce'; .*'completion', 'source', .*'file'"
    ):
        check_column(open_examples(str(path)), "sorce")
    check_column(open_examples(str(path)), "file")
    late = tmp_path / "late.jsonl"
    late.write_text(
        '{"prompt": "a", "completion": "b"}\nno record\n{"prompt": "a", "completion": "b", "of": 1}\n'
    )
    check_column(open_examples(str(late), checked=False), "of")
    other = [dict(record, completion="another") for record in RECORDS]
    for wrong in (other, RECORDS[:3]):
        with pytest.raises(UserError, match="not what was cached: see example"):
            groups(cache, open_examples(wrong), "source", scores_of(cache))


def test_files_of_the_data(cached: tuple[Cache, Path], tmp_path: Path) -> None:
    cache, path = cached
    parts = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for part, some in zip(parts, (RECORDS[:3], RECORDS[3:]), strict=True):
        part.write_text("\n".join(map(json.dumps, some)))
    examples = open_examples(Files(tuple(map(str, parts))), checked=False)
    found, _ = groups(cache, examples, "file", scores_of(cache))
    assert {g.value: g.count for g in found} == {str(parts[0]): 3, str(parts[1]): 5}
    found, _ = groups(cache, open_examples(str(path)), "file", scores_of(cache))
    assert [(g.value, g.count) for g in found] == [(str(path), 8)]
    (found, _) = groups(cache, open_examples(RECORDS), "file", scores_of(cache))
    assert [g.value for g in found] == ["(none)"]
