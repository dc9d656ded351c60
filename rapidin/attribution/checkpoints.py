"""The checkpoints of a training run and their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from rapidin.errors import UserError, short


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A `checkpoint-<step>` folder of a Hugging Face training run.

    weight: the sum of the learning rates of the steps since the previous checkpoint; is_adapter: whether it
    holds an adapter instead of a whole model.
    """

    path: Path
    step: int
    weight: float
    is_adapter: bool


def step_of(name: str) -> int | None:
    """The step in the name of a trainer's checkpoint folder, checkpoint-<step>; None for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """The checkpoint-<step> folders in a folder, by step, in their order; none if there is no such folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {step: path for path in paths if (step := step_of(path.name)) is not None and path.is_dir()}
    return dict(sorted(found.items()))


def find_checkpoints(folder: str | Path) -> tuple[list[Checkpoint], bool]:
    """The checkpoints of a training run by step, and whether their learning rates were found.

    The rates are those that the last checkpoint's `trainer_state.json` logs; if it logs none, all steps have
    the same weight. Raises UserError if there are no checkpoints, or if adapters and whole models are mixed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder of checkpoints: '{folder}'")
    steps = checkpoint_folders(folder)
    if not steps:
        raise UserError(f"'{folder}' holds no checkpoint-<step> folders", "name the trainer's output folder")
    adapters = {step: (path / "adapter_config.json").exists() for step, path in steps.items()}
    if len(set(adapters.values())) > 1:
        raise UserError(f"the checkpoints in '{folder}' are adapters and whole models", "keep one kind")
    order = list(steps)
    rates = _learning_rates(steps[order[-1]])
    checkpoints = [
        Checkpoint(steps[step], step, _weight(rates, before, step), adapters[step])
        for before, step in pairwise([0, *order])
    ]
    if rates and not sum(c.weight for c in checkpoints) > 0:
        raise UserError(f"the learning rates in '{steps[order[-1]]}' are all 0", "fix trainer_state.json")
    return checkpoints, bool(rates)


def _learning_rates(checkpoint: Path) -> list[tuple[int, float]]:
    """(step, learning rate) pairs that the trainer logged, by step."""
    path = checkpoint / "trainer_state.json"
    if not path.is_file():
        return []
    try:
        history = json.loads(path.read_bytes())["log_history"]
        pairs = [
            (int(entry["step"]), float(entry["learning_rate"]))
            for entry in history
            if "learning_rate" in entry and "step" in entry
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' cannot be read: {type(error).__name__} {short(error)}",
            "delete it to give all steps the same weight",
        ) from None
    return sorted(pairs)


def _weight(rates: Sequence[tuple[int, float]], before: int, step: int) -> float:
    """The sum of the learning rates of steps before + 1 .. step, linearly interpolated between the logs."""
    if not rates:
        return float(step - before)
    numbers, values = zip(*rates, strict=True)
    return float(np.interp(np.arange(before + 1, step + 1), numbers, values).sum())
