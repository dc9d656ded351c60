"""A fused ranking is shown with the rank of each hit in each ranking, and what that adds."""

from __future__ import annotations

import io
import json

import pytest
from made_results import fused, made

from rapidin.results.collection import Results
from rapidin.results.fusion import Fusion
from rapidin.results.html import page
from rapidin.results.json import results_json
from rapidin.results.terminal import hits_report, make_console

LINES = (
    "gradients #1 35%, BM25 #4 33%, hidden states #7 32%",
    "gradients #2 52%, BM25 without a rank",
)
SAID = "At the top gradients say nothing beyond words: 9 of the 10 rows with the highest gradient scores"


def shown(result: object, width: int) -> str:
    console = make_console(io.StringIO())
    console.width = width
    with console.capture() as captured:
        console.print(hits_report([result], width=width))  # type: ignore[list-item]
    return captured.get()


def test_all_hits_of_the_top_are_shown_whatever_their_sign() -> None:
    result = fused()
    assert [hit.score > 0 for hit in result.helpful] == [True, False, True]
    assert all(hit.score < 0 for hit in result.harmful)
    assert "3 of the fused ranking" in repr(result)
    rows = Results([result, made(hits=2)]).to_list()
    assert [row["side"] for row in rows] == ["fused"] * 3 + ["harmful"] * 3 + ["helpful", "harmful"]
    assert rows[0]["fused"] == pytest.approx(1 / 61 + 1 / 64 + 1 / 67)
    assert (rows[0]["fused BM25 rank"], rows[0]["BM25 adds"]) == (4, pytest.approx(1 / 64))
    assert (rows[1]["fused BM25 rank"], rows[1]["BM25 adds"]) == (None, 0.0)
    assert rows[3]["fused"] is rows[-1]["gradients adds"] is None


def test_the_table_has_ranks_and_what_they_add() -> None:
    text = shown(fused(), 140)
    words = " ".join(text.split())
    for line in ("Fused ranking", *LINES, SAID, "The fused score is the sum of weight / (60 + rank)"):
        assert line in words
    assert "Most helpful" not in words
    assert "of the fused ranking are also in the top 3 of BM25" in words
    narrow = shown(fused(), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    for part in LINES[0].split(", "):  # on lines of their own where they do not fit on one
        assert part in narrow
    plain = shown(made(hits=6, length=9, generation=4), 100)
    assert "Most helpful" in plain
    assert "used" not in plain


def test_the_page_has_them_too() -> None:
    markup = page([fused()])
    for line in (">Fused ranking<", *LINES, SAID):
        assert line in markup
    assert json.loads(markup.split('id="data">')[1].split("</script>")[0])[0]["fused"] is True
    plain = page([made(hits=6)])
    assert ">Fused ranking<" not in plain
    assert "Fused score" not in plain


def test_json_comes_back() -> None:
    result = fused()
    written = json.loads(results_json([result]))
    (query,) = written["queries"]
    assert query["fusion"]["sentence"] == SAID[0].lower() + SAID[1:] + " are also among the 10 best of BM25"
    assert query["top"][1]["fused"]["rankings"]["BM25"] == {"rank": None, "adds": 0.0}
    again = Results.from_json(written)
    assert json.loads(results_json(again)) == written
    assert again[0].fusion == result.fusion
    assert [hit.fused for hit in again[0].top] == [hit.fused for hit in result.top]


@pytest.mark.parametrize(
    ("common", "best", "only"), [(9, 10, True), (8, 10, False), (3, 3, True), (2, 3, False)]
)
def test_only_nearly_the_same_rows_are_called_words(common: int, best: int, only: bool) -> None:
    found = Fusion({}, 1000, common, best)
    assert found.only_words == only
    assert found.sentence.startswith("at the top gradients say nothing") == only
    assert f"{common} of the {best} rows" in found.sentence
    assert Fusion({}, 1000, 0, 0).sentence == "no row has a gradient score"
