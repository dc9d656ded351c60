"""The settings of the evaluations that tune a model, as dataclasses: the command line makes options of them.

This module imports no torch, so that `rapidin eval --help` is quick.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rapidin.errors import UserError, short
from rapidin.settings import Settings, documented, option, whole


@documented
@dataclass(frozen=True)
class Recipe(Settings):
    """How a model is tuned: AdamW, with a learning rate that warms up and then decays or stays.

    steps: number of steps, overrides epochs. rates: (share of the steps done, learning rate) of another
    training, in order, which are followed instead of the schedule. betas, weight_decay: AdamW's. clip:
    maximum gradient norm, None for no clipping. The seed is that of the order of examples, and of dropout if
    the model has it.
    """

    epochs: int = option(
        1,
        help="Passes over the training examples, each in its own order.",
        metavar="N",
        panel="Training",
        limits=(1, None),
    )
    steps: int | None = None
    batch: int = option(
        16,
        help="Examples per training step; the last one of a pass may have fewer.",
        flag="batch-size",
        metavar="N",
        panel="Training",
        limits=(1, None),
    )
    learning_rate: float = option(1e-3, help="Peak learning rate.", metavar="X", panel="Training")
    warm_up: int = option(
        1,
        help="Steps of linear learning-rate warm-up.",
        flag="warmup-steps",
        metavar="N",
        panel="Training",
        limits=(0, None),
    )
    schedule: Literal["linear", "constant"] = option(
        "linear",
        help="Learning rate after the warm-up. linear: decays to zero; constant: stays at the peak.",
        panel="Training",
        choices=("linear", "constant"),
    )
    rates: tuple[tuple[float, float], ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float | None = 1.0
    seed: int = option(
        0,
        help="Random seed of the training, and of synthetic data.",
        metavar="N",
        panel="Training",
        limits=(0, 2**32 - 1),
    )

    def count(self, examples: int) -> int:
        """Number of steps for so many examples."""
        return self.steps if self.steps is not None else self.epochs * -(-examples // self.batch)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, of `steps`."""
        if self.rates:
            return _followed(self.rates, (step + 1) / steps)
        warm_up = min(max(1, self.warm_up), steps)
        rising = (step + 1) / warm_up
        falling = (steps - step) / (steps - warm_up + 1) if self.schedule == "linear" else 1.0
        return self.learning_rate * min(1.0, rising, falling)

    def batches(self, examples: int) -> Iterator[list[int]]:
        """Indices of the examples of each step."""
        rng, order = random.Random(self.seed), list(range(examples))
        left = self.count(examples)
        while left:
            rng.shuffle(order)
            for start in range(0, examples, self.batch)[:left]:
                yield order[start : start + self.batch]
                left -= 1


def _followed(rates: tuple[tuple[float, float], ...], share: float) -> float:
    """The rate at a share of the steps, on the lines through the known ones; never below 0."""
    if len(rates) == 1:
        return rates[0][1]
    after = min(max(1, bisect_left(rates, (share, 0.0))), len(rates) - 1)
    (left, low), (right, high) = rates[after - 1], rates[after]
    return max(0.0, low + (high - low) * (share - left) / (right - left))


def _lora(default: int | None) -> Any:
    return option(
        default,
        help="Rank of the LoRA adapter to tune; 0 tunes all weights.",
        metavar="R",
        panel="Training",
        default="0" if default is None else str(default),
        parse=_rank,
    )


def _rank(text: str) -> int | None:
    rank = whole(text)
    if rank is None:
        raise UserError(f"`lora` must be a whole number of at least 0, got {short(text)}")
    return rank or None


def _checkpoints(default: int) -> Any:
    return option(
        default,
        help="Checkpoints of the tuning to keep, for `at='checkpoints'`.",
        metavar="N",
        panel="Storage",
        limits=(0, None),
    )


def _seeds(default: int, help: str) -> Any:
    return option(default, help=help, metavar="K", panel="Training", limits=(1, None))


@documented
@dataclass(frozen=True)
class GroundTruthSettings(Settings):
    """How the ground truth of `rapidin eval lds` is made.

    recipe: of every tuning; its seed is that of the tuning on all examples, the retrainings take the seeds
    after it. lora: None tunes all weights. Raises UserError for settings that cannot be used.
    """

    recipe: Recipe = field(default_factory=Recipe)
    lora: int | None = _lora(None)
    subsets: int = option(
        100, help="Random subsets to retrain on.", metavar="S", panel="Data", limits=(3, None)
    )
    fraction: float = option(0.5, help="Share of the examples in a subset.", metavar="X", panel="Data")
    seeds: int = _seeds(1, "Retrainings per subset, whose losses are averaged.")
    checkpoints: int = _checkpoints(4)
    max_length: int = option(
        256, help="Maximum tokens per example.", metavar="N", panel="Data", limits=(2, None)
    )

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"`fraction` must be between 0 and 1, got {self.fraction:g}", "0.5 is usual")
        if self.subsets < 3:
            raise UserError(f"`subsets` must be at least 3, got {self.subsets}")
        if self.seeds < 1:
            raise UserError(f"`seeds` must be at least 1, got {self.seeds}")

    def to_json(self) -> dict[str, Any]:
        """What must be the same for a folder to be resumed; subsets may be added."""
        return {
            "recipe": self.recipe.to_json(),
            "lora": self.lora,
            "fraction": self.fraction,
            "seeds": self.seeds,
            "checkpoints": self.checkpoints,
            "max_length": self.max_length,
        }


@documented
@dataclass(frozen=True)
class FactsSettings(Settings):
    """What `rapidin eval facts` makes, and how the model is tuned on it.

    recipe: of the tuning; its seed is that of the facts too. lora: None tunes all weights.
    """

    recipe: Recipe = field(default_factory=Recipe)
    count: int = option(
        60, help="Facts to invent.", flag="facts", metavar="N", panel="Data", limits=(2, None)
    )
    lora: int | None = _lora(8)
    checkpoints: int = _checkpoints(0)


@documented
@dataclass(frozen=True)
class SelectSettings(Settings):
    """What `rapidin eval select` makes and chooses, and how models are trained.

    recipe: of every training; its seed is that of the task too. lora: None tunes all weights. Raises
    UserError for settings that cannot be used.
    """

    recipe: Recipe = field(default_factory=Recipe)
    rows: int = option(400, help="Training rows to make up.", metavar="N", panel="Data", limits=(8, None))
    flipped: float = option(0.2, help="Share of the rows with a wrong label.", metavar="X", panel="Data")
    share: float = option(0.5, help="Share of the rows to choose.", metavar="X", panel="Data")
    seeds: int = _seeds(3, "Trainings for each choice.")
    lora: int | None = _lora(8)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"`share` must be between 0 and 1, got {self.share:g}")
        if self.seeds < 1:
            raise UserError(f"`seeds` must be at least 1, got {self.seeds}")

    @property
    def count(self) -> int:
        """Number of rows to choose."""
        return max(1, round(self.share * self.rows))


@documented
@dataclass(frozen=True)
class ConfirmSettings(Settings):
    """What `rapidin confirm` leaves out, and how it trains.

    What is None of the training is taken from what the Trainer saved beside the adapter. Raises UserError
    for settings that cannot be used.
    """

    top_k: int | None = option(
        None,
        help="Leave out only the first N helpful hits of each query.",
        metavar="N",
        panel="Rows",
        limits=(1, None),
        default="all",
    )
    query: int | None = option(
        None,
        help="Only this query of the file, counted from 1 (rows are counted from 0).",
        metavar="N",
        panel="Rows",
        limits=(1, None),
        default="all",
    )
    by: str | None = option(
        None,
        help="Leave out all rows with the same value in this column, for each value of the hits in turn; "
        "'file' for the file that they are from.",
        metavar="COLUMN",
        panel="Rows",
        default="the hits themselves",
    )
    controls: int = option(
        19,
        help="Random sets of as many rows that are left out for comparison; p is at least 1 / (N + 1).",
        metavar="N",
        panel="Rows",
        limits=(1, None),
    )
    epochs: int | None = option(
        None,
        help="Passes over the training examples.",
        metavar="N",
        panel="Training",
        limits=(1, None),
        default="as saved by the Trainer",
    )
    batch: int | None = option(
        None,
        help="Examples per training step.",
        flag="batch-size",
        metavar="N",
        panel="Training",
        limits=(1, None),
        default="as saved by the Trainer",
    )
    learning_rate: float | None = option(
        None, help="Peak learning rate.", metavar="X", panel="Training", default="as saved by the Trainer"
    )
    warm_up: int | None = option(
        None,
        help="Steps of linear learning-rate warm-up.",
        flag="warmup-steps",
        metavar="N",
        panel="Training",
        limits=(0, None),
        default="as saved by the Trainer",
    )
    schedule: str | None = option(
        None,
        help="Learning rate after the warm-up. linear: decays to zero; constant: stays at the peak.",
        panel="Training",
        choices=("linear", "constant"),
        default="as saved by the Trainer",
    )
    weight_decay: float | None = option(
        None, help="Weight decay of AdamW.", metavar="X", panel="Training", default="as saved by the Trainer"
    )
    max_length: int | None = option(
        None,
        help="Maximum tokens per example.",
        metavar="N",
        panel="Training",
        limits=(2, None),
        default="as in the cache",
    )
    seeds: int = _seeds(1, "Trainings on each set of rows, whose log-probabilities are averaged.")
    seed: int = option(
        0,
        help="Random seed of the trainings and of the random rows.",
        metavar="N",
        panel="Training",
        limits=(0, 2**32 - 1),
    )
    trainer: str | None = option(
        None,
        help="Command that trains instead: {data} becomes a jsonl file of the remaining rows, {out} the "
        "folder in which an adapter or a model must appear, {seed} a number.",
        metavar="COMMAND",
        panel="Training",
        default="LoRA with the adapter's own configuration",
    )

    def __post_init__(self) -> None:
        self.check_values()
        if self.trainer is None:
            return
        given = [name for name in TRAINING if getattr(self, name) is not None]
        if given:
            named = " and ".join(f"`{name}`" for name in given)
            raise UserError(f"{named} and `trainer` do not go together", "put it into the command")
        for part in ("{data}", "{out}"):
            if part not in self.trainer:
                raise UserError(
                    f"the command of `trainer` does not contain {part}",
                    "as in: python train.py {data} {out}",
                )


# Of the settings of `rapidin confirm`, those of its own trainer.
TRAINING = ("epochs", "batch", "learning_rate", "warm_up", "schedule", "weight_decay")
