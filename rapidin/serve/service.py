"""What the server does, without the web: it asks the model, explains its answers, and keeps the last ones."""

from __future__ import annotations

import copy
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rapidin.attribution.decoys import has_decoys
from rapidin.attribution.ensemble import Ensemble
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.provenance import task_name
from rapidin.attribution.questions import asked, continued
from rapidin.attribution.reading import read_example
from rapidin.attribution.training_data import cached_record
from rapidin.data.examples import Examples
from rapidin.data.fields import other_columns
from rapidin.data.records import Record
from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.types import QueryResult
from rapidin.serve.jobs import Job, OnEvent
from rapidin.tasks.forward import Listener, listening
from rapidin.tasks.names import CAUSAL

_COLUMN_ROWS = 50  # whose columns are offered
_MOST_BY_WORD = 50  # hits of each token at either end
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what stands for a part of a character


@dataclass(frozen=True)
class Question:
    """What is to be answered and explained.

    ask, or prompt: a question, or a whole text; completion: the answer, None for the model's own; words:
    whether each token of the answer gets hits, and hits say which of their words contribute, which takes
    longer; by, interactions, fdr: as for `rapidin.Ensemble.query`.
    """

    ask: str | None = None
    prompt: str | None = None
    completion: str | None = None
    top_k: int = 10
    words: bool = False
    by: str | None = None
    interactions: bool = False
    fdr: float | None = None
    max_new_tokens: int = 64

    def record(self, ensemble: Ensemble) -> Record:
        """As a record in the form of the training data. Raises UserError if there is nothing to ask."""
        if self.completion == "":
            raise UserError("the completion is empty", "leave it out, and the model writes one")
        manifest = ensemble.caches[-1].manifest
        if self.ask is not None:
            return asked(manifest, self.ask, self.completion)
        if not (self.prompt or "").strip():
            raise UserError("the question is empty", "ask something")
        return continued(manifest, self.prompt or "", self.completion)

    @property
    def text(self) -> str:
        """What was asked."""
        return self.ask if self.ask is not None else self.prompt or ""


@dataclass(frozen=True)
class Answer:
    """An answer with the examples behind it. id: names it in addresses."""

    question: Question
    results: Results
    made: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    when: datetime = field(default_factory=lambda: datetime.now().astimezone())

    @property
    def result(self) -> QueryResult:
        return self.results[0]

    @property
    def summary(self) -> dict[str, Any]:
        """What a list of answers says of it."""
        verdict = self.result.verdict
        return {
            "id": self.id,
            "question": self.question.text,
            "completion": self.result.completion,
            "verdict": None if verdict is None else verdict.strength,
            "words": self.question.words,
            "when": self.when.isoformat(timespec="seconds"),
        }


class History:
    """The last answers, in memory. most: how many are kept; the oldest is forgotten first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, answer: Answer) -> None:
        with self._lock:
            self._answers[answer.id] = answer
            while len(self._answers) > self._most:
                self._answers.popitem(last=False)

    def get(self, name: str) -> Answer | None:
        with self._lock:
            return self._answers.get(name)

    def remove(self, name: str) -> bool:
        """Whether there was one of this name."""
        with self._lock:
            return self._answers.pop(name, None) is not None

    def latest(self) -> list[Answer]:
        """All answers, the last one first."""
        with self._lock:
            return list(reversed(self._answers.values()))


class Service:
    """Answers questions with one model, and explains them by caches.

    ensemble: the caches, whose models are loaded if they are not in memory; examples: the training data, None
    to show none; rows: the same data opened once more, for single rows while a question is answered; made:
    what is said of where hits come from; history: answers that are kept.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        examples: Examples | None,
        rows: Examples | None,
        *,
        made: Callable[[QueryOptions], dict[str, Any]] = lambda _: {},
        about: dict[str, str] | None = None,
        history: int = 50,
    ) -> None:
        members = [
            member if member.source is not None else replace(member, source=ensemble.source(number))
            for number, member in enumerate(ensemble.members)
        ]
        self.ensemble = Ensemble(members, kind=ensemble.kind, location=ensemble.location)
        self.examples = examples
        self.history = History(history)
        self.about = about or {}
        self._rows, self._made = rows, made
        self._lock = threading.Lock()  # of `_rows`
        self._source = self.ensemble.source()
        task = task_name(ensemble.caches[-1].manifest)
        if task == "reward":
            raise UserError(
                "a reward model answers no questions", "use 'rapidin query' with pairs of answers"
            )
        self.by_token = task == CAUSAL and not self._source.whole and examples is not None
        # Rows are read beside the job, and a tokenizer has settings that a call changes.
        known = {id(self._source.loaded.model): self._source.loaded.model}
        self._reader = None if self._source.own_task else copy.deepcopy(self._source.task, known)
        self._tokenizer = copy.deepcopy(self._source.loaded.tokenizer)
        self.columns = self._columns()

    def _columns(self) -> list[str]:
        """The columns that the first rows have besides their texts."""
        names: dict[str, None] = {}
        if self._rows is not None:
            for row in range(min(len(self._rows), _COLUMN_ROWS)):
                with suppress(UserError):  # malformed, and the cache has skipped it
                    names |= dict.fromkeys(other_columns(self._rows[row]))
        return list(names)

    @property
    def has_rows(self) -> bool:
        """Whether training examples can be shown."""
        return self._rows is not None

    @property
    def has_decoys(self) -> bool:
        """Whether hits have p- and q-values."""
        return has_decoys(self.ensemble.caches, QueryOptions())

    def check(self, question: Question) -> None:
        """Raises UserError for a question that cannot be answered, before it waits for its turn."""
        question.record(self.ensemble)
        has_decoys(self.ensemble.caches, self._options(question))
        if question.words and not self.by_token:
            raise UserError("this cache has no scores of single words", "leave out 'words'")
        if question.words and question.top_k > _MOST_BY_WORD:
            raise UserError(f"with 'words', top_k is at most {_MOST_BY_WORD}, got {question.top_k}")

    def explain(self, question: Question, job: Job) -> Answer:
        """The answer to a question with the examples behind it, kept in the history.

        Events of the job are "answer" with the text that the model has written further, "stage" with a
        stage's name, and the numbers of its steps that are done and of all. Raises UserError as
        `rapidin.Ensemble.query` does, and CancelledError.
        """

        def on_stage(name: str, done: int, total: int) -> None:
            job.check()
            job.on_event("stage", {"stage": name, "done": done, "total": total})

        record, options = question.record(self.ensemble), self._options(question)
        examples = False if self.examples is None else self.examples
        written = _Written(job.on_event)
        with listening(self._listener(job, written)):
            results = self.ensemble.query([record], options, examples=examples, on_stage=on_stage)
        job.check()
        if results[0].generated:
            written.end(results[0].completion)
        results = Results([_with_file_names(result) for result in results])
        answer = Answer(question, results, self._made(options))
        self.history.add(answer)
        return answer

    def generate(self, question: Question, job: Job) -> dict[str, Any]:
        """What the model answers, without the examples behind it; events as for `explain`."""
        record = question.record(self.ensemble)
        task, model, written = self._source.task, self._source.loaded.model, _Written(job.on_event)
        with listening(self._listener(job, written)):
            answer = task.generation(model, record, question.max_new_tokens)
        job.check()
        written.end(answer.completion)
        return {"prompt": answer.prompt, "completion": answer.completion}

    def row(self, row: int) -> dict[str, Any] | None:
        """A training example with all of its columns, and as the model reads it; None if there is none."""
        if self._rows is None or not 0 <= row < len(self._rows):
            return None
        cache = self.ensemble.caches[-1]
        with self._lock:
            index = self._rows.index(row)
            try:
                record = cached_record(self._rows, row, index, int(cache.records([row])[0]))
                original = self._rows.original(row)
            except (UserError, IndexError):  # malformed, changed since, or not cached yet
                return {"row": row, "index": index, "record": None, "read": None}
            read = None
            if self._reader is not None:
                read = read_example(self._reader, self._tokenizer, self._rows, row, record).to_json()
                del read["where"]  # the folders of the server are no business of its users
            return {"row": row, "index": index, "record": original, "read": read}

    def _options(self, question: Question) -> QueryOptions:
        return QueryOptions(
            top_k=question.top_k,
            targets="tokens" if question.words else None,
            contributions=question.words,
            fold=True,
            layers=True,
            histogram=True,
            by=question.by,
            interactions=question.interactions,
            fdr=question.fdr,
            max_new_tokens=question.max_new_tokens,
        )

    def _listener(self, job: Job, written: _Written) -> Listener:
        tokenizer = self._source.loaded.tokenizer

        def wrote(ids: Sequence[int]) -> None:
            job.check()
            written(str(tokenizer.decode(list(ids), skip_special_tokens=True)))

        return Listener(wrote, lambda: job.cancelled)


def _with_file_names(result: QueryResult) -> QueryResult:
    """The result with names of files instead of their paths, if scores are summed by file."""
    if result.by != "file":
        return result
    return replace(result, groups=[replace(group, value=Path(group.value).name) for group in result.groups])


class _Written:
    """Tells what a text has more than before. A character whose bytes have not all been written waits."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event, self._told = on_event, ""

    def __call__(self, text: str) -> None:
        self.end(text.rstrip(_UNFINISHED))

    def end(self, text: str) -> None:
        """The text is this, and no further bytes come."""
        if not text.startswith(self._told) or len(text) == len(self._told):
            return
        self._on_event("answer", {"text": text[len(self._told) :]})
        self._told = text
