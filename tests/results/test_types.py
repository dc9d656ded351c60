"""Results as plain rows, for notebooks and tables."""

from __future__ import annotations

import json
import sys

import pytest

from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.types import Hit, QueryResult, Standing

KNOWN = Hit(
    1,
    70,
    7,
    0.5,
    {"text": "a", "rank": "of its own"},
    error=0.02,
    ranks=(1, 3),
    copies=(3, 4),
    copies_more=5,
    standings={"BM25": Standing(2.5, 4)},
)


def results() -> Results:
    return Results(
        [
            QueryResult("p", "c", False, [KNOWN], [Hit(1, 9, 9, -0.5)], "layer"),
            QueryResult("q", "d", False, [Hit(1, 2, 2, 0.1, {"label": [1]}, tied=True)], [], "layer"),
        ]
    )


def test_to_list_is_flat_and_every_row_has_the_same_keys() -> None:
    rows = results().to_list()
    assert [(row["query"], row["side"], row["index"]) for row in rows] == [
        (0, "helpful", 70),
        (0, "harmful", 9),
        (1, "helpful", 2),
    ]
    assert rows[0] == {
        "query": 0,
        "side": "helpful",
        "rank": 1,
        "index": 70,
        "row": 7,
        "score": 0.5,
        "error": 0.02,
        "first_rank": 1,
        "last_rank": 3,
        "tied": False,
        "estimate": None,
        "p": None,
        "q": None,
        "copies": 7,
        "BM25 score": 2.5,
        "BM25 rank": 4,
        "asked": "p",
        "answered": "c",
        "example.text": "a",
        "example.rank": "of its own",
        "example.label": None,
    }
    assert len({tuple(row) for row in rows}) == 1
    assert rows[1]["BM25 rank"] is None
    assert rows[2]["tied"] is None
    assert rows[2]["example.label"] == [1]
    json.dumps(rows)
    assert Results().to_list() == []


def test_to_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    frame = results().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["score"].tolist() == [0.5, -0.5, 0.1]
    assert frame.loc[0, "example.text"] == "a"
    assert len(Results().to_pandas()) == 0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"needs the package pandas; pip install 'rapidin\[notebook\]'"):
        results().to_pandas()
