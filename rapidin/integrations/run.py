"""A training run whose backward passes are sketched: what `SketchCallback` does in each of its events."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rapidin.attribution.checkpoints import checkpoint_folders, step_of
from rapidin.attribution.ensemble import NAME, Ensemble, read_members
from rapidin.attribution.options import CacheOptions
from rapidin.attribution.progress import LOG
from rapidin.cache import Cache, Manifest
from rapidin.cache.names import MANIFEST
from rapidin.data.encoding import Status
from rapidin.data.examples import Examples, open_examples
from rapidin.errors import CoverageWarning, UserError
from rapidin.gradients.adam import live_second_moments
from rapidin.gradients.adapters import has_adapter
from rapidin.gradients.calls import NotBatchedError
from rapidin.gradients.check import GradientCheck
from rapidin.gradients.live import LiveBatch, LiveSketcher
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import exact_pattern
from rapidin.gradients.path import base_path
from rapidin.gradients.preconditioner import PreconditionerConfig
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource
from rapidin.integrations.losses import LossWatch, TextBatch, kind_of, replaced
from rapidin.integrations.rows import number_rows, taken_from, unnumbered
from rapidin.integrations.steps import StepLog, StepSums
from rapidin.integrations.steps_cache import TokenRecords, training_record, write_cache
from rapidin.tasks.forward import inner_model
from rapidin.tasks.names import CAUSAL
from rapidin.tasks.preference import Preference

Precondition = Literal["off", "optimizer"]


@dataclass(frozen=True)
class RunOptions:
    """What a run's cache is to be; the arguments of `SketchCallback`."""

    path: Path
    data: Any
    per_checkpoint: bool
    precondition: Precondition
    tokenizer: Any
    steps: Path | None
    keep_steps: bool
    settings: GradientSettings
    options: CacheOptions


@dataclass
class _Pending:
    """The sketches of one batch, until its optimizer step is taken."""

    rows: list[int]
    sketches: Tensor
    targets: Tensor


@dataclass
class _Step:
    """What an optimizer step has so far. rates: the learning rate of each block."""

    batches: list[_Pending] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def refuse_unsupported(trainer: Any) -> None:
    """Raises UserError for a training whose backward passes cannot be sketched."""
    args, accelerator = trainer.args, trainer.accelerator
    remedy = "cache after training with 'rapidin cache'"
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(f"the gradients of a training with {kind} cannot be sketched", remedy)
    if args.n_gpu > 1:
        raise UserError("the gradients of a training with DataParallel cannot be sketched", "use torchrun")
    if getattr(args, "torch_compile", False):
        raise UserError(
            "a compiled model's layers cannot be watched", f"use torch_compile=False, or {remedy}"
        )
    if getattr(trainer.model, "active_adapter", None) and getattr(trainer.model, "prompt_encoder", None):
        raise UserError("an adapter of learned prompts cannot be sketched in training", remedy)


class TrainingRun:
    """Sketches a trainer's steps, and writes the caches."""

    def __init__(self, trainer: Any, options: RunOptions, loader: Any) -> None:
        """loader: of the training batches, not iterated over yet. Raises UserError for a training that cannot
        be sketched, and for folders that cannot be used."""
        self._trainer, self._options = trainer, options
        self._told: set[str] = set()
        refuse_unsupported(trainer)
        self._leads = trainer.accelerator.process_index == 0
        self._kind = kind_of(trainer)
        number_rows(loader)
        self._dataset = unnumbered(getattr(loader, "base_dataloader", loader).dataset)
        self._packs = _packs(self._dataset)
        self._settings = options.settings
        self._source = self._make_source(None)
        self._leave_out_unchanged()
        recomputed = any(
            getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()
        )
        self._sketcher = LiveSketcher(self._source, recomputed=recomputed)
        self._parameters = [self._sketcher.parameter(n) for n in range(len(self._source.targets))]
        self._examples = self._open_data()
        self._losses = LossWatch(trainer, self._kind)
        self._check: GradientCheck | None = None
        self._step = _Step()
        self._stepped = False  # whether the optimizer has taken a step since the callback's start
        self._done: list[tuple[str, float]] = []  # caches of checkpoints and their weights
        self._begun = trainer.state.global_step  # the first step that is in no cache yet
        self._folder = options.steps or Path(trainer.args.output_dir) / "rapidin"
        self._shape = (self._sketcher.blocks, self._source.width)
        self._log = StepLog(
            self._folder, self._definition(), self._shape, trainer.accelerator.process_index,
            trainer.accelerator.num_processes,
        )  # fmt: skip
        self._begin()

    # --------------------------------------------------------------------------------------- beginning

    def _make_source(self, moments: PreconditionerConfig | None) -> GradientSource:
        """The source of the gradients that the model has now."""
        trainer, tokenizer = self._trainer, self._tokenizer()
        loaded = LoadedModel.of(trainer.model, tokenizer)
        settings = replace(self._settings, at=1.0, preconditioner=moments or "off")
        if self._kind == "pairs":
            settings = replace(settings, task=settings.task or "preference", beta=float(trainer.args.beta))
            reference = getattr(trainer, "ref_model", None)
            if not loaded.path.ends and reference is not None:
                untuned = trainer.accelerator.unwrap_model(reference)
                name = getattr(untuned.config, "_name_or_path", None) or None
                loaded.path = base_path(trainer.model, untuned, "the model", "the reference model")
                loaded.source["base"] = name
        source = GradientSource(loaded, settings, bytes_per_example=self._options.options.bytes)
        expected = CAUSAL if self._kind == "tokens" else Preference.name
        if source.task.name != expected or settings.loss != "mean":
            raise UserError(
                f"the task is '{source.task.name}' and the loss '{settings.loss}', and the trainer's losses "
                f"are those of the task '{expected}' and the loss 'mean'",
                "cache after training with 'rapidin cache'",
            )
        return source

    def _leave_out_unchanged(self) -> None:
        """Exclude the parameters that the optimizer does not change: no step has a learning rate for them."""
        groups = self._trainer.optimizer.param_groups
        changed = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        sketcher = self._source.sketcher
        names = [
            t.name for n, t in enumerate(self._source.targets) if id(sketcher.parameter(n)) not in changed
        ]
        if len(names) == len(self._source.targets):
            raise UserError(
                f"the optimizer changes none of the {len(names):,} parameters whose gradients are to be "
                f"sketched, such as '{names[0]}'",
                "choose parameters that are trained with include=...",
            )
        if names:
            exclude = (*self._settings.exclude, *map(exact_pattern, names))
            self._settings = replace(self._settings, exclude=exclude)
            self._source = self._make_source(None)
            self._tell(
                f"{len(names):,} parameters that the training does not change are left out, such as "
                f"'{names[0]}'"
            )
        if self._source.coverage.is_low and self._leads:
            warnings.warn(self._source.coverage.warning, CoverageWarning, stacklevel=2)

    def _tell(self, message: str) -> None:
        """Something that the user should know, in one line of the leading process; the same is said once."""
        if self._leads and message not in self._told:
            self._told.add(message)
            LOG.warning(message)

    def _tokenizer(self) -> Any:
        tokenizer = self._options.tokenizer or getattr(self._trainer, "processing_class", None)
        if tokenizer is None:
            raise UserError(
                "the trainer has no tokenizer, which queries need",
                "give it: SketchCallback(..., tokenizer=tokenizer), or processing_class to the trainer",
            )
        return tokenizer

    def _open_data(self) -> Examples:
        forms = self._source.task.forms
        rows = len(self._dataset) if self._packs is None else len(self._packs.places)
        data, chosen = self._options.data, self._options.options
        if data is not None:
            if self._packs is not None:
                raise UserError("the texts of packed data have other numbers", "leave out data=...")
            made = open_examples(
                data, limit=chosen.limit, forms=forms, map=chosen.map, streaming=chosen.streaming
            )
            if len(made) != rows:
                raise UserError(
                    f"the data has {len(made):,} examples, and the trainer has {rows:,}",
                    "give what its data set was made of, without the rows that it dropped, or no data=...",
                )
            return made
        places = None if self._packs is None else self._packs.places
        return open_examples(TokenRecords(self._dataset, places), forms=None, checked=False)

    def _definition(self) -> dict[str, Any]:
        source = self._source
        return {
            "parameters": [target.name for target in source.targets],
            "width": source.width,
            "seed": source.settings.seed,
            "projection": source.settings.projection,
            "examples": len(self._examples),
            "precondition": self._options.precondition,
            "per_checkpoint": self._options.per_checkpoint,
        }

    def _begin(self) -> None:
        """Start or resume the log, and take over the caches of the checkpoints so far."""
        step, path = self._begun, self._options.path
        if self._leads:
            if (path / MANIFEST).exists() and (step == 0 or Manifest.read(path).complete):
                raise UserError(f"'{path}' holds a cache", "name another folder")
            if (path / NAME).exists() and step == 0:
                raise UserError(f"'{path}' holds the caches of a run", "name another folder")
            self._log.begin(step)
        self._trainer.accelerator.wait_for_everyone()
        if not self._leads:
            self._log.begin(step)
        if self._options.per_checkpoint and step:
            self._take_over(step)

    def _take_over(self, step: int) -> None:
        path = self._options.path
        before = read_members(path)[1] if (path / NAME).exists() else []
        steps = {m: made for m in before if (made := step_of(m.path.name)) is not None and made <= step}
        kept = [(m.path.name, m.weight) for m in steps]
        self._begun = max(steps.values(), default=0)
        self._done = kept
        if self._leads:
            for made, folder in checkpoint_folders(path).items():
                if made > self._begun and (folder / MANIFEST).exists():
                    shutil.rmtree(folder)
            if kept:
                Ensemble.write(path, "tracin", kept)
            if step > self._begun:  # killed between the trainer's checkpoint and its cache
                self._write_checkpoint(step)
        self._begun = step

    # ------------------------------------------------------------------------------------------ steps

    def training_step(self, original: Callable[..., Tensor], model: Any, inputs: Any, *args: Any) -> Tensor:
        """One batch of the trainer, whose sketches are kept until the optimizer's step."""
        examples = taken_from(inputs).tolist()
        texts = TextBatch.of(self._kind, inputs, [length for _, _, length in examples])
        if self._check is None:  # until a batch has an example with a gradient
            self._check = self._checked(texts)
        if not self._precondition():
            return original(model, inputs, *args)
        try:
            with self._sketcher.watching(_live(texts)) as sketching, self._losses.watching(texts) as factors:
                loss = original(model, inputs, *args)
        except NotBatchedError as error:
            raise UserError(
                f"{error.reason}, and the training's batches cannot be taken apart",
                "leave that layer out with exclude=..., or cache after training with 'rapidin cache'",
            ) from None
        of_texts = factors.of_examples(texts)
        counted = of_texts != 0
        own = sketching.sketches / torch.where(counted, of_texts, 1.0)[:, None, None]
        own = own.masked_fill_(~counted[:, None, None], 0.0)
        targets = texts.targets
        if self._kind == "pairs":
            own, targets = (torch.stack(each.chunk(2)).sum(0) for each in (own, targets))
        self._step.batches.append(
            _Pending([self._number(row, part) for row, part, _ in examples], own, targets)
        )
        return loss

    def _number(self, row: int, part: int) -> int:
        return row if self._packs is None else self._packs.first[row] + part

    def _checked(self, texts: TextBatch) -> GradientCheck | None:
        """Compare the gradients of the first batch with autograd's, as before caching."""
        encoded, source = texts.encoded(), self._source
        examples: list[Any] = list(encoded)
        if self._kind == "pairs":
            assert isinstance(source.task, Preference)
            pairs = zip(encoded[::2], encoded[1::2], strict=True)
            examples = [source.task.of_texts(pair, 1.0) for pair in pairs]
        gpus = [self._trainer.args.device] if self._trainer.args.device.type == "cuda" else []
        model = self._trainer.model
        # Without the reduced precision that accelerate puts around the model, which the check is not for.
        forward = getattr(model, "_original_forward", model.forward)
        with torch.random.fork_rng(devices=gpus), replaced(model, "forward", forward):
            check = source.checked(examples)
        wrong = list(check.by_autograd)[:1] if check else []
        if check is not None and (check.by_autograd or check.mixed):
            raise UserError(
                f"the gradient of '{(wrong or [check.mixed])[0]}' cannot be taken from the training's "
                f"batches: {check.text}",
                "leave it out with exclude=..., or cache after training with 'rapidin cache'",
            )
        return check

    def _precondition(self) -> bool:
        """Set the preconditioner of this step; whether there is one as configured."""
        if self._options.precondition == "off":
            return True
        if not self._step.batches or self._sketcher.preconditioner is None:
            moments = self._moments()
            if moments is None:
                return False
            assert moments.fitted is not None
            self._sketcher.preconditioner = moments.fitted.to(self._source.loaded.device)
        return True

    def _moments(self) -> PreconditionerConfig | None:
        """The optimizer's second moments now."""
        if self._options.precondition == "off":
            return None
        means = live_second_moments(self._trainer.optimizer, self._source.targets, self._parameters)
        if means is None:
            if self._stepped:
                raise UserError(
                    "the optimizer keeps no second moments",
                    "use precondition='off', or train with Adam, AdamW or Adafactor",
                )
            return None
        zero = [name for name, (rows, _) in means.items() if not rows.any()]
        if zero:  # as of LoRA's A after a first step in which B is 0
            self._tell(
                f"the gradients of {len(zero):,} parameters, such as '{zero[0]}', are not scaled as long as "
                "their second moments are 0"
            )
        return PreconditionerConfig.of_moments(means)

    def before_step(self) -> None:
        """The optimizer is about to step: its learning rates are those of the step."""
        rates = {
            id(p): float(group["lr"])
            for group in self._trainer.optimizer.param_groups
            for p in group["params"]
        }
        of_targets = [rates.get(id(parameter), 0.0) for parameter in self._parameters]
        self._step.rates = of_targets[:1] if len(set(of_targets)) == 1 else of_targets

    def after_step(self, step: int) -> None:
        """The optimizer has stepped: the sketches of the step, counted from 0, go to the log."""
        done, self._step = self._step, _Step()
        if self._trainer.accelerator.optimizer_step_was_skipped:  # mixed precision overflowed
            self._log.set_rates(step, [0.0])
            self._tell(f"step {step + 1} was skipped after an overflow, so its examples do not count in it")
            return
        if not self._stepped:
            self._stepped = True
            self._moments()  # says at once that there are none
        if not done.batches:
            self._tell(
                f"the examples of step {step + 1} do not count in it: the optimizer had no second moments yet"
            )
        for batch in done.batches:
            sketches = batch.sketches.cpu()
            bad = ~sketches.isfinite().flatten(1).all(1)
            sketches[bad] = 0.0
            status = torch.where(bad, int(Status.NONFINITE), int(Status.OK)).tolist()
            self._log.add(step, batch.rows, sketches, status, batch.targets.tolist())
        self._log.set_rates(step, done.rates)

    # ----------------------------------------------------------------------------------------- caches

    def saved(self, step: int) -> None:
        """The trainer has written a checkpoint after so many steps."""
        self._log.flush()
        if not self._options.per_checkpoint or step <= self._begun:
            return
        self._trainer.accelerator.wait_for_everyone()
        if self._leads:
            self._write_checkpoint(step)
        self._begun = step

    def finish(self, step: int) -> None:
        """The training has ended after so many steps: write what is not written yet."""
        self._log.close()
        self._trainer.accelerator.wait_for_everyone()
        if not self._leads:
            return
        if not self._options.per_checkpoint:
            self._write(self._options.path, 0, step)
        elif step > self._begun:
            self._write_checkpoint(step)
        if not self._options.keep_steps:
            try:
                self._log.remove()
            except UserError as error:  # the caches are there
                self._tell(f"the sketches of the steps are left behind: {error}")

    def close(self) -> None:
        """Let go of the log of a training that has failed."""
        self._log.close()

    def _write_checkpoint(self, step: int) -> None:
        name = f"checkpoint-{step}"
        cache = self._write(self._options.path / name, self._begun, step)
        self._done.append((name, cache.manifest.gradient["training"]["weight"]))
        if any(weight > 0 for _, weight in self._done):
            Ensemble.write(self._options.path, "tracin", self._done)

    def _write(self, path: Path, first: int, last: int) -> Cache:
        """The cache of the steps from `first` up to `last`, to be queried at the weights of now."""
        if self._check is None:
            self._tell(f"no gradient of the cache '{path}' was compared with autograd's")
        sums = StepSums(self._folder, self._shape, first, last)
        source = self._make_source(self._moments())
        self._name_model(source, last)
        training = training_record(sums, first, last, type(self._trainer).__name__, len(self._examples))
        options, alone = self._options.options, not self._options.per_checkpoint
        return write_cache(
            source, self._examples, sums, path, options, training, self._check, null=options.null and alone
        )

    def _name_model(self, source: GradientSource, step: int) -> None:
        """Record where a query finds the weights of now."""
        args, state = self._trainer.args, self._trainer.state
        folder = Path(args.output_dir)
        saved = folder / f"checkpoint-{step}"
        best = getattr(state, "best_model_checkpoint", None)
        if args.load_best_model_at_end and best and step >= state.max_steps:
            saved = Path(best)
        where = str((saved if saved.exists() else folder).resolve())
        recorded = source.loaded.source
        if has_adapter(self._trainer.model):
            config = getattr(inner_model(self._trainer.model), "config", None)
            recorded |= {"adapter": where, "model": getattr(config, "_name_or_path", None) or None}
        else:
            recorded |= {"model": where}


@dataclass(frozen=True, slots=True)
class _Packs:
    """first: the number of the first text in each row of packed data; places: (row, number in it) of each."""

    first: list[int]
    places: list[tuple[int, int]]


def _packs(dataset: Any) -> _Packs | None:
    """The texts in the rows of packed data; None for a text in each row."""
    if "seq_lengths" not in (getattr(dataset, "column_names", None) or ()):
        return None
    counts = [len(lengths) for lengths in dataset["seq_lengths"]]
    places = [(row, part) for row, count in enumerate(counts) for part in range(count)]
    return _Packs([0, *accumulate(counts)][: len(counts)], places)


def _live(texts: TextBatch) -> LiveBatch:
    rows, length = texts.ids.shape
    if texts.lengths is None:
        return LiveBatch(rows, length, texts.ids.device)
    longest = max(texts.lengths)
    return LiveBatch(texts.texts, longest, texts.ids.device, texts.owners[0] * longest)


def trainer_calls(run: TrainingRun, trainer: Any) -> Callable[..., Tensor]:
    """The trainer's `training_step`, sketched."""
    original = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return run.training_step(lambda m, i, *a: original(m, i, *a, **kwargs), model, inputs, *args)

    return training_step
