"""The null distribution of a cache: the best scores of texts that the data has nothing to do with.

The error of a score is that of the sketch alone: the best of many rows has a positive score and a small error
even for a question that no row is about. So at the end of caching two sets of texts are scored against all
rows, and the manifest keeps their best scores, among which a query's best score is placed
(`rapidin.attribution.verdict`):

    questions   everyday questions (`neutral_questions`) in the form of the data, with the model's own answers
    rows        some rows of the data, each against all rows but itself and its exact duplicates

A question is left out if its best row asks the same or answers the same, word for word: it is not unrelated.
Scores that are not normalized are divided by the length of the text's gradient, since they are proportional
to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution import methods
from rapidin.attribution.duplicates import Shingles, exact_copies, shingles
from rapidin.attribution.methods import NORMALIZE, counted
from rapidin.attribution.methods.vectors import stored_sketches
from rapidin.attribution.neutral_questions import QUESTIONS
from rapidin.attribution.questions import asked as asked_record
from rapidin.attribution.scan import scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache, Manifest
from rapidin.cache.build import sample_rows
from rapidin.cache.codec import FloatCodec
from rapidin.data.encoding import Status
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.data.records import Record, record_parts
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import Causal

# Best scores, ascending, by the set's name and the normalization.
NullScores = dict[str, dict[str, list[float]]]

LEAST = 29  # texts in a set: a query above all of them is called strong by chance once in 30 times
MOST_QUESTIONS, MOST_ROWS = len(QUESTIONS), 32
NEW_TOKENS = 16  # of the model's answer to a question
ROWS_PER_TEXT = 5  # rows of the cache for each text of a set, so that sets take little time to make
_ANSWERED_TOGETHER = 64  # questions in a batch that the model answers
_MOST_COPIES = 255  # of a row that is drawn for the set "rows"
STREAM = 19  # of the keyed hash in docs/reference/sketch.md
_SAME = 0.8  # share of the runs of words of a question or an answer that a row has if it says the same


@dataclass(frozen=True)
class _Texts:
    """Texts of one set: their sketches [n, blocks, width], and of questions what was asked and answered, of
    rows their numbers."""

    sketch: Tensor
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()


def null_scores(
    cache: Cache,
    source: GradientSource,
    examples: Examples,
    tell: Callable[[str], None],
    decoys: int = 0,
) -> NullScores | None:
    """The best scores of both sets; None if there are too few rows, or, with the reason told, if there can be
    none for another reason.

    cache: complete; source: the source that made it; examples: of which the best rows of questions are read;
    decoys: how many the cache gets, which take time as rows do. The leading process runs this alone.
    """
    numbers = counted_rows(cache)
    most = (len(numbers) + decoys) // ROWS_PER_TEXT
    if most < LEAST:
        return None
    if source.loaded.sharded:
        tell("no null distribution for verdicts: the model is sharded")
        return None
    tell("scoring neutral questions and some of the examples, for verdicts on queries")
    with distributed.by_itself():
        asked = _questions(source, cache.manifest, min(most, MOST_QUESTIONS))
        own = _rows(cache, numbers, source.loaded.device)
        scores = _best_scores(cache, examples, asked, own)
    kept = {name: best for name, best in scores.items() if all(len(of) >= LEAST for of in best.values())}
    if not kept:
        tell("no null distribution for verdicts: too few texts have a score")
    return kept or None


def counted_rows(cache: Cache) -> Tensor:
    """The rows of a cache that count, ascending: [n] int64."""
    return counted(cache).nonzero()[:, 0]


def drawn_rows(cache: Cache, rows: Tensor, most: int) -> list[int]:
    """At most so many of these rows [n] of a cache, drawn by its seed."""
    drawn: list[int] = rows[sample_rows(len(rows), most, cache.manifest.sketch["seed"], STREAM)].tolist()
    return drawn


def _questions(source: GradientSource, manifest: Manifest, most: int) -> _Texts:
    """At most that many questions with the model's answers; none if the task has no such answers."""
    task, model = source.task, source.loaded.model
    questions: list[str] = []
    answers: list[Generation] = []
    if isinstance(task, Causal) and hasattr(model, "generate"):
        prompts: list[str] = []
        for question in QUESTIONS[:most]:
            prompt = task.encoder.prompt_text(asked_record(manifest, question))
            if 0 < len(task.encoder.prompt_ids(prompt)) < task.encoder.max_length - NEW_TOKENS:
                questions.append(question)
                prompts.append(prompt)
        for at in range(0, len(prompts), _ANSWERED_TOGETHER):
            answers += task.answers(model, prompts[at : at + _ANSWERED_TOGETHER], NEW_TOKENS)
    sketch, status = source.sketches([answer.encoded for answer in answers])
    good = (status == int(Status.OK)).nonzero()[:, 0].tolist()
    return _Texts(sketch[good], tuple(questions[n] for n in good), tuple(answers[n].completion for n in good))


def _rows(cache: Cache, numbers: Tensor, device: torch.device) -> _Texts:
    """Some of these rows of a cache; none if its codec has few bits, which make the sketch of a row much
    coarser than that of a query."""
    chosen: list[int] = []
    if isinstance(cache.codec, FloatCodec):
        drawn = drawn_rows(cache, numbers, MOST_ROWS)
        chosen = [row for row, others in exact_copies(cache, drawn).items() if len(others) <= _MOST_COPIES]
    blocks, width = len(cache.layers), cache.manifest.width
    if not chosen:
        return _Texts(torch.zeros(0, blocks, width, device=device))
    return _Texts(stored_sketches(cache, chosen).to(device), rows=tuple(chosen))


def _best_scores(cache: Cache, examples: Examples, asked: _Texts, own: _Texts) -> NullScores:
    """The best scores of questions and of rows."""
    scores: NullScores = {"questions": {}, "rows": {}}
    sketch, count = torch.cat([asked.sketch, own.sketch]), len(asked.questions)
    if not len(sketch):
        return scores
    copies = max((len(others) for others in exact_copies(cache, own.rows).values()), default=0)
    said = [(shingles(a), shingles(b)) for a, b in zip(asked.questions, asked.answers, strict=True)]
    tops: dict[str, tuple[Tensor, Tensor]] = {}
    for normalize in NORMALIZE:
        scan = CacheScan(cache, methods.prepare(sketch, cache, normalize=normalize))
        (best, rows), _ = scan_cache(scan, copies + 2)
        tops[normalize] = best / gradient_lengths(sketch, normalize).cpu()[:, None], rows
    unrelated = [
        n
        for n, words in enumerate(said)
        if not any(says_the_same(examples.get(int(rows[n, 0])), *words) for _, rows in tops.values())
    ]
    for normalize, (best, rows) in tops.items():
        scores["questions"][normalize] = _sorted(best[unrelated, 0].tolist())
        scores["rows"][normalize] = _sorted(_best_others(cache, own.rows, best[count:], rows[count:]))
    return scores


def has_all(null: NullScores) -> bool:
    """Whether a null distribution has the scores of every normalization, which those of earlier versions have
    not."""
    return all(set(NORMALIZE) <= set(of) for of in null.values())


def gradient_lengths(sketch: Tensor, normalize: str) -> Tensor:
    """What the best scores of queries [n, blocks, width] are divided by so that they can be compared: [n]
    float32.

    Without a normalization it is the length of a query's gradient, which its scores are proportional to;
    otherwise 1.
    """
    if normalize != "none":
        return torch.ones(len(sketch), device=sketch.device)
    lengths: Tensor = sketch.double().flatten(1).norm(dim=1)
    return lengths.clamp(min=1e-38).float()


def says_the_same(record: Record | None, *texts: Shingles) -> bool:
    """Whether a record says the same as one of these texts, word for word."""
    if record is None:
        return False
    of_record = frozenset().union(*(shingles(part) for part in record_parts(record) if part.strip()))
    return any(len(text & of_record) >= _SAME * len(text) for text in texts)


def _best_others(cache: Cache, own: Sequence[int], scores: Tensor, rows: Tensor) -> Iterator[float]:
    """Of each row the best of these scores [n, k] that belongs to another record; rows: [n, k], -1 for
    none."""
    hashes = cache.records(list(own)).tolist() if own else []
    for record, of_scores, of_rows in zip(hashes, scores.tolist(), rows.tolist(), strict=True):
        hits = [row for row in of_rows if row >= 0]
        others = zip(of_scores, cache.records(hits).tolist(), strict=False)
        yield from [score for score, other in others if other != record][:1]


def _sorted(scores: Iterable[float]) -> list[float]:
    """Scores as the manifest has them: ascending, with as many digits as float32 tells apart on any
    machine."""
    return sorted(float(f"{score:.6g}") for score in scores)
