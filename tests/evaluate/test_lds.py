"""LDS: the figure by hand, and a ground truth that is made, killed, gone on with and scored."""

import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rank_bm25")

from made_truth import made_truth
from tiny import save_tiny

from rapidin.attribution.checkpoints import checkpoint_folders
from rapidin.cli import main
from rapidin.data.encoding import Encoder
from rapidin.errors import UserError
from rapidin.evaluate import ground_truth, lds
from rapidin.evaluate.settings import GroundTruthSettings, Recipe
from rapidin.evaluate.training import Tuner, losses
from rapidin.gradients.load import load_model


class Made(NamedTuple):
    model: str
    train: str
    test: str


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = ("fox", "dog", "quick", "lazy")
ROWS = [{"prompt": f"Row {n}: the", "completion": f" {WORDS[n % 4]} {WORDS[n % 4]}"} for n in range(16)]
ASKED = [{"prompt": "Row 0: the", "completion": f" {word}"} for word in WORDS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("lds")
    # A row that has nothing to learn stays a row.
    rows = [*ROWS[:5], {"prompt": "nothing", "completion": ""}, *ROWS[5:]]
    train, test = write(folder / "train.jsonl", rows), write(folder / "test.jsonl", ASKED)
    return Made(str(save_tiny(folder).model), train, test)


def command(made: Made, out: Path, *more: object) -> list[str]:
    return [
        "eval", "lds", made.model, "--data", made.train, "--test", made.test, "--out", str(out),
        "--subsets", "5", "--seeds", "2", "--epochs", "2", "--batch", "6", "--learning-rate", "1e-2",
        "--checkpoints", "2", "--max-length", "32", "--warm-up", "2", *map(str, more),
    ]  # fmt: skip


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def test_score_by_hand() -> None:
    masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])  # sums 5, 4, 3
    losses = np.array([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]])
    assert lds.correlations(masks, losses, scores).tolist() == [1, -1]
    mean, low, high = lds.score(masks, losses, scores)
    assert (mean, low, high) == (0, -1, 1)
    # Two seeds are averaged: 0.1, 0.35, 0.3.
    seeds = np.array([[[0.0], [0.2]], [[0.4], [0.3]], [[0.3], [0.3]]])
    assert lds.correlations(masks, seeds, scores[:1]) == pytest.approx([0.5])
    unfinished = np.array([[0.1], [np.nan], [0.2], [0.3]])
    assert lds.correlations(masks[[0, 1, 1, 2]], unfinished, scores[:1]) == pytest.approx([1])
    assert lds.correlations(masks, losses, [[np.nan, 2, 1], [3, 2, np.nan]]).shape == (2,)
    with pytest.raises(UserError, match="2 subsets"):
        lds.score(masks[:2], losses[:2], scores)
    with pytest.raises(ValueError, match="do not fit"):
        lds.score(masks, losses, scores[:1])


def test_subsets_are_halves_and_more_of_them_begin_alike() -> None:
    masks = ground_truth.random_subsets(7, 11, 0.5, seed=3)
    assert (masks.sum(1) == 6).all()
    assert (ground_truth.random_subsets(4, 11, 0.5, seed=3) == masks[:4]).all()
    assert not (ground_truth.random_subsets(4, 11, 0.5, seed=4) == masks[:4]).all()
    with pytest.raises(UserError, match="none or all"):
        ground_truth.random_subsets(3, 1, 0.5, seed=0)


def load_script(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "studies" / "lds" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"lds_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_killed_and_gone_on_with_and_scored(
    made: Made, tmp_path: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*command(made, whole, "--only-truth")).code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "rapidin", *command(made, killed, "--only-truth")], stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            if ground_truth.GroundTruth(killed).done >= 3:
                process.send_signal(signal.SIGKILL)
        except UserError:
            pass
        time.sleep(0.005)
    done = ground_truth.GroundTruth(killed).done
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert 3 <= done < 10

    places = ("--at", "0.5", "--at", "checkpoints", "--bytes", "0", "--baselines")
    places += ("--methods", "dot:layer,datainf:none,fisher:layer")
    ran = run(*command(made, killed, *places, "--json", "-"))
    assert ran.code == 0, ran.err
    first, second = ground_truth.GroundTruth(whole), ground_truth.GroundTruth(killed)
    assert (first.masks == second.masks).all()
    assert (first.losses == second.losses).all()
    assert first.losses.shape == (5, 2, 4)
    assert not np.isnan(first.losses).any()
    scaled = (
        "--at",
        "0.5",
        "--precondition",
        "sample",
        "--precondition",
        "optimizer",
        "--methods",
        "dot:layer",
    )
    ran_scaled = run(*command(made, killed, *scaled, "--json", "-"))
    assert ran_scaled.code == 0, ran_scaled.err
    (row,) = json.loads(ran_scaled.out)["results"]
    means = [row[f"at 0.5, preconditioner {name}"]["mean"] for name in ("sample", "optimizer")]
    assert all(-1 <= mean <= 1 for mean in means)
    assert list(checkpoint_folders(second.tuned().checkpoints)) == [3, 6]

    found = json.loads(ran.out)
    assert found["setting"]["retrainings"] == 10
    assert -1 <= found["setting"]["seeds_agree"] <= 1
    rows = {row["method"]: row for row in found["results"]}
    assert {"dot:layer", "datainf:none", "fisher:layer", "BM25", "hidden states"} <= set(rows)
    for place in ("at 0.5", "checkpoints"):
        for row in rows.values():
            assert -1 <= row[place]["low"] <= row[place]["mean"] <= row[place]["high"] <= 1
    # The words of a test example are those of a quarter of the rows: what helps is plain.
    assert rows["dot:layer"]["at 0.5"]["mean"] > 0.3
    again = run(*command(made, killed, *places, "--json", "-"))
    assert json.loads(again.out)["results"] == found["results"]
    assert "retraining:" not in again.err

    # studies/lds/cached.py finds the same of the same cache, and scores ensembles.
    (cache,) = (killed / "caches").glob("at-0.5-width-*")
    masks = ("--masks", "2", "--width", "32", "--out", str(tmp_path / "masks"))
    of = ("--base", made.model, "--data", str(killed / "train.jsonl"))
    assert run("cache", str(killed / "tuned"), *of, *masks).code == 0
    capsys.readouterr()
    cached = load_script("cached")
    cached.main([str(killed), str(cache), str(tmp_path / "masks"), "--methods", "dot:layer,fisher:layer"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["dot:layer", "fisher:layer"] * 2
    for line in said[:2]:
        _, method, mean, low, _, high = re.sub("[()]", "", line).split()
        want = rows[method]["at 0.5"]
        assert [float(mean), float(low), float(high)] == pytest.approx(
            [want[key] for key in ("mean", "low", "high")], abs=5.1e-4
        )
    assert all(-1 <= float(line.split()[2]) <= 1 for line in said[2:])
    (tmp_path / "other.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "masks").rename(tmp_path / "of-other")
    of = ("--base", made.model, "--data", str(tmp_path / "other.jsonl"))
    assert run("cache", str(killed / "tuned"), *of, *masks).code == 0
    with pytest.raises(SystemExit):
        cached.main([str(killed), str(tmp_path / "masks")])
    assert "is not of the training examples" in capsys.readouterr().err


def test_a_retraining_is_what_it_says(made: Made, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch=4, learning_rate=1e-2, seed=5)
    settings = GroundTruthSettings(recipe, lora=2, subsets=3, seeds=2, checkpoints=0, max_length=32)
    truth = ground_truth.make(tmp_path / "out", made.model, ROWS, ASKED, settings)
    assert sorted(path.name for path in truth.folder.iterdir() if path.name[0] != ".") == [
        "adapter", "lds.json", "retrained.npz", "test.jsonl", "train.jsonl",
    ]  # fmt: skip
    loaded = load_model(made.model)
    encoder = Encoder(loaded.tokenizer, max_length=32)
    asked = [encoder(row) for row in ASKED]
    kept = [encoder(row) for row, mask in zip(ROWS, truth.masks[1], strict=True) if mask]
    model = Tuner(loaded, lora=2).tuned(kept, Recipe(epochs=2, batch=4, learning_rate=1e-2, seed=5 + 1 + 2))
    assert (losses(model, asked).numpy() == truth.losses[1, 0]).all()
    for n, text in enumerate(asked):
        assert losses(model, [text])[0].item() == pytest.approx(truth.losses[1, 0, n], rel=1e-5)
    # The tuned model knows the way back to the base.
    tuned = truth.tuned().load()
    with tuned.path.at(0.0):
        base = losses(tuned.model, asked)
    assert base.numpy() == pytest.approx(losses(load_model(made.model).model, asked).numpy(), rel=1e-4)
    # More subsets: those that are there stay.
    more = ground_truth.make(
        truth.folder, made.model, ROWS, ASKED,
        GroundTruthSettings(recipe, lora=2, subsets=5, seeds=2, checkpoints=0, max_length=32),
    )  # fmt: skip
    assert (more.losses[:3] == truth.losses).all()
    assert more.done == 10
    fewer = ground_truth.make(truth.folder, made.model, ROWS, ASKED, settings)
    assert fewer.done == 10


def test_mistakes(made: Made, tmp_path: Path, run: Any) -> None:
    def refused(pattern: str, *arguments: str) -> None:
        ran = run(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert re.search(pattern, ran.err.splitlines()[-1]), ran.err

    out = tmp_path / "out"
    assert run(*command(made, out, "--only-truth", "--lora", 2)).code == 0
    refused("another epochs .2 instead of 4", *command(made, out, "--lora", 2, "--epochs", 4))
    refused("another lora .2 instead of None", *command(made, out))
    other = write(tmp_path / "other.jsonl", ROWS[:8])
    refused("another training data", *command(made, out, "--lora", 2, "--data", other))
    refused("data not found", *command(made, out, "--test", tmp_path / "none.jsonl"))
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": ""}])
    refused("line 1: no completion token", *command(made, tmp_path / "new", "--test", empty))
    refused("--fraction must be between 0 and 1, got 1.5", *command(made, out, "--fraction", 1.5))
    refused("no usable model|model not found", *command(Made("./no-model", made.train, made.test), out))
    refused("METHOD:NORMALIZE", *command(made, out, "--methods", "dot"))
    refused("--at half", *command(made, out, "--at", "half"))
    refused("--learning-rate must be above 0, got 0", *command(made, tmp_path / "new", "--learning-rate", 0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused("holds something else", *command(made, tmp_path / "mine"))
    with pytest.raises(UserError, match="holds no ground truth"):
        ground_truth.GroundTruth(tmp_path / "mine")
    (out / "retrained.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no ground truth"):
        ground_truth.GroundTruth(out)


def test_intervals_of_one_test_text_are_unknown() -> None:
    masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    mean, low, high = lds.score(masks, [[0.1], [0.2], [0.3]], [[3.0, 2.0, 1.0]])
    assert mean == pytest.approx(1)
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.fixture
def truth_folder(tmp_path: Path) -> Path:
    return made_truth(tmp_path / "truth")


def test_lds_of_what_the_losses_were_made_of_is_near_1_and_turns_with_the_sign(truth_folder: Path) -> None:
    truth = ground_truth.GroundTruth(truth_folder)
    helps = np.load(truth_folder / "helps.npy")

    def correlations(scores: Any) -> Any:
        return lds.correlations(truth.masks, truth.losses, scores)

    assert correlations(helps).min() > 0.99
    np.testing.assert_allclose(correlations(-helps), -correlations(helps))
    assert abs(correlations(np.random.default_rng(2).normal(size=(5, 12))).mean()) < 0.5
    agreement = lds.seed_agreement(truth.losses)
    assert agreement is not None
    assert agreement > 0.99
    assert lds.seed_agreement(truth.losses[:, :1]) is None
    with pytest.raises(ValueError, match=r"scores \(12, 5\), .* do not fit"):
        correlations(helps.T)


def test_unfinished_retrainings_are_left_out(truth_folder: Path) -> None:
    with np.load(truth_folder / "retrained.npz") as file:
        masks, losses = file["masks"], file["losses"]
    scores = np.load(truth_folder / "helps.npy")
    losses[10:, 1] = np.nan
    np.savez(truth_folder / "retrained.npz", masks=masks, losses=losses)
    truth = ground_truth.GroundTruth(truth_folder)
    assert (truth.finished == (np.arange(40) < 10)).all()
    assert truth.done == 50
    found = lds.correlations(truth.masks, truth.losses, scores)
    assert (found == lds.correlations(masks[:10], losses[:10], scores)).all()
    losses[2:] = np.nan
    np.savez(truth_folder / "retrained.npz", masks=masks, losses=losses)
    truth = ground_truth.GroundTruth(truth_folder)
    with pytest.raises(UserError, match="got 2 subsets"):
        lds.correlations(truth.masks, truth.losses, scores)
