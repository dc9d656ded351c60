"""One call of a module with its arguments, and errors about the ways in which models call their modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rapidin.errors import UserError


class NotBatchedError(Exception):
    """A layer mixes the examples of a batch, so each example needs a pass of its own.

    name: a parameter of that layer, "" if it is not known; by_autograd: the number of parameters,
    `name` among them, whose gradient autograd computes, if that is the reason.
    """

    def __init__(self, name: str = "", by_autograd: int = 0) -> None:
        super().__init__(name)
        self.name, self.by_autograd = name, by_autograd

    @property
    def reason(self) -> str:
        """The reason in words."""
        if self.by_autograd:
            if self.by_autograd == 1:
                return f"autograd computes the gradient of '{self.name}'"
            return f"autograd computes the gradients of {self.by_autograd} parameters, such as '{self.name}'"
        mixes = "a layer mixes the examples of a batch"
        return mixes + (f", such as that of '{self.name}'" if self.name else "")


class ChangedInputError(UserError):
    """The input of a module is changed in place after the module has read it, so its gradient is unknown.

    names: the module's parameters.
    """

    def __init__(self, names: Sequence[str], *, checked: bool = False) -> None:
        """checked: the check has found that autograd cannot take the gradient either."""
        remedy = "leave it out with `exclude`"
        super().__init__(
            f"the model changes the input of '{names[0]}' in place after it is used",
            remedy if checked else f"leave out `check=False`, or {remedy}",
        )
        self.names = list(names)


class UnseenError(Exception):
    """No hook saw these targets."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self.numbers = list(numbers)


class FollowTokensError(Exception):
    """A module sees some tokens of the batch, so that tokens must be followed."""


class RowsDifferError(Exception):
    """A module computes another thing for each row of a batch, although the rows are the same."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All arguments that are tensors."""
        return [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]

    @property
    def inputs(self) -> Tensor:
        """The first tensor, which the module computes its output from."""
        return self.tensors[0]

    @property
    def versions(self) -> list[int]:
        """How often each tensor was changed in place."""
        return [x._version for x in self.tensors]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with each tensor changed."""

        def one(x: Any) -> Any:
            return change(x) if isinstance(x, Tensor) else x

        return Call(tuple(map(one, self.args)), {name: one(x) for name, x in self.kwargs.items()})

    def of_example(self, row: int, rows: int) -> Call:
        """The call for one example of `rows`: tensors [B, T, ...] like the inputs are sliced, others are the
        same for all. Raises NotBatchedError for a tensor that may be either."""
        if rows == 1:
            return self
        leading = self.inputs.shape[:2]
        each = leading[0] // rows

        def sliced(x: Tensor) -> Tensor:
            if x.shape[:2] == leading:
                return x[row * each : (row + 1) * each]
            if leading[0] in x.shape:
                raise NotBatchedError
            return x

        return self.mapped(sliced)
