"""The caches that a command is given, and the models that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rapidin.cli.console import loading
from rapidin.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rapidin.attribution.ensemble import Ensemble


def open_caches(folders: Sequence[str]) -> Ensemble:
    """One folder, a cache or an ensemble, or several caches."""
    from rapidin.attribution.ensemble import Ensemble

    return Ensemble.read(folders[0]) if len(folders) == 1 else Ensemble(list(folders))


def folders_of(folder: str) -> list[Path]:
    """The caches in a folder: those of an ensemble, or the folder itself."""
    from rapidin.attribution.ensemble import read_members

    return [member.path for member in read_members(Path(folder))[1]]


def with_models(
    console: Console,
    ensemble: Ensemble,
    model: str | None,
    adapter: str | None,
    base: str | None,
    device: str | None,
    trust_remote_code: bool,
    shard_model: bool = False,
) -> Ensemble:
    """The ensemble with its model in memory, or, of several, told how to load each when its turn comes."""
    from rapidin.attribution.ensemble import Ensemble, Member
    from rapidin.distributed import world

    load = {"device": device, "trust_remote_code": trust_remote_code, "model": model}
    load["shard_model"] = shard_model
    if len(ensemble.members) > 1:
        named = {cache.manifest.model["source"].get("model") for cache in ensemble.caches}
        if model is not None and len(named) > 1:
            raise UserError("--model names one model, and these caches were made with several")
        if adapter is not None or base is not None:
            raise UserError(
                "--adapter and --base name one model, and these are several caches",
                "caches name theirs; say only --model where what they share has moved",
            )
        return Ensemble(ensemble.members, kind=ensemble.kind, load=load)
    manifest = ensemble.caches[0].manifest
    single = Ensemble(ensemble.members, kind=ensemble.kind, load=load | {"adapter": adapter, "base": base})
    if not (world().leads or shard_model):  # who scans along needs no model
        return single
    with loading(console, model or manifest.model["source"].get("model") or ""):
        member = ensemble.members[0]
        loaded = Member(member.path, member.weight, single.attributor())
        return Ensemble([loaded], kind=ensemble.kind, load=single.load)
