"""flipped_labels.py runs at tiny sizes, and its README has the tables and ranges of its results."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import doc_tables
import pytest
import torch

STUDY = doc_tables.DOCS.parent / "studies" / "flipped_labels"
MODULE = runpy.run_path(str(STUDY / "flipped_labels.py"))
ROWS = json.loads((STUDY / "flipped_labels.json").read_text())["rows"]
DATAINF = runpy.run_path(str(STUDY / "datainf.py"))
EXACT = json.loads((STUDY / "datainf.json").read_text())["rows"]
README = re.sub(r"\s+", " ", (STUDY / "README.md").read_text())
GUIDE = re.sub(r"\s+", " ", (doc_tables.DOCS / "guide" / "tasks.md").read_text())


@pytest.mark.full
def test_every_line_runs_and_results_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    MODULE["main"](["--quick", "--seed", "5", "--out", str(out)])
    row = json.loads(out.read_text())["rows"][0]
    assert row["seed"] == 5
    for tuning in ("short", "long"):
        assert set(row["auc"][tuning]) == set(ROWS[0]["auc"][tuning])
        assert all(0 <= value <= 1 for value in row["auc"][tuning].values())


def test_a_share_of_the_labels_is_flipped_and_the_target_set_is_correct() -> None:
    sizes = MODULE["Sizes"]()
    train, target, test = MODULE["make_examples"](sizes, 0)
    eaten = {goods for kind in MODULE["EATEN"] for goods in MODULE["CLASSES"][kind]}
    for record in [*train, *target, *test]:
        right = bool(eaten.intersection(re.findall("[a-z]+", record["text"])))
        assert (record["label"] == right) != record["flipped"]
    assert sum(record["flipped"] for record in train) == 80
    assert not any(record["flipped"] for record in [*target, *test])
    texts = {record["text"] for record in train}
    assert texts.isdisjoint(record["text"] for record in [*target, *test])


def test_the_first_training_knows_some_goods_only() -> None:
    sizes = MODULE["Sizes"]()
    reports = MODULE["first_examples"](sizes, 0)
    words = {word for record in reports for word in re.findall("[a-z]+", record["text"])}
    for goods in MODULE["CLASSES"].values():
        assert words.issuperset(goods[: sizes.known])
        assert words.isdisjoint(goods[sizes.known :])


def test_the_readme_shows_the_results() -> None:
    assert doc_tables.read(STUDY / "README.md", "flipped labels") == MODULE["table"](ROWS)
    assert [row["seed"] for row in ROWS] == [0, 1, 2]


RUNS = [aucs for row in ROWS for aucs in row["auc"].values()]


def span(*starts: str) -> str:
    """The range of the AUCs whose names begin so, over all seeds and tunings, as the README says it."""
    found = [value for run in RUNS for name, value in run.items() if name.startswith(starts)]
    return f"{min(found):.3f} to {max(found):.3f}"


def above(one: str, other: str) -> int:
    """Number of runs in which one ranking has the higher AUC."""
    return sum(run[one] > run[other] for run in RUNS)


def test_the_ranges_of_the_answer_are_those_of_the_results() -> None:
    loss, half = span("loss"), "kfac, at 0.5"
    for said in (
        f"all six runs (3 seeds, 2 tunings): {span(f'target set fisher:layer, {half}')}, and {loss}.",
        f"The default, `dot:layer` there, has {span(f'target set dot:layer, {half}')},",
        f"without it the range is {span('target set dot:layer, off, at 0.5')}.",
        f"at the tuned model has {span('target set datainf:none, off, at 1')}, below",
        f"With `layer` it has {span('target set datainf:layer, off, at 1')},",
        f"with K-FAC too {span('target set datainf:layer, kfac, at 1')}.",
        f"at the tuned model ({span('self-influence dot:none, off, at 1')}), below",
        f"it has {span(*(f'self-influence {m}:none, {half}' for m in ('dot', 'datainf', 'fisher')))} by all",
    ):
        assert said in README
    for said in (
        f"an AUC of {span(f'target set fisher:layer, {half}')} by `fisher:layer`",
        f"and {span(f'target set dot:layer, {half}')} by the default; the example's own loss has {loss}.",
        f"at the tuned model ({span('self-influence dot:none, off, at 1')}).",
    ):
        assert said in GUIDE
    right = [shares["test"] for row in ROWS for shares in row["accuracy"].values()]
    assert f"the accuracy on the test is {min(right):.1%} to {max(right):.1%}." in README


@pytest.mark.parametrize(
    ("one", "other", "runs"),
    [
        ("target set fisher:layer, kfac, at 0.5", "loss, at 1", 6),
        ("target set dot:layer, kfac, at 0.5", "loss, at 1", 5),
        ("target set dot:layer, kfac, at 0.5", "target set dot:layer, off, at 0.5", 6),
        ("target set dot:layer, off, at 0.5", "target set dot:none, off, at 0.5", 6),
        ("target set dot:layer, kfac, at 0.5", "target set dot:none, kfac, at 0.5", 4),
        ("loss, at 1", "target set datainf:none, off, at 1", 5),
        ("target set dot:none, off, at 1", "target set datainf:none, off, at 1", 4),
        ("loss, at 1", "self-influence dot:none, off, at 1", 4),
    ],
)
def test_the_runs_that_the_answer_counts(one: str, other: str, runs: int) -> None:
    assert above(one, other) == runs


# ------------------------------------------------------------------------------------------- DataInf


def test_every_line_of_the_look_at_datainf_runs(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    DATAINF["main"](["--quick", "--seed", "5", "--out", str(out)])
    row = json.loads(out.read_text())["rows"][0]
    assert all(set(row["auc"][tuning]) == set(EXACT[0]["auc"][tuning]) for tuning in ("short", "long"))


def test_datainf_and_the_inverse_are_those_of_formed_matrices() -> None:
    torch.manual_seed(0)
    y, v = torch.randn(6, 4).double(), torch.randn(4).double()
    size, eye = 0.3 * y.square().mean(), torch.eye(4).double()
    each = torch.stack([torch.linalg.inv(size * eye + torch.outer(row, row)) for row in y]).mean(0)
    torch.testing.assert_close(DATAINF["by_datainf"](y, v, 0.3), y @ each @ v)
    whole = torch.linalg.inv(size * eye + y.T @ y / len(y))
    torch.testing.assert_close(DATAINF["by_inverse"](y, v, 0.3), y @ whole @ v)


def exact_span(name: str, tuning: str) -> str:
    found = [row["auc"][tuning][name] for row in EXACT]
    return f"{min(found):.3f} to {max(found):.3f}"


def test_what_the_readme_says_of_datainf_is_what_was_found() -> None:
    assert doc_tables.read(STUDY / "README.md", "DataInf") == DATAINF["table"](EXACT)
    one, ten = "the inverse itself, damping 0.1", "the inverse itself, damping 10"
    ours, head, lora = (f"DataInf, damping 0.1{part}" for part in ("", ", the head alone", ", LoRA alone"))
    for said in (
        f"has {exact_span(one, 'short')} after the short tuning, "
        f"where DataInf's has {exact_span(ours, 'short')}.",
        f"the long one it has {exact_span(one, 'long')}, and with a damping of 10 {exact_span(ten, 'long')}, "
        f"where DataInf's has {exact_span(ours, 'long')} with 0.1.",
        f"the head alone has {exact_span(head, 'short')} and LoRA {exact_span(lora, 'short')}, after",
        f"the head has {exact_span(head, 'long')} and LoRA {exact_span(lora, 'long')}.",
    ):
        assert said in README
    sketched, dampings = [], []
    for row, exact in zip(ROWS, EXACT, strict=True):
        for tuning, found in exact["auc"].items():
            cached = row["auc"][tuning]["target set datainf:none, off, at 1"]
            sketched.append(abs(found[ours] - cached))
            same = [found[f"DataInf, damping {damping:g}"] for damping in DATAINF["DAMPINGS"]]
            dampings.append(max(same) - min(same))
    assert f"within {max(sketched):.3f} of the cache's" in README
    assert f"changes by at most {max(dampings):.3f}." in README
