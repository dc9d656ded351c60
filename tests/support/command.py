"""The command line as tests call it, in their own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from rapidin.cli import main


class Ran(NamedTuple):
    """What became of a command: its exit code, and what it said."""

    code: int
    out: str
    err: str


def caller(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """A function that runs `rapidin` with these arguments."""

    def call(*arguments: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
