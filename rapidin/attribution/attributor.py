"""The facade of the library: training examples into a cache, generations into hits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rapidin.attribution.caching import build_cache
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.attribution.loaded import loaded_of
from rapidin.attribution.options import CacheOptions, ModelLocation, QueryOptions
from rapidin.attribution.progress import LOG, Watch, caching_progress, caching_text
from rapidin.attribution.provenance import layers_of, load_model_of, source_of
from rapidin.attribution.reading import read_examples
from rapidin.cache import Cache, Manifest
from rapidin.cache.layout import Block
from rapidin.cache.progress import OnProgress
from rapidin.data.examples import Examples, open_examples
from rapidin.data.fields import FieldMap
from rapidin.distributed import world
from rapidin.errors import UserError
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource
from rapidin.results.collection import Results
from rapidin.results.reading import Reading
from rapidin.settings import check_names
from rapidin.tasks.names import CHAT_FORMS
from rapidin.tasks.task import Task


class Attributor:
    """Caches training examples as gradient sketches, and finds those behind a generation.

    model: a `LoadedModel` (see `rapidin.load_model`), the name or folder of a model, a transformers Trainer
    or pipeline, a transformers or peft model, which needs its tokenizer, a `GradientSource`, or any module
    with a task of your own (docs/guide/tasks.md). settings: how gradients are taken and sketched; fields of
    `rapidin.gradients.settings.GradientSettings` can also be given by name. bytes_per_example: the budget of
    the caches to be made, on which the default sketch dimension depends.

    >>> attributor = Attributor(model, tokenizer, at=0.5)
    >>> cache = attributor.cache("train.jsonl", "cache")
    >>> attributor.ask("Which planet is the largest?", cache).top[0].index

    Raises UserError for settings that do not fit the model or each other, and TypeError for unknown names.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        settings: GradientSettings | None = None,
        *,
        bytes_per_example: int | None = None,
        **by_name: Any,
    ) -> None:
        self._last: Cache | None = None  # the cache that was last made, or opened by its path
        if isinstance(model, GradientSource):
            if tokenizer is not None or settings is not None or by_name:
                raise TypeError("a GradientSource has its tokenizer and its settings already")
            self.source = model
            return
        check_names(by_name, GradientSettings)
        settings = replace(settings or GradientSettings(), **by_name)
        self.source = GradientSource(
            loaded_of(model, tokenizer), settings, bytes_per_example=bytes_per_example
        )

    @staticmethod
    def from_cache(path: str | Path, **location: Any) -> Attributor:
        """The attributor that made a cache: loads the model that its manifest names, and checks it.

        location: fields of `rapidin.attribution.options.ModelLocation`, such as `model` if it has moved.
        Raises UserError if a model is missing or is another one.
        """
        where = ModelLocation.given(None, location)
        return Attributor(source_of(Manifest.read(Path(path)), load_model_of(path, where)))

    @staticmethod
    def like(
        cache: Cache | Manifest | str | Path, model: Any, tokenizer: Any = None, *, task: Task | None = None
    ) -> Attributor:
        """The attributor that made a cache, on a model in memory, which is compared by its weights.

        cache: the cache, its folder or its manifest; model, tokenizer: as for `Attributor`; task: of your
        own, if the cache was made with one. Raises UserError if the cache was made with another model or
        task.
        """
        manifest = cache if isinstance(cache, Manifest) else _cache_of(cache).manifest
        return Attributor(source_of(manifest, loaded_of(model, tokenizer), task))

    @property
    def settings(self) -> GradientSettings:
        """How gradients are taken and sketched, with all defaults chosen."""
        return self.source.settings

    @property
    def loaded(self) -> LoadedModel:
        """The model and its tokenizer."""
        return self.source.loaded

    @property
    def layers(self) -> list[Block]:
        """The layer table of caches that this attributor makes."""
        return layers_of(self.source)

    def __repr__(self) -> str:
        return repr(self.source).replace("GradientSource", "Attributor", 1)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that count."""
        return self.source.coverage.share

    def cache(
        self,
        examples: Any,
        path: str | Path,
        options: CacheOptions | None = None,
        *,
        on_progress: OnProgress | None = None,
        progress: bool | None = None,
        **by_name: Any,
    ) -> Cache:
        """Sketch every example's gradient into the cache at `path`; resumes an unfinished cache.

        examples: anything that `rapidin.data.examples.open_examples` takes, as `decoys` do. options: how
        they are stored; fields of `rapidin.attribution.options.CacheOptions` can also be given by name,
        such as `bytes=2048`. If a batch does not fit into memory, smaller ones follow; an example that does
        not fit alone is recorded as such. SIGINT and SIGTERM wait until the current shard is written.
        on_progress: called in the leading process only, instead of a bar. progress: whether there is a bar;
        by default on a terminal and in a notebook. The cache remembers examples in memory, so that queries
        in this process show them; others are given them with `examples`. Raises UserError if data, folder
        or disk cannot be used, PeerError if another process of the run is gone, and TypeError for unknown
        names.
        """
        options = CacheOptions.given(options, by_name)
        if not isinstance(examples, Examples):
            examples = open_examples(
                examples,
                limit=options.limit,
                forms=self.source.task.forms,
                map=options.map,
                streaming=options.streaming,
            )
            self._check_chats(examples)
        elif options.limit is not None or options.map is not None or options.streaming:
            raise TypeError("examples that are open already have their own limit, map and streaming")
        if options.decoys is not None and not isinstance(options.decoys, Examples):
            decoys = open_examples(
                options.decoys, forms=self.source.task.forms, map=options.map, streaming=options.streaming
            )
            self._check_chats(decoys)
            options = replace(options, decoys=decoys)
        shown = progress if on_progress is None and world().leads else False
        with caching_progress(shown) as bar:
            watch = Watch(on_progress or bar, log=True)
            made = build_cache(self.source, examples, Path(path), options, watch)
        if watch.last is not None:
            LOG.info(caching_text(watch, made))
        if examples.path is None:
            made.examples = examples
        self._last = made
        return made

    def _check_chats(self, examples: Examples) -> None:
        """Warns of what the chat template does not read of the examples. Raises UserError for a chat that it
        rejects."""
        if examples.form not in ("messages", *CHAT_FORMS):
            return
        for note in self.source.check_records(examples):
            if world().leads:
                warnings.warn(note, stacklevel=3)

    def ask(
        self,
        question: Any,
        cache: Cache | str | Path,
        options: QueryOptions | None = None,
        **by_name: Any,
    ) -> Results:
        """The training examples behind the tuned model's answer to a question, which it gives first.

        question: a text, put in the form of the training data, as `rapidin query --ask` does: the Alpaca
        form, the chat template, or as it is; a (question, answer) pair; a record; or a list of these. The
        other arguments are those of `rapidin.Ensemble.query`, and so are the errors.
        """
        return self._alone(cache).ask(question, options, **by_name)

    def show(
        self, examples: Any, limit: int = 3, *, map: FieldMap | Mapping[str, str] | str | None = None
    ) -> Reading:
        """The first examples as the model reads them, with the tokens that have a loss: a list that prints
        itself, and that notebooks colour.

        examples: as for `cache`. Raises UserError for data that cannot be read.
        """
        source = self.source
        return read_examples(source.task, source.loaded.tokenizer, examples, limit, map=map)

    def generate(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        """What the tuned model says to a prompt, greedily, without special tokens."""
        return self.source.task.answer(self.source.loaded.model, prompt, max_new_tokens).completion

    def query(
        self,
        cache: Cache | str | Path,
        generations: Any,
        options: QueryOptions | None = None,
        **by_name: Any,
    ) -> Results:
        """The most helpful and most harmful training examples of each generation.

        Arguments are those of `rapidin.Ensemble.query`. Raises UserError if the cache was made with another
        model or other settings, and whenever `Ensemble.query` does.
        """
        return self._alone(cache).query(generations, options, **by_name)

    def scores(self, cache: Cache | str | Path, generations: Any, **by_name: Any) -> Tensor:
        """The scores of all training examples: [Q, rows] float32 on the CPU, NaN for rows without a sketch.

        Arguments are those of `rapidin.Ensemble.scores`.
        """
        return self._alone(cache).scores(generations, **by_name)

    def _alone(self, cache: Cache | str | Path) -> Ensemble:
        """The ensemble of one cache, made by this attributor."""
        opened = cache if isinstance(cache, Cache) else self._opened(_cache_of(cache))
        location = ModelLocation(device=str(self.loaded.device), shard_model=self.loaded.sharded)
        return Ensemble([Member(opened.path, 1.0, self.source, opened)], location=location)

    def _opened(self, opened: Cache) -> Cache:
        """The object of the last call for the same cache while its manifest is the same, so that rows that a
        scan left on a GPU and examples in memory are reused."""
        if self._last is None or (self._last.path, self._last.manifest) != (opened.path, opened.manifest):
            self._last = opened
        return self._last


def _cache_of(cache: Any) -> Cache:
    """The cache, opened if it is named by its folder. Raises UserError for anything else."""
    if isinstance(cache, Cache):
        return cache
    if isinstance(cache, str | os.PathLike):
        return Cache(Path(cache))
    raise UserError(f"the cache is a {type(cache).__name__}", "give a rapidin.Cache or the folder of one")
