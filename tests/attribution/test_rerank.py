"""Two levels: a coarse scan of few bytes an example, and a finer cache that ranks its candidates."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.cache import Cache
from rapidin.errors import UserError

RECORDS = [
    {"prompt": f"Say {n} ", "completion": "" if n == 7 else f"it is {n * n} " * (1 + n % 3)}
    for n in range(60)
]
ASKED = [("Say 5 ", "it is 25 "), ("Say 8 ", "it is no 64 ")]


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Attributor, Cache, Cache]:
    folder = tmp_path_factory.mktemp("levels")
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=128, at=1.0)
    coarse = attributor.cache(RECORDS, folder / "coarse", bytes=128, sample=0, shard_rows=16)
    return attributor, coarse, attributor.cache(RECORDS, folder / "fine", shard_rows=11)


@pytest.mark.parametrize("normalize", ["layer", "cosine", "weighted"])
@pytest.mark.parametrize("method", ["dot", "fisher"])
def test_candidates_are_ranked_by_the_finer_cache(
    levels: tuple[Attributor, Cache, Cache], normalize: str, method: str
) -> None:
    attributor, coarse, fine = levels
    ensemble = Ensemble([Member(coarse.path, source=attributor.source)])
    settings = {"normalize": normalize, "method": method, "examples": RECORDS}
    exact = attributor.scores(fine, ASKED, normalize=normalize, method=method)  # type: ignore[arg-type]
    for candidates, top_k in ((9, 4), (60, 60)):
        seen = ensemble.query(ASKED, top_k=candidates, **settings)  # type: ignore[arg-type]
        got = ensemble.query(ASKED, top_k=top_k, rescore=fine, candidates=candidates, **settings)  # type: ignore[arg-type]
        for query, (result, first) in enumerate(zip(got, seen, strict=True)):
            for end, sign in (("top", -1), ("bottom", 1)):
                rows = [hit.row for hit in getattr(first, end)]
                best = sorted(rows, key=lambda row: (sign * float(exact[query, row]), row))[:top_k]
                hits = getattr(result, end)
                assert [hit.row for hit in hits] == best
                assert [hit.score for hit in hits] == pytest.approx(exact[query, best].tolist(), abs=1e-6)
    assert len(got[0].top) == 59  # the one without a target token is in neither


def test_what_cannot_be_rescored_is_refused(levels: tuple[Attributor, Cache, Cache], tmp_path: Path) -> None:
    attributor, coarse, fine = levels
    other = attributor.cache(RECORDS[:9], tmp_path / "other")
    ensemble = Ensemble([Member(coarse.path, source=attributor.source)])
    both = Ensemble([Member(path, source=attributor.source) for path in (coarse.path, fine.path)])
    for asked, settings, words in (
        (ensemble, {"rescore": other}, "not of the same examples"),
        (ensemble, {"rescore": fine, "candidates": 3}, "`candidates` 3 is less than `top_k` 10"),
        (both, {"rescore": fine}, "single cache"),
    ):
        with pytest.raises(UserError, match=words):
            asked.query(ASKED, **settings)  # type: ignore[arg-type]
