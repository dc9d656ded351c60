"""`--fuse`: the hits are the best of three rankings of all rows, as counting by hand has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Ran, caller
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.attribution import baselines
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.cache import Cache
from rapidin.errors import UserError
from rapidin.results.types import QueryResult
from rapidin.tasks import Example, Task

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Say {n % 20} ", "completion": "" if n == 7 else f"it is {n} " * (1 + n % 3), "even": n % 2}
    for n in range(50)
]
ROWS += [{"prompt": "The zebra ", "completion": "sleeps", "even": 2}, *ROWS[:9]]
ASKED = [("Say 5 ", "it is 25 "), ("One, two, ", "zebra three")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Attributor, Cache]:
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=64, at=1.0)
    return attributor, attributor.cache(ROWS, tmp_path_factory.mktemp("fuse") / "cache", shard_rows=16)


def tables(attributor: Attributor, scores: Tensor) -> list[np.ndarray]:
    """The scores of the three rankings [Q, rows], worse than all others for rows without a rank."""
    texts, asked = (
        [baselines.plain_text(r) for r in of]
        for of in (ROWS, [{"prompt": prompt, "completion": completion} for prompt, completion in ASKED])
    )
    found = baselines.scores_of_baselines(attributor.source.loaded, texts, asked)
    found["BM25"][found["BM25"] == 0] = -np.inf
    every = [scores.double().numpy(), *found.values()]
    for table in every:
        table[:, scores[0].isnan().numpy()] = -np.inf
    return every


def by_hand(every: list[np.ndarray], query: int, weights: tuple[float, ...] = (1, 1, 1)) -> dict[int, float]:
    found: dict[int, float] = {}
    for table, weight in zip(every, weights, strict=True):
        for row, score in enumerate(table[query]):
            if np.isfinite(score) and weight:
                rank = 1 + int((table[query] > score).sum())
                found[row] = found.get(row, 0.0) + weight / (60 + rank)
    return found


def check(result: QueryResult, want: dict[int, float], top_k: int) -> None:
    assert result.fusion is not None
    assert len(result.top) == min(top_k, len(want))
    assert [hit.rank for hit in result.top] == list(range(1, len(result.top) + 1))
    best = sorted(want.values(), reverse=True)[: len(result.top)]
    fused = [hit.fused for hit in result.top if hit.fused is not None]
    assert [each.score for each in fused] == pytest.approx(best)
    for hit, each in zip(result.top, fused, strict=True):
        assert each.score == pytest.approx(want[hit.row])
        assert sum(each.adds.values()) == pytest.approx(each.score)
    assert all(hit.fused is None for hit in result.bottom)
    assert result.helpful == result.top


@pytest.mark.parametrize("weights", [None, (1, 0.25, 0.5), (0, 1, 0), (0, 0, 2)])
def test_hits_are_those_of_complete_rankings(
    made: tuple[Attributor, Cache], weights: tuple[float, ...] | None
) -> None:
    attributor, cache = made
    scores = attributor.scores(cache, ASKED)
    every = tables(attributor, scores.clone())
    for top_k in (4, 100):
        results = attributor.query(cache, ASKED, top_k=top_k, fuse=True, fuse_weights=weights, examples=ROWS)
        plain = attributor.query(cache, ASKED, top_k=top_k, examples=ROWS)
        for n, result in enumerate(results):
            check(result, by_hand(every, n, weights or (1, 1, 1)), top_k)
            for hit in result.top:
                assert hit.score == pytest.approx(float(scores[n, hit.row]), abs=1e-6)
                assert hit.error is not None
                assert hit.ranks is None
                assert not hit.tied
            # The other side, and the verdict, are those of the gradients.
            assert [(h.row, h.ranks) for h in result.bottom] == [(h.row, h.ranks) for h in plain[n].bottom]
            assert result.verdict == plain[n].verdict


def test_a_row_that_words_alone_find_is_among_the_hits(made: tuple[Attributor, Cache]) -> None:
    attributor, cache = made
    asked = ("zebra ", "it is 12 it is 12 ")
    (alone,) = attributor.query(cache, asked, top_k=30, examples=ROWS)
    assert 50 not in [hit.row for hit in alone.top]
    (result,) = attributor.query(
        cache, asked, top_k=4, fuse=True, fuse_weights=(0.01, 1, 0.01), examples=ROWS
    )
    (hit,) = (hit for hit in result.top if hit.row == 50)
    assert hit.fused is not None
    assert hit.fused.ranks["gradients"] == 58  # the last: training on it makes the answer less likely
    assert hit.score < 0
    assert hit in result.helpful
    for fold in (False, True):
        (nothing,) = attributor.query(
            cache, [("Qqq ", "xyz")], fuse=True, fuse_weights=(0, 1, 0), fold=fold, examples=ROWS
        )
        assert nothing.top == []
        assert len(nothing.bottom) > 0
        assert nothing.fusion is not None
        assert (nothing.fusion.common, nothing.fusion.best) == (0, 10)


def test_copies_are_folded_until_enough_are_left(made: tuple[Attributor, Cache]) -> None:
    attributor, cache = made
    plain = attributor.query(cache, ASKED, top_k=100, fuse=True, examples=ROWS)[0]
    folded = attributor.query(cache, ASKED, top_k=100, fuse=True, fold=True, examples=ROWS)[0]
    rows = [hit.row for hit in folded.top]
    assert rows == [hit.row for hit in plain.top if hit.row in rows]
    assert 0 < len(rows) < len(plain.top)
    assert any(hit.copies for hit in folded.top)
    few = attributor.query(cache, ASKED, top_k=3, fuse=True, fold=True, examples=ROWS)[0]
    assert [hit.row for hit in few.top] == rows[:3]
    alone = attributor.query(cache, ASKED, top_k=100, fold=True, examples=ROWS)[0]
    assert [hit.row for hit in folded.bottom] == [hit.row for hit in alone.bottom]


def test_it_goes_with_what_else_a_query_shows(made: tuple[Attributor, Cache], tmp_path: Path) -> None:
    attributor, cache = made
    more = {"fuse": True, "examples": ROWS, "top_k": 5}
    plain = attributor.query(cache, ASKED, **more)  # type: ignore[arg-type]
    result = attributor.query(
        cache, ASKED, targets="tokens", contributions=True, by="even", histogram=True, layers=True,
        baselines=True, **more,  # type: ignore[arg-type]
    )[0]  # fmt: skip
    assert [hit.row for hit in result.top] == [hit.row for hit in plain[0].top]
    assert sum(target.influence for target in result.targets) == pytest.approx(
        sum(hit.score for hit in result.top) / 5, abs=1e-5
    )
    for hit in result.top:
        assert hit.tokens is not None
        # Contributions are of the gradient itself, the score of a row in float16.
        assert sum(hit.tokens.contributions) == pytest.approx(hit.score, abs=5e-5)
        assert sum(hit.layers) == pytest.approx(hit.score, abs=1e-5)
        assert set(hit.standings) == {"BM25", "hidden states"}
    assert sum(group.count for group in result.groups) == len(ROWS) - 2  # two have no token with a loss
    every = tables(attributor, attributor.scores(cache, ASKED))
    scores = attributor.scores(cache, ASKED, together=True)[0]
    both = [scores[None].double().numpy(), *(table.clip(min=0).mean(0)[None] for table in every[1:])]
    both[2] = every[2].mean(0)[None]
    both[1][both[1] <= 0] = -np.inf
    for table in both:
        table[:, scores.isnan().numpy()] = -np.inf
    (set_of,) = attributor.query(cache, ASKED, together=True, **more)  # type: ignore[arg-type]
    check(set_of, by_hand(both, 0), 5)


def test_several_caches_and_a_finer_one(made: tuple[Attributor, Cache], tmp_path: Path) -> None:
    attributor, cache = made
    other = Attributor(attributor.loaded, width=256, at=1.0, seed=1)
    second = other.cache(ROWS, tmp_path / "second")
    ensemble = Ensemble([Member(cache.path, 1.0, attributor.source), Member(second.path, 1.0, other.source)])
    every = tables(attributor, ensemble.scores(ASKED))
    for n, result in enumerate(ensemble.query(ASKED, top_k=6, fuse=True, examples=ROWS)):
        check(result, by_hand(every, n), 6)
    coarse = attributor.cache(ROWS, tmp_path / "coarse", bytes=128, sample=0)
    every = tables(attributor, attributor.scores(cache, ASKED))
    found = attributor.query(coarse, ASKED, top_k=6, fuse=True, rescore=cache, examples=ROWS)
    for n, result in enumerate(found):
        check(result, by_hand(every, n), 6)


class Vectors(Task):
    """A task without text."""

    name = "vectors"

    def example(self, record: dict[str, Any]) -> Example:
        return Example({"x": torch.tensor(record["x"]), "y": record["y"]})

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def test_what_cannot_be_fused_is_refused(made: tuple[Attributor, Cache], tmp_path: Path) -> None:
    attributor, cache = made
    for options, words in (
        ({"fuse": True, "rescore": "exact"}, "leave out one of them, or rescore by another cache"),
        ({"fuse_weights": (1, 1, 1)}, "use `fuse` too"),
        ({"fuse": True, "fuse_weights": (1, 1)}, "must be three numbers"),
        ({"fuse": True, "fuse_weights": (0, 0, 0)}, "not all 0"),
        ({"fuse": True, "fuse_weights": (1, -1, 1)}, "of 0 or more"),
        ({"fuse": True, "fuse_weights": (1, float("nan"), 1)}, "of 0 or more"),
        ({"fuse": True, "fuse_weights": 1}, "must be three numbers"),
    ):
        with pytest.raises(UserError, match=words):
            attributor.query(cache, ASKED, examples=ROWS, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`fuse` needs the training examples"):
        attributor.query(cache, ASKED, examples=False, fuse=True)
    torch.manual_seed(0)
    rows = [{"x": torch.randn(4).tolist(), "y": n % 2} for n in range(8)]
    own = Attributor(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), task=Vectors(), width=16, at=1.0)
    small = own.cache(rows, tmp_path / "own")
    for name in ("fuse", "baselines"):
        with pytest.raises(UserError, match=f"`{name}` compares texts, and this model has no tokenizer"):
            own.query(small, [rows[0]], examples=rows, **{name: True})  # type: ignore[arg-type]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[..., Ran] = caller(capsys)
    monkeypatch.setenv("COLUMNS", "80")
    saved = save_tiny(tmp_path)
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    cache = tmp_path / "cache"
    assert run("cache", saved.model, "--data", data, "--out", cache, "--width", "32", "--quiet").code == 0
    ask = ["query", cache, "--prompt", "Say 5 ", "--completion", "it is 25 ", "--top-k", "4", "--quiet"]
    page = tmp_path / "page.html"
    ran = run(*ask, "--fuse", "--fuse-weights", "1,0.5,0", "--json", tmp_path / "h.json", "--report", page)
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "Fused ranking" in ran.out
    assert "Most harmful" in ran.out
    assert "hidden states" in page.read_text()
    written = json.loads((tmp_path / "h.json").read_text())
    assert written["settings"]["fuse_weights"] == [1.0, 0.5, 0.0]
    (query,) = written["queries"]
    assert query["fusion"]["weights"] == {"gradients": 1.0, "BM25": 0.5, "hidden states": 0.0}
    assert set(query["fusion"]) == {"weights", "depth", "common", "best", "sentence"}
    for hit in query["top"]:
        rankings = hit["fused"]["rankings"]
        assert list(rankings) == ["gradients", "BM25", "hidden states"]
        assert hit["fused"]["score"] == pytest.approx(sum(each["adds"] for each in rankings.values()))
        assert rankings["gradients"]["adds"] == pytest.approx(1 / (60 + rankings["gradients"]["rank"]))
    for words, message in (
        (("--fuse", "--rescore", "exact"), "--fuse ranks all examples"),
        (("--fuse", "--fuse-weights", "1,2"), "--fuse-weights must be three numbers"),
        (("--fuse", "--fuse-weights", "a,b,c"), "--fuse-weights a,b,c are not numbers"),
        (("--fuse-weights", "1,1,1"), "use --fuse too"),
        (("--fuse", "--no-text"), "--fuse needs the training examples"),
    ):
        ran = run(*ask, *words)
        assert ran.code == 2
        assert message in ran.err
        assert len(ran.err.splitlines()) == 1
    data.unlink()
    ran = run(*ask, "--fuse")
    assert ran.code == 2
    assert "is not at" in ran.err
