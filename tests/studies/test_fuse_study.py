"""studies/fuse scores rankings as a query fuses them, and its README has the tables of what it found."""

from __future__ import annotations

import json

import doc_tables
import fuse as study
import fuse_report
import numpy as np
import pytest

from rapidin.attribution import fusion
from rapidin.results.fusion import BEST, SAME

RESULTS = json.loads(fuse_report.RESULTS.read_text())


def truth() -> study.Truth:
    rng = np.random.default_rng(0)
    scores = {name: rng.standard_normal((4, 30)) for name in fusion.RANKINGS}
    scores["BM25"] = scores["BM25"].clip(min=0)
    return study.Truth("small", "facts", scores, relevant=rng.random((4, 30)) < 0.2)


def test_fused_scores_are_those_of_a_query() -> None:
    small, counted = truth(), np.ones(30, dtype=np.bool_)
    parts = {name: study.reciprocal(name, scores) for name, scores in small.scores.items()}
    for weights in ((1.0, 1.0, 1.0), (1.0, 0.25, 0.0)):
        found = study.fused(parts, weights)
        for query in range(4):
            ranks = {
                name: fusion.best_rows(scores[query], counted, nonzero=name == "BM25")
                for name, scores in small.scores.items()
            }
            want = fusion.fuse(ranks, weights)
            assert found[query].nonzero()[0].tolist() == sorted(want.rows)
            for row, fused in want.by_row.items():
                assert found[query, row] == pytest.approx(fused.score)


def test_every_way_and_all_weights_are_measured() -> None:
    small = truth()
    found = study.measured(small)
    assert list(found["ways"]) == list(study.WAYS)
    assert len(found["weights"]) == len(study.STEPS) ** 2
    want = small.figures(small.scores["gradients"])["MRR"]
    assert found["ways"]["gradients"]["MRR"] == pytest.approx(want.tolist(), abs=1e-4)
    assert found["ranks alone"]["gradients"]["MRR"] == found["ways"]["gradients"]["MRR"]
    assert found["weights"]["1 1"] == pytest.approx(np.mean(found["ways"]["fused"]["MRR"]), abs=1e-4)
    own = small.scores["gradients"]
    assert study.common(own, own, "gradients") == [10] * 4


@pytest.mark.full
def test_a_set_is_measured_as_the_result_says() -> None:
    lds = doc_tables.DOCS.parent / "studies" / "lds"
    scores = study.of_retrained(lds / "kjv")
    kjv = next(row for row in RESULTS if row["subject"] == "kjv")
    for name in fusion.RANKINGS:
        found = float(scores.figures(scores.scores[name])["LDS"].mean())
        assert found == pytest.approx(fuse_report.mean(kjv["ways"][name]["LDS"]), abs=2e-3)


def test_pages_show_the_results() -> None:
    for name, text in fuse_report.tables(RESULTS).items():
        assert doc_tables.read(fuse_report.HERE / "README.md", name) == text
    assert doc_tables.read(fuse_report.PAGE, "fuse") == fuse_report.ways_table(RESULTS)


def test_the_threshold_is_what_two_sketches_have_in_common() -> None:
    again = [count for row in RESULTS for count in row.get("two sketches", ())]
    assert round(fuse_report.mean(again)) >= SAME
    assert SAME < BEST


def test_one_fused_ranking_is_not_better_everywhere() -> None:
    """What the guide says of when to fuse."""
    by = {row["subject"]: row["ways"] for row in RESULTS}
    for name in ("kjv", "orders", "alpaca"):
        assert (
            fuse_report.mean(by[name]["fused"]["LDS"]) < fuse_report.mean(by[name]["gradients"]["LDS"]) - 0.1
        )
    for name in ("facts-0", "facts-1"):
        assert fuse_report.mean(by[name]["fused"]["recall at 10"]) == 1.0
        assert fuse_report.mean(by[name]["gradients"]["recall at 10"]) < 0.95
