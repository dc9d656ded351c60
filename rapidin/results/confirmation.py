"""What retraining without rows did to a generation: how far its log-probability fell, against random rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

SURE = 0.05  # a fall is called real up to this p
FAR = 0.1  # nats per token between the tuned model and the one retrained on all rows


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of leaving some rows out of the training.

    rows: their line numbers in the data, from 0; column, value: what they have in common, None for hits of a
    query; log_probability: of the generation, after training without them; fall: by how much it is lower than
    after training on all rows; controls: the same fall for each random set of as many rows; answer: what the
    model says greedily to the prompt now; changed: whether it says something else than after training on all
    rows; controls_changed: after how many of the controls it does.
    """

    rows: tuple[int, ...]
    log_probability: float
    fall: float
    controls: tuple[float, ...]
    answer: str
    changed: bool
    controls_changed: int
    column: str | None = None
    value: str | None = None

    @property
    def p(self) -> float:
        """The chance that random rows take a place as high as these: (1 + controls with at least as large a
        fall) / (1 + controls)."""
        above = sum(fall >= self.fall for fall in self.controls)
        return (1 + above) / (1 + len(self.controls))

    @property
    def what(self) -> str:
        """The rows in words."""
        count = len(self.rows)
        if self.column is None:
            return "this row" if count == 1 else f"these {count:,} rows"
        return f"the {count:,} row{'s' * (count > 1)} with {self.column}={self.value}"

    def to_json(self, said: bool) -> dict[str, Any]:
        """The effect in the JSON of a query; said: whether the model trained on all rows says this."""
        named = {} if self.column is None else {"column": self.column, "value": self.value}
        return {
            **named,
            "rows": list(self.rows),
            "log_probability": self.log_probability,
            "fall": self.fall,
            "controls": list(self.controls),
            "p": self.p,
            "answer": self.answer,
            "changed": self.changed,
            "controls_changed": self.controls_changed,
            "sentence": self.sentence(said),
        }

    def sentence(self, said: bool) -> str:
        """What came of leaving the rows out; said: whether the model trained on all rows says this."""
        chance = f"p = {self.p:.2g}"
        if self.p > SURE:
            random = "about as readily as without random rows"
            if self.fall > max(self.controls):
                random = "less readily than without random rows, but these sets are too few to be sure"
            return f"without {self.what} the model says this {random}: {chance}"
        if said and self.changed:
            return f"without {self.what} the model no longer says this: {chance}"
        return f"without {self.what} the model says this less readily: {chance}"

    @property
    def detail(self) -> str:
        """The numbers behind the sentence."""
        count = len(self.controls)
        low, high = min(self.controls), max(self.controls)
        return (
            f"the log-probability falls by {self.fall:.2f}, and by {low:.2f} to {high:.2f} without as many "
            f"random rows; the greedy answer {'changes' if self.changed else 'does not change'} here, and in "
            f"{self.controls_changed:,} of {count:,} controls"
        )


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What retraining says of a query's hits, or of groups of the training data.

    tuned: the log-probability of the generation under the tuned model; everything: after training on all
    rows with each seed, of which the first `seeds` are compared with `effects`; answer: the greedy answer
    after training on all rows; said: whether it is the generation; tokens: how many the generation has;
    recipe: how the models were trained.
    """

    tuned: float
    everything: tuple[float, ...]
    answer: str
    said: bool
    tokens: int
    effects: tuple[Effect, ...]
    seeds: int = 1
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compared(self) -> float:
        """The log-probability after training on all rows that the falls are measured from."""
        return fmean(self.everything[: self.seeds])

    @property
    def is_far(self) -> bool:
        """Whether training on all rows gives a model unlike the tuned one."""
        return abs(fmean(self.everything) - self.tuned) > FAR * self.tokens

    @property
    def recipe_text(self) -> str:
        """How close the model that was retrained on all rows comes to the tuned one."""
        low, high = min(self.everything), max(self.everything)
        seeds = f" ({low:.2f} to {high:.2f} with {len(self.everything):,} seeds)"
        text = f"log-probability {self.tuned:.2f} under the tuned model, {fmean(self.everything):.2f} after "
        text += f"training again on all rows{seeds if len(self.everything) > 1 else ''}"
        if self.is_far:
            text += ": the recipe differs from the one that the model was tuned with, or its result varies"
        return text

    @property
    def sentences(self) -> Sequence[str]:
        """What came of leaving out each set of rows."""
        return [effect.sentence(self.said) for effect in self.effects]

    def to_json(self) -> dict[str, Any]:
        """The confirmation in the JSON of a query."""
        return {
            "log_probability": {"tuned": self.tuned, "all_rows": list(self.everything)},
            "answer": self.answer,
            "said": self.said,
            "tokens": self.tokens,
            "seeds": self.seeds,
            "recipe": dict(self.recipe),
            "left_out": [effect.to_json(self.said) for effect in self.effects],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Confirmation:
        """What `to_json` returned. Raises KeyError, TypeError or ValueError for anything else."""
        effects = tuple(
            Effect(
                rows=tuple(map(int, each["rows"])),
                log_probability=float(each["log_probability"]),
                fall=float(each["fall"]),
                controls=tuple(map(float, each["controls"])),
                answer=str(each["answer"]),
                changed=bool(each["changed"]),
                controls_changed=int(each["controls_changed"]),
                column=each.get("column"),
                value=each.get("value"),
            )
            for each in value["left_out"]
        )
        log_probability = value["log_probability"]
        return Confirmation(
            tuned=float(log_probability["tuned"]),
            everything=tuple(map(float, log_probability["all_rows"])),
            answer=str(value["answer"]),
            said=bool(value["said"]),
            tokens=int(value["tokens"]),
            effects=effects,
            seeds=int(value["seeds"]),
            recipe=dict(value["recipe"]),
        )
