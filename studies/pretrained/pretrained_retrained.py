"""Trainings beside those of the ground truth: with a second seed, and without what methods rank first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pretrained_files import REMOVALS, SECOND, Bools, Floats, Scores, save_trainings, trainings

from rapidin.data.encoding import Encoder, Status
from rapidin.errors import UserError
from rapidin.evaluate.confirm import Stopped
from rapidin.evaluate.ground_truth import GroundTruth
from rapidin.evaluate.lds import correlations
from rapidin.evaluate.left_out import random_rows
from rapidin.evaluate.log import Log, StepLog
from rapidin.evaluate.retraining import BuiltIn
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import Tuner, losses
from rapidin.evaluate.tuned import load_float32
from rapidin.files import lock_folder
from rapidin.results.text import time_text

SUBSETS = 20  # that are trained on with a second seed
SECOND_SEEDS = 1000  # the first of them; the truth's own are far below
QUERIES, LEADING, CONTROLS = 10, 6, 10
SHARE = 0.05  # of the rows that is left out


def second_seeds(truth: GroundTruth, work: Path, *, only_cost: bool, log: Log) -> None:
    """Train on the first 20 subsets of the truth with another seed each: WORK/second.npz."""
    masks = truth.masks[:SUBSETS]
    seeds = [SECOND_SEEDS + number for number in range(len(masks))]
    train_missing(truth, work / SECOND, masks, seeds, {}, only_cost=only_cost, log=log)


def removals(truth: GroundTruth, work: Path, *, only_cost: bool, log: Log) -> None:
    """Train without 5% of the rows, with the seed of the training on all of them: WORK/removals.npz.

    Ten random choices come first, then what each leading method ranks first for each of ten test examples.
    The methods are chosen once, when the file is begun. Equal choices are trained on once.
    """
    rows, queries = truth.masks.shape[1], min(QUERIES, truth.losses.shape[2])
    count = round(SHARE * rows)
    if not count:
        raise UserError(f"{SHARE:.0%} of {rows} rows is none", "give more data")
    if (work / REMOVALS).exists():
        masks, seeds, _, about = trainings(work / REMOVALS)
        sets = {"of": about["of"], "methods": about["methods"]}
    else:
        chosen = leading(truth, Scores(work))
        left_out = [random_rows(range(rows), count, number, 0) for number in range(CONTROLS)]
        of: list[list[Any]] = [["random", None, number] for number in range(CONTROLS)]
        for family, (way, method) in chosen.items():
            scores = np.nan_to_num(Scores(work).load(way)[1][method], nan=-np.inf)
            for query in range(queries):
                first = np.argsort(-scores[query], kind="stable")[:count]
                top = tuple(sorted(first.tolist()))
                if top not in left_out:
                    left_out.append(top)
                of.append([family, query, left_out.index(top)])
        masks = np.ones((len(left_out), rows), dtype=np.bool_)
        for mask, gone in zip(masks, left_out, strict=True):
            mask[list(gone)] = False
        seeds = [int(truth.description["settings"]["recipe"]["seed"])] * len(masks)
        sets = {"of": of, "methods": chosen}
    train_missing(truth, work / REMOVALS, masks, seeds, sets, only_cost=only_cost, log=log)


def family_of(about: Mapping[str, Any], method: str) -> str:
    """What counts as one method among those that lead: a package's, whatever its normalization, its
    preconditioner, its point and its bytes."""
    name = method.partition("|")[0].partition(":")[0].partition(" of ")[0].partition(" (")[0]
    return f"{about['package'].partition(' ')[0]} {'' if about['package'] == 'RISE' else name}".strip()


def leading(truth: GroundTruth, scores: Scores) -> dict[str, tuple[str, str]]:
    """The way and method with the highest LDS of each of the six families that have the highest ones."""
    best: dict[str, tuple[float, str, str]] = {}
    for name in scores.names():
        about, found = scores.load(name)
        for method, values in found.items():
            lds = float(correlations(truth.masks, truth.losses, values).mean())
            family = family_of(about, method)
            best[family] = max(best.get(family, (-2.0, "", "")), (lds, name, method))
    if len(best) < LEADING:
        raise UserError(f"there are scores of {len(best)} methods, {LEADING} are needed", "run 'scores'")
    order = sorted(best, key=lambda family: -best[family][0])[:LEADING]
    return {family: best[family][1:] for family in order}


def train_missing(
    truth: GroundTruth,
    path: Path,
    masks: Bools,
    seeds: Sequence[int],
    about: Mapping[str, Any],
    *,
    only_cost: bool,
    log: Log,
) -> npt.NDArray[np.float32]:
    """Do the trainings that the file at `path` lacks, as those of the truth were done: losses [n, T].

    masks: rows of each [n, N]; about: more to keep. Says first what they take, and stops there if only_cost.
    Raises UserError if the file is of other trainings, or the model is another.
    """
    settings = truth.description["settings"]
    measured = np.full((len(masks), truth.losses.shape[2]), np.nan, dtype=np.float32)
    with lock_folder(path.parent):
        if path.exists():
            other_masks, other_seeds, measured, _ = trainings(path)
            if not np.array_equal(other_masks, masks) or other_seeds != list(seeds):
                raise UserError(f"'{path}' is of other trainings", "remove it, or name another folder")
        missing = np.flatnonzero(np.isnan(measured).any(1)).tolist()
        if not missing:
            log(f"all {len(masks):,} trainings are in {path}")
            return measured
        loaded = load_float32(truth.description["model"], device="cpu")
        if loaded.identity != truth.description["identity"]:
            raise UserError("the base model is not the one that the truth was made with")
        encoder = Encoder(loaded.tokenizer, max_length=settings["max_length"])
        rows, queries = ([encoder(record) for record in truth.examples(part)] for part in ("train", "test"))
        usable = {n: row for n, row in enumerate(rows) if row.status == Status.OK}
        trainer = BuiltIn(Tuner(loaded, lora=settings["lora"]), usable, Recipe.from_json(settings["recipe"]))

        def cost(steps: int, seconds: float) -> None:
            whole = time_text(seconds * len(missing))
            log(
                f"{len(missing):,} of {len(masks):,} trainings are missing, of {steps:,} steps, about "
                f"{time_text(seconds)} each: {whole} in all"
            )
            if only_cost:
                raise Stopped

        progress = StepLog(log, "retraining", first=len(masks) - len(missing))
        for n, training in enumerate(missing):
            gone = np.flatnonzero(~masks[training]).tolist()
            try:
                model = trainer.trained(gone, seeds[training], cost if n == 0 else None)
            except Stopped:
                return measured
            measured[training] = losses(model, queries).numpy()
            save_trainings(path, masks, seeds, measured, about)
            progress.step(progress.done + 1, len(masks), float(measured[training].mean()))
    return measured


def effects(losses_of: Floats, of: Sequence[Sequence[Any]]) -> tuple[dict[str, Floats], Floats]:
    """(by family and query, what leaving its rows out adds to the query's loss over the mean of the random
    choices [queries]; the random choices' own losses [controls, T]), NaN where trainings are missing.

    of: [family, query, training] of each choice, as `removals` keeps them.
    """
    random = losses_of[[training for family, _, training in of if family == "random"]]
    expected = random.mean(0)
    found: dict[str, dict[int, float]] = {}
    for family, query, training in of:
        if family != "random":
            found.setdefault(family, {})[query] = float(losses_of[training, query] - expected[query])
    return {family: np.array(list(values.values())) for family, values in found.items()}, random
