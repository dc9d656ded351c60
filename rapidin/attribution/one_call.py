"""`rapidin.explain`: from a model, its training data and a question to the examples behind the answer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.loaded import is_holder, loaded_of
from rapidin.attribution.options import CacheOptions, QueryOptions
from rapidin.distributed import world
from rapidin.errors import UserError
from rapidin.gradients.settings import GradientSettings
from rapidin.results.collection import Results
from rapidin.settings import check_names

_KINDS = (GradientSettings, CacheOptions, QueryOptions)


def explain(
    model: Any,
    tokenizer: Any = None,
    data: Any = None,
    question: Any = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **by_name: Any,
) -> Results:
    """The training examples behind a model's answer to a question, in one call.

    model: as for `rapidin.Attributor`: a `rapidin.load_model` (with an adapter or a base model), a name or
    folder, a transformers Trainer, or a transformers or peft model with its tokenizer. data: the training
    examples, as for `Attributor.cache`; by default a Trainer's own. question: as for `Attributor.ask`. cache:
    the folder to cache into, which a later call uses again; by default a temporary one. progress: as for
    `Attributor.cache`. All options of caching and querying can be given by name: fields of
    `GradientSettings`, `CacheOptions` and `QueryOptions`.

    >>> rapidin.explain(model, tokenizer, "train.jsonl", "Which planet is the largest?", top_k=5).top

    Several questions about the same data are asked faster with `Attributor.cache` and `Attributor.ask`.
    Raises UserError as these do, and TypeError for unknown names.
    """
    settings, storage, options = _shared_out(by_name)
    if data is None and is_holder(model):
        data = getattr(model, "train_dataset", None)
    if data is None:
        raise UserError(
            "there is no training data", "give `data`, such as 'train.jsonl' or a list of records"
        )
    if question is None:
        raise UserError("there is no question", "give `question`, a text or a (question, answer) pair")
    if cache is None and not world().alone:
        raise UserError("several processes need one folder for the cache", "name it with `cache`")
    attributor = Attributor(loaded_of(model, tokenizer), settings=settings, bytes_per_example=storage.bytes)
    with _folder(cache) as folder:
        made = attributor.cache(data, folder, storage, progress=progress)
        return attributor.ask(question, made, options, progress=progress)


def _folder(cache: str | os.PathLike[str] | None) -> AbstractContextManager[str | Path]:
    if cache is None:
        return tempfile.TemporaryDirectory(prefix="rapidin-")
    return nullcontext(Path(cache))


def _shared_out(by_name: Mapping[str, Any]) -> tuple[GradientSettings, CacheOptions, QueryOptions]:
    """The options by the class that they belong to."""
    check_names(by_name, *_KINDS)
    known = {each.name: kind for kind in _KINDS for each in fields(kind)}
    given = {kind: {name: value for name, value in by_name.items() if known[name] is kind} for kind in _KINDS}
    return (
        GradientSettings(**given[GradientSettings]),
        CacheOptions(**given[CacheOptions]),
        QueryOptions(**given[QueryOptions]),
    )
