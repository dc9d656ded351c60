"""The null distribution of a cache: the best scores of texts that nothing in the data stands out for.

The error of a score is that of the sketch alone: the best of many rows has a positive score with a small error even
if the data has nothing to do with the question. So at the end of caching two sets of texts are scored against all
rows, and their best scores are kept in the manifest, where a query's best score is placed among them:

    questions   everyday questions (`neutral_questions`), put in the form of the data, with the model's own answers
    rows        rows of the data themselves, each against all rows but itself and its exact duplicates

A question that the data itself asks is left out. If a query is as unrelated to the data as the questions, its best
score is above all n of theirs with a probability of 1 / (n + 1), whatever the distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution import methods
from rapidin.attribution.duplicates import exact_copies, shingles
from rapidin.attribution.methods import NORMALIZE, counted
from rapidin.attribution.neutral_questions import QUESTIONS
from rapidin.attribution.scan import scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.cache.build import sample_rows
from rapidin.cache.codec import FloatCodec
from rapidin.data.encoding import AnyExample, Status
from rapidin.data.examples import Examples
from rapidin.data.records import record_parts
from rapidin.errors import UserError
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import Causal
from rapidin.tasks.names import asked_record

NullScores = dict[str, dict[str, list[float]]]  # best scores, ascending, by "questions" or "rows" and normalization

LEAST = 19  # texts in a set, so that a query above all of them is called strong by chance once in 20 times
MOST = 64
NEW_TOKENS = 16  # of the model's answer to a question
_ROWS_PER_QUESTION = 4  # the questions take about a quarter of the time of the cache's rows, at most
_ANSWERED_TOGETHER = 32  # questions in a batch that the model answers
_MOST_COPIES = 255  # of a row of the set "rows": with more, it is not drawn
_STREAM = 19  # of the keyed hash in docs/reference/sketch.md
_ASKED = 0.8  # share of a question's runs of words that a row contains if it asks the question


def null_scores(
    cache: Cache, source: GradientSource, examples: Examples, tell: Callable[[str], None]
) -> NullScores | None:
    """The best scores of both sets; None, with the reason told, if there can be none.

    cache: complete; source: the source that made it. Runs in one process, and reads a few examples.
    """
    world, rows = distributed.world(), counted(cache).nonzero()[:, 0].tolist()
    if len(rows) < _ROWS_PER_QUESTION * LEAST:
        tell(f"no null distribution for verdicts: it takes at least {_ROWS_PER_QUESTION * LEAST} examples")
        return None
    if source.loaded.sharded:
        tell("no null distribution for verdicts: the model is sharded")
        return None
    with distributed.using(distributed.World() if not world.alone else world):
        scores: NullScores = {}
        asked = _asked(source, str(cache.manifest.data.get("form")), len(rows) // _ROWS_PER_QUESTION)
        if asked is not None:
            questions, sketch = asked
            scores["questions"] = _of_questions(cache, examples, questions, sketch)
        own = _own_rows(cache, rows)
        if own:
            scores["rows"] = _of_rows(cache, own, source.loaded.device)
    kept = {name: of for name, of in scores.items() if all(len(best) >= LEAST for best in of.values())}
    if not kept:
        tell("no null distribution for verdicts: too few texts have a score")
    return kept or None


# ----------------------------------------------------------------------------------------- questions


def _asked(source: GradientSource, form: str, most: int) -> tuple[list[str], Tensor] | None:
    """Questions with the sketches [n, blocks, width] of their answers; None if the task has no such answers.

    form: of the training data; most: how many questions are asked.
    """
    task = source.task
    if type(task) is not Causal or not hasattr(source.loaded.model, "generate"):
        return None
    prompts: dict[str, str] = {}
    for question in QUESTIONS[: min(most, MOST)]:
        prompt = task.encoder.prompt_text(asked_record(question, form))
        if 0 < len(task.encoder.prompt_ids(prompt)) < task.encoder.max_length - NEW_TOKENS:
            prompts[question] = prompt
    questions, texts = list(prompts), list[AnyExample]()
    for at in range(0, len(questions), _ANSWERED_TOGETHER):
        some = [prompts[question] for question in questions[at : at + _ANSWERED_TOGETHER]]
        texts += [each.encoded for each in task.answers(source.loaded.model, some, NEW_TOKENS)]
    answered = [n for n, text in enumerate(texts) if text.status == Status.OK]
    sketch, status = source.sketches([texts[n] for n in answered])
    good = (status == 0).nonzero()[:, 0].tolist()
    return [questions[answered[n]] for n in good], sketch[good]


def _of_questions(
    cache: Cache, examples: Examples, questions: Sequence[str], sketch: Tensor
) -> dict[str, list[float]]:
    """The best scores of questions by normalization, without those that their best row asks too."""
    known = [shingles(question) for question in questions]
    best: dict[str, list[float]] = {}
    for normalize in NORMALIZE:
        scores, rows = _top(cache, sketch, normalize, 1)
        asked = []
        for n, row in enumerate(rows[:, 0].tolist()):
            record = examples.get(row)
            of_row = shingles(" ".join(record_parts(record))) if record is not None else frozenset()
            asked.append(len(known[n] & of_row) >= _ASKED * len(known[n]))
        best[normalize] = _sorted([s for s, left_out in zip(scores[:, 0].tolist(), asked, strict=True) if not left_out])
    return best


# ---------------------------------------------------------------------------------------------- rows


def _own_rows(cache: Cache, rows: Sequence[int]) -> list[int]:
    """Rows of the cache to be scored against the others. None if its codec keeps too few bits: a row's stored sketch
    then is a much coarser one than that of a query."""
    if not isinstance(cache.codec, FloatCodec):
        return []
    chosen = [rows[n] for n in sample_rows(len(rows), MOST, cache.manifest.sketch["seed"], _STREAM)]
    copies = exact_copies(cache, chosen)
    return [row for row in chosen if len(copies[row]) <= _MOST_COPIES]


def _of_rows(cache: Cache, own: list[int], device: torch.device) -> dict[str, list[float]]:
    """The best scores of rows, by normalization, with any row that has another record."""
    blocks, width = len(cache.layers), cache.manifest.width
    sketch = cache.sketches(own).view(-1, blocks, width) * cache.lengths(own)[:, :, None]
    hashes = cache.records(own)[:, None]
    copies = max(len(others) for others in exact_copies(cache, own).values())
    best: dict[str, list[float]] = {}
    for normalize in NORMALIZE:
        scores, rows = _top(cache, sketch.to(device), normalize, copies + 2)
        real = rows >= 0
        hashes_of_hits = torch.zeros_like(rows)
        hashes_of_hits[real] = cache.records(rows[real].tolist())
        other = scores.masked_fill(~real | (hashes_of_hits == hashes), -torch.inf).max(1).values
        best[normalize] = _sorted(other[other.isfinite()].tolist())
    return best


# ------------------------------------------------------------------------------------------- helpers


def _top(cache: Cache, sketch: Tensor, normalize: str, count: int) -> tuple[Tensor, Tensor]:
    """The best scores [n, count] of texts with these sketches, and their rows."""
    return scan_cache(CacheScan(cache, methods.prepare(sketch, normalize=normalize)), count)[0]


def _sorted(scores: Sequence[float]) -> list[float]:
    """Scores for a manifest, ascending, with as many digits as they are known to."""
    return sorted(float(f"{score:.6g}") for score in scores)
