"""The number of each example's row in the data set, which travels with the batch.

A trainer drops the columns that its model does not take, shuffles, and lets worker processes make batches. So
the rows are numbered where the loader asks the data set for them, and the numbers are put into the finished
batch, as a tensor that is taken out of it before the model sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import UserError

KEY = "rapidin_rows"


@dataclass(frozen=True, slots=True)
class Numbered:
    """A row of the data set with its number."""

    number: int
    item: Any


class NumberedRows:
    """A data set whose rows have their numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Numbered:
        return Numbered(int(number), self.dataset[number])

    def __getitems__(self, numbers: Sequence[int]) -> list[Numbered]:
        at_once = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[n] for n in numbers] if at_once is None else at_once(list(numbers))
        return [Numbered(int(n), item) for n, item in zip(numbers, items, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class NumberedCollator:
    """Makes a batch of numbered rows: that of the collator, with the tensor `KEY` [n, 3] int64 of the
    examples in it: row, number within the row, and number of tokens.

    A row of packed texts (TRL's ``seq_lengths``) has several examples. The number of tokens is -1 if it is
    not known.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Numbered]) -> Any:
        # Before the collator is called, since some change their features.
        examples = [example for row in rows for example in _examples_of(row)]
        batch = self.collate([row.item for row in rows])
        if not isinstance(batch, MutableMapping):
            raise UserError(
                f"the trainer's collator makes a {type(batch).__name__}, and batches by name are needed",
                "use a collator that returns a dictionary",
            )
        batch[KEY] = torch.tensor(examples, dtype=torch.int64)
        return batch


def _examples_of(row: Numbered) -> list[tuple[int, int, int]]:
    item = row.item if isinstance(row.item, Mapping) else {}
    lengths = item.get("seq_lengths")
    if lengths is not None:
        return [(row.number, n, int(length)) for n, length in enumerate(lengths)]
    ids = item.get("input_ids")
    return [(row.number, 0, -1 if ids is None else len(ids))]


def number_rows(loader: Any) -> None:
    """Let the batches of a data loader, which has not been iterated over yet, have the numbers of their rows.

    Raises UserError for a data set whose rows have no numbers.
    """
    inner = getattr(loader, "base_dataloader", loader)  # of accelerate's loaders
    if not isinstance(inner.dataset, NumberedRows):
        if not hasattr(inner.dataset, "__len__") or not hasattr(inner.dataset, "__getitem__"):
            raise UserError(
                "the rows of the training data have no numbers, since it is a stream",
                "train on a data set with a length, or cache after training with 'rapidin cache'",
            )
        # A loader refuses to take another data set, for its sampler might not fit; this one has the same
        # rows.
        vars(inner)["dataset"] = NumberedRows(inner.dataset)
        inner.collate_fn = NumberedCollator(inner.collate_fn)


def unnumbered(dataset: Any) -> Any:
    """The data set without the numbers."""
    return dataset.dataset if isinstance(dataset, NumberedRows) else dataset


def taken_from(batch: Any) -> Tensor:
    """The tensor `KEY` of a batch, which has it no more."""
    rows: Tensor = batch.pop(KEY)
    return rows
