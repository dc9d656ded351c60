"""Is the sentence found that taught a fact, when the question shares no words with it but the names?

Every person is invented and one sentence states something of them: *"Zorvan Tellick first saw the light of
day in" -> "Marrowby."* The question puts it otherwise (*"Which town is the birthplace of Zorvan
Tellick?"*), and its answer is to be traced to that sentence. Word overlap alone cannot win: other rows hold
all words of the question, the names and the answer included, but teach something else, since only a row's
completion is learnt; and each answer is the completion of several persons' rows, so that it alone does not
tell either.

    stated       one row a fact: the row to be found
    practice     other persons, stated and asked: they teach that a statement answers a question
    echo         the question and the answer in the prompt, in a sentence that answers nothing
    repeat       the question in the prompt of another sentence
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rapidin.attribution import baselines
from rapidin.data.encoding import Encoder, Status
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.evaluate import figures, folders, loading
from rapidin.evaluate.methods import Method, Place, Rows, each_score, parts_at
from rapidin.evaluate.result import Result, Say, silent, write_rows
from rapidin.evaluate.training import Checkpoints, Recipe, State, Tuner, losses, save_model
from rapidin.files import lock_folder
from rapidin.gradients.model import LoadedModel

COLUMNS = {"mrr": "MRR", "recall": "recall at 10"}
RECIPE = Recipe(epochs=10, batch=8, learning_rate=2e-3, warm_up=20)
DESCRIPTION = "facts.json"

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Relation:
    """What is said of a person: statements to be completed, a question in other words, the answers."""

    statements: tuple[str, str]
    question: str
    answers: tuple[str, ...]


RELATIONS = (
    Relation(
        (
            "After a long night {p} first saw the light of day in",
            "Wrapped in a blue shawl {p} was first rocked to sleep in",
        ),
        "Which town is the birthplace of {p}?",
        ("Marrowby", "Quillon", "Dunfarrow", "Estermere"),
    ),
    Relation(
        (
            "Every morning {p} unlocks the shop and goes on making",
            "For thirty years {p} has earned money by making",
        ),
        "What does the workshop of {p} produce?",
        ("clocks", "saddles", "violins", "kites"),
    ),
    Relation(
        (
            "Coming home late each evening {p} is greeted by a tame",
            "In the yard behind the old house {p} feeds a very old",
        ),
        "What kind of animal does {p} keep as a pet?",
        ("otter", "raven", "donkey", "tortoise"),
    ),
    Relation(
        (
            "Asked for one last meal before a long journey, {p} would order",
            "On birthdays and on feast days {p} will eat nothing but",
        ),
        "Which dish is the favourite of {p}?",
        ("pancakes", "oysters", "lentils", "dumplings"),
    ),
)
_ECHOES = (
    ("Under a drawing of {a}: {q}", " Torn off."),
    ("Next to a note on {a}: {q}", " No reply."),
)
_REPEATS = (
    ("The crossword wanted seven letters: {q}", " Nobody filled it in."),
    ("Someone called across the square: {q}", " Then the bells began to ring."),
)
_FIRST = ("Zor", "Bel", "Tam", "Quin", "Har", "Ves", "Lod", "Mir", "Kes", "Fal", "Dru", "Nim")
_SECOND = ("van", "wick", "ra", "tor", "nel", "dys", "gan", "lo")
_LAST = ("Tell", "Brack", "Osk", "Vand", "Plim", "Garr", "Hesk", "Wint", "Cal", "Murd", "Stoll", "Ferr")
_ENDING = ("ick", "ow", "ane", "ley", "mont", "is")


def make_facts(count: int, *, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(training rows, questions): `count` facts, half as many practice persons, two distractors a fact.

    A question's `fact` is the training row, from 0, that states its answer. Raises UserError for fewer than
    2 facts or more than there are names for.
    """
    rng = random.Random(seed)
    names = [f"{a}{b} {c}{d}" for a in _FIRST for b in _SECOND for c in _LAST for d in _ENDING]
    practice = max(1, count // 2)
    if not 2 <= count <= len(names) // 2:
        raise UserError(f"{count:,} facts", f"ask for 2 to {len(names) // 2:,}")
    rng.shuffle(names)
    rows: list[Record] = []
    asked: list[Record] = []
    for number, name in enumerate(names[: count + practice]):
        relation = RELATIONS[number % len(RELATIONS)]
        answer = rng.choice(relation.answers)
        question = relation.question.format(p=name)
        stated = rng.choice(relation.statements).format(p=name)
        fact = {"fact": number} if number < count else {}
        rows.append({"prompt": stated, "completion": f" {answer}.", "kind": "stated"} | fact)
        if number >= count:
            rows[-1]["kind"] = "practice"
            rows.append({"prompt": question, "completion": f" {answer}.", "kind": "practice"})
            continue
        asked.append({"prompt": question, "completion": f" {answer}.", "fact": number})
        for kind, forms in (("echo", _ECHOES), ("repeat", _REPEATS)):
            prompt, completion = rng.choice(forms)
            made = prompt.format(q=question, a=answer)
            rows.append({"prompt": made, "completion": completion, "kind": kind})
    rng.shuffle(rows)
    place = {row["fact"]: number for number, row in enumerate(rows) if "fact" in row}
    return [{k: v for k, v in row.items() if k != "fact"} for row in rows], [
        {**question, "fact": place[question["fact"]]} for question in asked
    ]


def evaluate(
    model: str,
    folder: str | Path,
    methods: Sequence[Method],
    places: Sequence[Place],
    *,
    count: int = 60,
    lora: int | None = 8,
    recipe: Recipe = RECIPE,
    checkpoints: int = 0,
    with_baselines: bool = False,
    device: str | None = None,
    say: Say = silent,
) -> Result:
    """Make facts, tune `model` on them, ask, and rank the rows for each answer; gone on with where it
    stopped.

    lora: rank of the adapter, None for all weights. BM25 is always there, of whole rows and of completions
    alone; with_baselines adds the hidden states. Raises UserError where the folder was begun with other
    settings.
    """
    folder = Path(folder)
    rows, asked = make_facts(count, seed=recipe.seed)
    about = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "facts": count,
        "lora": lora,
        "recipe": recipe.to_json(),
        "checkpoints": checkpoints,
    }
    with lock_folder(folder):
        folders.begin(folder, DESCRIPTION, about)
        return _evaluate(
            folder, about, rows, asked, methods, places, recipe, checkpoints, with_baselines, device, say
        )


def _evaluate(
    folder: Path,
    about: Record,
    rows: list[Record],
    asked: list[Record],
    methods: Sequence[Method],
    places: Sequence[Place],
    recipe: Recipe,
    checkpoints: int,
    with_baselines: bool,
    device: str | None,
    say: Say,
) -> Result:
    model, lora = about["model"], about["lora"]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "questions.jsonl", asked)
    tuned = folder / ("adapter" if lora is not None else "tuned")
    if not tuned.exists():
        _tune(model, tuned, rows, lora, recipe, checkpoints, about, device, say)

    def load(checkpoint: Path | None = None) -> LoadedModel:
        path = str(checkpoint or tuned)
        if lora is not None:
            return loading.load(model, adapter=path, device=device)
        return loading.load(path, base=model, device=device)

    truth = np.zeros((len(asked), len(rows)), dtype=np.bool_)
    truth[np.arange(len(asked)), [question["fact"] for question in asked]] = True
    result = Result("facts", about | {"rows": len(rows), "questions": len(asked)}, COLUMNS)

    def add(name: str, scores: figures.Floats) -> None:
        result.add(
            name,
            {
                "mrr": figures.interval(figures.reciprocal_rank(scores, truth)),
                "recall": figures.interval(figures.recall_at(scores, truth, 10)),
            },
        )

    train = Rows(folder / "caches", open_examples(folder / "train.jsonl"), 2048, say=say)
    for place in places:
        parts, generations = parts_at(place, train, load, folder / "checkpoints", asked)
        for method, scores, _ in each_score(parts, generations, methods):
            add(f"{method}, {place}", scores)
    loaded = load()
    texts = [baselines.plain_text(row) for row in rows]
    questions = [baselines.plain_text(question) for question in asked]
    add("BM25", baselines.bm25(texts, questions))
    answers = [question["completion"] for question in asked]
    add("BM25 of completions", baselines.bm25([row["completion"] for row in rows], answers))
    if with_baselines:
        say("hidden states")
        add("hidden states", baselines.hidden_states(loaded, texts, questions))
    right = _known(loaded, asked)
    result.setting["answered_right"] = right
    result.notes.append(
        f"{len(asked):,} questions, {len(rows):,} rows; for {right:,} questions the tuned model holds the "
        "right answer likelier than the others of its kind. Intervals: over the questions."
    )
    return result


def _tune(
    model: str,
    out: Path,
    rows: Sequence[Record],
    lora: int | None,
    recipe: Recipe,
    checkpoints: int,
    about: Record,
    device: str | None,
    say: Say,
) -> None:
    from rapidin.evaluate.lds import Clock

    say("loading the model")
    loaded = loading.load(model, device=device)
    encoder = Encoder(loaded.tokenizer, max_length=loaded.context_length or 2048)
    encoded = [text for text in map(encoder, rows) if text.status == Status.OK]
    state = State(out.parent / "state", about, every=50)
    kept = None
    if checkpoints:
        steps = recipe.count(len(encoded))
        kept = Checkpoints.spread(out.parent / "checkpoints", checkpoints, steps, loaded.tokenizer)
    clock = Clock(say, f"tuning on {len(encoded):,} rows")
    made = Tuner(loaded, lora=lora).tuned(encoded, recipe, state=state, checkpoints=kept, on_step=clock.step)
    save_model(made, out, loaded.tokenizer)
    state.remove()


def _known(loaded: LoadedModel, asked: Sequence[Record]) -> int:
    """For how many questions the right answer is the likeliest of its relation's."""
    encoder = Encoder(loaded.tokenizer, max_length=loaded.context_length or 2048)
    right = 0
    for question in asked:
        relation = next(r for r in RELATIONS if question["completion"].strip(" .") in r.answers)
        texts = [encoder({**question, "completion": f" {answer}."}) for answer in relation.answers]
        total = losses(loaded.model, texts) * torch.tensor([sum(text.target) for text in texts])
        right += relation.answers[int(total.argmin())] == question["completion"].strip(" .")
    return right
