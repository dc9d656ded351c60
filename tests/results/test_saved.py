"""Results are read back from their JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from made_results import hostile, made

from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.html import page
from rapidin.results.json import results_json
from rapidin.results.verdict import Common, Place, Verdict

VERDICT = Verdict(
    "strong", 0.5, Place((0.1, 0.2, 0.6), 2), Place((0.3,), 1), (Common("web", 2, 3, 0.1, "source"),)
)


def test_what_was_written_comes_back() -> None:
    results = [
        replace(made(hits=6, generation=4, length=9, pool=2), verdict=VERDICT, missing=("planet",)),
        replace(made(hits=0, generation=0, extra=False), verdict=Verdict("unknown", reason="no null")),
        hostile(),
    ]
    written = json.loads(results_json(results))
    again = Results.from_json(written)
    assert json.loads(results_json(again)) == written
    assert again[0].verdict == VERDICT
    assert [hit.index for hit in again[0].top] == [hit.index for hit in results[0].top]
    assert again[0].top[0].parts == results[0].top[0].parts
    assert page(again).startswith("<!DOCTYPE html>")


def test_a_verdict_of_an_earlier_version_is_left_out() -> None:
    written = json.loads(results_json([replace(made(hits=2), verdict=VERDICT)]))
    del written["queries"][0]["verdict"]["questions"]["scores"]
    assert Results.from_json(written)[0].verdict is None


@pytest.mark.parametrize("value", [{}, {"queries": [{}]}, {"queries": [{"prompt": "a"}]}, {"queries": 3}])
def test_anything_else_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not what 'rapidin query --json' writes"):
        Results.from_json(value)
