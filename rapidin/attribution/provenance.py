"""The manifest of a cache from a source of gradients, and the source of gradients from a manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapidin.attribution.options import ModelLocation
from rapidin.cache import Manifest, other_model
from rapidin.cache.codec import CodecConfig
from rapidin.cache.differences import gradient_settings
from rapidin.cache.layout import Block, layer_table
from rapidin.cache.learned_files import read_preconditioner
from rapidin.cache.names import PRECONDITIONER
from rapidin.data.examples import Examples
from rapidin.distributed import world
from rapidin.errors import UserError
from rapidin.gradients.check import GradientCheck
from rapidin.gradients.load import load_model
from rapidin.gradients.model import MEMORY, LoadedModel
from rapidin.gradients.preconditioner import Preconditioner, PreconditionerConfig
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource
from rapidin.tasks.names import CAUSAL
from rapidin.tasks.task import Task

# The version of the sketch of stacked experts. Caches without one have experts sketched as single matrices.
_STACK_SKETCH = "stack_sketch"
_FILE_KEYS = ("file", "bytes", "sha256")  # of a manifest's preconditioner


def load_model_of(path: str | Path, location: ModelLocation | None = None) -> LoadedModel:
    """The model of the cache at `path`, which its manifest names. Raises UserError if it is not found."""
    manifest = Manifest.read(Path(path))
    source = manifest.model.get("source", {})
    location = location or ModelLocation()
    name = location.model or source.get("model")
    if name is None:
        raise UserError(f"the cache in '{path}' does not say which model made it", _how_to_load(manifest))
    return load_model(
        name,
        adapter=location.adapter or source.get("adapter"),
        base=location.base or source.get("base"),
        tokenizer=_tokenizer_of(source, location),
        device=location.device,
        dtype=source.get("dtype"),
        trust_remote_code=location.trust_remote_code,
        shard_model=location.shard_model,
        task=task_name(manifest),
    )


def _other_tokenizer(recorded: Mapping[str, Any], given: Mapping[str, str]) -> str:
    """In words, how the tokenizer that a cache was made with differs from another."""
    nouns = {"vocabulary": "vocabulary", "template": "chat template"}
    differ = [noun for key, noun in nouns.items() if recorded.get(key, given.get(key)) != given.get(key)]
    if not differ:
        return "with another tokenizer: its contents are not the same"
    verb = "is" if len(differ) == 1 else "are"
    return f"with another tokenizer: its {' and '.join(differ)} {verb} not the same"


def _tokenizer_of(source: Mapping[str, Any], location: ModelLocation) -> str | None:
    """The tokenizer that made a cache; None for the usual one. Caches of models that were loaded by their
    names, but that do not name it, were made with the model's own."""
    recorded = source.get("tokenizer")
    if location.tokenizer is not None or "dtype" not in source or MEMORY in source:
        return location.tokenizer
    for moved, name in ((location.model, source.get("model")), (location.adapter, source.get("adapter"))):
        if recorded == name:
            return moved or recorded
    return recorded or location.model or source.get("model")


def _how_to_load(manifest: Manifest) -> str:
    """What to do if the model that was loaded is not the one that made the cache."""
    source, identity = manifest.model["source"], manifest.model["identity"]
    if "dtype" in source and MEMORY not in source:  # it was loaded by its names
        return "name what it was made with: `model`, `adapter`, `base` or `tokenizer`"
    saved = ["adapter"] if "adapter" in identity else []
    saved += [] if saved and source.get("model") else ["model"]
    return (
        "it was made with a model in memory: in Python use rapidin.Attributor.like(cache, model, tokenizer), "
        f"or save the {' and the '.join(saved)} with save_pretrained and name "
        f"{' and '.join(f'`{name}`' for name in saved)}"
    )


def task_name(manifest: Manifest) -> str:
    """The name of the task that a cache was made for."""
    return str(manifest.gradient.get("task", CAUSAL))


def layers_of(source: GradientSource) -> list[Block]:
    """The layer table of a cache that is made with this source."""
    shapes = [(target.name, target.shape) for target in source.targets]
    return layer_table(shapes, source.points, source.width, whole=source.whole)


def manifest_of(
    source: GradientSource, codec: CodecConfig, rows: int, examples: Examples | None = None
) -> Manifest:
    """The manifest of a cache of `rows` examples that is made with this source."""
    recorded = source.settings.recorded()
    gradient = recorded["gradient"] | {"coverage": source.coverage.to_json()}
    if any(target.stack for target in source.targets):
        gradient[_STACK_SKETCH] = 1
    if gradient["preconditioner"] != "off":
        fitted = source.config.fitted
        gradient["preconditioner"] |= {
            "file": PRECONDITIONER,
            "bytes": 0 if fitted is None else len(fitted.data),
            "sha256": None if fitted is None else fitted.sha256,
        }
    return Manifest(
        model={
            "source": source.loaded.source,
            "identity": source.loaded.identity,
            **source.loaded.text_identity,
        },
        sketch=recorded["sketch"],
        gradient=gradient,
        text=recorded["text"],
        data={} if examples is None else data_record(examples),
        codec=codec,
        rows=rows,
        shard_rows=1,
        layers=layers_of(source),
    )


def data_record(examples: Examples) -> dict[str, Any]:
    """What a manifest says of the examples."""
    data = {"path": examples.path, "form": examples.form, "identity": examples.identity}
    return data | examples.reading.to_json()


def resumed(source: GradientSource, path: Path) -> GradientSource:
    """The source with the date, damping and tolerance of the cache at `path`, if one was begun there and none
    were asked for.

    All processes use those of the leading one.
    """
    chooses_date = source.settings.date is not None and source.chooses_date
    if not (chooses_date or source.chooses_damping or source.chooses_tolerance):
        return source

    def begun() -> bytes:
        found = source
        try:
            manifest = Manifest.read(path)
        except UserError:  # there is none, or opening it says what is wrong
            pass
        else:
            found = _with_damping_of(source, manifest)
            if chooses_date:
                found = found.with_date(manifest.text.get("date") or source.settings.date)
        config = found.config
        return json.dumps([found.settings.date, config.damping, config.tolerance]).encode()

    date, damping, tolerance = json.loads(world().share(begun))
    return source.with_date(date).with_damping(damping, tolerance)


def _with_damping_of(source: GradientSource, manifest: Manifest) -> GradientSource:
    """The source with the damping and tolerance that a cache's preconditioner was fitted with, if none were
    asked for: the defaults were others in earlier versions."""
    record, config = manifest.preconditioner, source.config
    if record is None or record["kind"] != "kfac":
        return source
    damping = record["damping"] if source.chooses_damping else config.damping
    tolerance = record["tolerance"] if source.chooses_tolerance else config.tolerance
    return source.with_damping(damping, tolerance)


def read_fitted(manifest: Manifest) -> Preconditioner | None:
    """The fitted preconditioner of a cache, None if it has none.

    Raises UserError if the file is missing or is not the one that the manifest describes.
    """
    record = manifest.preconditioner
    if record is None:
        return None
    if manifest.folder is None or record["sha256"] is None:
        raise UserError("the cache's preconditioner is not fitted yet", "run the same 'rapidin cache' again")
    return read_preconditioner(manifest.folder, record, Preconditioner.of_tensors)


def check_of(manifest: Manifest) -> GradientCheck | None:
    """The result of the check that was made before caching, None if there was none."""
    record = manifest.gradient.get("check")
    return None if record is None else GradientCheck.from_json(record)


def config_of(manifest: Manifest) -> PreconditionerConfig:
    """The configuration of a cache's preconditioner; with the fitted one if it came from an optimizer's
    state, which may be gone."""
    record = manifest.preconditioner
    if record is None:
        return PreconditionerConfig()
    settings = {key: value for key, value in record.items() if key not in _FILE_KEYS}
    return PreconditionerConfig.from_json(
        settings, read_fitted(manifest) if record["kind"] == "optimizer" else None
    )


def source_of(manifest: Manifest, loaded: LoadedModel, task: Task | None = None) -> GradientSource:
    """The source that made a cache, on a model in memory.

    task: of the user's own, which a manifest only names. Raises UserError if the cache was made with another
    model or another task, or its settings do not fit this model.
    """
    try:
        settings = GradientSettings.from_record(
            {"sketch": manifest.sketch, "gradient": manifest.gradient, "text": manifest.text},
            config_of(manifest),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"the cache's manifest is damaged: {type(error).__name__} {error}") from None
    if task is not None:
        settings = replace(settings, task=task)
    return checked(GradientSource(loaded, settings), manifest)


def checked(source: GradientSource, manifest: Manifest) -> GradientSource:
    """The source with a cache's preconditioner, its damping and its date, and gradients taken as the cache's
    check demands.

    Raises UserError if the cache was made with another model or other settings than the source has.
    """
    source = _with_damping_of(source, manifest)
    recorded, loaded = manifest.model["identity"], source.loaded.identity
    if recorded != loaded:
        what = other_model(recorded, loaded)
        if {**recorded, "tokenizer": ""} == {**loaded, "tokenizer": ""}:
            what = _other_tokenizer(manifest.model, source.loaded.text_identity)
        raise UserError(f"the cache was made {what}", _how_to_load(manifest))
    expected = manifest_of(source, manifest.codec, manifest.rows)
    for section in ("sketch", "gradient", "layers"):
        of_cache, of_source = getattr(manifest, section), getattr(expected, section)
        if section == "gradient":
            of_cache, of_source = gradient_settings(of_cache), gradient_settings(of_source)
            if of_cache.get(_STACK_SKETCH) != of_source.get(_STACK_SKETCH):
                raise UserError(
                    "the cache was made by an earlier version of rapidin, which sketched routed experts in "
                    "another way",
                    "make the cache again",
                )
        if of_cache != of_source:
            raise UserError(
                f"the cache was made with other settings ({section})", "use the settings of its manifest"
            )
    dated = source.with_date(manifest.text.get("date"))
    return dated.with_check(check_of(manifest)).with_preconditioner(read_fitted(manifest))
