"""What differs between the cache in a folder and the one that is requested, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from rapidin.errors import UserError, short

# A difference in each section of a manifest, in words.
_WORDS = {
    "model": "for another model",
    "sketch": "with another sketch",
    "gradient": "with other gradients",
    "text": "with another treatment of the texts",
    "rows": "for another number of examples",
    "data": "from other data",
    "codec": "with another codec",
    "shard_rows": "with another number of rows a shard",
    "layers": "for other layers",
}


def refuse_difference(
    cached: Mapping[str, Any], requested: Mapping[str, Any], folder: Path, *, may_append: bool
) -> None:
    """Raise UserError naming the first difference between two manifests' definitions, if there is one.

    may_append: whether examples could be added to the cache in `folder`, if it only has fewer.
    """
    for section, words in _WORDS.items():
        if cached[section] != requested[section]:
            append = section == "rows" and may_append
            _refuse(section, words, cached[section], requested[section], folder, append)


def _refuse(section: str, words: str, cached: Any, requested: Any, folder: Path, append: bool) -> NoReturn:
    detail = ""
    if section == "model":
        words = other_model(cached, requested)
    elif isinstance(cached, dict):
        absent = object()
        key = next(k for k in {**cached, **requested} if cached.get(k, absent) != requested.get(k, absent))
        is_preconditioner = (section, key) == ("gradient", "preconditioner")
        there, here = (
            preconditioner_words(value[key]) if is_preconditioner else short(value.get(key))
            for value in (cached, requested)
        )
        detail = f" ({key}: {there} in the cache, {here} requested)"
    elif not isinstance(cached, list):
        detail = f" ({cached} in the cache, {requested} requested)"
    remedy = "name another folder with `path`"
    if append:
        remedy += ", or add the new examples with `append`"
    raise UserError(f"the cache in '{folder}' was made {words}{detail}", remedy)


def gradient_settings(gradient: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's `gradient` as it was requested, so that two of them can be compared.

    What was found out about the model is left out, since the model determines it, and so are the steps of a
    training run that sketches were taken in, and the result of
    fitting a preconditioner to a sample, which data, model and seed determine. The checksum of an optimizer's
    state is not.
    """
    preconditioner = gradient.get("preconditioner", "off")
    if preconditioner != "off":
        left_out = {"file", "bytes"} if preconditioner["kind"] == "optimizer" else {"file", "bytes", "sha256"}
        preconditioner = {k: v for k, v in preconditioner.items() if k not in left_out}
    requested = {k: v for k, v in gradient.items() if k not in ("check", "coverage", "training")}
    return {**requested, "preconditioner": preconditioner}


def preconditioner_words(value: str | Mapping[str, Any]) -> str:
    """A manifest's preconditioner in words."""
    if isinstance(value, str):
        return value
    if value["kind"] == "optimizer":
        source = f"from the optimizer's state {str(value['sha256'])[:8]}"
    else:
        source = f"from a sample of at most {value['sample']} examples"
    if value["kind"] == "kfac":
        fewer = f", tolerance {value['tolerance']:g}" if value["tolerance"] else ""
        return f"K-FAC's {source}, rank {value['rank']}, damping {value['damping']:g}{fewer}"
    return f"{source}, exponent {value['exponent']:g}, floor {value['floor']:g}"


def other_model(cached: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """In words, how the model that a cache was made with differs from another, by their identities."""
    # First what is missing: with an adapter the model's own parameters have other names, and so another hash.
    for key, words in (("adapter", "an adapter"), ("base", "a base model")):
        if key in cached and key not in given:
            return f"with {words}, and none is given"
        if key in given and key not in cached:
            return f"without {words}, and one is given"
    nouns = {"model": "model", "adapter": "adapter", "base": "base model"}
    differs = next((noun for key, noun in nouns.items() if cached.get(key) != given.get(key)), "tokenizer")
    return f"with another {differs}: its contents are not the same"
