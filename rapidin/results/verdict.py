"""The verdict on a query: whether its best score stands out, what its hits have in common, and what to do
next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Strength = Literal["strong", "weak", "nothing", "unknown"]

# The strength of a verdict by the chance that a query which the data has nothing to do with gets as far.
STRONG, WEAK = 1 / 30, 1 / 10


@dataclass(frozen=True, slots=True)
class Place:
    """Where a query's best score lies among the best scores of other texts.

    scores: of the texts, ascending; above: how many of them are lower than the query's.
    """

    scores: tuple[float, ...]
    above: int

    @property
    def chance(self) -> float:
        """The largest share of such texts that come as far up among the others as the query."""
        return (1 + len(self.scores) - self.above) / (1 + len(self.scores))

    def to_json(self) -> dict[str, Any]:
        """How many are lower, of how many, their quartiles and extremes, and all of them."""
        last = len(self.scores) - 1
        quantiles = [self.scores[round(share * last / 4)] for share in range(5)]
        value = {"above": self.above, "of": len(self.scores), "chance": self.chance, "quantiles": quantiles}
        return value | {"scores": list(self.scores)}


@dataclass(frozen=True, slots=True)
class Common:
    """What hits have in common more often than the training data.

    column: of the value `text`, None if `text` is a word or phrase of the examples; hits: how many of `of`
    hits have it; share: of a sample of the training data that has it.
    """

    text: str
    hits: int
    of: int
    share: float
    column: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        column = {} if self.column is None else {"column": self.column}
        return {**column, "text": self.text, "hits": self.hits, "of": self.of, "share": self.share}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a query's best score stands out.

    strength: "strong", "weak", "nothing" (stands out), or "unknown", of which `reason` says why; score: the
    best score, without a normalization divided by the length of the query's gradient; questions, rows: its
    place among the best scores of neutral questions, and of training rows against the others, None without
    these; common: what the most helpful hits have in common.
    """

    strength: Strength
    score: float | None = None
    questions: Place | None = None
    rows: Place | None = None
    common: tuple[Common, ...] = ()
    reason: str = ""

    @property
    def sentence(self) -> str:
        """The verdict in a sentence."""
        return f"{self.title}: {self.detail}"

    @property
    def title(self) -> str:
        """The strength in words."""
        titles = {
            "strong": "Strong",
            "weak": "Weak",
            "nothing": "Nothing stands out",
            "unknown": "No verdict",
        }
        return titles[self.strength]

    @property
    def detail(self) -> str:
        """Where the best score lies, or why there is no verdict; begins with a small letter."""
        if self.strength == "unknown":
            return f"{self.reason}."
        places = [_place_text(place, what) for place, what in self.places]
        return f"the best score is higher than that of {' and of '.join(places)}."

    @property
    def places(self) -> list[tuple[Place, str]]:
        """The places that are known, and what the other texts are."""
        sets = ((self.questions, "neutral questions"), (self.rows, "training rows"))
        return [(place, what) for place, what in sets if place is not None]

    @property
    def common_text(self) -> str:
        """What the hits have in common, in a sentence; "" for nothing."""
        return "; ".join(map(common_text, self.common))

    @property
    def next_step(self) -> str:
        """What to do next, in a sentence; "" if there is no verdict."""
        return {
            "strong": "Look at the most helpful rows: 'rapidin drop' writes the training data without them.",
            "weak": "Look at the most helpful rows before you act on them; they may be there by chance.",
            "nothing": "Nothing to do: unrelated questions have hits with scores like these.",
            "unknown": "",
        }[self.strength]

    def to_json(self) -> dict[str, Any]:
        """The verdict in the JSON of a query."""
        value: dict[str, Any] = {"strength": self.strength, "sentence": self.sentence}
        if self.reason:
            value["reason"] = self.reason
        if self.score is not None:
            value["score"] = self.score
        for name, place in (("questions", self.questions), ("rows", self.rows)):
            if place is not None:
                value[name] = place.to_json()
        value["common"] = [each.to_json() for each in self.common]
        return value | ({"next": self.next_step} if self.next_step else {})


def _place_text(place: Place, what: str) -> str:
    count = len(place.scores)
    return f"all {count:,} {what}" if place.above == count else f"{place.above:,} of {count:,} {what}"


def common_text(common: Common, shown: Callable[[str], str] = str) -> str:
    """What hits have in common, in words. shown: how a text of the data is written."""
    who = f"all {common.of:,}" if common.hits == common.of else f"{common.hits:,} of {common.of:,}"
    what = f'contain "{shown(common.text)}"'
    if common.column is not None:
        what = f"are {shown(common.column)}={shown(common.text)}"
    return f"{who} {what} ({common.share:.0%} of the training data)"
