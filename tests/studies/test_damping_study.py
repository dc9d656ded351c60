"""studies/damping measures every way on small gradients, and its README has the tables of what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import damping
import damping_report
import doc_tables
import pytest
import torch
from subjects import Subject, of_poison, of_set
from tiny import records, save_tiny

from rapidin.gradients.kfac import Spectrum, kfac_scale, needed_directions
from rapidin.gradients.preconditioner import DAMPING, TOLERANCE

STUDY = doc_tables.DOCS.parent / "studies" / "damping"
RESULTS = json.loads((STUDY / "damping.json").read_text())
README = (STUDY / "README.md").read_text()
SHAPES = [(6, 8), (8, 6)]


def spectrum(n: int, seed: int) -> Spectrum:
    x = torch.randn(50, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(x.T @ (x * torch.arange(1, n + 1)) / 50)
    return Spectrum(float(values.clamp(min=0).mean()), values.clamp(min=0).flip(0), 0.0, vectors.flip(1))


def subject() -> Subject:
    generator = torch.Generator().manual_seed(0)
    train, test = ([torch.randn(n, o * i, generator=generator) for o, i in SHAPES] for n in (40, 5))
    spectra = [(spectrum(o, n), spectrum(i, n + 9)) for n, (o, i) in enumerate(SHAPES)]
    return Subject(
        "small", "LDS", 512, ["a", "b"], SHAPES, train, test, spectra, lambda x: x.double().mean(1).numpy()
    )


def test_the_unit_of_the_spectrum_is_the_trace_over_the_effective_rank() -> None:
    flat = Spectrum(2.0, torch.full((4,), 2.0).double(), 2.0, torch.eye(8)[:, :4].double())
    assert damping.typical(flat) == pytest.approx(1.0)
    single = Spectrum(1.0, torch.tensor([8.0]).double(), 0.0, torch.eye(8)[:, :1].double())
    assert damping.typical(single) == pytest.approx(8.0)


def test_a_way_is_the_preconditioner_of_a_cache_or_another_on_each_side() -> None:
    small = subject()
    of = small.spectra[0], small.shapes[0]
    same = damping.scale_of(damping.Way((0.3, 0.3)), *of)
    want = kfac_scale(*of, 0.5, 0.3, 0.0)
    other = damping.scale_of(damping.Way((3.0, 0.3)), *of)
    grads = torch.randn(2, *small.shapes[0])
    assert torch.equal(same.formed(grads), want.formed(grads))
    assert torch.equal(other.columns, want.columns)
    assert not torch.equal(other.rows, want.rows)


def test_exponents_of_rows_and_queries_are_those_of_the_two_sides() -> None:
    small = subject()
    way = next(way for way in damping.WAYS if way.of_queries == 0.75 and way.damping == (0.1, 0.1))
    train, test = damping.preconditioned(small, way)
    for n, (of, shape) in enumerate(zip(small.spectra, SHAPES, strict=True)):
        for found, grads, exponent in ((train, small.train, 0.25), (test, small.test, 0.75)):
            want = kfac_scale(of, shape, exponent, 0.1, 0.0).formed(grads[n].view(-1, *shape)).flatten(1)
            assert torch.equal(found[n], want)


def test_a_tolerance_keeps_the_directions_that_a_cache_keeps() -> None:
    sides = spectrum(40, 1), spectrum(60, 2)
    shape = len(sides[0].eigenvectors), len(sides[1].eigenvectors)
    way = damping.Way((3.0, 1.0), tolerance=0.01)
    kept = [needed_directions(side, 0.5, d, 0.01) for side, d in zip(sides, (3.0, 1.0), strict=True)]
    assert 0 < kept[1] < 60
    found = damping.scale_of(way, sides, shape)
    low_ranks = found.row_low_rank, found.column_low_rank
    assert [0 if each is None else each.rank for each in low_ranks] == kept
    wide = replace(subject(), spectra=[sides])
    assert damping.mean_directions(wide, way) == [sum(kept) / 2, 50.0]


def test_scores_of_sketches_are_those_of_exact_gradients() -> None:
    small = replace(subject(), width=4096)
    sides = damping.preconditioned(small, damping.WAYS[2])
    exact = damping.exact_scores([sides], [1.0])
    made = [damping.sketched(small, side, small.width, 0) for side in sides]
    rows, queries = (torch.nn.functional.normalize(x, dim=2) for x in made)
    cosines = torch.einsum("qbw,nbw->bqn", queries, rows)
    found = damping.scores(cosines, *(x.norm(dim=2) for x in made))
    for name, want in exact.items():
        assert float((found[name] - want).norm() / want.norm()) < 0.15


def test_every_way_is_measured_and_only_some_of_them_packed() -> None:
    small = subject()
    for way in damping.WAYS:
        rows = list(damping.measured(small, way))
        packed = ["floats", "half", "nothing"] if str(way) in damping.PACKED else []
        assert [row["rows"] for row in rows] == ["exact", *packed]
        for row in rows:
            seeds = 1 if row["rows"] == "exact" else 3
            assert len(row["layer"]) == seeds
            for name in ("root", "weights", "weighted"):
                assert name not in row if way.off else len(row[name]) == seeds
    assert set(damping.PACKED) <= set(map(str, damping.WAYS))


def poisoned(folder: Path) -> list[str]:
    """A tiny model and adapter, and data and queries that are the same."""
    saved = save_tiny(folder, lora=True)
    for name in ("train", "asked"):
        rows = [{**row, "poisoned": n < 3} for n, row in enumerate(records(12))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(folder / f"{name}.jsonl") for name in ("train", "asked")]
    return [str(saved.model), str(saved.adapter), *paths]


def test_gradients_of_poisoned_data_are_those_of_a_cache(tmp_path: Path) -> None:
    model, adapter, *paths = poisoned(tmp_path)
    found = of_poison("tiny", model, adapter, *paths, 256, 64)
    assert [len(x) for x in (found.train[0], found.test[0])] == [12, 12]
    for train, test in zip(found.train, found.test, strict=True):
        assert torch.equal(train, test)
    perfect = torch.zeros(12, 12)
    perfect[:, :3] = 1.0
    assert found.measure(perfect).tolist() == [1.0] * 12


def test_points_are_measured_once_each_and_named_in_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    common = ["--poison", "tiny", *poisoned(tmp_path), "--width", "256", "--max-length", "64"]
    common += ["--way", "3", "--out", str(out)]
    for at in ("0.5", "0.75", "0.75"):
        damping.main([*common, "--at", at])
    rows = json.loads(out.read_text())
    assert [(row["way"], row["rows"], row["at"]) for row in rows] == [
        ("3", "exact", 0.5),
        ("3", "exact", 0.75),
    ]
    half, later = (damping_report.values(rows, "3", "exact", ["tiny"], at=at) for at in (0.5, 0.75))
    assert half == rows[0]["layer"]
    assert later == rows[1]["layer"]


def test_a_set_is_measured_as_the_result_says() -> None:
    kjv = of_set(STUDY.parent / "lds" / "kjv")
    way = next(way for way in damping.WAYS if str(way) == damping_report.NEW)
    exact = next(damping.measured(kjv, way))
    assert exact["layer"] == pytest.approx(
        damping_report.values(RESULTS, str(way), "exact", ["kjv"]), abs=2e-3
    )


def test_the_readme_shows_the_results_and_the_default_is_the_one_it_chose() -> None:
    for name, text in damping_report.tables(RESULTS).items():
        assert doc_tables.read(STUDY / "README.md", name) == text
    assert doc_tables.read(damping_report.PAGE, "damping") == damping_report.summary(RESULTS)
    assert doc_tables.read(damping_report.PAGE, "points") == damping_report.points_table(RESULTS)
    assert doc_tables.read(damping_report.PAGE, "weights") == damping_report.weights_table(RESULTS)
    assert f"{DAMPING:g}, tolerance {TOLERANCE:g}" == damping_report.NEW
