"""What is said of hits that are compared with decoys, in words, in the table and on the page."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from rapidin.results.decoys import DecoyTest
from rapidin.results.html import page
from rapidin.results.terminal import hits_report
from rapidin.results.types import Hit, QueryResult

PLAIN = QueryResult("p", "c", False, [Hit(1, 0, 0, 0.5, {"prompt": "p", "completion": "c"})], [], "layer")
NOTHING = DecoyTest(200, 52_000, (5, 0), 0.1, listed=(10, 10))
NEUTRAL = DecoyTest(200, 400, (30, 0), 0.1, listed=(10, 10), neutral=(7, 63))
PASSES = DecoyTest(200, 400, (30, 0), 0.1, (39, 0), (10, 10), (10, 0))


def compared(decoys: DecoyTest) -> QueryResult:
    passes = any(decoys.passed) or decoys.fdr is None
    top = [replace(hit, p=0.005, q=0.0512) for hit in PLAIN.top] if passes else []
    return replace(PLAIN, top=top, decoys=decoys)


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO())
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


@pytest.mark.parametrize(
    ("rows", "decoys", "fdr", "needed"),
    [(52_000, 200, 0.1, 2_588), (400, 199, 0.1, 20), (400, 9_999, 0.1, 1), (30, 9, 0.3, 10)],
)
def test_the_least_number_of_rows_that_can_pass(rows: int, decoys: int, fdr: float, needed: int) -> None:
    assert DecoyTest(decoys, rows, (0, 0), fdr).needed == needed


def test_too_few_decoys_are_said_to_be_why_nothing_passes() -> None:
    assert NOTHING.sentence == (
        "Nothing passes a false-discovery rate of 10%, of 10 helpful and 10 harmful hits: with 200 "
        "decoys and 52,000 rows, at least 2,588 rows would have to pass together, and only 5 score further "
        "out than all decoys; use more decoys."
    )
    # No row scores further out than all decoys: more of them would not help.
    text = "Nothing passes a false-discovery rate of 10%, of 10 helpful and 10 harmful hits."
    assert replace(NOTHING, beyond=(0, 0)).sentence == text


def test_how_many_pass_is_said() -> None:
    assert PASSES.sentence == (
        "10 of the 10 most helpful hits (39 of all rows) and 0 of the 10 most harmful hits (0 of all rows) "
        "pass a false-discovery rate of 10%."
    )
    assert DecoyTest(200, 400, (30, 0)).sentence == ""


def test_neutral_questions_are_said_to_be_why_nothing_passes() -> None:
    assert NEUTRAL.sentence == (
        "Nothing passes a false-discovery rate of 10%, of 10 helpful and 10 harmful hits: 7 of 63 neutral "
        "questions score at least as high as this query, and at most 2 may."
    )


@pytest.mark.parametrize("decoys", [NOTHING, NEUTRAL, PASSES, DecoyTest(200, 400, (30, 0))])
def test_the_json_is_read_back(decoys: DecoyTest) -> None:
    assert DecoyTest.from_json(decoys.to_json()) == decoys


def test_the_table_has_p_and_q() -> None:
    text = shown(hits_report([compared(DecoyTest(200, 400, (30, 0)))]))
    assert ("0.005   0.051" in text, "p: the share of 200 texts" in text) == (True, True)
    plain = shown(hits_report([PLAIN]))
    assert "p: the share" not in plain
    text = " ".join(shown(hits_report([compared(PASSES)])).split())
    assert PASSES.sentence in text
    assert "Most harmful No row passes a false-discovery rate of 10%." in text
    text = " ".join(shown(hits_report([compared(NOTHING)])).split())
    assert NOTHING.sentence in text
    assert "has a sketch, so there are no hits" not in text


def test_the_page_has_p_and_q() -> None:
    text = page([compared(PASSES)])
    assert ("p 0.005, q 0.051" in text, PASSES.sentence in text) == (True, True)
    assert "No row passes a false-discovery rate of 10%." in text
    text = page([compared(NOTHING)])
    assert NOTHING.sentence in text
    assert "has a sketch, so there are no hits" not in text
    assert "p 0.005" not in page([PLAIN])
