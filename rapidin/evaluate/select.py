"""Evaluation `select`: does choosing training data leave wrong labels out and give a better model?

A share of the training rows of the task (`rapidin.evaluate.tasks.labels`) has another class's answer.
`rapidin select` ranks the rows by their mean influence on a small, correct target set (LESS, Xia et al., ICML
2024, section 3). A new model is then trained on the chosen rows, on random rows of the same number, and on
all rows, and tested on rows that it has not seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rapidin.attribution.query_sketch import scores as scores_of
from rapidin.attribution.selection import best_rows
from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.evaluate import metrics
from rapidin.evaluate.folders import model_reference, start_or_resume, write_jsonl
from rapidin.evaluate.log import Log, no_log
from rapidin.evaluate.methods import Method
from rapidin.evaluate.result import Result
from rapidin.evaluate.settings import SelectSettings
from rapidin.evaluate.tasks.labels import Task, accuracy, make_task
from rapidin.evaluate.training import Tuner, losses
from rapidin.evaluate.tuned import TunedModel, encoder_of, load_float32, tune_and_save
from rapidin.evaluate.variants import Variant, VariantCaches
from rapidin.files import lock_folder, replace_file

COLUMNS = {"flipped": "flipped in it", "accuracy": "test accuracy", "loss": "test loss"}
DEFAULT = "dot:weighted,fisher:weighted"
DESCRIPTION = "select.json"
MEASURED = "measured.json"


def evaluate(
    model: str,
    folder: str | Path,
    methods: Sequence[Method],
    variant: Variant,
    settings: SelectSettings,
    *,
    device: str | None = None,
    log: Log = no_log,
) -> Result:
    """Make the task, tune `model` on all of it, choose rows by each method, and train on the choices.

    The trainings of a choice differ in the order of rows and in the adapter's first weights; random choices
    differ in their rows too. Every training is kept, so a killed run resumes. Raises UserError if the folder
    was made with other settings.
    """
    folder = Path(folder)
    task = make_task(settings.rows, flipped=settings.flipped, seed=settings.recipe.seed)
    description: dict[str, Any] = {
        "model": model_reference(model),
        "rows": settings.rows,
        "flipped": settings.flipped,
        "lora": settings.lora,
        "recipe": settings.recipe.to_json(),
    }
    with lock_folder(folder):
        start_or_resume(folder, DESCRIPTION, description)
        for name, records in (("train", task.train), ("target", task.target), ("test", task.test)):
            write_jsonl(folder / f"{name}.jsonl", records)
        tuned = TunedModel(folder, description["model"], settings.lora, device)
        trainings = _Trainings(tuned, task, settings, log)
        if not tuned.path.exists():
            trainings.tune_on_all(description)
        setting = description | {
            "share": settings.share,
            "seeds": settings.seeds,
            "place": str(variant),
            "target": len(task.target),
        }
        result = Result("select", setting, COLUMNS, lower=frozenset({"flipped", "loss"}))
        for name, choices in _choices(tuned, task, methods, variant, settings, log):
            _add(result, name, choices, trainings)
    result.notes.append(
        f"{settings.count:,} of {settings.rows:,} rows chosen, of which {settings.flipped:.0%} are flipped; "
        f"{len(task.test):,} test rows; each choice trained {settings.seeds:,} times. "
        "Intervals: over the trainings."
    )
    return result


def _choices(
    tuned: TunedModel,
    task: Task,
    methods: Sequence[Method],
    variant: Variant,
    settings: SelectSettings,
    log: Log,
) -> Iterator[tuple[str, list[list[int]]]]:
    """(name, the chosen rows for each seed) of every method, then of `random` and `all`."""
    caches = VariantCaches(tuned.folder / "caches", open_examples(tuned.folder / "train.jsonl"), log=log)
    sketches, generations = caches.query(variant, tuned, task.target)
    chosen: dict[str, list[list[int]]] = {}
    for method in methods:
        scores = scores_of(sketches, generations, method.scoring(together=True))
        best = best_rows(scores, settings.count)
        file = tuned.folder / f"chosen-{str(method).replace(':', '-')}.jsonl"
        write_jsonl(file, [task.train[n] for n in best])
        chosen[str(method)] = [best] * settings.seeds
    chosen["random"] = [
        sorted(random.Random(settings.recipe.seed + n).sample(range(settings.rows), settings.count))
        for n in range(settings.seeds)
    ]
    chosen["all"] = [list(range(settings.rows))] * settings.seeds
    yield from chosen.items()


def _add(result: Result, name: str, choices: Sequence[Sequence[int]], trainings: _Trainings) -> None:
    measured = [trainings.measure(rows, seed) for seed, rows in enumerate(choices)]
    flipped = [float(np.mean([trainings.task.train[n]["flipped"] for n in rows])) for rows in choices]
    result.add(
        name,
        {
            "flipped": metrics.estimate(flipped),
            "accuracy": metrics.estimate(accuracy for accuracy, _ in measured),
            "loss": metrics.estimate(loss for _, loss in measured),
        },
    )


class _Trainings:
    """Trains on chosen rows, and keeps each training's test results in a file."""

    def __init__(self, tuned: TunedModel, task: Task, settings: SelectSettings, log: Log) -> None:
        self.task = task
        self._tuned, self._settings, self._log = tuned, settings, log
        self._path = tuned.folder / MEASURED
        self._results: dict[str, list[float]] = {}
        if self._path.exists():
            self._results = json.loads(self._path.read_text(encoding="utf-8"))
        self._loaded: tuple[Tuner, Encoder, list[Encoded]] | None = None

    def _load(self) -> tuple[Tuner, Encoder, list[Encoded]]:
        """The model, loaded when it is first needed, and the encoded training rows."""
        if self._loaded is None:
            self._log("loading the model")
            loaded = load_float32(self._tuned.base, device=self._tuned.device)
            encoder = encoder_of(loaded)
            encoded = [encoder(row) for row in self.task.train]
            if any(row.status != Status.OK for row in encoded):
                raise UserError("a row is longer than the model's context", "use a larger model")
            self._loaded = Tuner(loaded, lora=self._settings.lora), encoder, encoded
        return self._loaded

    def tune_on_all(self, description: dict[str, Any]) -> None:
        """Tune the model on all rows, and save it."""
        tuner, _, encoded = self._load()
        tune_and_save(
            self._tuned, tuner, encoded, self._settings.recipe, description, checkpoints=0, log=self._log
        )

    def measure(self, rows: Sequence[int], seed: int) -> tuple[float, float]:
        """(accuracy, mean loss) on the test rows after training on these rows."""
        key = f"{seed}:{','.join(map(str, rows))}"
        if key not in self._results:
            tuner, encoder, encoded = self._load()
            recipe = replace(self._settings.recipe, seed=self._settings.recipe.seed + 1 + seed)
            model = tuner.tuned([encoded[row] for row in rows], recipe)
            right = accuracy(model, encoder, self.task.test, self.task.classes)
            loss = float(losses(model, [encoder(row) for row in self.task.test]).mean())
            self._results[key] = [right, loss]
            replace_file(self._path, (json.dumps(self._results) + "\n").encode())
            self._log(f"trained on {len(rows):,} rows: test accuracy {right:.3f}, loss {loss:.3f}")
        right, loss = self._results[key]
        return right, loss
