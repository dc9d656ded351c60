"""Folding: hits that say the same are one hit with a count, whatever their spelling and order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.duplicates import MOST_NAMED, exact_copies, fold, shingles
from rapidin.cache import Cache
from rapidin.results.types import Hit

LONG = "the old ship sailed out of the harbour into the grey sea and nobody on shore waved to it at all"


def hits(*texts: str | None, scores: list[float] | None = None) -> list[Hit]:
    """Hits in order; line numbers are 10 times the rows, which go down."""
    found = []
    for n, text in enumerate(texts):
        score = 1.0 - n / 100 if scores is None else scores[n]
        row = len(texts) - n
        found.append(Hit(n + 1, 10 * row, row, score, None if text is None else {"text": text}))
    return found


def leads(folded: list[Hit]) -> list[tuple[int, tuple[int, ...]]]:
    return [(hit.index, hit.copies) for hit in folded]


def test_case_space_and_punctuation_do_not_count() -> None:
    folded = fold(hits("Say: hello, world!", "say   HELLO world", "Say hello, moon"), {})
    assert leads(folded) == [(30, (20,)), (10, ())]
    assert [hit.rank for hit in folded] == [1, 2]
    assert shingles("Ｆｕｌｌ ｗｉｄｔｈ Straße ok") == shingles("full width strasse OK")


def test_near_ones_fold_and_others_do_not() -> None:
    words = LONG.split()
    near = " ".join([*words, "today"])
    far = " ".join([*words[:10], "yet", *words[11:]])  # one word within: three runs of 18 differ
    assert leads(fold(hits(LONG, near, far), {})) == [(30, (20,)), (10, ())]


def test_chats_fold_only_if_their_first_turns_are_near_too() -> None:
    def chat(first: str, *, field: str = "messages") -> dict[str, Any]:
        turns = [first, "I see.", "Shall I go?", f"You shall: {LONG}"]
        roles = ["user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        if field == "messages":
            return {"messages": messages}
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    first, other = LONG.replace("ship", "train"), " ".join(reversed(LONG.split()))
    for field in ("messages", "prompt"):
        records = [chat(first, field=field), chat(other, field=field), chat(first + "!", field=field)]
        found = [Hit(n + 1, n, n, 1.0 - n / 10, record) for n, record in enumerate(records)]
        assert leads(fold(found, {})) == [(0, (2,)), (1, ())]
    # A long beginning that two chats share does not make one of different answers.
    shared = {"role": "system", "content": LONG * 9}
    found = [
        Hit(n + 1, n, n, 1.0, {"messages": [shared, {"role": "assistant", "content": text}]})
        for n, text in enumerate(["Yes, at once.", "No, never in my life."])
    ]
    assert len(fold(found, {})) == 2


def test_folding_is_transitive_and_the_first_leads() -> None:
    words = LONG.split()
    tail = ["and", "more", "of", "it", "yet"]
    steps = [" ".join([*words, *tail[:n]]) for n in (0, 3, 5)]
    assert len(fold(hits(steps[0], steps[2]), {})) == 2
    assert leads(fold(hits(steps[0], steps[2], steps[1]), {})) == [(30, (10, 20))]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("yes", "Yes!", True),
        ("yes", "no", False),
        ("yes it is", "it is yes", False),
        ("two words", "two words more", False),
        ("", "  ", True),
        ("", "?", False),
        ("?!", "? !", True),
        ("?!", "!?", False),
        ("今天天气很好我们去公园", "今天天气很好，我们去公园。", True),
        ("今天天气很好我们去公园", "今天天气很差我们去公园", False),
        ("\ud800\x00 odd", "\ud800\x00 ODD", True),
    ],
)
def test_short_and_odd_texts(one: str, other: str, same: bool) -> None:
    assert (len(fold(hits(one, other), {})) == 1) == same


def test_opposite_sides_are_never_one() -> None:
    folded = fold(hits("a b c", "a b c", "a b c", "a b c", scores=[0.5, 0.0, -0.1, -0.2]), {1: [20, 30, 40]})
    assert leads(folded) == [(40, ()), (30, ()), (20, (10, 30, 40))]


def test_exact_copies_fold_without_texts_and_count_beyond_the_hits() -> None:
    folded = fold(hits(None, None, None), {3: [10, 70, 80], 1: [30, 70, 80]})
    assert leads(folded) == [(30, (10, 70, 80)), (20, ())]
    (one,) = fold(hits("a"), {1: range(1000, 1000 + MOST_NAMED + 7)})
    assert (len(one.copies), one.copies_more) == (MOST_NAMED, 7)
    assert one.copies[0] == 1000
    assert fold([], {}) == []


def test_forms_are_compared_by_what_they_say() -> None:
    said = [("user", "add one and two"), ("assistant", "Three")]
    same: list[Any] = [
        {"prompt": "Add one and two.", "completion": "Three."},
        {"instruction": "Add one", "input": "and two", "output": "three", "source": "b"},
        {"messages": [{"role": role, "content": text} for role, text in said]},
    ]
    found = [Hit(n + 1, n, n, 0.5, record) for n, record in enumerate(same)]
    assert leads(fold(found, {})) == [(0, (1, 2))]


def test_exact_copies_are_found_over_the_whole_cache(tmp_path: Path) -> None:
    records: list[Any] = [{"prompt": f"Say {n % 4} ", "completion": f"it is {n % 4}"} for n in range(11)]
    records[6] = {"prompt": "Say 2 ", "completion": ""}
    records[10] = {"prompt": "Say 2 ", "completion": ""}  # no token to learn from: it does not count
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=16, at=1.0, preconditioner="off")
    cache: Cache = attributor.cache(records, tmp_path / "cache", shard_rows=3)
    assert exact_copies(cache, [1, 2, 3, 9]) == {1: [5, 9], 2: [], 3: [7], 9: [1, 5]}
    assert exact_copies(cache, []) == {}
