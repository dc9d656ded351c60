"""Caching: the sketches of a source of gradients, for every training example, into a cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rapidin import distributed
from rapidin.attribution.decoys import counted_decoys
from rapidin.attribution.null_scores import has_all, null_scores
from rapidin.attribution.options import CacheOptions
from rapidin.attribution.provenance import check_of, data_record, manifest_of, read_fitted, resumed
from rapidin.cache import Cache, CacheWriter, ShardWriter, build, codec
from rapidin.cache.codec import CodecConfig
from rapidin.cache.merge import copy_learned
from rapidin.cache.names import DECOYS
from rapidin.cache.progress import Meter, OnProgress
from rapidin.cache.reader import decoys_folder
from rapidin.data.encoding import Status
from rapidin.data.examples import Examples
from rapidin.distributed import World
from rapidin.errors import CoverageWarning, UserError
from rapidin.gradients.batching import Reporter, StageReporter
from rapidin.gradients.check import GradientCheck
from rapidin.gradients.kept import KeptGradients
from rapidin.gradients.preconditioner import STREAM, Preconditioner
from rapidin.gradients.source import GradientSource
from rapidin.ops.transfer import Download

_CHECK_TEXTS = 64  # examples that those of the check are chosen from
_CHECKED = 2  # examples that the check compares


def format_of(options: CacheOptions, width: int) -> CodecConfig:
    """How rows are stored; width: sketch dimension per layer. Raises UserError for options that do not go
    together."""
    budget, sample = options.bytes, options.sample
    dtype = options.dtype or ("float16" if budget is None else "sign")
    if dtype not in codec.DTYPES:
        raise UserError(f"unknown dtype '{dtype}'", f"use one of {', '.join(codec.DTYPES)}")
    if dtype in codec.FLOATS and (budget is not None or sample):
        raise UserError(
            f"{dtype} rows keep every number of the sketch",
            "use `bytes` with `dtype='sign'`, int4 or int8, or leave it out",
        )
    if dtype in codec.PACKED and width & (width - 1):
        raise UserError(f"`width` must be a power of two with `dtype='{dtype}'`, got {width}")
    if sample is None:
        sample = 0 if budget is None else codec.DEFAULT_SAMPLE
    if sample and budget is None:
        raise UserError("a codec that learns from a sample needs a budget", "use `bytes`")
    if sample < 0 or 0 < sample < 8:
        raise UserError(f"`sample` must be 0 or at least 8, got {sample}")
    if budget is not None and budget < codec.min_row_bytes():
        raise UserError(f"`bytes` must be at least {codec.min_row_bytes()}, got {budget}")
    return CodecConfig(dtype, budget, sample)


def build_cache(
    source: GradientSource,
    examples: Examples,
    path: Path,
    options: CacheOptions,
    on_progress: OnProgress | None = None,
) -> Cache:
    """Sketch every example's gradient into the cache at `path`, and resume one that an earlier run left.

    on_progress is called in the leading process only. Raises as `rapidin.Attributor.cache`.
    """
    decoys = options.decoys
    if decoys is not None and decoys.form != examples.form:
        raise UserError(
            f"the decoys are records of the form '{decoys.form}', the examples of the form '{examples.form}'",
            "give texts of the same kind, or name their fields with `map`",
        )
    if source.coverage.is_low and distributed.world().leads:
        warnings.warn(source.coverage.warning, CoverageWarning, stacklevel=3)
    source = resumed(source, path)
    manifest = manifest_of(source, format_of(options, source.width), len(examples), examples)
    manifest.shard_rows = options.shard_rows or build.shard_rows(manifest, path)
    number, parts = options.part or (1, 1)
    world, prefix = distributed.world(), examples.identity_of if options.append else None
    with build.open_writer(path, manifest, world, (max(0, number - 1), parts), prefix) as writer:
        fitting = _Fitting(source, writer, world)
        loop = build.CachingLoop(
            writer,
            world,
            examples,
            lambda row, record: source.example(record),
            lambda texts: fitting.source.sketches(texts, meter, announced=True),
            source.loaded.device,
            lambda message: meter.tell(message),
            learn_only=not number,
            idle=lambda: fitting.source.keep_pace(),
        )
        meter = Meter(on_progress if world.leads else None, writer, world, loop.sampled_rows())
        if world.size * 2 > len(writer.missing) > 0 and not world.alone:
            meter.tell(
                f"{len(writer.missing)} shards for {world.size} processes: a smaller `shard_rows` would keep "
                "all of them busy to the end"
            )
        fitting.settle_check(examples, meter, options.check)
        fitting.settle(examples, meter, loop.awaited)
        meter.prepared()
        loop.run()
        meter.settle(wait=True)
        if options.null and isinstance(writer, CacheWriter):
            add_null(writer, fitting.source, examples, meter, 0 if decoys is None else len(decoys))
        world.meet()
        if decoys is not None:
            _add_decoys(writer, fitting.source, decoys, world, meter)
        meter.tell(None, now=True)
    return Cache(path)


def add_null(
    writer: CacheWriter, source: GradientSource, examples: Examples, reporter: Reporter, decoys: int = 0
) -> None:
    """Adds the null distribution to a complete cache that has none, or lacks that of some normalization.

    decoys: how many the cache gets.
    """
    null = writer.manifest.null
    if not writer.manifest.complete or (null is not None and has_all(null)):
        return
    scores = null_scores(Cache(writer.folder), source, examples, reporter.tell, decoys)
    if scores is not None:
        writer.set_null(scores)


def _add_decoys(
    whole: ShardWriter, source: GradientSource, decoys: Examples, world: World, meter: Meter
) -> None:
    """Sketches decoys into a cache inside of a complete one, with its preconditioner and its codec; resumes.

    Raises UserError if none of them counts, and if the cache has other decoys already.
    """
    folder, rows = whole.folder / DECOYS, len(decoys)
    decoys_folder(whole.folder)  # refuses a link
    manifest = replace(
        whole.manifest,
        gradient=dict(whole.manifest.gradient),
        data=data_record(decoys),
        codec=replace(whole.manifest.codec, sample=0),  # the basis is that of the examples
        rows=rows,
        fitted_codec=None,
        shards=[],
        null=None,
    )
    with build.open_writer(folder, manifest, world) as writer:
        if writer.missing:
            meter.tell(f"sketching {rows:,} decoys")
            if isinstance(writer, CacheWriter):
                copy_learned(whole.folder, whole.manifest, writer)
            build.agree(writer, world)
            reporter = StageReporter(meter.stage, "sketching decoys", rows, meter.tell)
            build.CachingLoop(
                writer,
                world,
                decoys,
                lambda row, record: source.example(record),
                lambda texts: source.sketches(texts, reporter, announced=True),
                source.loaded.device,
                meter.tell,
                idle=source.keep_pace,
            ).run()
        world.meet()
    if world.leads:
        kept = Cache(whole.folder)
        assert kept.decoys is not None
        if not counted_decoys(kept, kept.decoys).any():
            raise UserError(
                f"none of the {rows:,} decoys counts: each has no sketch or is one of the examples",
                f"delete '{folder}', and give texts that were never trained on",
            )


class _Fitting:
    """What is found out before a cache is written: how gradients are to be taken, and the preconditioner.

    source: the source of gradients, which has the check's result after `settle_check` and the preconditioner
    after `settle`.
    """

    def __init__(self, source: GradientSource, writer: ShardWriter, world: World) -> None:
        self.source = source.with_preconditioner(None).with_check(None)
        self._writer, self._world = writer, world

    def settle_check(self, examples: Examples, reporter: Reporter, enabled: bool) -> None:
        """Uses the result of the cache's check; makes the check first if there was none: in the leading
        process, and in all processes if they share the model."""
        writer = self._writer
        leads = isinstance(writer, CacheWriter)
        needed = enabled and leads and check_of(writer.manifest) is None and bool(writer.missing)
        if self.source.loaded.sharded:
            needed = self._world.share(lambda: b"1" if needed else b"0") == b"1"
        if needed:
            rows = range(0, len(examples), max(1, len(examples) // _CHECK_TEXTS))
            reporter.stage("comparing gradients with autograd's", 0, _CHECKED)
            check = self.source.checked([self.source.example(examples.get(row)) for row in rows])
            reporter.stage("comparing gradients with autograd's", _CHECKED, _CHECKED)
            if check is None:
                reporter.tell("gradients are not compared with autograd's: no example has a gradient")
            elif isinstance(writer, CacheWriter):
                self._refuse_late(check)
                writer.set_check(check.to_json())
                reporter.tell(check.text)
        build.agree(writer, self._world)
        self.source = self.source.with_check(check_of(writer.manifest))
        if self.source.batches.one_at_a_time:
            reporter.tell(self.source.batches.why_one_at_a_time)

    def _refuse_late(self, check: GradientCheck) -> None:
        """Raise UserError if the check finds fault with gradients that are cached already."""
        if self._writer.manifest.shards and (check.by_autograd or check.mixed):
            raise UserError(
                f"the cache in '{self._writer.folder}' was begun without the check, and its gradients are "
                f"wrong: {check.text}",
                "cache into another folder",
            )

    def settle(self, examples: Examples, reporter: Reporter, awaited: Callable[[Sequence[int]], int]) -> None:
        """Uses the preconditioner of the cache, and fits it first if there is none: in the leading process,
        and in all processes if they share the model.

        awaited: how many of some rows this run is to write. Rows of the sample whose sketches are made here
        are reported as done.
        """
        writer, record, config = self._writer, self._writer.manifest.preconditioner, self.source.config
        if record is None:
            return
        fitted = config.fitted
        if fitted is None:
            exists = record["sha256"] is not None and (writer.folder / record["file"]).exists()
            again = exists and self._lacks_sketches(awaited)
            known = bool(int(self._world.share(lambda: b"1" if exists and not again else b"0")))
            if not known and (self._world.leads or self.source.loaded.sharded):
                fitted = self._fit(examples, reporter, awaited)
                if again and fitted.sha256 != record["sha256"]:  # of another machine: it stays as it is
                    fitted = None
        if fitted is not None and isinstance(writer, CacheWriter):
            if config.kind != "optimizer" and record["sha256"] not in (None, fitted.sha256):
                raise UserError(
                    f"the preconditioner '{writer.folder / record['file']}' is missing, and fitting it again "
                    "on this machine gives another one",
                    "restore the file, or cache into another folder",
                )
            writer.set_preconditioner(fitted.data)
        build.agree(writer, self._world)
        if fitted is None or not self._world.alone:
            fitted = read_fitted(writer.manifest)
        self.source = self.source.with_preconditioner(fitted)

    def _sample(self) -> list[int]:
        """The rows that the preconditioner is fitted to, of those that the cache was started with."""
        begun, settings = self._writer.manifest.rows_begun, self.source.settings
        return build.sample_rows(begun, self.source.config.sample_of(begun), settings.seed, STREAM)

    def _lacks_sketches(self, awaited: Callable[[Sequence[int]], int]) -> bool:
        """Whether shards with rows of the sample are lost, which are made again in the batches of the fit."""
        keeper = self._keeper
        return keeper is not None and not keeper.fitted_folder.exists() and awaited(self._sample()) > 0

    @property
    def _keeper(self) -> CacheWriter | None:
        """The writer, if the sample can be sketched from the gradients of the fit."""
        writer = self._writer
        return writer if isinstance(writer, CacheWriter) and self.source.keeps_gradients else None

    def _fit(
        self, examples: Examples, reporter: Reporter, awaited: Callable[[Sequence[int]], int]
    ) -> Preconditioner:
        """The preconditioner of each point, from a sample of the examples that the cache was started with.

        The sample is sketched too, from the gradients of the same passes, as far as these can be kept.
        """
        keeper, rows = self._keeper, self._sample()
        reporter.tell(f"fitting the preconditioner on a sample of {len(rows):,} examples first")
        texts = [self.source.example(examples.get(row)) for row in rows]
        known = (self._writer.manifest.preconditioner or {}).get("sha256")
        if keeper is None or (known is not None and not awaited(rows)):
            return self.source.fit_preconditioner(texts, reporter)
        kept = KeptGradients()
        fitted = self.source.fit_preconditioner(texts, reporter, kept)
        sketched: list[int] = []
        parts, stage, count = [], "sketching the sample", len(kept)
        for chosen, sketches, status in self.source.with_preconditioner(fitted).of_kept(kept):
            reporter.stage(stage, len(sketched), count)
            in_batch = [rows[n] for n in chosen]
            skipped = int(Download([(status != int(Status.OK)).sum()]).wait()[0])
            reporter.add(awaited(in_batch), sum(texts[n].length for n in chosen), skipped=skipped)
            sketched += in_batch
            parts.append((sketches, status))
        keeper.fitted_folder.mkdir(exist_ok=True)  # a resumed run does not try again what cannot be kept
        if parts and known in (None, fitted.sha256):
            made, statuses = (torch.cat(each) for each in zip(*parts, strict=True))
            build.write_fitted(keeper, fitted.data, sketched, made, statuses)
            reporter.stage(stage, len(sketched), len(sketched))
        return fitted
