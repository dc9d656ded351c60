"""Models loaded without the bars of the libraries, which nothing turns off for GGUF files."""

from __future__ import annotations

import os
from contextlib import redirect_stderr
from typing import Any

from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel


def load(name: str, **options: Any) -> LoadedModel:
    """`rapidin.gradients.load.load_model` in float32, with nothing on standard error."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        return load_model(name, dtype="float32", **options)
