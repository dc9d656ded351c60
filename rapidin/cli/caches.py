"""The caches that a command is given, and the models that made them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidin.attribution.options import ModelLocation
from rapidin.cli.console import loading
from rapidin.errors import UserError
from rapidin.tasks.names import forms_of

if TYPE_CHECKING:
    from rich.console import Console

    from rapidin.attribution.ensemble import Ensemble
    from rapidin.data.examples import Examples
    from rapidin.data.fields import FieldMap


def open_caches(folders: Sequence[str]) -> Ensemble:
    """One folder, a cache or an ensemble, or several caches."""
    from rapidin.attribution.ensemble import Ensemble

    return Ensemble.read(folders[0]) if len(folders) == 1 else Ensemble(list(folders))


def folders_of(folder: str) -> list[Path]:
    """The caches in a folder: those of an ensemble, or the folder itself."""
    from rapidin.attribution.ensemble import read_members

    return [member.path for member in read_members(Path(folder))[1]]


def open_queries(
    folder: str, data: Any, *, generations: bool = True, map: FieldMap | None = None
) -> Examples:
    """Queries of the cache in a folder, in the forms of its task; generations: what the model can write may
    be missing; map: the names of their fields."""
    from rapidin.attribution.provenance import task_name
    from rapidin.cache import Manifest
    from rapidin.data.examples import open_examples

    task = task_name(Manifest.read(folders_of(folder)[-1]))
    return open_examples(data, generations=generations, forms=forms_of(task), map=map)


def with_models(console: Console, ensemble: Ensemble, location: ModelLocation) -> Ensemble:
    """The ensemble with its model in memory, or, of several, told how to load each when its turn comes."""
    from rapidin.attribution.ensemble import Ensemble
    from rapidin.distributed import world

    ready = Ensemble(ensemble.members, kind=ensemble.kind, location=location)
    if len(ensemble.members) > 1:
        named = {cache.manifest.model["source"].get("model") for cache in ensemble.caches}
        if location.model is not None and len(named) > 1:
            raise UserError("--model names one model, and these caches were made with several")
        if location.adapter is not None or location.base is not None:
            raise UserError(
                "--adapter and --base name one model, and these are several caches",
                "caches name theirs; use only --model, if what they share has moved",
            )
        return ready
    manifest = ensemble.caches[0].manifest
    if not (world().leads or location.shard_model):  # the other processes only scan
        return ready
    with loading(console, location.model or manifest.model["source"].get("model") or ""):
        loaded = replace(ensemble.members[0], source=ready.source())
    return Ensemble([loaded], kind=ensemble.kind, location=location)


def facts_of(ensemble: Ensemble) -> dict[str, str]:
    """What a page says of where its hits come from: names, since a page is sent to people whom the folders of
    this machine are no business of (--json has the whole paths)."""
    from rapidin import __version__

    cache = ensemble.caches[-1]
    source = cache.manifest.model.get("source", {})
    facts = {
        **{name: model_name(source.get(name)) for name in ("model", "adapter", "base")},
        "caches": ", ".join(cache.path.resolve().name for cache in ensemble.caches),
        "examples": f"{len(cache):,}",
        "made": f"{datetime.now().astimezone():%Y-%m-%d %H:%M} by rapidin {__version__}",
    }
    return {name: value for name, value in facts.items() if value}


def model_name(model: str | None) -> str:
    """The last part of a folder's path; a name on the Hub, such as "org/model", as it is."""
    if not model:
        return ""
    parts = [part for part in re.split(r"[/\\]", model) if part not in ("", ".", "..", "~")]
    is_hub_name = len(parts) <= 2 and "/".join(parts) == model and not os.path.exists(model)
    return model if is_hub_name else "".join(parts[-1:])
