"""Attention sinks are not among the strongest tokens, and parts that cancel out have no shares."""

from __future__ import annotations

from typing import Any

import pytest

from rapidin.results.html import page
from rapidin.results.sinks import sinks_of, without_sinks
from rapidin.results.terminal import words_text
from rapidin.results.text import has_shares
from rapidin.results.types import Hit, QueryResult, Tokens


def hit(row: int, pieces: str, *contributions: float) -> Hit:
    words = tuple(f"{piece} " for piece in pieces.split())
    tokens = Tokens(words, (True,) * len(words), contributions)
    return Hit(row + 1, row, row, sum(contributions), {"text": pieces}, tokens=tokens)


TEMPLATED = [
    hit(0, "<s> Below is planted one", 0.3, 0.5, 0.02, 0.1, 0.1),
    hit(1, "<s> Below is planted two", 0.2, 0.4, 0.01, 0.1, 0.05),
    hit(2, "<s> Below is other three", 0.1, -0.6, 0.03, 0.01, 0.02),
]


def test_the_first_word_of_a_template_is_a_sink_behind_a_special_token() -> None:
    assert sinks_of(TEMPLATED) == {0, 1}
    assert sinks_of(TEMPLATED[:2]) == {0}  # two rows are too few to tell
    other = hit(3, "<s> Below is planted four", 0.3, 0.1, 0.02, 0.3, 0.1)
    assert sinks_of([*TEMPLATED, other]) == {0}  # in one row it gathers little
    without_template = hit(3, "<s> Once upon planted four", 0.3, 0.9, 0.02, 0.1, 0.1)
    assert sinks_of([*TEMPLATED, without_template]) == {0}
    assert sinks_of([]) == {0}


def test_a_text_never_consists_of_sinks_alone() -> None:
    rows = [hit(n, "a b", 0.5, 0.4) for n in range(3)]
    assert sinks_of(rows) == {0}
    assert without_sinks(rows[0].tokens, sinks_of(rows)) == [0.0, 0.4]  # type: ignore[arg-type]


def test_words_and_the_page_leave_sinks_out() -> None:
    assert words_text(TEMPLATED[0], sinks_of(TEMPLATED)) == "planted 10%, one 10%, is 2%"
    text = page([QueryResult("p", "c", False, TEMPLATED[:2], TEMPLATED[2:], "layer")])
    strongest = text.split("Strongest tokens</span>")[1].split("</div>")[0]
    assert "planted" in strongest
    assert "Below" not in strongest
    assert '"sinks":[0,1]' in text


@pytest.mark.parametrize(
    ("total", "parts", "shared"),
    [
        (1.0, [0.6, 0.4], True),
        (1.0, [1.5, -0.5], True),
        (0.02, [0.41, -0.39], False),  # 2050% and -1950%
        (0.0, [], False),
        (0.0, [0.1, -0.1], False),
        (-1.0, [-0.6, -0.4], True),
    ],
)
def test_shares_of_a_sum_near_zero_are_left_out(total: float, parts: list[float], shared: bool) -> None:
    assert has_shares(total, parts) == shared


def test_words_that_cancel_out_have_no_shares() -> None:
    row = hit(0, "<s> one two three", 0.0, 0.41, -0.4, 0.01)
    assert words_text(row) == "one, three"


def test_parts_that_cancel_out_have_no_shares(capsys: Any) -> None:
    from rich.console import Console

    from rapidin.results.terminal import targets_table
    from rapidin.results.types import TargetResult

    for influences, shown in (((0.41, -0.39), False), ((0.6, 0.4), True)):
        targets = [TargetResult(str(n), (n,), each, [], []) for n, each in enumerate(influences)]
        hits = [Hit(1, 0, 0, sum(influences))]
        result = QueryResult("p", "c", False, hits, [], "layer", targets=targets)
        Console(width=100).print(targets_table(result, bounded=True))
        assert ("%" in capsys.readouterr().out) == shown
