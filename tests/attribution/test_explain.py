"""What is told beside the hits of a query: errors, ranks, copies, groups, histogram, layers and baselines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Ran, caller
from fitted import fitted
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.attribution.generate import generations_of
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import QuerySketch, scans_of, sketch_generations
from rapidin.attribution.score_errors import details, rank_intervals
from rapidin.cache import Cache
from rapidin.errors import UserError
from rapidin.results.types import Hit, QueryResult

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"Say {n % 30} " if n % 30 else "Say it again ",
        "completion": "" if n == 7 else f"it is {(n % 30) ** 2} " * (1 + n % 3),
        "source": ["web", "book", None][n % 3],
        "note": n,  # so that only the texts of two rows are the same
    }
    for n in range(60)
]
COPIES = 120  # more than a hit lists
ROWS += [{"prompt": "One, two, three, ", "completion": "four and five", "source": "count"}] * COPIES
ASKED = [("Say 5 ", "it is 25 "), ("One, two, three, ", "four and six")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Attributor, Cache]:
    folder = tmp_path_factory.mktemp("answers")
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=64, at=1.0)
    return attributor, attributor.cache(ROWS, folder / "cache", shard_rows=77)


def hits(result: QueryResult) -> list[Hit]:
    return [*result.top, *result.bottom]


def test_errors_and_ranks_stand_by_default(made: tuple[Attributor, Cache]) -> None:
    attributor, cache = made
    results = attributor.query(cache, ASKED, top_k=8, examples=ROWS)
    source = fitted(attributor, cache).source
    texts = generations_of(source, ASKED)
    scans = scans_of([QuerySketch(cache, sketch_generations(source, texts))], texts, ScoringConfig())
    for n, result in enumerate(results):
        for end, sign in ((result.top, 1), (result.bottom, -1)):
            rows = torch.tensor([[hit.row for hit in end]])
            own = torch.full((len(ASKED), len(end)), -1)
            own[n] = rows
            errors = details(scans, own).errors[n].tolist()
            assert [hit.error for hit in end] == pytest.approx(errors)
            for hit, place in zip(
                end, rank_intervals([sign * hit.score for hit in end], errors), strict=True
            ):
                assert hit.ranks is not None
                assert hit.ranks[0] == place.first  # all that are surely ahead are among the hits
                assert hit.ranks[1] >= place.last
                assert hit.tied == place.tied
    (plain, _) = attributor.query(cache, ASKED, top_k=8, examples=ROWS, errors=False)
    assert all(hit.error is None and hit.ranks is None and not hit.tied for hit in hits(plain))
    assert [hit.row for hit in hits(plain)] == [hit.row for hit in hits(results[0])]


def test_folding_leaves_as_many_as_are_asked_for(made: tuple[Attributor, Cache]) -> None:
    """Many rows say the same, and are the best: the scan is asked again for more."""
    attributor, cache = made
    (_, plain) = attributor.query(cache, ASKED, top_k=5, examples=ROWS)
    assert {hit.row >= 60 for hit in plain.top} == {True}
    (first, second) = attributor.query(cache, ASKED, top_k=5, fold=True, examples=ROWS)
    assert [hit.rank for hit in second.top] == [1, 2, 3, 4, 5]
    (best, *others) = second.top
    assert (len(best.copies), best.copies_more) == (100, COPIES - 101)
    assert all(hit.row < 60 for hit in others)
    for result in (first, second):
        for end in (result.top, result.bottom):
            texts = [(ROWS[hit.row]["prompt"], ROWS[hit.row]["completion"]) for hit in end]
            assert len(set(texts)) == len(end) == 5
            for hit in end:
                for copy in hit.copies:
                    assert ROWS[copy]["prompt"] == ROWS[hit.row]["prompt"]
    everything, _ = attributor.query(cache, ASKED, top_k=500, fold=True, examples=ROWS)
    folded = [row for hit in everything.top for row in (hit.index, *hit.copies)]
    more = sum(hit.copies_more for hit in everything.top)
    assert len(set(folded)) == len(folded) == len(ROWS) - 1 - more
    without, _ = attributor.query(cache, ASKED, top_k=500, fold=True, examples=False)
    assert sum(1 + len(hit.copies) + hit.copies_more for hit in without.top) == len(ROWS) - 1
    assert len(without.top) > len(everything.top)  # without texts, records to the letter alone


def test_folding_with_targets_and_exact_gradients(made: tuple[Attributor, Cache]) -> None:
    attributor, cache = made
    (result,) = attributor.query(
        cache, ASKED[:1], top_k=4, fold=True, rescore="exact", candidates=9, targets="tokens", examples=ROWS,
        layers=True,
    )  # fmt: skip
    assert result.exact
    assert len(result.top) == 4
    for hit in hits(result):
        assert hit.error is None
        assert hit.ranks is None
        assert sum(hit.targets) == pytest.approx(hit.score, abs=1e-4)
        assert sum(hit.layers) == pytest.approx(hit.estimate, abs=1e-4)
    for end in (result.top, result.bottom, *(target.top for target in result.targets)):
        assert len({ROWS[hit.row]["prompt"] + ROWS[hit.row]["completion"] for hit in end}) == len(end) == 4


@pytest.mark.parametrize("together", [False, True])
def test_groups_and_histogram_are_of_all_scores(made: tuple[Attributor, Cache], together: bool) -> None:
    attributor, cache = made
    results = attributor.query(
        cache, ASKED, top_k=3, by="source", histogram=True, layers=True, together=together, examples=ROWS,
        targets=None if together else "tokens",
    )  # fmt: skip
    scores = attributor.scores(cache, ASKED, together=together)
    assert len(results) == len(scores)
    for result, own in zip(results, scores, strict=True):
        assert result.by == "source"
        assert {group.value: group.count for group in result.groups} == {
            "web": 20, "book": 19, "(none)": 20, "count": COPIES,
        }  # fmt: skip
        for group in result.groups:
            rows = [n for n, row in enumerate(ROWS) if (row["source"] or "(none)") == group.value and n != 7]
            assert group.total == pytest.approx(float(own[rows].double().sum()), abs=1e-5)
        assert result.histogram is not None
        assert sum(result.histogram.counts) == result.examples == len(ROWS) - 1
        assert result.layers == tuple(block.name for block in cache.layers)
        for hit in hits(result):
            assert sum(hit.layers) == pytest.approx(hit.score, abs=1e-5)


def test_baselines_stand_beside_hits(made: tuple[Attributor, Cache]) -> None:
    attributor, cache = made
    stages: list[tuple[str, int, int]] = []
    results = attributor.query(
        cache, ASKED, top_k=6, baselines=True, examples=ROWS, on_stage=lambda *stage: stages.append(stage)
    )
    for result in results:
        assert set(result.overlaps) == {"BM25", "hidden states"}
        for hit in hits(result):
            assert all(1 <= standing.rank < len(ROWS) for standing in hit.standings.values())
    assert results[1].top[0].standings["BM25"].rank == 1  # the one of all that share the words
    assert ("hidden states", len(ROWS) + 2, len(ROWS) + 2) in stages
    (both,) = attributor.query(cache, ASKED, top_k=6, baselines=True, together=True, examples=ROWS)
    assert set(both.overlaps) == {"BM25", "hidden states"}
    shown = {hit.row for hit in hits(both)}
    other = [row if n in shown else row | {"completion": "other"} for n, row in enumerate(ROWS)]
    with pytest.raises(UserError, match="is not what was cached"):
        attributor.query(cache, ASKED, top_k=6, baselines=True, together=True, examples=other)


def test_several_caches(made: tuple[Attributor, Cache], tmp_path: Path) -> None:
    attributor, cache = made
    other = Attributor(attributor.loaded, width=64, at=1.0, seed=1)
    second = other.cache(ROWS, tmp_path / "second")
    ensemble = Ensemble([Member(cache.path, 1.0, attributor.source), Member(second.path, 1.0, other.source)])
    (alone, _), (both, _) = (
        asked.query(ASKED, top_k=20, fold=True, by="source", layers=True, examples=ROWS)
        for asked in (Ensemble([Member(cache.path, 1.0, attributor.source)]), ensemble)
    )
    mean = [sum(hit.error or 0 for hit in result.top) / 20 for result in (alone, both)]
    assert 0.6 < mean[1] / mean[0] < 0.85  # two seeds: the root of a half
    for hit in hits(both):
        assert sum(hit.layers) == pytest.approx(hit.score, abs=1e-5)


def test_what_needs_texts_says_so(made: tuple[Attributor, Cache]) -> None:
    attributor, cache = made
    for options, words in (({"by": "source"}, "`by`"), ({"baselines": True}, "`baselines`")):
        with pytest.raises(UserError, match=f"{words} needs the training examples; give them"):
            attributor.query(cache, ASKED, examples=False, **options)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[..., Ran] = caller(capsys)
    monkeypatch.setenv("COLUMNS", "80")
    saved = save_tiny(tmp_path)
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS[:40] + ROWS[-3:])))
    cache = tmp_path / "cache"
    assert run("cache", saved.model, "--data", data, "--out", cache, "--width", "32", "--quiet").code == 0
    ask = ["query", cache, "--prompt", "Say 5 ", "--completion", "it is 25 ", "--top-k", "4", "--quiet"]
    ran = run(*ask, "--by", "source", "--fold", "--baselines", "--json", tmp_path / "hits.json")
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    for words in (
        "±",
        "By column: source",
        "helpful",
        "BM25",
        "most helpful hits are also in the top 4 of hidden states",
    ):
        assert words in ran.out
    (query,) = json.loads((tmp_path / "hits.json").read_text())["queries"]
    assert query["by"]["column"] == "source"
    assert {"error", "ranks", "tied", "baselines"} <= set(query["top"][0])
    assert set(query["overlaps"]) == {"BM25", "hidden states"}
    ran = run(*ask, "--by", "nothing")
    assert ran.code == 2
    assert "no training example has a column 'nothing'; there are 'prompt'" in ran.err
    assert len(ran.err.splitlines()) == 1
