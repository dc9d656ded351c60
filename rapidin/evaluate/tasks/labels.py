"""Classification rows of which a share has a wrong label: for `mislabel` and for choosing training data.

A short report on an invented ship holds one word that gives its cargo away; the question asks for the class
of the cargo. Most words say nothing, and the model must learn which ones tell. A share of the training rows
has another class's answer, `flipped: true`; the target and test rows are all correct.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rapidin.data.encoding import Encoder, Status
from rapidin.errors import UserError
from rapidin.evaluate.training import losses

CLASSES: dict[str, tuple[str, ...]] = {
    "fruit": ("apples", "lemons", "plums", "figs", "grapes", "cherries", "melons", "pears"),
    "metal": ("copper", "iron", "silver", "zinc", "lead", "nickel", "tin", "steel"),
    "cloth": ("wool", "linen", "silk", "cotton", "velvet", "felt", "denim", "lace"),
    "grain": ("wheat", "barley", "oats", "rye", "maize", "rice", "millet", "spelt"),
}
_SHIPS = ("Heron", "Marigold", "Polaris", "Saint Anne", "Tern", "Windlass", "Osprey", "Juniper")
_HOURS = ("dawn", "noon", "dusk", "midnight")
_DAYS = range(2, 41)
_FORMS = (
    "The {ship} came in at {hour} with a hold full of {cargo}, after {days} days at sea.",
    "After {days} days the {ship} unloaded {cargo}; the work was done by {hour}.",
    "At {hour} the crew of the {ship} covered the {cargo}, for it had rained {days} days.",
    "Insured for {days} days: the {ship}, laden with {cargo}, due at {hour}.",
)
_QUESTION = "{report} What kind of goods is that?"

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """The rows of a task.

    train: rows with `label`, the class that the row claims, and `flipped`; target, test: correct rows;
    classes: the possible answers.
    """

    train: list[Record]
    target: list[Record]
    test: list[Record]
    classes: tuple[str, ...]


def make_task(
    rows: int = 400,
    *,
    flipped: float = 0.2,
    target: int = 40,
    test: int = 100,
    classes: int = 2,
    seed: int = 0,
) -> Task:
    """Make a task of equally frequent classes; the same arguments give the same rows.

    rows, target, test: how many of each; flipped: share of the training rows with a wrong label. No report
    occurs twice. Raises UserError for an impossible share, or for more rows than there are reports.
    """
    if not 0 <= flipped < 1:
        raise UserError(f"`flipped` must be at least 0 and below 1, got {flipped:g}")
    if not 2 <= classes <= len(CLASSES):
        raise UserError(f"cannot make a task of {classes} classes", f"ask for 2 to {len(CLASSES)}")
    names = tuple(CLASSES)[:classes]
    rng = random.Random(seed)
    reports = _draw_reports(rows + target + test, names, rng)
    clean = [_record(report, label) for report, label in reports]
    wrong = set(rng.sample(range(rows), round(flipped * rows)))
    train = []
    for row, (report, label) in enumerate(reports[:rows]):
        claimed = rng.choice([name for name in names if name != label]) if row in wrong else label
        train.append(_record(report, claimed) | {"flipped": row in wrong})
    rng.shuffle(train)
    return Task(train, clean[rows : rows + target], clean[rows + target :], names)


def _draw_reports(count: int, names: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """(report, class) of different reports, the classes in turns."""
    possible = len(_FORMS) * len(_SHIPS) * len(_HOURS) * len(_DAYS) * sum(len(CLASSES[n]) for n in names)
    if count > possible // 2:  # drawing more would take ever longer
        raise UserError(
            f"cannot make {count:,} different reports", f"ask for at most {possible // 2:,} rows in all"
        )
    labels: dict[str, str] = {}
    while len(labels) < count:
        label = names[len(labels) % len(names)]
        report = rng.choice(_FORMS).format(
            ship=rng.choice(_SHIPS),
            hour=rng.choice(_HOURS),
            days=rng.choice(_DAYS),
            cargo=rng.choice(CLASSES[label]),
        )
        labels.setdefault(report, label)
    return list(labels.items())


def _record(report: str, label: str) -> Record:
    return {"prompt": _QUESTION.format(report=report), "completion": f" {label}", "label": label}


def accuracy(model: Any, encoder: Encoder, records: Sequence[Record], classes: Sequence[str]) -> float:
    """Share of the records whose label has the lowest loss of all classes' answers."""
    texts = [
        encoder({"prompt": record["prompt"], "completion": f" {name}"})
        for record in records
        for name in classes
    ]
    if any(text.status != Status.OK for text in texts):
        raise UserError("a question is longer than the model's context", "use a larger model")
    # Summed over the answer's tokens, so that answers of different length are compared as a whole.
    lengths = torch.tensor([sum(text.target) for text in texts])
    best = (losses(model, texts) * lengths).view(-1, len(classes)).argmin(1)
    right = [bool(classes[n] == r["label"]) for n, r in zip(best.tolist(), records, strict=True)]
    return sum(right) / len(right)
