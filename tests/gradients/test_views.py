"""Parts of a parameter are found by their strides: the place that is said holds the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rapidin.gradients.views import WeightView

EXPERTS, ROWS, COLUMNS = 3, 4, 6
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expert": lambda w: w[1],
    "expert, transposed": lambda w: w[2].T,
    "unbind": lambda w: w.unbind(0)[2],
    "transpose, then expert": lambda w: w.transpose(1, 2)[1],
    "chunk of rows": lambda w: w[1].chunk(2, 0)[1],
    "chunk of columns": lambda w: w[1].chunk(2, 1)[1],
    "chunk of columns, transposed": lambda w: w[2].T.chunk(3, 0)[1],
    "every other row": lambda w: w[1, ::2],
    "every other column": lambda w: w[1, :, 1::2],
    "one row": lambda w: w[2, 1:2],
    "one column": lambda w: w[2, :, 3:4],
    "view of fewer axes": lambda w: w.view(EXPERTS * ROWS, COLUMNS)[ROWS : 2 * ROWS],
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_lies_where_it_is_said_to(kind: str) -> None:
    whole = torch.arange(EXPERTS * ROWS * COLUMNS).view(EXPERTS, ROWS, COLUMNS)
    part = PARTS[kind](whole)
    view = WeightView.whole(7, whole).part(part, whole)
    assert view is not None
    assert view.n == 7
    placed = view.placed((ROWS, COLUMNS))
    assert placed is not None
    found = whole[placed.matrix][placed.span.rows, placed.span.columns]
    assert torch.equal(found if placed.first_is_row else found.T, part)
    rows, columns = part.shape if placed.first_is_row else part.shape[::-1]
    u, v = torch.randn(2, rows), torch.randn(2, columns)
    expected = torch.zeros(ROWS, COLUMNS)
    expected[placed.span.rows, placed.span.columns] = u.T @ v
    torch.testing.assert_close(placed.span.whole_rows(u).T @ placed.span.whole_columns(v), expected)


def test_a_view_of_a_copy_is_a_view_of_the_parameter() -> None:
    whole = torch.arange(EXPERTS * ROWS * COLUMNS).view(EXPERTS, ROWS, COLUMNS)
    turned = whole.transpose(1, 2)
    shown = WeightView.whole(0, whole).part(turned, whole)
    assert shown is not None
    copy = turned.contiguous()  # of other strides than what it shows
    view = shown.part(copy[1].T, copy)
    assert view is not None
    placed = view.placed((ROWS, COLUMNS))
    assert placed is not None
    assert (placed.matrix, placed.first_is_row) == (1, True)
    assert torch.equal(whole[1][placed.span.rows, placed.span.columns], copy[1].T)


@pytest.mark.parametrize(
    "part",
    [
        lambda w: w.view(EXPERTS, ROWS * COLUMNS),
        lambda w: w.view(EXPERTS * ROWS, COLUMNS)[2:6],
        lambda w: w[1].view(COLUMNS, ROWS),
    ],
)
def test_what_is_no_part_of_one_matrix_has_no_place(part: Any) -> None:
    whole = torch.arange(EXPERTS * ROWS * COLUMNS).view(EXPERTS, ROWS, COLUMNS)
    view = WeightView.whole(0, whole).part(part(whole), whole)
    assert view is not None
    assert view.placed((ROWS, COLUMNS)) is None


def test_the_rows_of_biases() -> None:
    bias = torch.arange(EXPERTS * COLUMNS).view(EXPERTS, COLUMNS).float()
    whole = WeightView.whole(0, bias)
    device = torch.device("cpu")
    of_one = whole.part(bias[2], bias)
    of_each = whole.part(bias[:, None], bias)
    assert of_one is not None
    assert of_each is not None
    for view, added in ((of_one, bias[2]), (of_each, bias[:, None]), (whole, bias)):
        outputs = torch.zeros(2, *((EXPERTS,) if added.ndim < 3 else (EXPERTS, 5)), COLUMNS) + added
        rows = view.bias_rows((EXPERTS, COLUMNS), outputs.shape[:-1], device)
        assert rows is not None
        assert torch.equal(bias[rows], outputs.reshape(-1, COLUMNS))
    half = whole.part(bias[1, : COLUMNS // 2], bias)
    assert half is not None
    assert half.bias_rows((EXPERTS, COLUMNS), torch.Size([5]), device) is None
