"""Evaluation `facts`: does attribution find the sentence that taught a fact, asked for in other words?

The facts, the questions and the rows that distract are those of `rapidin.evaluate.tasks.facts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rapidin.attribution import baselines
from rapidin.data.encoding import Status
from rapidin.data.examples import open_examples
from rapidin.evaluate import metrics
from rapidin.evaluate.folders import model_reference, start_or_resume, write_jsonl
from rapidin.evaluate.log import Log, no_log
from rapidin.evaluate.methods import Method, each_score
from rapidin.evaluate.metrics import Floats
from rapidin.evaluate.result import Result
from rapidin.evaluate.settings import FactsSettings
from rapidin.evaluate.tasks.facts import Record, make_facts, possible_answers
from rapidin.evaluate.training import Tuner, losses
from rapidin.evaluate.tuned import TunedModel, encoder_of, load_float32, tune_and_save
from rapidin.evaluate.variants import Variant, VariantCaches
from rapidin.files import lock_folder
from rapidin.gradients.model import LoadedModel

COLUMNS = {"mrr": "MRR", "recall": "recall at 10"}
DESCRIPTION = "facts.json"


def evaluate(
    model: str,
    folder: str | Path,
    methods: Sequence[Method],
    variants: Sequence[Variant],
    settings: FactsSettings,
    *,
    with_baselines: bool = False,
    device: str | None = None,
    log: Log = no_log,
) -> Result:
    """Invent facts, tune `model` on them, and rank the rows for each question; a killed run resumes.

    BM25 is always compared, of whole rows and of completions only; with_baselines adds the hidden states.
    Raises UserError if the folder was made with other settings.
    """
    folder = Path(folder)
    rows, questions = make_facts(settings.count, seed=settings.recipe.seed)
    description: Record = {
        "model": model_reference(model),
        "facts": settings.count,
        "lora": settings.lora,
        "recipe": settings.recipe.to_json(),
        "checkpoints": settings.checkpoints,
    }
    with lock_folder(folder):
        start_or_resume(folder, DESCRIPTION, description)
        write_jsonl(folder / "train.jsonl", rows)
        write_jsonl(folder / "questions.jsonl", questions)
        tuned = TunedModel(folder, description["model"], settings.lora, device)
        if not tuned.path.exists():
            _tune(tuned, rows, settings, description, log)
        result = Result("facts", description | {"rows": len(rows), "questions": len(questions)}, COLUMNS)
        _add_methods(result, tuned, questions, methods, variants, log)
        loaded = tuned.load()
        _add_baselines(result, rows, questions, loaded if with_baselines else None, log)
        answered = _answered_right(loaded, questions)
    result.setting["answered_right"] = answered
    result.notes.append(
        f"{len(questions):,} questions, {len(rows):,} rows; for {answered:,} questions the tuned model "
        "gives the right answer a higher likelihood than the others of its kind. "
        "Intervals: over the questions."
    )
    return result


def _tune(
    tuned: TunedModel, rows: Sequence[Record], settings: FactsSettings, description: Record, log: Log
) -> None:
    log("loading the model")
    loaded = load_float32(tuned.base, device=tuned.device)
    encoded = [text for text in map(encoder_of(loaded), rows) if text.status == Status.OK]
    tune_and_save(
        tuned,
        Tuner(loaded, lora=settings.lora),
        encoded,
        settings.recipe,
        description,
        checkpoints=settings.checkpoints,
        log=log,
    )


def _add_methods(
    result: Result,
    tuned: TunedModel,
    questions: Sequence[Record],
    methods: Sequence[Method],
    variants: Sequence[Variant],
    log: Log,
) -> None:
    caches = VariantCaches(tuned.folder / "caches", open_examples(tuned.folder / "train.jsonl"), log=log)
    for variant in variants:
        sketches, generations = caches.query(variant, tuned, questions)
        for method, scores, _ in each_score(sketches, generations, methods):
            _add(result, f"{method}, {variant}", scores, questions)


def _add_baselines(
    result: Result,
    rows: Sequence[Record],
    questions: Sequence[Record],
    loaded: LoadedModel | None,
    log: Log,
) -> None:
    """BM25 of whole rows and of completions; with a model the cosine of its hidden states."""
    texts, queries = ([baselines.plain_text(record) for record in records] for records in (rows, questions))
    answers, answered = ([record["completion"] for record in records] for records in (rows, questions))
    _add(result, "BM25", baselines.bm25(texts, queries), questions)
    _add(result, "BM25 of completions", baselines.bm25(answers, answered), questions)
    if loaded is not None:
        log("hidden states")
        _add(result, "hidden states", baselines.hidden_states(loaded, texts, queries), questions)


def _add(result: Result, name: str, scores: Floats, questions: Sequence[Record]) -> None:
    truth = np.zeros(scores.shape, dtype=np.bool_)
    truth[np.arange(len(questions)), [question["fact"] for question in questions]] = True
    result.add(
        name,
        {
            "mrr": metrics.estimate(metrics.reciprocal_rank(scores, truth)),
            "recall": metrics.estimate(metrics.recall_at(scores, truth, 10)),
        },
    )


def _answered_right(loaded: LoadedModel, questions: Sequence[Record]) -> int:
    """The number of questions whose right answer is the likeliest of its relation's."""
    encoder = encoder_of(loaded)
    right = 0
    for question in questions:
        answers = possible_answers(question)
        texts = [encoder({**question, "completion": f" {answer}."}) for answer in answers]
        total = losses(loaded.model, texts) * torch.tensor([sum(text.target) for text in texts])
        right += answers[int(total.argmin())] == question["completion"].strip(" .")
    return right
