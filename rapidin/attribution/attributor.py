"""The two loops of the flow: examples into a cache, generations into hits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.cache import Cache, CacheWriter, Manifest, ShardWriter, build, codec, other_model
from rapidin.cache.codec import CodecConfig
from rapidin.cache.differences import gradient_settings
from rapidin.cache.layout import layer_table
from rapidin.cache.progress import Meter, OnProgress
from rapidin.data.encoding import Encoded, Encoder, Status, by_length
from rapidin.data.examples import Examples, Record, open_examples
from rapidin.data.generations import Generation, as_records
from rapidin.data.spans import HOTWORDS, Targets, find, split_words
from rapidin.data.spans import check as check_targets
from rapidin.errors import UserError, is_out_of_memory, short
from rapidin.gradients.batch import Batch, LossKind, evaluation_mode
from rapidin.gradients.collector import GradientSketcher, NotBatchedError, Projection
from rapidin.gradients.dropout import Thinning
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.load import DEFAULT_AT, LoadedModel, load_model
from rapidin.gradients.parameters import coverage, find_targets
from rapidin.gradients.preconditioner import (
    STREAM,
    Moments,
    Preconditioner,
    PreconditionerConfig,
    kfac_scales,
)
from rapidin.ops.transfer import Download, upload
from rapidin.results.collection import Results

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rapidin.attribution.ensemble import Ensemble, QueryOptions, ScoreOptions

PROJECTIONS = get_args(Projection)
HASH = "lowbias32-1"  # the definition of bins and signs in docs/sketch.md


_T = TypeVar("_T")


class Attributor:
    """Caches training examples as gradient sketches, and finds those behind a generation.

    model: a `LoadedModel`, or a transformers or peft causal model with its tokenizer.
    width: bins of each layer's sketch; "auto": as many as pay, 512 for hundreds of layers, more for fewer
        (`rapidin.cache.codec.default_width`), or where `budget`, the bytes an example that a code is to take,
        is large.
    projection: "tensor" (from the factors), "flat" (from the formed gradient), or "rapidgrad" (one block of
        `width` numbers for the whole layer-normalised gradient, say 65,536: the paper's setting).
    seed: of bins and signs.
    include, exclude: patterns of parameter names (`rapidin.gradients.parameters.matches`).
    at: points between base (0) and tuned model (1) where gradients are taken, one number or several, which
        are summed; default 0.5 where the untuned state is known, else 1.
    loss: "mean" or "sum" over an example's completion tokens.
    preconditioner: turns gradients by a root of their inverse second moment
    (`rapidin.gradients.preconditioner`): "kfac" K-FAC's,
        from a sample of the data; Adam's, "sample" from a sample of the data, or the path of the optimizer's
        state (optimizer.pt, or the checkpoint folder with it); None or "off" for not. "auto": "kfac", but
        "off" for the projection "rapidgrad", as the paper has it.
    eos, max_length, too_long: see `rapidin.data.encoding.Encoder`.
    batch_tokens: padded tokens a batch.
    thinning: take gradients of the model thinned by a dropout mask (`rapidin.gradients.dropout`).

    >>> attributor = Attributor(model, tokenizer)
    >>> cache = attributor.cache("train.jsonl", "cache")
    >>> attributor.query(cache, [(prompt, completion)])[0].top[0].index

    Raises UserError for settings that do not fit the model or each other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        width: int | Literal["auto"] = "auto",
        budget: int | None = None,
        projection: Projection = "tensor",
        seed: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        at: float | Sequence[float] | None = None,
        loss: LossKind = "mean",
        preconditioner: PreconditionerConfig | str | Path | None = "auto",
        eos: bool = True,
        max_length: int | None = None,
        too_long: Literal["truncate", "skip"] = "truncate",
        batch_tokens: int = 1024,
        thinning: Thinning | None = None,
    ) -> None:
        self.loaded = model if isinstance(model, LoadedModel) else LoadedModel.of(model, tokenizer)
        if projection not in PROJECTIONS:
            raise UserError(f"unknown projection '{projection}'", f"known: {', '.join(PROJECTIONS)}")
        if loss not in ("mean", "sum"):
            raise UserError(f"unknown loss '{loss}'", "known: mean, sum")
        if width != "auto" and width < 1:
            raise UserError(f"a width of {width} bins", "say at least 1")
        if not 0 <= seed < 2**64:
            raise UserError(f"the seed {seed} is not between 0 and 2^64 - 1")
        if (
            projection != "tensor"
            and width != "auto"
            and width % 128
            and width not in (1, 2, 4, 8, 16, 32, 64)
        ):
            raise UserError(f"the {projection} projection takes no width of {width}", "say a multiple of 128")
        self.projection, self.seed, self.loss = projection, seed, loss
        self.thinning = thinning if thinning is not None and thinning.rate else None
        self.points = self._points(at)
        limit = self.loaded.context_length
        self.max_length = max_length if max_length is not None else limit if limit is not None else 2048
        if limit is not None and self.max_length > limit:
            raise UserError(f"--max-length {max_length} is over the model's context of {limit} tokens")
        self.eos, self.too_long, self.batch_tokens = eos, too_long, max(1, batch_tokens)
        self.encoder = Encoder(self.loaded.tokenizer, eos=eos, max_length=self.max_length, too_long=too_long)
        self.include, self.exclude = list(include), list(exclude)
        self.targets = find_targets(
            self.loaded.model, trained=self.loaded.trained, include=include, exclude=exclude
        )
        if width == "auto":
            width = 65536 if projection == "rapidgrad" else codec.default_width(len(self.targets), budget)
        self.width = width
        self._last: Cache | None = None  # the cache that was last opened by its path
        self.layers = layer_table(
            [(target.name, target.shape) for target in self.targets],
            self.points,
            width,
            whole=projection == "rapidgrad",
        )
        self.sketcher = GradientSketcher(
            self.loaded.model, self.targets, width=width, seed=seed, projection=projection, loss=loss
        )
        if self.loaded.sharded and (names := self.sketcher.needs_weights):
            raise UserError(
                f"'{names[0]}' counts, and its gradient needs it whole in one process",
                "leave such parameters out with --exclude, or do without --shard-model",
            )
        if preconditioner == "auto":
            preconditioner = "off" if projection == "rapidgrad" else "kfac"
        self.preconditioner = PreconditionerConfig.of(
            preconditioner, self.loaded.model, self.targets, self.loaded.trained
        )
        self._take_up(self.preconditioner.made)

    def _take_up(self, preconditioner: Preconditioner | None) -> None:
        """Scale gradients by this preconditioner from now on."""
        if preconditioner is not None:
            preconditioner.check(self.targets, len(self.points))
            preconditioner = preconditioner.to(self.loaded.device)
        self.sketcher.preconditioner = preconditioner

    def _points(self, at: float | Sequence[float] | None) -> list[float]:
        path = self.loaded.path
        if at is None:
            adapter_unknown = self.loaded.trained is not None and not path.ends
            if adapter_unknown:
                path.check([DEFAULT_AT])
            return [DEFAULT_AT if path.ends else 1.0]
        points = [float(at)] if isinstance(at, int | float) else [float(a) for a in at]
        if not points:
            raise UserError("--at names no point")
        path.check(points)
        return points

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that count."""
        counted, total = coverage(self.loaded.model, self.targets)
        return counted / total

    @staticmethod
    def from_cache(
        path: str | Path,
        *,
        model: str | None = None,
        adapter: str | None = None,
        base: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        shard_model: bool = False,
    ) -> Attributor:
        """The attributor that made a cache: loads what its manifest names and checks that it is the same.

        model, adapter, base: where they have moved. Raises UserError where one is missing or another.
        """
        manifest = Manifest.read(Path(path))
        source = manifest.model.get("source", {})
        name = model or source.get("model")
        if name is None:
            raise UserError(f"the cache in '{path}' does not say which model made it", "name it with --model")
        loaded = load_model(
            name,
            adapter=adapter or source.get("adapter"),
            base=base or source.get("base"),
            device=device,
            dtype=source.get("dtype"),
            trust_remote_code=trust_remote_code,
            shard_model=shard_model,
        )
        return Attributor.like(manifest, loaded)

    @staticmethod
    def like(manifest: Manifest, model: Any, tokenizer: Any = None) -> Attributor:
        """The attributor of a manifest's settings on a model in memory; UserError where it is another one."""
        try:
            made = Attributor(
                model,
                tokenizer,
                width=manifest.sketch["width"],
                projection=manifest.sketch["projection"],
                seed=manifest.sketch["seed"],
                include=manifest.gradient["include"],
                exclude=manifest.gradient["exclude"],
                at=manifest.gradient["at"],
                loss=manifest.gradient["loss"],
                preconditioner=PreconditionerConfig.recorded(manifest),
                eos=manifest.text["eos"],
                max_length=manifest.text["max_length"],
                too_long=manifest.text["too_long"],
                thinning=Thinning(**thinning) if (thinning := manifest.gradient.get("dropout")) else None,
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"the cache's manifest is damaged: {type(error).__name__} {error}") from None
        made.check(manifest)
        return made

    def check(self, manifest: Manifest) -> None:
        """Raise UserError where a cache was not made with this model and these settings.

        Gradients taken after this are scaled by the preconditioner of that cache, which is read from its
        folder.
        """
        made, here = manifest.model["identity"], self.loaded.identity
        if made != here:
            raise UserError(
                f"the cache was made {other_model(made, here)}",
                "name what it was made with: --model, --adapter or --base",
            )
        mine = self._manifest(None, manifest.codec, manifest.rows)
        for part in ("sketch", "gradient", "layers"):
            there, wanted = getattr(manifest, part), getattr(mine, part)
            if part == "gradient":
                there, wanted = gradient_settings(there), gradient_settings(wanted)
            if there != wanted:
                raise UserError(
                    f"the cache was made with other settings ({part})", "use those of its manifest"
                )
        self._take_up(Preconditioner.read(manifest))

    def _manifest(self, examples: Examples | None, code: CodecConfig, rows: int) -> Manifest:
        data: dict[str, Any] = {}
        if examples is not None:
            data = {"path": examples.path, "form": examples.form, "identity": examples.identity}
        return Manifest(
            model={"source": self.loaded.source, "identity": self.loaded.identity},
            sketch={"projection": self.projection, "width": self.width, "seed": self.seed, "hash": HASH},
            gradient=self._gradient(),
            text={"eos": self.eos, "max_length": self.max_length, "too_long": self.too_long},
            data=data,
            codec=code,
            rows=rows,
            shard_rows=1,
            layers=self.layers,
        )

    def _gradient(self) -> dict[str, Any]:
        """How gradients are taken; what is not used is left out, as in caches older than it."""
        taken: dict[str, Any] = {
            "at": self.points,
            "loss": self.loss,
            "include": self.include,
            "exclude": self.exclude,
            "preconditioner": self.preconditioner.to_json(),
        }
        if self.thinning is not None:
            taken["dropout"] = self.thinning.to_json()
        return taken

    # ---------------------------------------------------------------------------------------- caching

    def cache(
        self,
        examples: Any,
        path: str | Path,
        *,
        dtype: Literal["float16", "float32", "int8", "int4", "sign"] | None = None,
        bytes: int | None = None,
        sample: int | None = None,
        limit: int | None = None,
        shard_rows: int | None = None,
        part: tuple[int, int] | None = None,
        append: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Cache:
        """Sketch every example's gradient into the cache at `path`, going on where an earlier run stopped.

        examples: anything `rapidin.data.examples.open_examples` takes. dtype: of the numbers kept, by default
        float16, or with a budget sign. bytes: a budget an example, all told, that a code is fitted to.
        sample: examples that the code learns from, 0 for none; by default 1,024 with a budget, none without.
        limit: the first so many. shard_rows: rows of a shard, by default what fills 16 MiB. part: (i, n) for
        the i-th of n parts (every n-th shard), that `rapidin.cache.merge` puts together; (0, n) for what all
        parts have in common, preconditioner and code. append: the cache may hold the first of the examples
        alone, and the others are added to it. Where a batch does not fit into memory, smaller ones follow; an
        example that does not fit alone is recorded as such. SIGINT and SIGTERM wait until the shard in hand
        is written. on_progress is called in the leading process alone. Raises UserError where the data, the
        folder or the disk will not do, and PeerError where another process of the run is gone.
        """
        code = self.format(dtype=dtype, bytes=bytes, sample=sample)
        if not isinstance(examples, Examples):
            examples = open_examples(examples, limit=limit)
        elif limit is not None:
            raise TypeError("examples that are open already have their own limit")
        manifest = self._manifest(examples, code, len(examples))
        manifest.shard_rows = shard_rows or build.shard_rows(manifest, Path(path))
        if manifest.shard_rows < 1:
            raise UserError(f"--shard-rows {shard_rows} is less than 1")
        number, parts = part or (1, 1)
        if not 0 <= number <= parts or parts < 1:
            raise UserError(f"--part {number}/{parts} is none of {parts} parts", "as in --part 1/4")
        if append and parts > 1:
            raise UserError("both --append and --part", "add to the merged cache")
        world, prefix = distributed.world(), examples.identity_of if append else None
        part = (max(0, number - 1), parts)
        with build.open_writer(Path(path), manifest, world, part, prefix) as writer:
            loop = build.CachingLoop(
                writer,
                world,
                examples,
                self.encoder,
                lambda encoded: self._sketch_in_step(encoded, meter),
                self.loaded.device,
                lambda message: meter.tell(message),
                learn_only=not number,
                idle=self._keep_step,
            )
            meter = Meter(on_progress if world.leads else None, writer, world, loop.sampled_rows())
            if self.sketcher.one_by_one:
                meter.tell(self._one_by_one())
            idle = world.size * 2 > len(writer.missing) > 0 and not world.alone
            if idle:
                meter.tell(
                    f"{len(writer.missing)} shards for {world.size} processes: a smaller --shard-rows would "
                    "keep all of them busy to the end"
                )
            self._settle_preconditioner(writer, world, examples, meter)
            loop.run()
            meter.settle(wait=True)
            world.meet()
            meter.tell(None, now=True)
        return Cache(path)

    def format(
        self, *, dtype: str | None = None, bytes: int | None = None, sample: int | None = None
    ) -> CodecConfig:
        """How rows are to be packed; UserError where these settings do not go together."""
        dtype = dtype or ("float16" if bytes is None else "sign")
        if dtype not in (*codec.FLOATS, *codec.PACKED):
            raise UserError(f"unknown dtype '{dtype}'", f"known: {', '.join((*codec.FLOATS, *codec.PACKED))}")
        if dtype in codec.FLOATS and (bytes is not None or sample):
            raise UserError(
                f"{dtype} rows keep every number of the sketch",
                "give --bytes with --dtype sign, int4 or int8, or leave it out",
            )
        if dtype in codec.PACKED and self.width & (self.width - 1):
            raise UserError(f"--dtype {dtype} takes no width of {self.width}", "say a power of two")
        if sample is None:
            sample = 0 if bytes is None else codec.DEFAULT_SAMPLE
        if sample and bytes is None:
            raise UserError("a code that learns from a sample needs a budget", "give --bytes")
        if sample < 0 or 0 < sample < 8:
            raise UserError(f"a sample of {sample} examples", "say 0, or at least 8")
        if bytes is not None and bytes < codec.min_row_bytes():
            raise UserError(f"--bytes {bytes} leaves no room", f"say at least {codec.min_row_bytes()}")
        return CodecConfig(dtype, bytes, sample)

    def _settle_preconditioner(
        self, writer: ShardWriter, world: distributed.World, examples: Examples, meter: Meter
    ) -> None:
        """Take up the preconditioner of a cache that is being made; first make it where it is not there: the
        leader
        does, and with it all that have a part of the model."""
        record, made = writer.manifest.preconditioner, self.preconditioner.made
        self._take_up(None)
        if record is None:
            return
        file = writer.folder / record["file"]
        if made is None:
            there = record["sha256"] is not None and file.exists()
            if not int(world.share(lambda: b"1" if there else b"0")) and (world.leads or self.loaded.sharded):
                made = self._sample_preconditioner(examples, writer.manifest.rows_begun, meter)
        if made is not None and isinstance(writer, CacheWriter):
            if self.preconditioner.kind != "optimizer" and record["sha256"] not in (None, made.sha256):
                raise UserError(
                    f"the preconditioner '{file}' is missing, and does not come out the same here",
                    "restore it, or cache into another folder",
                )
            writer.set_preconditioner(made.data)
        build.agree(writer, world)
        self._take_up(made if world.alone and made is not None else Preconditioner.read(writer.manifest))

    def _sample_preconditioner(self, examples: Examples, begun: int, meter: Meter) -> Preconditioner:
        """The preconditioner of each point, from the gradients of a sample of the first `begun` examples."""
        rows = build.sample_rows(begun, self.preconditioner.sample, self.seed, STREAM)
        meter.tell(f"taking the preconditioner of gradients from a sample of {len(rows):,} examples first")
        return self.fit_preconditioner([self.encoder.example(examples.get(row)) for row in rows], meter)

    def fit_preconditioner(self, encoded: Sequence[Encoded], meter: Meter | None = None) -> Preconditioner:
        """The preconditioner of each point, of the kind that is wanted, from the gradients of these texts."""
        good = [n for n, e in enumerate(encoded) if e.status == Status.OK]
        points = []
        for number in range(len(self.points)):
            with self.at(number):
                if self.preconditioner.kind == "kfac":
                    factors = self._factor_moments(good, encoded, meter)
                    if not factors.examples and meter:
                        meter.tell("no example of the sample has a gradient: gradients are left as they are")
                    points.append(
                        kfac_scales(factors, self.preconditioner.exponent, self.preconditioner.damping)
                    )
                else:
                    moments = Moments(self.targets)
                    for _, squares in self._in_batches(good, encoded, self.sketcher.squares, meter):
                        if squares is not None:
                            moments.add(squares)
                    points.append(moments.scales(self.preconditioner.exponent, self.preconditioner.floor))
        return Preconditioner(points)

    def _factor_moments(
        self, good: Sequence[int], encoded: Sequence[Encoded], meter: Meter | None
    ) -> FactorMoments:
        """The moments of the factors of these examples' gradients, where the model stands.

        A pass that fails, for memory or since a layer mixes the examples of its batch, may have added a part
        of them. Then all are made again, in batches that are smaller by then, without the examples that do
        not fit: a second set of moments, to add to these once a pass has gone through, would take as much
        memory again, and the batch's factors some five times that.
        """
        while True:
            factors = FactorMoments(self.targets, self.preconditioner.rank, self.seed, self.loaded.device)
            spoilt = False

            def add(batch: Batch, factors: FactorMoments = factors) -> bool:
                nonlocal spoilt
                if not spoilt:  # what is made after a failure is of no use
                    spoilt = True
                    self.sketcher.add_moments(batch, factors)
                    spoilt = False
                return True

            left = list(good)
            for chosen, added in self._in_batches(good, encoded, add, meter):
                if added is None:
                    left = [n for n in left if n not in chosen]
            if not spoilt:
                return factors
            good = left

    def _in_batches(
        self,
        good: Sequence[int],
        encoded: Sequence[Encoded],
        run: Callable[[Batch], _T],
        meter: Meter | None,
    ) -> Iterator[tuple[list[int], _T | None]]:
        """Batches of like length and what `run` gives for them; one at a time where a layer mixes them.

        A batch that does not fit into memory is halved, and later ones are as small; for an example that does
        not fit even alone there is None.
        """
        told = self.sketcher.one_by_one
        queue = by_length(good, encoded, 0 if told else self.batch_tokens)
        # Of a model that is spread over processes all make the same number of passes.
        world = distributed.world() if self.loaded.sharded else distributed.World()
        idle = world.most(len(queue)) - len(queue)
        while queue:
            chosen = queue.pop()
            result: _T | None = None
            try:
                batch = Batch.of([(encoded[n].ids, encoded[n].target) for n in chosen], self.loaded.device)
                result = world.collective(partial(run, batch))
            except NotBatchedError:
                if self.loaded.sharded:
                    raise UserError(
                        "a layer mixes the examples of a batch", "say --batch-tokens 1 with --shard-model"
                    ) from None
                if meter and not told:
                    meter.tell(self._one_by_one())
                told = True
                queue.extend([n] for n in reversed(chosen))
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.loaded.sharded:  # others are in this pass, too
                    raise UserError("a batch does not fit into memory", "lower --batch-tokens") from None
                fits = False
            else:
                fits = True
            if not fits:  # out here, where nothing holds on to what the pass had made
                self._forget()
                if len(chosen) > 1:
                    longest = max(len(encoded[n].ids) for n in chosen)
                    self.batch_tokens = longest * (len(chosen) // 2)
                    if meter:
                        meter.tell(f"out of memory: going on with batches of {self.batch_tokens:,} tokens")
                    left = [n for each in (*queue, chosen) for n in each]
                    queue = by_length(left, encoded, self.batch_tokens)
                    continue
            yield chosen, result
        for _ in range(idle):
            world.collective(partial(run, Batch.of([([0, 0], [False, True])], self.loaded.device)))

    def _sketch_in_step(self, encoded: Sequence[Encoded], meter: Meter) -> tuple[Tensor, Tensor]:
        """`_sketch`, together with all processes that have a part of the model, each with its own
        examples."""
        if self.loaded.sharded:
            distributed.world().most(1)
        return self._sketch(encoded, meter)

    def _keep_step(self) -> None:
        """Go along with the passes of the others until none has examples left."""
        while self.loaded.sharded and distributed.world().most(0):
            self._sketch([])

    def _forget(self) -> None:
        """Give back memory that a pass which failed had taken."""
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """The model at one of `points`, by its number, as gradients are taken of it."""
        thinned = (
            nullcontext() if self.thinning is None else self.thinning.over(self.loaded.model, self.targets)
        )
        with self.loaded.path.at(self.points[number]), thinned:
            yield

    def _one_by_one(self) -> str:
        names = self.sketcher.single_names
        if not names:
            return "examples go one at a time: a layer mixes those of a batch"
        return f"examples go one at a time: no batched way for {len(names)} parameters, as '{names[0]}'"

    def _sketch(self, encoded: Sequence[Encoded], meter: Meter | None = None) -> tuple[Tensor, Tensor]:
        """Raw sketches [n, blocks, width] float32, zeros where there is none, and status [n] uint8, both on
        the model's device."""
        device = self.loaded.device
        status = _on(device, [int(e.status) for e in encoded], torch.uint8)
        out = torch.zeros(len(encoded), len(self.layers), self.width, device=device)
        good = [n for n, e in enumerate(encoded) if e.status == Status.OK]
        if meter:
            meter.add(len(encoded) - len(good), 0, skipped=len(encoded) - len(good))
        for number in range(len(self.points)):
            blocks = slice(number * self.sketcher.blocks, (number + 1) * self.sketcher.blocks)
            last = number == len(self.points) - 1
            with self.at(number):
                run = partial(self.sketcher, point=number)
                for chosen, made in self._in_batches(good, encoded, run, meter):
                    at = _on(device, chosen, torch.int64)
                    if made is None:
                        status[at] = int(Status.TOO_LARGE)
                        good = [n for n in good if n not in chosen]
                        if meter:
                            meter.add(len(chosen), 0, skipped=len(chosen))
                        continue
                    sketch = made[0]
                    bad = ~sketch.isfinite().flatten(1).all(1)
                    out[at, blocks] = sketch
                    status[at] = status[at].masked_fill(bad, int(Status.NONFINITE))
                    if meter:
                        tokens = sum(len(encoded[n].ids) for n in chosen)
                        skipped = Download([bad.sum()]) if last else None
                        meter.sketched(len(chosen) if last else 0, tokens, skipped)
        out.masked_fill_((status != int(Status.OK))[:, None, None], 0.0)
        return out, status

    # ----------------------------------------------------------------------------------------- query

    def generate(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        """What the tuned model says to a prompt, greedily; special tokens left out."""
        return self._generate(prompt, max_new_tokens).completion

    def _generate(self, prompt: str, max_new_tokens: int) -> Generation:
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        ids = self.encoder.prompt_ids(prompt)
        if not ids:
            raise UserError(
                "an empty prompt gives the model nothing to go on from", "give a --completion too"
            )
        if len(ids) >= self.max_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the context {self.max_length}: no room to answer"
            )
        inputs = torch.tensor([ids], device=self.loaded.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with torch.no_grad(), evaluation_mode(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generate = partial(
                model.generate,
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                num_beams=1,
                max_new_tokens=min(max_new_tokens, self.max_length - len(ids)),
                pad_token_id=pad,
            )
            written = distributed.world().collective(generate)
        answer = written[0, len(ids) :].tolist()
        # The tokens that the model wrote, not its text read again: an answer cut short has no end token.
        kept = answer if self.eos else [i for i in answer if i != tokenizer.eos_token_id]
        target = [False] * len(ids) + [True] * len(kept)
        encoded = Encoded(ids + kept, target, Status.OK if kept else Status.NO_TARGET)
        return Generation(prompt, str(tokenizer.decode(answer, skip_special_tokens=True)), True, encoded)

    def query(
        self,
        cache: Cache | str | Path,
        generations: Any,
        **options: Unpack[QueryOptions],
    ) -> Results:
        """The most helpful and most harmful training examples of each generation.

        generations: a list of (prompt, completion) pairs, prompts, or records as in training data; a data
        frame of such records; or a single pair, prompt or record. The tuned model generates missing
        completions. options: see `rapidin.Ensemble.query`. Raises UserError if the cache was made with
        another model or other settings, and wherever `Ensemble.query` does.
        """
        return self._alone(cache).query(generations, **options)

    def scores(self, cache: Cache | str | Path, generations: Any, **options: Unpack[ScoreOptions]) -> Tensor:
        """The scores of all training examples: [Q, rows] float32 on the CPU, NaN for rows that do not count.

        options: see `rapidin.Ensemble.scores`.
        """
        return self._alone(cache).scores(generations, **options)

    def _alone(self, cache: Cache | str | Path) -> Ensemble:
        """The ensemble of one cache, made by this attributor."""
        from rapidin.attribution.ensemble import Ensemble, Member  # which knows attributors

        opened = cache if isinstance(cache, Cache) else self._opened(cache)
        load = {"device": str(self.loaded.device), "shard_model": self.loaded.sharded}
        return Ensemble([Member(opened.path, 1.0, self, opened)], load=load)

    def _opened(self, path: str | Path) -> Cache:
        """The cache of a folder: the object of the last call while path and manifest are the same, so that
        rows that a scan left on a GPU are reused."""
        opened = Cache(path)
        if self._last is None or (self._last.path, self._last.manifest) != (opened.path, opened.manifest):
            self._last = opened
        return self._last

    def query_sketches(self, texts: Sequence[Generation]) -> Tensor:
        """Sketches of generations: [Q, blocks, width] float32. Raises UserError for one with NaN or Inf."""
        sketch, status = self._sketch([text.encoded for text in texts])
        if bool((status != 0).any()):
            row = int(status.nonzero()[0])
            large = int(status[row]) == Status.TOO_LARGE
            raise UserError(
                f"the gradient of the generation for '{short(texts[row].prompt)}' "
                f"{'does not fit into memory' if large else 'holds NaN or Inf'}"
            )
        return sketch

    def target_sketches(self, texts: Sequence[Generation]) -> Tensor | None:
        """Sketches of the targets of all generations, one after the other: [targets, blocks, width] float32,
        or None where there are none. Those of all tokens of a generation sum to the generation's.

        Raises UserError for one with NaN or Inf, and for a projection that keeps no layers apart.
        """
        queries, weights, _ = self.target_queries(texts)
        if not queries:
            return None
        if self.projection == "rapidgrad":
            raise UserError(
                "the rapidgrad projection scales the whole generation's gradient, so its tokens have no part",
                "make the cache with --projection tensor",
            )
        sketch, status = self._sketch(queries)
        if bool((status != 0).any()):
            raise UserError(
                "the gradient of a token of a generation holds NaN or Inf, or needs too much memory"
            )
        return sketch * torch.tensor(weights, device=sketch.device)[:, None, None]

    def target_queries(self, texts: Sequence[Generation]) -> tuple[list[Encoded], list[float], list[int]]:
        """Of the targets of all generations: the text whose loss is theirs, the weight of this loss in the
        generation's, and the generation's place.

        A text ends before the last token that is asked about: what a causal model reads after it changes
        nothing.
        """
        queries: list[Encoded] = []
        weights: list[float] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            counted = [n for n, counts in enumerate(text.encoded.target) if counts]
            for span in text.spans:
                chosen = {counted[place] for place in span.places}
                end = max(chosen) + 1
                target = [n in chosen for n in range(end)]
                queries.append(Encoded(text.encoded.ids[:end], target, Status.OK))
                weights.append(len(chosen) / len(counted) if self.loss == "mean" else 1.0)
                owners.append(owner)
        return queries, weights, owners

    def generations(
        self, values: Any, max_new_tokens: int = 64, targets: Targets | None = None
    ) -> list[Generation]:
        """What is to be explained, with completions written where they are missing, and its targets; see
        `query`.

        Raises UserError where there is none, or one has no token to explain."""
        records = as_records(values)
        if not records:
            raise UserError("there is no generation to explain")
        check_targets(targets, len(records))
        texts = [self._generation(record, max_new_tokens) for record in records]
        for text in texts:
            text.check()
        return [self._with_targets(text, records[n], targets, n) for n, text in enumerate(texts)]

    def _with_targets(self, text: Generation, record: Record, targets: Targets | None, n: int) -> Generation:
        if targets is None:
            return text
        words = split_words(record.get(HOTWORDS) or ())
        if targets == "hotwords" and not words:
            return text
        pieces = self.encoder.pieces(text.encoded.ids)
        counted = [piece for piece, counts in zip(pieces, text.encoded.target, strict=True) if counts]
        chosen = None if targets == "tokens" else words if isinstance(targets, str) else targets[n]
        spans, missing = find(chosen, counted, text.completion)
        return replace(text, pieces=tuple(counted), spans=tuple(spans), missing=tuple(missing))

    def _generation(self, record: Record, max_new_tokens: int) -> Generation:
        weight = record.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"the weight {short(weight)} is not a number", "mend the column 'weight'")
        prompt = self.encoder.prompt_text(record)
        completion = self.encoder.completion_text(record)
        if completion:
            return Generation(prompt, completion, False, self.encoder(record), float(weight))
        return replace(self._generate(prompt, max_new_tokens), weight=float(weight))


def _on(device: torch.device, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    return upload(torch.tensor(numbers, dtype=dtype, device="cpu"), device)
