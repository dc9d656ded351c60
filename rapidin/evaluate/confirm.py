"""Proof by retraining: what a model says once rows are left out of its training data, against random rows.

The model is trained again without the hits of a query, and without as many random rows, several times. If the
hits had no more to do with the generation than other rows have, each of these models would be as likely to
make it least likely; so the rank of the hits' among them is a p-value. The controls are drawn from all rows,
the hits included, so that this holds exactly for hits that are chosen at random; sets of the same size share
them. Every training is kept in a folder as soon as it is done, and the same call resumes with the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rapidin.attribution.options import ModelLocation
from rapidin.cache import Manifest, other_model
from rapidin.data.encoding import Encoded
from rapidin.errors import UserError
from rapidin.evaluate.asked import Asked, Measured, text_encoder, usable_rows
from rapidin.evaluate.folders import start_or_resume
from rapidin.evaluate.left_out import Data, Rows, random_rows
from rapidin.evaluate.log import Log, StepLog, no_log
from rapidin.evaluate.retraining import Command, Trainer, built_in, recipe_of, split_command
from rapidin.evaluate.settings import ConfirmSettings
from rapidin.evaluate.tuned import load_float32
from rapidin.files import lock_folder, remove_partials, replace_file
from rapidin.gradients.model import LoadedModel
from rapidin.results.confirmation import Confirmation, Effect
from rapidin.results.text import time_text

LEAST_SEEDS = 3  # of the training on all rows, which show how much the seed alone changes
_REQUEST = "request.json"
# What to call a key of the request in an error message.
_LABELS = {
    "format": "version of rapidin",
    "generations": "file of hits, or of another of its queries",
    "data": "training data",
    "model": "model",
    "trainer": "recipe or trainer",
    "text": "form of the text",
}


class Stopped(Exception):
    """The cost is known, and no more was asked for."""


@dataclass(frozen=True)
class Confirmed:
    """The result of `confirm`: the content of the file of hits with a `confirmation` in each query that was
    confirmed, and the confirmations by the number of the query, from 0."""

    hits: Mapping[str, Any]
    confirmations: Mapping[int, Confirmation]


# ----------------------------------------------------------------------------------------- the trainings


@dataclass
class Trainings:
    """The trainings of a request: what is done is kept in the folder, and what is missing is trained."""

    folder: Path
    trainer: Trainer
    asked: Asked
    log: Log
    _results: dict[tuple[tuple[int, ...], int], Measured] = field(default_factory=dict)

    def run(self, wanted: Sequence[tuple[tuple[int, ...], int]], only_cost: bool) -> None:
        """Do the trainings that the folder lacks. wanted: rows that are left out, and a seed, of each.

        Raises Stopped, once it has been said what they take, if no more is asked for.
        """
        missing = [each for each in wanted if not self._file(*each).exists()]
        done = len(wanted) - len(missing)
        if done:
            self.log(f"{done:,} of {len(wanted):,} trainings are in {self.folder} already")
        if not missing:
            if only_cost:
                raise Stopped
            return
        said = f"{len(missing):,} training{'s' * (len(missing) > 1)}"
        self.log(f"{said}, kept in {self.folder}; measuring the time that one takes")

        def cost(steps: int, seconds: float) -> None:
            of_steps = f" of {steps:,} steps" if steps else ""
            whole = time_text(seconds * len(missing))
            self.log(f"{said}{of_steps}, about {time_text(seconds)} each: {whole} in all")
            if only_cost and steps:
                raise Stopped

        progress = StepLog(self.log, "retraining", first=done)
        for n, (rows, seed) in enumerate(missing):
            model = self.trainer.trained(rows, seed, cost if n == 0 else None)
            measured = self.asked.measured(model)
            value = {"left_out": len(rows), "seed": seed, **measured.to_json()}
            replace_file(self._file(rows, seed), (json.dumps(value, indent=1) + "\n").encode())
            if only_cost:
                raise Stopped
            progress.step(done + n + 1, len(wanted), -fmean(measured.log_probabilities))

    def result(self, rows: tuple[int, ...], seed: int) -> Measured:
        """What the model of a training that is done says. Raises UserError for a damaged file."""
        found = self._results.get((rows, seed))
        if found is not None:
            return found
        path = self._file(rows, seed)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            found = Measured(tuple(map(float, value["log_probabilities"])), tuple(map(str, value["answers"])))
            if not len(found.log_probabilities) == len(found.answers) == len(self.asked.texts):
                raise ValueError("another number of generations")
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"'{path}' is damaged", "remove it, and rerun the same command") from None
        self._results[rows, seed] = found
        return found

    def _file(self, rows: tuple[int, ...], seed: int) -> Path:
        name = hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest()[:16] if rows else "all"
        return self.folder / f"{name}-seed-{seed}.json"


# ----------------------------------------------------------------------------------------------- the call


def confirm(
    hits: str | Path,
    settings: ConfirmSettings | None = None,
    *,
    work: str | Path | None = None,
    train_data: str | Sequence[str] | None = None,
    location: ModelLocation | None = None,
    only_cost: bool = False,
    log: Log = no_log,
    **by_name: Any,
) -> Confirmed | None:
    """Retrain the model of a file of hits without them, and without random rows, and compare what is said.

    hits: the file that `rapidin query --json` wrote. settings: or its fields by name. work: the folder of the
    trainings, by default beside the file; a later call resumes it, or adds controls. train_data, location:
    where data and model have moved. only_cost: measure what the trainings take, say it to `log`, and return
    None. Raises UserError for hits, data or a model that cannot be used.
    """
    settings = ConfirmSettings.given(settings, by_name)
    if settings.trainer is not None:
        split_command(settings.trainer)
    hits = Path(hits)
    data = Data(str(hits), settings, train_data, log)
    where = _located(data, location or ModelLocation(), settings.trainer)
    loaded = _load_tuned(where, data.manifest)
    encoder = text_encoder(loaded, data.manifest, settings.max_length)
    rows = usable_rows(data.examples, encoder)
    if len(rows) < len(data.examples):
        log(
            f"{len(data.examples) - len(rows):,} of {len(data.examples):,} rows cannot be read or have no "
            "token to learn: no random set has them, and the built-in trainer leaves them out"
        )
    sets = data.left_out(settings.by, list(rows), log)
    queries = [data.value["queries"][n] for n in data.chosen]
    most = data.value["settings"].get("max_new_tokens") or 64
    asked = Asked(queries, encoder, int(most))
    folder = Path(work) if work is not None else hits.with_name(f"{hits.stem}.confirm")
    with lock_folder(folder):
        remove_partials(folder)
        tuned = asked.measured(loaded.model)
        identity = loaded.identity
        del loaded
        trainer = _trainer(settings, where, rows, data, folder)
        request = {
            "format": 1,
            "generations": hashlib.sha256(json.dumps(asked.texts).encode()).hexdigest(),
            "data": data.examples.identity,
            "model": identity,
            "trainer": trainer.to_json(),
            "text": {"max_length": encoder.max_length, "eos": encoder.eos, "max_new_tokens": most},
        }
        start_or_resume(folder, _REQUEST, request, labels=_LABELS)
        trainings = Trainings(folder, trainer, asked, log)
        try:
            trainings.run(_wanted(sets, list(rows), settings), only_cost)
        except Stopped:
            return None
    confirmations = {
        query: _confirmation(n, query, sets, list(rows), tuned, trainings, settings, data)
        for n, query in enumerate(data.chosen)
        if any(each.query == query for each in sets)
    }
    for query, found in confirmations.items():
        data.value["queries"][query]["confirmation"] = found.to_json()
    return Confirmed(data.value, confirmations)


def _located(data: Data, location: ModelLocation, trainer: str | None) -> ModelLocation:
    """Where the model is. Raises UserError if nothing names what was tuned."""
    value = data.value
    model = location.model or value["model"]
    adapter = location.adapter or value["adapter"]
    base = location.base or value["base"]
    if model is None:
        raise UserError("the file of hits does not say which model it is of", "name it with `model`")
    if adapter is None and base is None and trainer is None:
        raise UserError(
            f"nothing says what '{model}' was tuned from", "name its adapter with `adapter`, or its `base`"
        )
    tokenizer = location.tokenizer
    if data.manifest is not None and location.model is None and location.adapter is None:
        tokenizer = tokenizer or data.manifest.model["source"].get("tokenizer")
    return replace(location, model=model, adapter=adapter, base=base, tokenizer=tokenizer)


def _options(where: ModelLocation) -> dict[str, Any]:
    return {
        "tokenizer": where.tokenizer,
        "device": where.device,
        "trust_remote_code": where.trust_remote_code,
    }


def _load_tuned(where: ModelLocation, manifest: Manifest | None) -> LoadedModel:
    """The tuned model. Raises UserError if it is not the one that was cached, where that can be told."""
    assert where.model is not None
    loaded = load_float32(where.model, adapter=where.adapter, **_options(where))
    if manifest is not None and manifest.model["source"].get("dtype") == "float32":
        cached, given = ({**each, "base": ""} for each in (manifest.model["identity"], loaded.identity))
        if cached != given:
            raise UserError(
                f"the hits are of a cache that was made {other_model(cached, given)}",
                "name what it was made with: `model`, `adapter` or `tokenizer`",
            )
    return loaded


def _trainer(
    settings: ConfirmSettings, where: ModelLocation, rows: Mapping[int, Encoded], data: Data, folder: Path
) -> Trainer:
    assert where.model is not None
    if settings.trainer is not None:
        model = where.model if where.base is None else where.base
        return Command(settings.trainer, data.source, data.reading, folder, model, _options(where))
    if where.adapter is None:
        recipe = recipe_of(settings, where.model, len(rows))
    else:
        recipe = recipe_of(settings, where.adapter, len(rows))
    base = load_float32(where.model if where.base is None else where.base, **_options(where))
    return built_in(base, where.adapter, rows, recipe)


def _seeds(settings: ConfirmSettings) -> tuple[list[int], list[int]]:
    """The seeds of the trainings without rows, and of those on all rows, which begin with the same."""
    first = settings.seed
    return (
        list(range(first, first + settings.seeds)),
        list(range(first, first + max(LEAST_SEEDS, settings.seeds))),
    )


def _controls(count: int, usable: Sequence[int], settings: ConfirmSettings) -> list[tuple[int, ...]]:
    return [random_rows(usable, count, number, settings.seed) for number in range(settings.controls)]


def _wanted(
    sets: Sequence[Rows], usable: Sequence[int], settings: ConfirmSettings
) -> list[tuple[tuple[int, ...], int]]:
    """All trainings: on all rows, without each set, and without random rows."""
    some, every = _seeds(settings)
    sizes = dict.fromkeys(len(each.rows) for each in sets)
    left_out = [each.rows for each in sets] + [
        rows for count in sizes for rows in _controls(count, usable, settings)
    ]
    wanted = [((), seed) for seed in every] + [(rows, seed) for rows in left_out for seed in some]
    return list(dict.fromkeys(wanted))


def _confirmation(
    n: int,
    query: int,
    sets: Sequence[Rows],
    usable: Sequence[int],
    tuned: Measured,
    trainings: Trainings,
    settings: ConfirmSettings,
    data: Data,
) -> Confirmation:
    """What came of a query; n: its number among those that models were asked about."""
    some, every = _seeds(settings)
    everything = [trainings.result((), seed).log_probabilities[n] for seed in every]
    answer = trainings.result((), some[0]).answers[n]
    before = fmean(everything[: len(some)])

    def said(rows: tuple[int, ...]) -> tuple[float, str]:
        found = [trainings.result(rows, seed) for seed in some]
        return fmean(each.log_probabilities[n] for each in found), found[0].answers[n]

    effects = []
    for each in sets:
        if each.query != query:
            continue
        after, other = said(each.rows)
        controls = [said(rows) for rows in _controls(len(each.rows), usable, settings)]
        effects.append(
            Effect(
                rows=tuple(data.examples.index(row) for row in each.rows),
                log_probability=after,
                fall=before - after,
                controls=tuple(before - value for value, _ in controls),
                answer=other,
                changed=other != answer,
                controls_changed=sum(text != answer for _, text in controls),
                column=each.column,
                value=each.value,
            )
        )
    return Confirmation(
        tuned=tuned.log_probabilities[n],
        everything=tuple(everything),
        answer=answer,
        said=answer.strip() == trainings.asked.texts[n][1].strip(),
        tokens=trainings.asked.tokens[n],
        effects=tuple(effects),
        seeds=len(some),
        recipe=_described(trainings.trainer),
    )


def _described(trainer: Trainer) -> dict[str, Any]:
    """How models were trained, without the learning rates of every step."""
    value = trainer.to_json()
    if "recipe" in value:
        value["recipe"] = {**value["recipe"], "rates": len(value["recipe"]["rates"])}
    return value
