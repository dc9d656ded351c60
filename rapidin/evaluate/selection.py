"""Does choosing data leave the wrong labels out, and does the model that is trained on the choice do better?

The task of `rapidin.evaluate.tasks`: a share of the training rows has another class's answer. `rapidin
select` ranks them by their mean influence on a small, right target set (LESS, Xia et al., ICML 2024,
section 3); the model is then trained anew on the chosen part, on a random part of the same size, and on
all, and asked about rows it has not seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import scores as part_scores
from rapidin.attribution.selection import best_rows
from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.evaluate import figures, folders, loading
from rapidin.evaluate.methods import Method, Place, Rows, parts_at
from rapidin.evaluate.result import Result, Say, silent, write_rows
from rapidin.evaluate.tasks import Task, accuracy, make_task
from rapidin.evaluate.training import Recipe, Tuner, losses, save_model
from rapidin.files import lock_folder, replace_file
from rapidin.gradients.load import LoadedModel

COLUMNS = {"flipped": "flipped in it", "accuracy": "test accuracy", "loss": "test loss"}
RECIPE = Recipe(epochs=3, batch=8, learning_rate=1e-3, warm_up=10)
DESCRIPTION = "select.json"
MEASURED = "measured.json"


def evaluate(
    model: str,
    folder: str | Path,
    methods: Sequence[Method],
    place: Place,
    *,
    rows: int = 400,
    flipped: float = 0.2,
    share: float = 0.5,
    seeds: int = 3,
    lora: int | None = 8,
    recipe: Recipe = RECIPE,
    device: str | None = None,
    say: Say = silent,
) -> Result:
    """Make the task, tune `model` on all of it, choose `share` of the rows by each method, and train on that.

    seeds: trainings of each choice, which differ in the order of rows and in the adapter's start; random
    parts differ in their rows too. Every training is kept, and the same call goes on. Raises UserError
    where the folder was begun with other settings.
    """
    folder = Path(folder)
    task = make_task(rows, flipped=flipped, seed=recipe.seed)
    about = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "rows": rows,
        "flipped": flipped,
        "lora": lora,
        "recipe": recipe.to_json(),
    }
    if not 0 < share < 1 or seeds < 1:
        raise UserError(f"a share of {share:g} with {seeds} seeds", "say a share between 0 and 1, and seeds")
    with lock_folder(folder):
        folders.begin(folder, DESCRIPTION, about)
        return _evaluate(folder, about, task, methods, place, share, seeds, recipe, device, say)


def _evaluate(
    folder: Path,
    about: dict[str, Any],
    task: Task,
    methods: Sequence[Method],
    place: Place,
    share: float,
    seeds: int,
    recipe: Recipe,
    device: str | None,
    say: Say,
) -> Result:
    model, lora, rows = about["model"], about["lora"], about["rows"]
    for name, part in (("train", task.train), ("target", task.target), ("test", task.test)):
        write_rows(folder / f"{name}.jsonl", part)
    trainer = _Trainer(model, folder, task, lora, recipe, device, say)
    tuned = folder / ("adapter" if lora is not None else "tuned")
    if not tuned.exists():
        trainer.save(tuned)

    def load(checkpoint: Path | None = None) -> LoadedModel:
        if lora is not None:
            return loading.load(model, adapter=str(checkpoint or tuned), device=device)
        return loading.load(str(checkpoint or tuned), base=model, device=device)

    count = max(1, round(share * rows))
    train = Rows(folder / "caches", open_examples(folder / "train.jsonl"), 2048, say=say)
    parts, texts = parts_at(place, train, load, folder / "checkpoints", task.target)
    chosen: dict[str, list[list[int]]] = {}
    for method in methods:
        scoring = ScoringConfig(method.normalize, method.method, method.damping, together=True)
        best = best_rows(part_scores(parts, texts, scoring), count)
        write_rows(folder / f"chosen-{str(method).replace(':', '-')}.jsonl", [task.train[n] for n in best])
        chosen[str(method)] = [best] * seeds
    chosen["random"] = [
        sorted(random.Random(recipe.seed + n).sample(range(rows), count)) for n in range(seeds)
    ]
    chosen["all"] = [list(range(rows))] * seeds
    setting = about | {"share": share, "seeds": seeds, "place": str(place), "target": len(task.target)}
    result = Result("select", setting, COLUMNS, lower=frozenset({"flipped", "loss"}))
    for name, repeats in chosen.items():
        measured = [trainer.measured(choice, seed) for seed, choice in enumerate(repeats)]
        wrong = [np.mean([task.train[n]["flipped"] for n in choice]) for choice in repeats]
        result.add(
            name,
            {
                "flipped": figures.interval(map(float, wrong)),
                "accuracy": figures.interval(right for right, _ in measured),
                "loss": figures.interval(loss for _, loss in measured),
            },
        )
    result.notes.append(
        f"{count:,} of {rows:,} rows chosen, of which {about['flipped']:.0%} are flipped; "
        f"{len(task.test):,} test rows; each choice trained {seeds:,} times. Intervals: over the trainings."
    )
    return result


class _Trainer:
    """Trains on chosen rows, and keeps what came of it."""

    def __init__(
        self,
        model: str,
        folder: Path,
        task: Task,
        lora: int | None,
        recipe: Recipe,
        device: str | None,
        say: Say,
    ) -> None:
        self._task, self._recipe, self._say, self._lora = task, recipe, say, lora
        self._name, self._device = model, device
        self._path = folder / MEASURED
        self._known: dict[str, list[float]] = {}
        if self._path.exists():
            self._known = json.loads(self._path.read_text(encoding="utf-8"))
        self._ready: tuple[Tuner, Encoder, list[Encoded]] | None = None

    def _tuner(self) -> tuple[Tuner, Encoder, list[Encoded]]:
        """The model, loaded when it is first needed, and the training rows as it reads them."""
        if self._ready is None:
            self._say("loading the model")
            loaded = loading.load(self._name, device=self._device)
            encoder = Encoder(loaded.tokenizer, max_length=loaded.context_length or 2048)
            encoded = [encoder(row) for row in self._task.train]
            if any(row.status != Status.OK for row in encoded):
                raise UserError("a row is longer than the model's context", "take a larger model")
            self._ready = Tuner(loaded, lora=self._lora), encoder, encoded
        return self._ready

    def save(self, out: Path) -> None:
        """The model tuned on all rows."""
        tuner, _, encoded = self._tuner()
        save_model(tuner.tuned(encoded, self._recipe), out, tuner.loaded.tokenizer)

    def measured(self, rows: Sequence[int], seed: int) -> tuple[float, float]:
        """(accuracy, mean loss) on the test rows after training on these."""
        key = f"{seed}:{','.join(map(str, rows))}"
        if key not in self._known:
            tuner, encoder, encoded = self._tuner()
            recipe = replace(self._recipe, seed=self._recipe.seed + 1 + seed)
            model = tuner.tuned([encoded[row] for row in rows], recipe)
            right = accuracy(model, encoder, self._task.test, self._task.classes)
            loss = float(losses(model, [encoder(row) for row in self._task.test]).mean())
            self._known[key] = [right, loss]
            replace_file(self._path, (json.dumps(self._known) + "\n").encode())
            self._say(f"trained on {len(rows):,} rows: test accuracy {right:.3f}, loss {loss:.3f}")
        right, loss = self._known[key]
        return right, loss
