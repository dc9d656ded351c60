"""Decoys: texts that were never trained on, which give hits p- and q-values and are never hits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Ran, caller
from fitted import fitted
from inputs import torch_threads
from processes import together
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.decoys import DecoyTable, as_whole, counted_decoys, decoys_text, distinct_rows
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.attribution.methods.vectors import mean_factor
from rapidin.attribution.options import NORMALIZE
from rapidin.cache import Cache
from rapidin.cache.merge import merge
from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.decoys import DecoyTest
from rapidin.results.types import Hit, QueryResult, TargetResult
from rapidin.results.verdict import Place, Verdict

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Say {n} ", "completion": "" if n == 7 else f"it is {n**2} " * (1 + n % 3)} for n in range(40)
]
ROWS += [{"prompt": "One, two, three, ", "completion": "four and five"}] * 20
DECOYS = [{"prompt": f"Tell {n} ", "completion": f"it was {n**2} " * (1 + n % 3)} for n in range(30)]
COPIES = [ROWS[3], ROWS[59], DECOYS[0]]  # of rows, and of a decoy
ASKED = [("Say 5 ", "it is 25 "), ("One, two, three, ", "four and six")]
SETTINGS: dict[str, Any] = {"width": 64, "at": 1.0, "preconditioner": "sample"}

Made = tuple[Attributor, Cache]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("decoys")
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), **SETTINGS)
    cache = attributor.cache(ROWS, folder / "cache", shard_rows=16, decoys=[*DECOYS, *COPIES])
    return attributor, cache


def by_definition(scores: Tensor, decoys: Tensor) -> tuple[list[float], list[float]]:
    """p and q of scores at the helpful end, row by row."""
    p = [
        1.0 if score <= 0 else (1 + sum(decoy >= score for decoy in decoys.tolist())) / (1 + len(decoys))
        for score in scores.tolist()
    ]
    ordered, rows = sorted(p), len(p)
    rates = [rows * value / (n + 1) for n, value in enumerate(ordered)]
    q = [
        min([1.0, *(rate for rate, other in zip(rates, ordered, strict=True) if other >= value)])
        for value in p
    ]
    return p, q


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("decoys", [0, 1, 7, 300])
def test_p_and_q_are_those_of_the_definition(sign: int, decoys: int) -> None:
    made = torch.Generator().manual_seed(decoys)
    # Whole numbers, so that rows and decoys tie.
    scores = torch.randint(-4, 12, (83,), generator=made).float()
    others = torch.randint(-6, 8, (decoys,), generator=made).float()
    nan = torch.tensor([torch.nan])
    table = DecoyTable.of(torch.cat([nan, sign * scores]), torch.cat([sign * others, nan]), sign)
    p, q = by_definition(scores, others)
    for n, score in enumerate(scores.tolist()):
        assert table.values(sign * score) == pytest.approx((p[n], q[n]))
    for fdr in (0.01, 0.1, 0.3, 0.9):
        assert table.passing(fdr) == sum(value <= fdr for value in q)


def test_the_rate_is_held_where_rows_and_decoys_are_alike() -> None:
    """Of 1,000 draws with 30 true rows, the share of false rows that pass is at most the rate, but for the
    error of the mean, and true rows are found; and with no true rows hardly anything passes."""
    made = torch.Generator().manual_seed(0)
    false, found, anything = [], [], 0
    for _ in range(1000):
        scores = torch.randn(200, generator=made) + 10
        scores[:30] += 4.0
        decoys = torch.randn(200, generator=made) + 10
        table = DecoyTable.of(scores, decoys, 1)
        passes = torch.zeros(200, dtype=torch.bool)
        passes[scores.topk(table.passing(0.1)).indices] = True
        false.append(float(passes[30:].sum()) / max(1, int(passes.sum())))
        found.append(float(passes[:30].float().mean()))
        anything += DecoyTable.of(torch.randn(200, generator=made) + 10, decoys, 1).passing(0.1) > 0
    assert 0.05 < sum(false) / 1000 < 0.1
    assert sum(found) / 1000 > 0.8
    assert anything / 1000 < 0.11


def in_unit(attributor: Attributor, cache: Cache, normalize: Any = "weighted") -> Tensor:
    """Scores that are not divided by the mean over the cache's own rows, as those of decoys are not."""
    return attributor.scores(cache, ASKED, normalize=normalize) * mean_factor(cache, normalize)


def test_each_hit_has_the_values_of_its_score_among_all_rows(made: Made) -> None:
    attributor, cache = made
    assert cache.decoys is not None
    assert (len(cache), len(cache.decoys)) == (60, 33)
    own = fitted(attributor, cache)
    scores, decoys = (in_unit(own, each) for each in (cache, cache.decoys))
    distinct = [n for n in range(41) if n != 7]  # rows after them are copies of the last
    results = own.query(cache, ASKED, top_k=60, errors=False)
    for n, result in enumerate(results):
        assert result.decoys is not None
        assert (result.decoys.decoys, result.decoys.rows, result.decoys.fdr) == (30, 40, None)
        for sign, hits in ((1, result.top), (-1, result.bottom)):
            p, q = by_definition(sign * scores[n, distinct], sign * decoys[n, :30])
            assert len(hits) == 59
            for hit in hits:
                at = distinct.index(min(hit.row, 40))
                assert (hit.p, hit.q) == pytest.approx((p[at], q[at]))
    listed = results.to_list()[0]
    assert (listed["p"], listed["q"]) == (results[0].helpful[0].p, results[0].helpful[0].q)


def test_copies_count_once_and_examples_are_no_decoys(made: Made) -> None:
    _, cache = made
    assert cache.decoys is not None
    assert distinct_rows(cache).nonzero()[:, 0].tolist() == [n for n in range(41) if n != 7]
    assert counted_decoys(cache, cache.decoys).tolist() == [True] * 30 + [False] * 3
    assert decoys_text(cache, cache.decoys).startswith("30 decoys and 3 more that do not count:")


def test_decoys_change_nothing_of_the_cache(made: Made, tmp_path: Path) -> None:
    attributor, cache = made
    without = attributor.cache(ROWS, tmp_path / "cache", shard_rows=16)
    assert without.manifest == cache.manifest
    with_decoys, plain = (
        [(hit.row, hit.score) for hit in attributor.query(each, ASKED[:1], top_k=60).top]
        for each in (cache, without)
    )
    assert with_decoys == plain


def test_only_what_passes_is_shown(made: Made) -> None:
    attributor, cache = made
    every = attributor.query(cache, ASKED, top_k=60, targets="tokens")
    # The rate at which some of the second query's hits pass.
    rate = sorted(hit.q for hit in every[1].top if hit.q is not None)[20]
    assert rate < 1
    passing = attributor.query(cache, ASKED, top_k=60, targets="tokens", fdr=rate)
    for before, after in zip(every, passing, strict=True):
        kept: set[int] = set()
        for end, hits in ((before.top, after.top), (before.bottom, after.bottom)):
            chosen = [hit for hit in end if hit.q is not None and hit.q <= rate]
            assert [(hit.rank, hit.row, hit.q) for hit in hits] == [(h.rank, h.row, h.q) for h in chosen]
            kept |= {hit.row for hit in chosen}
        assert after.decoys is not None
        assert after.decoys.hits == (len(after.helpful), len(after.harmful))
        assert after.decoys.listed == (len(before.helpful), len(before.harmful))
        # Parts have no values of their own: they show the hits that pass for the whole generation.
        for one, other in zip(before.targets, after.targets, strict=True):
            assert [hit.row for hit in other.top] == [hit.row for hit in one.top if hit.row in kept]
            assert [hit.p for hit in other.top] == [None] * len(other.top)
    assert 20 < len(passing[1].top) < 59
    # The copies of a row pass together and count as one.
    assert passing[1].decoys is not None
    assert passing[1].decoys.passed[0] == len({min(hit.row, 40) for hit in passing[1].top})
    nothing = attributor.query(cache, ASKED, fdr=0.001)
    assert [(result.top, result.bottom) for result in nothing] == [([], [])] * 2
    assert nothing[0].decoys is not None
    assert "Nothing passes a false-discovery rate of 0.1%" in nothing[0].decoys.sentence


@pytest.mark.parametrize(
    ("below", "of", "fdr", "told"),
    [
        (63, 63, 0.1, None),
        (61, 63, 0.1, None),  # 3 of 64 come as far up, counting itself
        (60, 63, 0.1, (3, 63)),
        (60, 63, 0.2, None),
        (0, 63, 0.2, (63, 63)),
        (0, 18, 0.1, None),  # 19 are needed
        (0, 19, 0.1, (19, 19)),
    ],
)
def test_a_query_that_does_not_stand_out_yields_nothing(
    below: int, of: int, fdr: float, told: tuple[int, int] | None
) -> None:
    hits = [Hit(1, 0, 0, 0.5, None)]
    place = Place(tuple(map(float, range(of))), below)
    result = QueryResult(
        "p",
        "c",
        False,
        hits,
        hits,
        "layer",
        verdict=Verdict("weak", 0.5, place, None),
        targets=[TargetResult("c", (0,), 0.5, hits, hits)],
        decoys=DecoyTest(30, 40, (1, 1), fdr, (1, 1), (1, 1), (1, 1)),
    )
    got = as_whole(result)
    assert got.decoys is not None
    assert got.decoys.neutral == told
    if told is None:
        assert got == result
    else:
        assert (got.top, got.bottom, got.targets[0].top, got.targets[0].bottom) == ([], [], [], [])
        assert (got.decoys.passed, got.decoys.hits, got.decoys.listed) == ((0, 0), (0, 0), (1, 1))
    rows = replace(result, verdict=Verdict("weak", 0.5, None, place))
    assert as_whole(rows) == rows  # rows of the data say nothing of neutral questions
    plain = replace(result, decoys=DecoyTest(30, 40, (1, 1)))
    assert as_whole(plain) == plain


def test_generations_together_are_tested_as_one(made: Made) -> None:
    attributor, cache = made
    assert cache.decoys is not None
    (result,) = attributor.query(cache, ASKED, top_k=60, together=True, errors=False)
    scores, decoys = (
        fitted(attributor, cache).scores(each, ASKED, together=True)[0] for each in (cache, cache.decoys)
    )
    distinct = [n for n in range(41) if n != 7]
    p, q = by_definition(scores[distinct], decoys[:30])
    best = result.top[0]
    at = distinct.index(min(best.row, 40))
    assert (best.p, best.q) == pytest.approx((p[at], q[at]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "fisher"}, "'fisher' does not treat decoys as it treats examples"),
        ({"method": "datainf"}, "'datainf' does not treat decoys"),
        ({"rescore": "exact"}, "`rescore` gives new scores to some examples only"),
    ],
)
def test_what_cannot_be_tested_is_refused_and_has_no_values(
    made: Made, options: dict[str, Any], words: str
) -> None:
    attributor, cache = made
    with pytest.raises(UserError, match=f"`fdr` is not possible: {words}"):
        attributor.query(cache, ASKED, fdr=0.1, **options)
    result = attributor.query(cache, ASKED, **options)[0]
    assert (result.decoys, result.top[0].p) == (None, None)
    assert "p" not in result.to_json()["top"][0]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 10.0])
def test_a_rate_is_between_0_and_1(made: Made, rate: float) -> None:
    attributor, cache = made
    with pytest.raises(UserError, match="`fdr` must be above 0 and below 1"):
        attributor.query(cache, ASKED, fdr=rate)


def test_results_read_back_have_the_values(made: Made) -> None:
    attributor, cache = made
    (result,) = attributor.query(cache, ASKED[:1], fdr=0.9)
    (read,) = Results.from_json({"queries": [json.loads(json.dumps(result.to_json()))]})
    assert read.decoys == result.decoys
    assert [(hit.p, hit.q) for hit in read.top] == [(hit.p, hit.q) for hit in result.helpful]


@pytest.mark.parametrize(
    "storage", [{}, {"bytes": 256, "sample": 32}, {"dtype": "int8"}], ids=["float16", "packed", "int8"]
)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_decoy_scores_as_a_row_with_its_text(
    tmp_path: Path, storage: dict[str, Any], normalize: str
) -> None:
    """Decoys have the preconditioner, the basis and the format of the rows."""
    settings = SETTINGS | {"preconditioner": "kfac"}
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), **settings)
    cache = attributor.cache(ROWS[8:40], tmp_path / "cache", decoys=[*ROWS[8:40], DECOYS[0]], **storage)
    assert cache.decoys is not None
    assert cache.decoys.manifest.fitted_codec == cache.manifest.fitted_codec
    own = fitted(attributor, cache)
    rows, decoys = (in_unit(own, each, normalize) for each in (cache, cache.decoys))
    # Rows that a basis was learned from are encoded from float16 sketches, and decoys are not.
    atol = (1e-2 if storage.get("sample") else 1e-4) * float(rows.abs().max())
    torch.testing.assert_close(decoys[:, :32], rows, rtol=1e-3, atol=atol)


# ------------------------------------------------------------------------------------------------ caching


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_decoys_are_added_later_and_resumed(made: Made, tmp_path: Path) -> None:
    attributor, cache = made
    attributor.cache(ROWS, tmp_path / "cache", shard_rows=16)
    with_decoys = {"shard_rows": 16, "decoys": [*DECOYS, *COPIES]}
    messages = []
    attributor.cache(
        ROWS,
        tmp_path / "cache",
        on_progress=lambda progress: messages.append(progress.message),
        **with_decoys,
    )
    assert "sketching 33 decoys" in messages
    assert contents(tmp_path / "cache") == contents(cache.path)
    lost = tmp_path / "cache" / "decoys" / "shard-000001.safetensors"
    lost.unlink()
    attributor.cache(ROWS, tmp_path / "cache", **with_decoys)
    assert contents(tmp_path / "cache") == contents(cache.path)
    with pytest.raises(UserError, match="decoys' was made for another number of examples"):
        attributor.cache(ROWS, tmp_path / "cache", shard_rows=16, decoys=DECOYS)


def test_unfinished_decoys_give_no_values(made: Made, tmp_path: Path) -> None:
    attributor, cache = made
    shutil.copytree(cache.path, tmp_path / "cache")
    path = tmp_path / "cache" / "decoys" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"shards": manifest["shards"][:1]}))
    with pytest.raises(UserError, match="are unfinished; run the same 'rapidin cache' again"):
        attributor.query(tmp_path / "cache", ASKED, fdr=0.1)
    assert attributor.query(tmp_path / "cache", ASKED, examples=False)[0].top[0].p is None


def test_added_examples_are_no_decoys_any_more(made: Made, tmp_path: Path) -> None:
    attributor, cache = made
    shutil.copytree(cache.path, tmp_path / "cache")
    grown = attributor.cache([*ROWS, *DECOYS[:5]], tmp_path / "cache", shard_rows=16, append=True)
    assert grown.decoys is not None
    assert int(counted_decoys(grown, grown.decoys).sum()) == 25
    assert attributor.query(grown, ASKED)[0].decoys is not None


def test_what_is_no_decoy_is_refused(made: Made, tmp_path: Path) -> None:
    attributor, cache = made
    with pytest.raises(UserError, match="none of the 2 decoys counts"):
        attributor.cache(ROWS, tmp_path / "copies", decoys=[ROWS[3], ROWS[59]])
    with pytest.raises(UserError, match="decoys are records of the form 'text', the examples of the form 'p"):
        attributor.cache(ROWS, tmp_path / "form", decoys=[{"text": "A text."}])
    with pytest.raises(UserError, match="`decoys` and `part` do not go together"):
        attributor.cache(ROWS, tmp_path / "part", decoys=DECOYS, part=(1, 2))
    other = Attributor(tiny_llama(), tiny_tokenizer(), **SETTINGS, seed=1)
    made_otherwise = other.cache(ROWS, tmp_path / "other", shard_rows=16)
    shutil.copytree(cache.path / "decoys", made_otherwise.path / "decoys")
    with pytest.raises(UserError, match="decoys' were not made as the rows of the cache were"):
        other.query(Cache(made_otherwise.path), ASKED)
    shutil.rmtree(made_otherwise.path / "decoys")
    (made_otherwise.path / "decoys").symlink_to(cache.path / "decoys")
    for refused in (
        lambda: other.query(Cache(made_otherwise.path), ASKED),
        lambda: other.cache(ROWS, made_otherwise.path, shard_rows=16, decoys=DECOYS),
    ):
        with pytest.raises(UserError, match="is a link, and links are not followed"):
            refused()


def test_damaged_decoys_are_found(made: Made, tmp_path: Path) -> None:
    _, cache = made
    shutil.copytree(cache.path, tmp_path / "cache")
    read: list[tuple[int, int]] = []
    assert Cache.verify(tmp_path / "cache", lambda *done: read.append(done)) == []
    assert cache.decoys is not None
    assert read[-1] == (cache.bytes + cache.decoys.bytes,) * 2
    path = tmp_path / "cache" / "decoys" / "shard-000000.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    (problem,) = Cache.verify(tmp_path / "cache")
    assert str(path) in problem


def test_a_cache_with_decoys_is_not_merged_without_them(made: Made, tmp_path: Path) -> None:
    _, cache = made
    with pytest.raises(UserError, match="has decoys, which merging would lose"):
        merge(tmp_path / "merged", [cache.path])


def test_several_caches_are_tested_by_the_sums_of_their_scores(made: Made, tmp_path: Path) -> None:
    attributor, cache = made
    other = Attributor(tiny_llama(), tiny_tokenizer(), **SETTINGS, seed=1)
    second = other.cache(ROWS, tmp_path / "second", shard_rows=16, decoys=[*DECOYS, *COPIES])
    members = [
        Member(each.path, 1.0, fitted(of, each).source, each)
        for of, each in ((attributor, cache), (other, second))
    ]
    (result, _) = Ensemble(members).query(ASKED, top_k=60, errors=False, examples=False)
    of_both: list[Tensor] = [torch.zeros(60), torch.zeros(33)]
    for of, each in ((attributor, cache), (other, second)):
        assert each.decoys is not None
        for n, scored in enumerate((each, each.decoys)):
            scores = in_unit(fitted(of, each), scored)[0] / mean_factor(each, "weighted")
            of_both[n] = of_both[n] + scores / 2
    distinct = [n for n in range(41) if n != 7]
    p, q = by_definition(of_both[0][distinct], of_both[1][:30])
    for hit in result.helpful:
        at = distinct.index(min(hit.row, 40))
        assert (hit.p, hit.q) == pytest.approx((p[at], q[at]))
    third = other.cache(ROWS, tmp_path / "third", shard_rows=16, decoys=DECOYS)
    fourth = other.cache(ROWS, tmp_path / "fourth", shard_rows=16)
    for folder, words in ((third, "the caches have different decoys"), (fourth, "fourth has no decoys")):
        pair = [members[0], Member(folder.path, 1.0, fitted(other, folder).source, folder)]
        with pytest.raises(UserError, match=words):
            Ensemble(pair).query(ASKED, examples=False, fdr=0.1)
        unknown: QueryResult = Ensemble(pair).query(ASKED, examples=False)[0]
        assert unknown.decoys is None


# ------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    save_tiny(folder)
    for name, records in (("train", ROWS), ("decoys", DECOYS), ("asked", [{"prompt": "Say 5 "}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def caching(work: Path, out: str, *more: str) -> list[str]:
    data = ("--data", str(work / "train.jsonl"), "--out", str(work / out))
    return ["cache", str(work / "model"), *data, "--width", "64", "--shard-rows", "8", *more]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return caller(capsys)


def test_the_commands_make_and_use_decoys(work: Path, call: Callable[..., Ran]) -> None:
    decoys = ("--decoys", str(work / "decoys.jsonl"))
    assert call(*caching(work, "plain")).code == 0
    asked = ("--data", str(work / "asked.jsonl"))
    ran = call("query", work / "plain", *asked, "--fdr", "0.1")
    assert ran.code == 2
    assert ran.err.splitlines()[-1] == (
        f"rapidin: --fdr is not possible: the cache {work / 'plain'} has no decoys; run its 'rapidin cache' "
        "command again with --decoys and texts that were never trained on"
    )
    ran = call(*caching(work, "plain", *decoys))
    assert (ran.code, ran.err.strip().endswith("; 30 decoys")) == (0, True)
    ran = call("query", work / "plain", *asked, "--fdr", "0.001", "--report", work / "page.html")
    assert (ran.code, "Nothing passes a false-discovery rate of 0.1%" in ran.out) == (0, True)
    assert "Nothing passes a false-discovery rate of 0.1%" in (work / "page.html").read_text()
    assert "No example in the cache has a sketch" not in ran.out + (work / "page.html").read_text()
    ran = call("query", work / "plain", *asked, "--fdr", "1.5")
    assert (ran.code, "--fdr must be above 0 and below 1" in ran.err) == (2, True)
    assert "30 with a sketch" in call("info", work / "plain").out
    assert call("verify", work / "plain").out.strip().endswith("and 30 decoys)")


@pytest.mark.full
def test_several_processes_make_the_decoys_of_one(work: Path, call: Callable[..., Ran]) -> None:
    decoys = ("--decoys", str(work / "decoys.jsonl"))
    with torch_threads(1):  # as in each of the others: with more, products are rounded otherwise
        assert call(*caching(work, "one", *decoys)).code == 0
    for ended in together(2, caching(work, "two", *decoys), work / "logs"):
        assert ended.code == 0, ended.err
    assert contents(work / "two") == contents(work / "one")
    asked = ("--data", str(work / "asked.jsonl"), "--top-k", "60", "--no-text", "--json", "-")
    alone = call("query", work / "one", *asked)
    first, _ = together(2, ["query", str(work / "two"), *asked], work / "asking")
    hits, others = (json.loads(text)["queries"][0]["top"] for text in (alone.out, first.out))
    assert "p" in hits[0]
    assert hits == others
