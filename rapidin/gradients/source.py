"""The source of gradient sketches: one model, the parameters that count, and how their gradients are
taken."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from rapidin.data.encoding import AnyExample, Encoder, Status
from rapidin.data.examples import Examples
from rapidin.data.records import Record
from rapidin.errors import UserError
from rapidin.gradients.adam import Moments
from rapidin.gradients.batching import SILENT, BatchRunner, Counted, Lockstep, Reporter
from rapidin.gradients.calls import NotBatchedError
from rapidin.gradients.check import MOST_ELEMENTS, GradientCheck, check_gradients, check_pair
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.coverage import Coverage, coverage_of
from rapidin.gradients.kept import KeptBatch, KeptGradients
from rapidin.gradients.kfac import FactorMoments, kfac_scales
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import Target, find_targets, with_autograd
from rapidin.gradients.path import DEFAULT_AT
from rapidin.gradients.preconditioner import TOLERANCE, Preconditioner, PreconditionerConfig
from rapidin.gradients.probe import check_causal
from rapidin.gradients.reader import dated, embedded_tokens, max_length_of, task_settings
from rapidin.gradients.settings import RAPIDGRAD_WIDTH, GradientSettings
from rapidin.ops import faster_linear
from rapidin.ops.transfer import Download, upload
from rapidin.tasks.causal import Causal
from rapidin.tasks.choose import task_of
from rapidin.tasks.forward import evaluation_mode
from rapidin.tasks.names import CAUSAL
from rapidin.tasks.task import AnyBatch, Example, Task


class GradientSource:
    """Sketches of the preconditioned gradients of texts.

    Two sources with equal `settings`, models and preconditioners give equal sketches. A source does not
    change: `with_preconditioner` and `with_check` make another one of the same model. Only its batches become
    smaller once memory has run out.

    loaded: the model; settings: complete, without a value that is still to be chosen; points: of the path
    from base to tuned model, where gradients are taken; targets: the parameters that count; task: makes
    examples of records, batches of examples, and the losses that gradients are taken of; check: the result of
    comparing gradients with autograd's, None if that was not done.

    Raises UserError for settings that do not fit the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: GradientSettings | None = None,
        *,
        bytes_per_example: int | None = None,
    ) -> None:
        """bytes_per_example: the budget of a cache, on which the default sketch dimension depends."""
        settings = settings or GradientSettings()
        self.loaded = loaded
        max_length = max_length_of(loaded.context_length, settings.max_length)
        self.task: Task = dated(
            task_of(
                settings.task,
                loaded.model,
                loaded.tokenizer,
                task_settings(settings, max_length, embedded_tokens(loaded.model)),
            ),
            settings.date,
        )
        self.chooses_date = settings.date is None
        self.chooses_damping = settings.preconditioner in ("auto", "kfac")
        if self.task.needs_causal:
            check_causal(loaded)
        self.points = _points(loaded, settings.at)
        if self.task.needs_reference and not loaded.path.ends:
            raise UserError(
                f"the task '{self.task.name}' compares with the model before it was tuned: "
                f"{loaded.path.unknown}",
                "give `adapter` or `base`",
            )
        self.targets = find_targets(
            loaded.model,
            trained=loaded.trained,
            include=settings.include,
            exclude=settings.exclude,
            convolutions=self.task.name != CAUSAL,
        )
        config = _preconditioner_config(settings, loaded, self.targets)
        self.settings = replace(
            settings,
            at=tuple(self.points),
            task=settings.task if isinstance(settings.task, Task) else self.task.name,
            width=settings.width or self._default_width(settings, bytes_per_example),
            max_length=max_length,
            preconditioner=config,
            date=None if self.task.chats is None else self.task.chats.date,
        )
        self.config = config
        # A tolerance that is the default was not chosen: a cache's own comes first.
        self.chooses_tolerance = config.kind == "kfac" and config.tolerance == TOLERANCE
        self.check: GradientCheck | None = None
        self._set_preconditioner(config.fitted)
        self._refuse_partial()
        self.lockstep = Lockstep(loaded.sharded)
        self.batches = self._batch_runner()

    def _refuse_partial(self) -> None:
        """Raise UserError if a gradient needs a whole parameter, and processes have parts of it."""
        if self.loaded.sharded and (names := self.sketcher.needs_weights):
            raise UserError(
                f"the gradient of '{names[0]}' needs the whole parameter in one process",
                "leave such parameters out with `exclude`, or do not use `shard_model`",
            )

    def __repr__(self) -> str:
        points = ", ".join(f"{point:g}" for point in self.points)
        return (
            f"GradientSource({self.loaded!r}, {self.blocks:,} layers x {self.width:,} dimensions, task "
            f"'{self.task.name}', gradients at {points}, preconditioner '{self.config.kind}')"
        )

    def _default_width(self, settings: GradientSettings, bytes_per_example: int | None) -> int:
        if settings.projection == "rapidgrad":
            return RAPIDGRAD_WIDTH
        return default_width(len(self.targets), bytes_per_example)

    def _set_preconditioner(self, preconditioner: Preconditioner | None) -> None:
        if preconditioner is not None:
            preconditioner.check(self.targets, len(self.points))
            preconditioner = preconditioner.to(self.loaded.device)
        by_autograd = () if self.check is None else self.check.by_autograd
        self.sketcher = GradientSketcher(
            self.loaded.model,
            with_autograd(self.targets, by_autograd),
            width=self.width,
            seed=self.settings.seed,
            projection=self.settings.projection,
            losses=self.task.losses,
            preconditioner=preconditioner,
            checked=self.check is not None,
            followed=() if self.check is None else self.check.followed,
        )

    def _batch_runner(self) -> BatchRunner:
        names, why = self.sketcher.single_names, ""
        if names:
            why = NotBatchedError(names[0], len(names)).reason
        elif self.check is not None:
            why = self.check.why_single
        return BatchRunner(self.task, self.loaded.device, self.settings.batch_tokens, self.lockstep, why)

    def checked(
        self, texts: Sequence[AnyExample], most_elements: int = MOST_ELEMENTS
    ) -> GradientCheck | None:
        """Compare the gradients of one or two of these texts with autograd's (`rapidin.gradients.check`).

        None if no text has a gradient. All processes that share the model call this together, with the same
        texts. most_elements: of parameters that are all compared; of more, some of each kind. Raises
        UserError for a gradient that cannot be taken.
        """
        assert self.settings.max_length is not None
        pair = check_pair(texts, self.settings.max_length)
        if pair is None:
            return None
        source = self.with_preconditioner(None).with_check(GradientCheck())
        short, long = self.prepared(pair)
        batched = not source.batches.one_at_a_time
        if isinstance(self.task, Causal):
            batched = batched and short.length < long.length
        some = ([short], [long], [short, long])
        alone, longer, both = (self.task.batch(each, self.loaded.device) for each in some)
        with source.at(len(self.points) - 1):
            check = self.lockstep.run(
                lambda: check_gradients(
                    source.sketcher, alone, longer, both if batched else None, most_elements
                )
            )
        self.with_check(check)._refuse_partial()
        return check

    def with_check(self, check: GradientCheck | None) -> GradientSource:
        """The same source after a check: gradients that differ from autograd's are taken by autograd."""
        other = copy.copy(self)
        other.check = check
        other._set_preconditioner(self.preconditioner)
        other.batches = other._batch_runner()
        return other

    def with_preconditioner(self, preconditioner: Preconditioner | None) -> GradientSource:
        """The same source with another preconditioner. Raises UserError if that is for other parameters."""
        other = copy.copy(self)
        other._set_preconditioner(preconditioner)
        return other

    def with_date(self, date: str | None) -> GradientSource:
        """The same source, whose chat template writes another date."""
        if date == self.settings.date:
            return self
        other = copy.copy(self)
        other.task = self.task.dated(date)
        other.settings = replace(self.settings, date=date)
        other.batches = other._batch_runner()
        return other

    def with_damping(self, damping: float, tolerance: float) -> GradientSource:
        """The same source, whose preconditioner of K-FAC is fitted with another damping and tolerance."""
        if (damping, tolerance) == (self.config.damping, self.config.tolerance):
            return self
        other = copy.copy(self)
        other.config = replace(self.config, damping=damping, tolerance=tolerance)
        other.settings = replace(self.settings, preconditioner=other.config)
        return other

    @property
    def own_task(self) -> Task | None:
        """The task, if it is one of the user's own."""
        return self.settings.task if isinstance(self.settings.task, Task) else None

    @property
    def encoder(self) -> Encoder:
        """What encodes the texts of a causal model. Raises UserError for another task."""
        if not isinstance(self.task, Causal):
            raise UserError(f"this needs a causal language model, and the task is '{self.task.name}'")
        return self.task.encoder

    def example(self, record: Record | None) -> AnyExample:
        """The example of a record; None stands for a malformed one."""
        if record is None:
            return Example({}, 0, Status.MALFORMED)
        made: AnyExample = self.task.example(record)
        return made

    def check_records(self, examples: Examples) -> list[str]:
        """Checks what of the examples depends on the model, such as its chat template or its labels. Those
        that it rejects are malformed; if `examples` does not skip such, raises UserError for the first.

        Returns what the user should know of how the examples are read, a line each.
        """
        chats = self.task.chats
        if chats is not None:
            chats.forget()
        if isinstance(self.task, Causal) and examples.form != "messages":
            rows = self.task.encoder.rows
            if rows is None or len(self.loaded.tokenizer) <= rows:
                return []  # every text can be encoded
            examples.check(self.task.encoder)
        else:
            examples.check(self.task.check)
        return [] if chats is None else chats.notes()

    @property
    def preconditioner(self) -> Preconditioner | None:
        """The preconditioner, on the model's device; None for none, or if it has not been fitted yet."""
        return self.sketcher.preconditioner

    @property
    def fitted(self) -> bool:
        """Whether sketches are preconditioned as configured: the preconditioner is fitted, or there is
        none."""
        return self.config.kind == "off" or self.preconditioner is not None

    @property
    def width(self) -> int:
        """Sketch dimension per layer."""
        assert self.settings.width is not None
        return self.settings.width

    @property
    def whole(self) -> bool:
        """Whether one block holds all parameters, instead of one each."""
        return self.settings.projection == "rapidgrad"

    @property
    def blocks(self) -> int:
        """Blocks of a sketch, over all points."""
        return self.sketcher.blocks * len(self.points)

    @cached_property
    def coverage(self) -> Coverage:
        """What of the model counts."""
        chosen = bool(self.settings.include or self.settings.exclude)
        return coverage_of(self.loaded.model, self.targets, trained=self.loaded.trained, chosen=chosen)

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """The model at one of `points`, by its number, as gradients are taken of it."""
        dropout = self.settings.dropout
        mask = nullcontext() if dropout is None else dropout.applied(self.loaded.model, self.targets)
        with self.loaded.path.at(self.points[number]), mask:
            yield

    # -------------------------------------------------------------------------------------- sketches

    def prepared(self, examples: Sequence[AnyExample]) -> Sequence[AnyExample]:
        """The examples with what their losses take from the model before it was tuned, if the task needs it.

        One that does not fit into memory gets Status.TOO_LARGE.
        """
        if not self.task.needs_reference:
            return examples
        made: list[Any] = list(examples)
        missing = [n for n, each in enumerate(made) if each.status == Status.OK and not each.reference]
        model = self.loaded.model
        with self.loaded.path.at(0.0), torch.no_grad(), evaluation_mode(model), faster_linear(model):
            step = partial(self.task.reference, model)
            for chosen, result in self.batches.run(missing, examples, step):
                values: list[Any] = [None] * len(chosen) if result is None else result.tolist()
                for n, value in zip(chosen, values, strict=True):
                    made[n] = (
                        replace(made[n], status=Status.TOO_LARGE)
                        if value is None
                        else replace(made[n], reference=tuple(value))
                    )
        return made

    def sketches(
        self, texts: Sequence[AnyExample], reporter: Reporter = SILENT, *, announced: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Raw sketches [n, blocks, width] float32, zeros for texts without one, and status [n] uint8.

        Both are on the model's device. announced: tell the processes that share the model that these texts
        come, for those that wait in `keep_pace`.
        """
        if announced:
            self.lockstep.begin()
        texts = self.prepared(texts)
        device = self.loaded.device
        status = _on(device, [int(text.status) for text in texts], torch.uint8)
        out = torch.zeros(len(texts), self.blocks, self.width, device=device)
        good = [n for n, text in enumerate(texts) if text.status == Status.OK]
        reporter.add(len(texts) - len(good), 0, skipped=len(texts) - len(good))
        for number in range(len(self.points)):
            blocks = slice(number * self.sketcher.blocks, (number + 1) * self.sketcher.blocks)
            last = number == len(self.points) - 1
            with self.at(number):
                step = partial(self.sketcher, point=number)
                for chosen, result in self.batches.run(good, texts, step, reporter):
                    rows = _on(device, chosen, torch.int64)
                    if result is None:
                        status[rows] = int(Status.TOO_LARGE)
                        good = [n for n in good if n not in chosen]
                        reporter.add(len(chosen), 0, skipped=len(chosen))
                        continue
                    sketch = result[0]
                    bad = _nonfinite(sketch)
                    out[rows, blocks] = sketch
                    status[rows] = status[rows].masked_fill(bad, int(Status.NONFINITE))
                    tokens = sum(texts[n].length for n in chosen)
                    skipped = Download([bad.sum()]) if last else None
                    reporter.sketched(len(chosen) if last else 0, tokens, skipped)
        out.masked_fill_((status != int(Status.OK))[:, None, None], 0.0)
        return out, status

    def keep_pace(self) -> None:
        """Run passes for the processes that share the model until none of them has texts left."""
        self.lockstep.until_all_are_done(lambda: self.sketches([]))

    # -------------------------------------------------------------------------------- preconditioner

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradients that the preconditioner is fitted to can be kept, to be sketched later."""
        return self.config.kind == "kfac" and len(self.points) == 1 and not self.loaded.sharded

    def of_kept(self, kept: KeptGradients) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers of the texts, sketches [n, blocks, width] and status [n] as of `sketches`, of each batch
        whose gradients `fit_preconditioner` kept; each is released once it is yielded."""
        for chosen, batch in kept.taken():
            sketching = self.sketcher.new_pass(self.sketcher.sketch_pass, batch.batch, 0)
            batch.give(sketching)
            sketch = sketching.blocks(self.whole)
            bad = _nonfinite(sketch)
            status = torch.where(bad, int(Status.NONFINITE), int(Status.OK)).to(torch.uint8)
            yield chosen, sketch.masked_fill_(bad[:, None, None], 0.0), status

    def fit_preconditioner(
        self, texts: Sequence[AnyExample], reporter: Reporter = SILENT, kept: KeptGradients | None = None
    ) -> Preconditioner:
        """The preconditioner of each point, of the configured kind, from the gradients of these texts.

        kept: keeps the gradients, for `of_kept` of the source with this preconditioner; only if
        `keeps_gradients`.
        """
        assert kept is None or self.keeps_gradients
        texts = self.prepared(texts)
        good = [n for n, text in enumerate(texts) if text.status == Status.OK]
        points = []
        for number in range(len(self.points)):
            counted = Counted(reporter, number * len(good), len(self.points) * len(good))
            with self.at(number):
                if self.config.kind == "kfac":
                    moments = self._factor_moments(good, texts, counted, kept)
                    if not moments.examples:
                        reporter.tell(
                            "no example of the sample has a gradient, so gradients are not preconditioned"
                        )
                    points.append(
                        kfac_scales(moments, self.config.exponent, self.config.damping, self.config.tolerance)
                    )
                else:
                    squares = Moments(self.targets)
                    for chosen, result in self.batches.run(good, texts, self.sketcher.squares, reporter):
                        counted.add(len(chosen))
                        if result is not None:
                            squares.add(result)
                    points.append(squares.scales(self.config.exponent, self.config.floor))
        return Preconditioner(points)

    def _factor_moments(
        self, good: Sequence[int], texts: Sequence[AnyExample], counted: Counted, kept: KeptGradients | None
    ) -> FactorMoments:
        """The moments of the factors of these texts' gradients, at the point where the model is.

        A pass that fails, because memory runs out or a layer mixes the examples of its batch, may have added
        a part of them. All are then computed again, in batches that are smaller by then, without the examples
        that do not fit: a second set of moments, to add to these after each pass, would take as much memory
        again, and the batch's factors some five times that. Gradients are no longer kept then.
        """
        while True:
            moments = FactorMoments(self.targets, self.config.rank, self.settings.seed, self.loaded.device)
            spoilt = False
            counted.restart()
            keeps = kept is not None and kept.begin()

            def add(batch: AnyBatch, moments: FactorMoments = moments) -> KeptBatch | bool:
                nonlocal spoilt
                if spoilt:  # after a failure the moments are of no use
                    return True
                spoilt = True
                keeping = None if kept is None else kept.new_batch(batch)
                try:
                    self.sketcher.add_moments(batch, moments, keeping)
                except (RuntimeError, MemoryError):
                    if kept is not None:
                        kept.refuse()
                    raise
                spoilt = False
                return True if keeping is None else keeping

            left = list(good)
            for chosen, added in self.batches.run(good, texts, add, counted.reporter):
                counted.add(len(chosen))
                if added is None and not keeps:  # else it may fit where nothing is kept
                    left = [n for n in left if n not in chosen]
                elif kept is not None and isinstance(added, KeptBatch):
                    kept.add(chosen, added)
            if not spoilt:
                return moments
            good = left


def default_width(blocks: int, bytes_per_example: int | None = None) -> int:
    """The sketch dimension per layer that pays: about 2^17 numbers in all, 512 at 210 layers, 8,192 at 12.

    bytes_per_example: the budget of a codec; from 8,192 on twice as many, since fewer would limit the codec's
    accuracy (docs/measured/fidelity.md).
    """
    numbers = 3 << (16 if bytes_per_example is None or bytes_per_example < 8192 else 17)
    width = 512
    while width < 8192 and width * 2 * blocks <= numbers:
        width *= 2
    return width


def _points(loaded: LoadedModel, at: tuple[float, ...] | float | None) -> list[float]:
    if at is None:
        if loaded.trained is not None and not loaded.path.ends:  # an adapter whose base is unknown
            loaded.path.check([DEFAULT_AT])
        return [DEFAULT_AT if loaded.path.ends else 1.0]
    points = [at] if isinstance(at, float) else list(at)
    loaded.path.check(points)
    return points


def _preconditioner_config(
    settings: GradientSettings, loaded: LoadedModel, targets: Sequence[Target]
) -> PreconditionerConfig:
    value = settings.preconditioner
    if value == "auto":
        value = "off" if settings.projection == "rapidgrad" else "kfac"
    return PreconditionerConfig.of(value, loaded.model, targets, loaded.trained)


def _nonfinite(sketch: Tensor) -> Tensor:
    """Which of the sketches [n, blocks, width] have NaN or Inf: [n] bool."""
    return ~sketch.isfinite().flatten(1).all(1)


def _on(device: torch.device, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    return upload(torch.tensor(numbers, dtype=dtype, device="cpu"), device)
