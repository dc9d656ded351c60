"""Tasks: what a model is tuned for. A task makes a model's inputs of a record, and the loss of each example.

`Task` is the protocol; a task of your own is a class of about twenty lines (docs/guide/tasks.md). The
built-in tasks are named in `rapidin.tasks.names`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapidin.tasks.task import Batch as Batch
    from rapidin.tasks.task import Example as Example
    from rapidin.tasks.task import Task as Task

__all__ = ["Batch", "Example", "Task"]


def __getattr__(name: str) -> Any:
    # Imported when first used, since they import torch, which the names of tasks do not need.
    if name in __all__:
        return getattr(import_module("rapidin.tasks.task"), name)
    raise AttributeError(f"module 'rapidin.tasks' has no attribute {name!r}")
