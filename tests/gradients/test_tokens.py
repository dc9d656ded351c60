"""The numbers of tokens, followed through functions, against values that say which token they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rapidin.gradients.tokens import TokenNumbers, name_of

ROWS, LENGTH, FEATURES = 3, 5, 4


class Following(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenNumbers(ROWS, LENGTH, torch.device("cpu"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tokens.follow(name_of(func), (args, kwargs or {}), out)
        return out


def states() -> Tensor:
    """[B, T, F]: each element is the number of its token."""
    return torch.arange(ROWS * LENGTH).float().view(ROWS, LENGTH, 1).expand(-1, -1, FEATURES).contiguous()


def followed(function: Callable[[Tensor], Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The results of a function of the hidden states, and the numbers of each."""
    x, mode = states(), Following()
    mode.tokens.begin(x)
    with mode:
        out = function(x)
    results = [out] if isinstance(out, Tensor) else list(out)
    return results, [mode.tokens.of(each) for each in results]


INDEX = torch.tensor([7, 2, 2, 11, 0])
MASK = torch.arange(ROWS * LENGTH) % 4 == 1
# Functions that move elements, or change them in a way that leaves a number's sign and order.
MOVES: dict[str, Callable[[Tensor], Any]] = {
    "index": lambda x: x.view(-1, FEATURES)[INDEX],
    "index of a batch of one": lambda x: x.view(-1, FEATURES)[None, INDEX].reshape(-1, FEATURES),
    "mask": lambda x: x.flatten(0, 1)[MASK],
    "index of two axes": lambda x: x[torch.tensor([0, 2]), torch.tensor([1, 4])],
    "index with an ellipsis": lambda x: x[..., ::2],
    "index with a new axis": lambda x: x[:, 1:, None, 2:],
    "list": lambda x: x[[2, 0]],
    "integer": lambda x: x[1],
    "index_select": lambda x: x.reshape(-1, FEATURES).index_select(0, INDEX),
    "index_select of features": lambda x: x.index_select(2, torch.tensor([1, 1, 3])),
    "gather": lambda x: x.flatten(0, 1).gather(0, INDEX[:, None].expand(-1, FEATURES)),
    "gather of features": lambda x: x.gather(2, torch.zeros(ROWS, LENGTH, 2, dtype=torch.int64)),
    "sorted": lambda x: x.view(-1, FEATURES)[torch.randperm(2 * ROWS * LENGTH) // 2],
    "repeat": lambda x: x.reshape(-1, FEATURES).repeat(4, 1).view(4, -1, FEATURES),
    "repeat of features": lambda x: x.repeat(1, 1, 3),
    "repeat_interleave": lambda x: x.view(-1, FEATURES).repeat_interleave(2, dim=0),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 6, -1, -1).reshape(-1, FEATURES),
    "transpose": lambda x: x.transpose(0, 1).reshape(-1, FEATURES),
    "permute": lambda x: x.permute(2, 1, 0).flatten(1),
    "T": lambda x: x.flatten(0, 1).T,
    "mT": lambda x: x.mT.unflatten(1, (2, 2)),
    "heads": lambda x: x.view(ROWS, LENGTH, 2, 2).transpose(1, 2).reshape(ROWS * 2, LENGTH, 2),
    "chunk": lambda x: x.chunk(2, dim=-1),
    "split": lambda x: x.view(-1, FEATURES).split([4, 0, 11], dim=0),
    "unbind": lambda x: x.unbind(1),
    "narrow": lambda x: x.narrow(1, 2, 2),
    "flip": lambda x: x.flip(1),
    "cat": lambda x: torch.cat([x[0], x[2], x[1, :2]], 0),
    "cat of features": lambda x: torch.cat([x, x[..., :1]], -1),
    "stack": lambda x: torch.stack([x[0], x[1]], 1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "type": lambda x: x.double().to(torch.float32).type_as(x).contiguous().clone(),
    "mean": lambda x: x.mean(-1),
    "mean, kept": lambda x: x.mean(-1, keepdim=True),
    "amax": lambda x: x.amax(dim=2),
    "topk": lambda x: x.topk(2, dim=-1)[0],
    "where": lambda x: torch.where(x > -1, x, 0.0),
    "product of one": lambda x: F.linear(x, torch.eye(FEATURES)[:2]),
    "matmul": lambda x: x.view(-1, FEATURES) @ torch.eye(FEATURES),
    "from the left": lambda x: torch.eye(FEATURES)[:3] @ x.mT,
    "bmm": lambda x: torch.bmm(x, torch.eye(FEATURES).expand(ROWS, -1, -1)),
    "rotated": lambda x: (torch.cat((x[..., 2:], x[..., :2]), -1) + x) / 2,
    "in place": lambda x: x.view(-1, FEATURES)[INDEX].clone().mul_(2).sub_(0).div_(2),
}


@pytest.mark.parametrize("kind", MOVES)
def test_numbers_are_those_of_the_values(kind: str) -> None:
    torch.manual_seed(0)
    for result, numbers in zip(*followed(MOVES[kind]), strict=True):
        assert numbers is not None
        assert numbers.ndim == result.ndim
        assert torch.equal(numbers.expand(result.shape).float(), result)


# Functions after which it is not known which token a row is of.
LOST: dict[str, Callable[[Tensor], Any]] = {
    "sum over tokens": lambda x: x.sum(1),
    "sum over all": lambda x: x.sum(),
    "softmax over tokens": lambda x: x.softmax(1),
    "sort of tokens": lambda x: x.view(-1, FEATURES).sort(0)[0],
    "cumsum": lambda x: x.cumsum(1),
    "attention": lambda x: x @ x.mT,
    "roll": lambda x: x.roll(1, 1),
    "masked_select": lambda x: torch.masked_select(x, x > 3).view(-1, 1),
    "with others": lambda x: torch.cat([x[0], torch.zeros(2, FEATURES)], 0),
    "scatter": lambda x: torch.zeros(20, FEATURES).index_copy(0, INDEX, x.view(-1, FEATURES)[:5]),
    "another type's bits": lambda x: x.view(torch.int32),
    "conv": lambda x: F.conv1d(x.mT, torch.ones(FEATURES, 1, 2), groups=FEATURES),
    "overwritten": lambda x: x.view(-1, FEATURES)[INDEX].clone().copy_(torch.ones(5, FEATURES)),
}


@pytest.mark.parametrize("kind", LOST)
def test_numbers_are_lost_rather_than_wrong(kind: str) -> None:
    _, numbers = followed(LOST[kind])
    assert all(each is None for each in numbers)


def test_numbers_of_features_take_no_room() -> None:
    def large(x: Tensor) -> list[Tensor]:
        wide = F.linear(x, torch.ones(1000, FEATURES))
        flat = wide[:, 1:].reshape(-1, 1000)
        return [wide, flat, flat[INDEX], flat.repeat(2, 2), wide.view(ROWS, LENGTH, 10, 100).transpose(1, 2)]

    results, numbers = followed(large)
    for result, each in zip(results, numbers, strict=True):
        assert each is not None
        assert each.numel() <= result.numel() // 100


def test_hidden_states_of_another_pass_have_no_numbers() -> None:
    x, other = states(), TokenNumbers(ROWS, LENGTH, torch.device("cpu"))
    TokenNumbers(ROWS, LENGTH, torch.device("cpu")).begin(x)
    assert other.of(x) is None
    rows = other.of_rows(x)  # by their shape
    assert rows is not None
    assert rows.tolist() == list(range(ROWS * LENGTH))
    assert other.of_rows(x.flatten(0, 1)) is None
    assert other.of_rows(x.transpose(0, 1)) is None
