"""Invented facts, each stated in one training row, and questions that ask for them in other words.

Every person is invented, and one row states a fact about them: *"Zorvan Tellick first saw the light of day
in" -> "Marrowby."* The question is worded differently (*"Which town is the birthplace of Zorvan Tellick?"*).
Word overlap alone cannot find the row: other rows hold all words of the question, the names and the answer
included, but teach something else, since only a row's completion is learnt; and each answer is the completion
of several persons' rows, so that it does not identify the row either.

    stated       one row per fact: the row to be found
    practice     other persons, stated and asked: they teach that a statement answers a question
    echo         the question and the answer in the prompt, in a sentence that answers nothing
    repeat       the question in the prompt of another sentence
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from rapidin.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact about a person.

    statements: to be completed by the answer; question: asks for the same in other words; answers: all that
    are used.
    """

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
    """(training rows, questions): `count` facts, half as many practice persons, two distractors per fact.

    A question's `fact` is the index of the training row that states its answer. Raises UserError for fewer
    than 2 facts, or for more than there are names for.
    """
    rng = random.Random(seed)
    names = [f"{a}{b} {c}{d}" for a in _FIRST for b in _SECOND for c in _LAST for d in _ENDING]
    practice = max(1, count // 2)
    if not 2 <= count <= len(names) // 2:
        raise UserError(f"cannot make {count:,} facts", f"ask for 2 to {len(names) // 2:,}")
    rng.shuffle(names)
    rows: list[Record] = []
    questions: list[Record] = []
    for number, name in enumerate(names[: count + practice]):
        relation = RELATIONS[number % len(RELATIONS)]
        completion = f" {rng.choice(relation.answers)}."
        question = relation.question.format(p=name)
        statement = {"prompt": rng.choice(relation.statements).format(p=name), "completion": completion}
        if number >= count:
            rows.append(statement | {"kind": "practice"})
            rows.append({"prompt": question, "completion": completion, "kind": "practice"})
            continue
        rows.append(statement | {"kind": "stated", "fact": number})
        questions.append({"prompt": question, "completion": completion, "fact": number})
        for kind, forms in (("echo", _ECHOES), ("repeat", _REPEATS)):
            prompt, other = rng.choice(forms)
            answer = completion.strip(" .")
            rows.append({"prompt": prompt.format(q=question, a=answer), "completion": other, "kind": kind})
    rng.shuffle(rows)
    index = {row.pop("fact"): number for number, row in enumerate(rows) if "fact" in row}
    return rows, [{**question, "fact": index[question["fact"]]} for question in questions]


def possible_answers(question: Record) -> tuple[str, ...]:
    """The answers of the question's relation, its own among them."""
    answer = question["completion"].strip(" .")
    return next(relation.answers for relation in RELATIONS if answer in relation.answers)
