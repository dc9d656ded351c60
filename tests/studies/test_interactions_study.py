"""studies/interactions groups texts as it says, and its README has the table of what it found."""

from __future__ import annotations

import json

import doc_tables
import interactions
import numpy as np
import pytest
import retrain
import torch
from lds import RetrainedSet, sets

from rapidin.attribution.interactions import DAMPING

STUDY = doc_tables.DOCS.parent / "studies" / "interactions"
RESULTS = json.loads((STUDY / "interactions.json").read_text())


def figure(name: str, version: str, rows: str, way: str, figure: str) -> float:
    (found,) = [
        row[figure]
        for row in RESULTS
        if (row["set"], row["version"], row["rows"], row["way"]) == (name, version, rows, way)
    ]
    return float(found)


@pytest.mark.parametrize("version", retrain.VERSIONS)
def test_rows_are_in_groups(version: str) -> None:
    for folder in sets():
        truth = RetrainedSet(folder)
        rows, groups = retrain.rows_of(truth, version)
        assert np.bincount(groups).tolist() == [retrain.SIZE] * retrain.GROUPS
        first, last = rows[groups == 0], rows[groups == retrain.GROUPS - retrain.TWICE]
        assert (first.tolist() == last.tolist()) == (version == "twice")
        assert len(set(rows.tolist())) == (165 if version == "twice" else 240)
        with np.load(STUDY / f"{folder.name}-{version}.npz", allow_pickle=False) as file:
            assert file["rows"].tolist() == rows.tolist()
            assert not np.isnan(file["without"]).any()


def test_figures_by_hand() -> None:
    found = torch.zeros(retrain.GROUPS + 1, retrain.GROUPS)
    found[1:].fill_diagonal_(2.0)
    found[-1, -1] = 4.0
    truth = found.double().numpy() ** 2
    named = interactions.figures(found, truth, "twice")
    assert named["own"] == 1.0
    assert named["twice"] == pytest.approx((9 * 2 + 4) / 10 / 2)
    assert "twice" not in interactions.figures(found, truth, "plain")


def test_the_readme_shows_the_results() -> None:
    assert doc_tables.read(STUDY / "README.md", "table") == interactions.table(RESULTS)


@pytest.mark.parametrize("rows", ["float16", "2,048 bytes"])
def test_interactions_predict_better(rows: str) -> None:
    for name in ("kjv", "orders"):
        for version in retrain.VERSIONS:
            by_sum, by_net = (
                [figure(name, version, rows, way, each) for each in ("queries", "own")]
                for way in ("sum", f"net, {DAMPING:g}")
            )
            assert by_net[0] > by_sum[0] - 0.006
            assert by_net[1] > by_sum[1] + 0.05
