"""A module with some of its functions others, for what is given a module to work with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def changed(module: Any, **names: Any) -> SimpleNamespace:
    """The names of a module, or of an object, some of them in place of its own."""
    return SimpleNamespace(**{name: getattr(module, name) for name in dir(module)} | names)
