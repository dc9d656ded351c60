"""studies/pretrained scores, retrains and reports as it says, on a tiny model; and shows what it found."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import doc_tables
import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rank_bm25")

import pretrained
import pretrained_report as report
import pretrained_retrained as retrained
import pretrained_scores
from pretrained_files import (
    REMOVALS,
    RESULTS,
    SECOND,
    Scores,
    kept_truth,
    key,
    restore,
    save_trainings,
    trainings,
)
from tiny import save_tiny

from rapidin import Attributor
from rapidin.errors import UserError
from rapidin.evaluate import ground_truth
from rapidin.evaluate.ground_truth import GroundTruth
from rapidin.evaluate.lds import correlations
from rapidin.evaluate.settings import GroundTruthSettings, Recipe

STUDY = Path(pretrained.__file__).parent
WORDS = ("fox", "dog", "quick", "lazy")
ROWS = [
    {"prompt": f"Row {n}: the", "completion": f" {WORDS[n % 4]} {WORDS[n // 4 % 4]} {n}"} for n in range(40)
]
ASKED = [{"prompt": f"Row {n}: the", "completion": f" {word}"} for n, word in enumerate(WORDS)]
SETTINGS = GroundTruthSettings(
    Recipe(epochs=2, batch=8, learning_rate=1e-2),
    lora=4,
    subsets=4,
    fraction=0.8,
    max_length=24,
    checkpoints=0,
)
SCORED = [
    "baselines",
    "exact gradients at 1, off",
    "exact gradients at 0.5, kfac",
    "stored gradients at 0.5, kfac",
    "rapidgrad",
    "RISE at 1",
    "fused",
    "cache at 0.5",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[GroundTruth, Path]:
    """A truth of four retrainings, and the folder of the study with the scores of SCORED."""
    folder = tmp_path_factory.mktemp("pretrained")
    saved = save_tiny(folder)
    for name, rows in (("rows", ROWS), ("asked", ASKED)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth = ground_truth.make(
        folder / "truth",
        str(saved.model),
        str(folder / "rows.jsonl"),
        str(folder / "asked.jsonl"),
        SETTINGS,
        device="cpu",
    )
    pretrained.main(["scores", str(truth.folder), str(folder / "work"), "--only", *SCORED])
    return truth, folder / "work"


def test_gradients_give_the_scores_of_a_cache(made: tuple[GroundTruth, Path]) -> None:
    _, work = made
    _, exact = Scores(work).load("exact gradients at 0.5, kfac")
    _, stored = Scores(work).load("stored gradients at 0.5, kfac")
    _, cached = Scores(work).load("cache at 0.5")
    for key_of_cache, want in cached.items():
        method = key_of_cache.split("|")[0]
        (floats,) = (x for name, x in stored.items() if name.startswith(f"{method}|kfac|width"))
        of = {"floats": (floats, 0.999), "exact": (exact[key(method, "kfac", "exact")], 0.9)}
        of["packed"] = (stored[key(method, "kfac", "2,048 bytes")], 0.8)
        for kind, (found, least) in of.items():
            assert np.corrcoef(found.ravel(), want.ravel())[0, 1] > least, (method, kind)
    assert len(exact) == len(cached)
    assert len(stored) == 2 * len(cached)


def test_the_papers_projection_is_that_of_a_cache(made: tuple[GroundTruth, Path], tmp_path: Path) -> None:
    truth, work = made
    attributor = Attributor(truth.tuned("cpu").load(), at=1.0, projection="rapidgrad", max_length=24)
    cache = attributor.cache(str(truth.folder / "train.jsonl"), tmp_path / "cache", null=False)
    want = attributor.scores(cache, list(truth.examples("test")))
    found = Scores(work).load("rapidgrad")[1][key("rapidgrad", "off", "65,536 numbers")]
    np.testing.assert_allclose(found, np.asarray(want), atol=2e-3)


def test_the_residual_channel_is_the_gradient_of_the_output_layer(made: tuple[GroundTruth, Path]) -> None:
    truth, work = made
    loaded = truth.tuned("cpu").load()
    texts = pretrained_scores.encoded(truth, loaded)
    weight = loaded.model.get_output_embeddings().weight.requires_grad_()
    rows = []
    for text in [texts["test"][1], *texts["train"][:3]]:
        labels = torch.tensor(
            [[i if counts else -100 for i, counts in zip(text.ids, text.target, strict=True)]]
        )
        loss = loaded.model(input_ids=torch.tensor([text.ids]), labels=labels).loss
        rows.append(torch.nn.functional.normalize(torch.autograd.grad(loss, weight)[0].flatten(), dim=0))
    about, scores = Scores(work).load("RISE at 1")
    found = scores[key("residual channel", "off", "exact")][1, :3]
    np.testing.assert_allclose(found, [float(rows[0] @ row) for row in rows[1:]], atol=1e-4)
    assert about["package"] == "RISE"


def test_what_is_there_is_not_computed_again(made: tuple[GroundTruth, Path]) -> None:
    truth, work = made
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.npz")}
    pretrained.main(["scores", str(truth.folder), str(work), "--only", "baselines", "RISE at 1"])
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.npz")} == before


def test_an_unknown_way_is_one_line(
    made: tuple[GroundTruth, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    truth, work = made
    with pytest.raises(SystemExit) as stopped:
        pretrained.main(["scores", str(truth.folder), str(work), "--only", "astrology"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("pretrained: unknown way 'astrology'")


def test_trainings_repeat_the_truths_own_and_resume(made: tuple[GroundTruth, Path], tmp_path: Path) -> None:
    truth, _ = made
    said: list[str] = []
    path = tmp_path / "again.npz"
    run = {"only_cost": False, "log": said.append}
    retrained.train_missing(truth, path, truth.masks[:2], [1, 2], {}, only_cost=True, log=said.append)
    assert not path.exists()
    assert "2 of 2 trainings are missing, of 8 steps" in said[-1]
    again = retrained.train_missing(truth, path, truth.masks[:2], [1, 2], {}, **run)
    np.testing.assert_allclose(again, truth.losses[:2, 0], rtol=1e-5)
    masks, seeds, losses, about = trainings(path)
    losses[1] = np.nan
    save_trainings(path, masks, seeds, losses, about)
    np.testing.assert_array_equal(
        retrained.train_missing(truth, path, truth.masks[:2], [1, 2], {}, **run), again
    )
    with pytest.raises(UserError, match="other trainings"):
        retrained.train_missing(truth, path, truth.masks[:2], [1, 3], {}, **run)


@pytest.mark.full
def test_removals_leave_out_what_is_ranked_first(made: tuple[GroundTruth, Path], tmp_path: Path) -> None:
    truth, work = made
    for command in ("second", "removals"):
        pretrained.main([command, str(truth.folder), str(work)])
    masks, seeds, losses, about = trainings(work / REMOVALS)
    assert not np.isnan(losses).any()
    assert set(seeds) == {0}
    assert (~masks).sum(1).tolist() == [2] * len(masks)
    assert len(about["methods"]) == retrained.LEADING
    assert len({json.dumps(mask.tolist()) for mask in masks}) == len(masks)
    for family, query, training in about["of"]:
        if family != "random":
            way, name = about["methods"][family]
            scores = Scores(work).load(way)[1][name][query]
            gone = np.flatnonzero(~masks[training])
            assert scores[gone].min() >= np.delete(scores, gone).max()
    assert trainings(work / SECOND)[2].shape == (4, 4)

    out = tmp_path / "kept"
    pretrained.main(["keep", str(truth.folder), str(work), "--out", str(out)])
    results = report.measured(out)
    assert (results["retrainings"], results["subsets"]) == (4, 4)
    assert -1 <= results["second seeds"]["mean"] <= 1
    row = next(row for row in results["lds"] if row["method"] == "BM25")
    bm25 = Scores(work).load("baselines")[1]["BM25"]
    assert row["mean"] == pytest.approx(correlations(truth.masks, truth.losses, bm25).mean(), abs=2e-2)
    gone = results["removals"]
    assert gone["trainings"] == gone["of"] == len(masks)
    family, row = next(iter(gone["methods"].items()))
    mine = [(query, training) for name, query, training in about["of"] if name == family]
    added = [losses[training, query] - losses[:10, query].mean() for query, training in mine]
    assert row["mean"] == pytest.approx(np.mean(added), abs=1e-4)
    means = {name: of["mean"] for name, of in gone["methods"].items()}
    first = max(means, key=lambda name: means[name])
    assert "behind the first" not in gone["methods"][first]
    for name, of in gone["methods"].items():
        if name != first:
            assert of["behind the first"]["mean"] == pytest.approx(means[first] - of["mean"], abs=2e-4)
    other = list(gone["methods"])[1]
    sets = [
        [set(np.flatnonzero(~masks[training]).tolist()) for name, _, training in about["of"] if name == one]
        for one in (family, other)
    ]
    common = np.mean([len(a & b) / len(a) for a, b in zip(*sets, strict=True)])
    assert gone["rows in common"][f"{family} and {other}"] == pytest.approx(common, abs=1e-3)
    for name, table in report.TABLES.items():
        assert table(results).startswith("| "), name


def test_new_folders_go_on_from_what_was_kept(made: tuple[GroundTruth, Path], tmp_path: Path) -> None:
    truth, work = made
    saved, again, kept = truth.folder.parent, tmp_path / "again", tmp_path / "kept"
    model = truth.description["model"]
    masks = truth.masks[:2]
    save_trainings(tmp_path / SECOND, masks, [5, 6], np.ones((2, 4), np.float32), {})
    shutil.copytree(work / "scores", tmp_path / "scores")
    pretrained.main(["keep", str(truth.folder), str(tmp_path), "--out", str(kept)])
    # What a folder has of its own stays.
    again.mkdir()
    save_trainings(again / SECOND, masks, [7, 8], np.zeros((2, 4), np.float32), {})
    for _ in range(2):
        restore(model, tmp_path / "truth", again, kept)
    assert trainings(again / SECOND)[1] == [7, 8]
    assert set(Scores(again).names()) == set(SCORED)
    want = Scores(work).load("baselines")[1]["BM25"]
    found = Scores(again).load("baselines")[1]["BM25"]
    np.testing.assert_allclose(found, want / np.abs(want).max(1, keepdims=True), atol=1e-3)

    files = str(saved / "rows.jsonl"), str(saved / "asked.jsonl")
    whole = ground_truth.make(tmp_path / "truth", model, *files, SETTINGS, device="cpu")
    np.testing.assert_array_equal(whole.losses, truth.losses)
    np.testing.assert_array_equal(whole.masks, truth.masks)
    assert whole.tuned("cpu").path.exists()
    with pytest.raises(UserError, match="was made with another"):
        ground_truth.make(tmp_path / "truth", model, *reversed(files), SETTINGS, device="cpu")


def test_unfinished_removals_are_left_out() -> None:
    losses = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 0.0], [np.nan, np.nan]])
    of: list[list[Any]] = [["random", None, 0], ["random", None, 1], ["a", 0, 2], ["a", 1, 3]]
    found, random = retrained.effects(losses, of)
    np.testing.assert_array_equal(found["a"], [3.0, np.nan])
    assert random.shape == (2, 2)


def test_rows_are_the_same_for_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"instruction": f"Say {n}.", "input": "x" if n % 9 == 0 else "", "output": str(n)} for n in range(400)
    ]
    data = tmp_path / "alpaca.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["rows.py", str(data), str(tmp_path / folder)])
        runpy.run_path(str(STUDY / "rows.py"), run_name="__main__")
    made = {name: (tmp_path / "one" / name).read_text() for name in ("train.jsonl", "test.jsonl")}
    assert [len(text.splitlines()) for text in made.values()] == [256, 32]
    assert not set(made["train.jsonl"].splitlines()) & set(made["test.jsonl"].splitlines())
    for name, text in made.items():
        assert (tmp_path / "two" / name).read_text() == text


# --------------------------------------------------------------------------------------- what was found


def test_the_page_shows_the_results() -> None:
    results = json.loads(report.OUT.read_text("utf-8"))
    for name, table in report.TABLES.items():
        assert doc_tables.read(report.PAGE, name) == table(results)


def test_the_results_are_those_of_the_kept_scores() -> None:
    results = json.loads(report.OUT.read_text("utf-8"))
    again = json.loads(json.dumps(report.measured()))
    assert again["setting"] == results["setting"]
    for row, want in zip(again["lds"], results["lds"], strict=True):
        assert {k: v for k, v in row.items() if k not in ("mean", "low", "high")} == {
            k: v for k, v in want.items() if k not in ("mean", "low", "high")
        }
        assert row.get("mean") == pytest.approx(want.get("mean"), abs=1e-3)


def test_the_repository_keeps_numbers_alone_and_few() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    about, masks, losses = kept_truth()
    assert masks.shape == (len(losses), about["train"]["rows"])
    assert {path.suffix for path in files} == {".npz"}
