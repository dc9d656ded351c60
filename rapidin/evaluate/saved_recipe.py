"""How a model was tuned, as far as the Hugging Face Trainer left it in files beside the weights.

`trainer_state.json` has the steps, the size of a batch and the learning rates that were logged, and
`optimizer.pt` AdamW's own settings. `training_args.bin` is a pickle, which may run code, and is never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rapidin.errors import UserError, short
from rapidin.evaluate.settings import Recipe

STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.pt"


def saved_recipe(folder: Path, rows: int) -> Recipe | None:
    """The recipe that weights in a folder were tuned with; None if no `trainer_state.json` is in the folder
    or in one of its checkpoints, of which the last counts.

    rows: number of examples that were trained on. The seed is not known. Raises UserError for a damaged file.
    """
    path = _state_file(folder)
    if path is None:
        return None
    try:
        state = json.loads(path.read_bytes())
        steps, epochs = int(state["global_step"]), float(state.get("epoch") or 0)
        per_device = max(1, int(state.get("train_batch_size") or 1))
        logged = {
            int(entry["step"]): float(entry["learning_rate"])
            for entry in state["log_history"]
            if "learning_rate" in entry and "step" in entry
        }
        if steps < 1:
            raise ValueError("no steps")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' cannot be read: {type(error).__name__} {short(error)}", "fix or remove that file"
        ) from None
    # Batches are those of one device; gradient accumulation and more devices show in the number of steps.
    parts = round(rows * epochs / steps / per_device) if epochs else 1
    rates = tuple((step / steps, rate) for step, rate in sorted(logged.items()) if 0 < step <= steps)
    optimizer = _optimizer(path.parent / _OPTIMIZER)
    first, second = optimizer.get("betas", (0.9, 0.999))
    return Recipe(
        steps=steps,
        batch=min(rows, per_device * max(1, parts)),
        learning_rate=max((rate for _, rate in rates), default=0.0),
        rates=rates,
        betas=(float(first), float(second)),
        weight_decay=float(optimizer.get("weight_decay", 0.0)),
    )


def _state_file(folder: Path) -> Path | None:
    if (folder / STATE).is_file():
        return folder / STATE
    found = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name[11:].isdigit()]
    return max(found, key=lambda path: int(path.parent.name[11:]), default=None)


def _optimizer(path: Path) -> Mapping[str, Any]:
    """The settings of the first group of an optimizer's state, which has weight decay if any has; empty if
    there is none that can be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        group: Mapping[str, Any] = state["param_groups"][0]
    except Exception:  # torch raises many kinds; without the file the Trainer's defaults hold
        return {}
    return group
