"""The tasks that are built in, by their names in `--task` and in manifests, and the forms of their records.

Imports no torch: the command line's help and the reading of data need these alone.
"""

from __future__ import annotations

from typing import Any, Literal

from rapidin.data.records import TEXTS, Forms

LossKind = Literal["mean", "sum"]
TaskName = Literal["causal"]

CAUSAL = "causal"  # what caches were made for that do not name a task

_FORMS: dict[str, Forms] = {CAUSAL: TEXTS}


def forms_of(name: str) -> Forms | None:
    """The forms of a task's records; None for a task of the user's own, which reads any record."""
    return _FORMS.get(name)


def task_of_config(config: Any) -> str:
    """The name of the task that a model was saved for, by its config; "causal" where that is not clear."""
    return CAUSAL
