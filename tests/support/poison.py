"""Memory as the allocator may hand it out: with something in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[list[Tensor]]:
    """Inside the block torch.empty gives NaN, or bytes 0x55, on any device; gives what was handed out."""
    empty, given = torch.empty, list[Tensor]()

    def full(*shape: Any, **named: Any) -> Tensor:
        made = empty(*shape, **named)
        given.append(made)
        return made.fill_(torch.nan if made.is_floating_point() else 0x55)

    with mock.patch.object(torch, "empty", full):
        yield given
