"""The model that a caller gives, in whatever form, as a `LoadedModel`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from rapidin.errors import UserError
from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel


def loaded_of(model: Any, tokenizer: Any = None) -> LoadedModel:
    """The loaded model of a `LoadedModel`, a name or folder, a transformers Trainer or pipeline, or a model
    in memory with its tokenizer.

    Raises UserError for anything else, and TypeError for a second tokenizer.
    """
    if isinstance(model, LoadedModel):
        if tokenizer is not None:
            raise TypeError("a LoadedModel has its tokenizer already")
        return model
    check_tokenizer(tokenizer)
    if isinstance(model, str | os.PathLike):
        loaded = load_model(os.fspath(model))
        if tokenizer is not None:
            loaded.tokenizer = tokenizer
            name = getattr(tokenizer, "name_or_path", None)
            loaded.source["tokenizer"] = name or loaded.source["tokenizer"]
        return loaded
    if is_holder(model):  # of a model and what reads texts for it
        named = (getattr(model, name, None) for name in ("processing_class", "tokenizer"))
        tokenizer = tokenizer if tokenizer is not None else next((each for each in named if each), None)
        model = model.model
    return LoadedModel.of(model, tokenizer)


def is_holder(value: Any) -> bool:
    """Whether a value is a Trainer, a pipeline or the like: it holds a model, and is none."""
    return not isinstance(value, nn.Module) and isinstance(getattr(value, "model", None), nn.Module)


def check_tokenizer(tokenizer: Any) -> None:
    """Raises UserError for what is no tokenizer, such as its name."""
    if tokenizer is None or (callable(tokenizer) and not isinstance(tokenizer, type | nn.Module)):
        return
    remedy = "load it with transformers.AutoTokenizer.from_pretrained"
    raise UserError(f"the tokenizer is a {type(tokenizer).__name__}, not a tokenizer of transformers", remedy)
