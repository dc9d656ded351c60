"""The protocol of a task: how it makes examples of records, a batch of examples, and losses of a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rapidin.data.chats import ChatTemplate
from rapidin.data.encoding import AnyExample, Status
from rapidin.data.generations import Generation
from rapidin.data.records import Forms, Record, record_parts
from rapidin.errors import UserError
from rapidin.ops.transfer import upload


@dataclass(frozen=True, slots=True)
class Example:
    """One example as a task reads it.

    inputs: what its batch is made of; length: number of positions that the model computes for it, by which
    batches are filled; status: why it has no sketch; truncated: whether part of it was left out; reference:
    numbers that its loss needs from the model before tuning (`Task.reference`).
    """

    inputs: Mapping[str, Any]
    length: int = 1
    status: Status = Status.OK
    truncated: bool = False
    reference: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadText:
    """A text as a model reads it: what it is, such as "chosen", its token ids, and which of them have a
    loss."""

    name: str
    ids: Sequence[int]
    target: Sequence[bool]

    @staticmethod
    def whole(name: str, ids: Sequence[int], target: bool = False) -> ReadText:
        """A text all of whose tokens have a loss, or none of them."""
        return ReadText(name, ids, [target] * len(ids))


class AnyBatch(Protocol):
    """Examples that the model computes together.

    rows: number of examples; parts: rows of the model's inputs for each example, one after the other; length:
    positions of an example, over all its parts, for layers that see the positions of a whole batch on one
    axis; pooled: whether a layer may see one vector [F] of each row instead of one at each position; alike:
    whether all rows of the model's inputs are the same. Axis 0 of every input of a layer must be the rows of
    the model's inputs.
    """

    @property
    def rows(self) -> int: ...

    @property
    def parts(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def pooled(self) -> bool: ...

    @property
    def alike(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of tensors by name, whose first axis is that of the examples, or of their parts."""

    inputs: Mapping[str, Tensor]
    rows: int
    parts: int = 1
    length: int = 1
    pooled: bool = True
    alike: ClassVar[bool] = False

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    def without(self, name: str) -> dict[str, Tensor]:
        """All tensors but one, such as the model's own arguments without the labels."""
        return {key: value for key, value in self.inputs.items() if key != name}

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(self.inputs.values())).device


class Task:
    """Makes examples of records, batches of examples, and the loss of each example of a batch.

    A task of your own defines `example` and `losses`, and `batch` unless the inputs of its examples are
    tensors of equal shapes. The model may be any `torch.nn.Module` in which the first axis of the inputs of
    every layer is that of the examples. Gradients are taken of these losses, so `losses` must not mix the
    examples of a batch.

    name: recorded in the manifests of caches; forms: of the records that it reads, None for any.
    """

    name: str = ""
    forms: Forms | None = None

    # ------------------------------------------------------------------------ what a task must define

    def example(self, record: Record) -> Any:
        """The example of a record. Raises UserError for a record that cannot be used."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of each example of a batch: [B] float32."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------- what a task may define

    def batch(self, examples: Sequence[Any], device: torch.device) -> Any:
        """The batch of some examples on a device. By default their inputs are stacked."""
        names = examples[0].inputs
        inputs = {
            name: torch.stack([torch.as_tensor(each.inputs[name]) for each in examples]) for name in names
        }
        return Batch({name: upload(value, device) for name, value in inputs.items()}, len(examples))

    def check(self, record: Record) -> None:
        """Raises UserError for a record that `example` would refuse, as far as a quick look shows."""

    def generation(self, model: nn.Module, record: Record, max_new_tokens: int) -> Generation:
        """A record to explain as a generation; the model writes what is missing, in evaluation mode."""
        prompt, completion = record_parts(record)
        return Generation(prompt, completion, False, self.example(record))

    def answer(self, model: nn.Module, prompt: str, max_new_tokens: int) -> Generation:
        """What the model answers to a prompt. Raises UserError for an empty prompt, or one that is too
        long."""
        raise UserError(f"the task '{self.name}' generates no text")

    def filler(self) -> AnyExample | None:
        """A short example, for passes in which a process has none of its own; None if the task has none."""
        return None

    def dated(self, date: str | None) -> Task:
        """The task with another date that chat templates write."""
        encoder = getattr(self, "encoder", None)
        if encoder is None or not hasattr(encoder, "dated"):
            return self
        other: Any = copy.copy(self)
        other.encoder = encoder.dated(date)
        made: Task = other
        return made

    @property
    def chats(self) -> ChatTemplate | None:
        """The chat template that the task's texts are rendered with, None without one."""
        return getattr(getattr(self, "encoder", None), "chats", None)

    needs_causal = False  # whether the model must predict each token from those before it alone

    # -------------------------------------------------------------------------------------- references

    needs_reference = False  # whether a loss depends on what the model computed before it was tuned

    def reference(self, model: nn.Module, batch: Any) -> Tensor:
        """Of each example the numbers [B, R] that its loss takes from the model before it was tuned."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------- tokens

    has_tokens = False  # whether every layer sees an example's tokens, one at a position

    def texts(self, example: Any) -> list[ReadText]:
        """The texts of an example as the model reads them, to show; none if it reads no texts."""
        if not self.has_tokens:
            return []
        return [ReadText("", *self.tokens(example))]

    def label_text(self, record: Record) -> str:
        """The label of a record as it is shown; "" if the task has none."""
        return "" if record.get("label") is None else str(record["label"])

    def tokens(self, example: Any) -> tuple[list[int], list[bool]]:
        """The ids of an example's tokens at the positions of a layer's input, and which of them count."""
        raise NotImplementedError

    def check_tokens(self) -> None:
        """Raises UserError if the tokens of examples have no scores of their own."""
        if not self.has_tokens:
            raise UserError(
                f"the examples of the task '{self.name}' have no tokens with scores of their own",
                "leave out `targets` and `contributions`",
            )
