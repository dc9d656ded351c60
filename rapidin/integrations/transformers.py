"""A callback for the trainers of transformers and TRL that sketches every example in the training's own
backward pass, so that its cache costs no pass of its own.

>>> trainer.add_callback(SketchCallback("cache"))
>>> trainer.train()

The cache holds the sum that TracIn takes over a training run (Pruthi et al., NeurIPS 2020, section 3): for
each example its gradients in the steps that it was seen in, each times the learning rate of the step.
docs/guide/training.md says more.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from rapidin.attribution.options import CacheOptions
from rapidin.errors import UserError
from rapidin.gradients.settings import GradientSettings
from rapidin.integrations.losses import replaced
from rapidin.integrations.run import Precondition, RunOptions, TrainingRun, trainer_calls

# What the training or the callback decides, and what is of no use where it does not apply.
_CHOSEN = {"at", "preconditioner", "beta", "dropout", "append", "part", "check", "decoys"}
_OF_DATA = ("limit", "map", "streaming")  # how `data` is read


class SketchCallback(TrainerCallback):  # type: ignore[misc]
    """Makes the cache of a training run of `Trainer`, TRL's `SFTTrainer` or `DPOTrainer` while it trains.

    path: folder of the cache, or with `per_checkpoint` of several. data: the examples that the trainer's data
    set was made of, in its order, for queries to show (anything that `rapidin.Attributor.cache` takes); by
    default hits are row numbers and token ids. per_checkpoint: a cache for each of the trainer's checkpoints,
    of the steps since the one before, queried as one at each checkpoint's weights; by default one cache,
    queried at the last weights. precondition: "optimizer" preconditions gradients by the second moments that
    the optimizer has in each step, "off" leaves them as they are. tokenizer: by default the trainer's
    (processing_class). steps: folder of the sketches of all steps until the training has ended, by default
    'rapidin' in the trainer's output_dir; keep_steps: keep it. Others are fields of
    `rapidin.gradients.settings.GradientSettings` and `rapidin.attribution.options.CacheOptions`.

    Raises TypeError for unknown names, and in `train` UserError for a training that cannot be sketched.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        data: Any = None,
        per_checkpoint: bool = False,
        precondition: Precondition = "off",
        tokenizer: Any = None,
        steps: str | Path | None = None,
        keep_steps: bool = False,
        **by_name: Any,
    ) -> None:
        if precondition not in ("off", "optimizer"):
            raise UserError(f"unknown precondition '{precondition}'", "use 'off' or 'optimizer'")
        known = {each.name for each in fields(CacheOptions)} - _CHOSEN
        taken = {each.name for each in fields(GradientSettings)} - _CHOSEN
        unknown = sorted(set(by_name) - known - taken)
        if unknown:
            raise TypeError(f"SketchCallback has no argument '{unknown[0]}'")
        unused = [name for name in _OF_DATA if name in by_name] if data is None else []
        if unused:
            raise UserError(
                f"`{unused[0]}` says how `data` is read, and there is no `data`", "give `data` too"
            )
        if per_checkpoint and by_name.get("null"):
            raise UserError(
                "a null distribution is of one cache, and per_checkpoint=True makes several",
                "leave out `null`",
            )
        self._options = RunOptions(
            Path(path),
            data,
            per_checkpoint,
            precondition,
            tokenizer,
            None if steps is None else Path(steps),
            keep_steps,
            GradientSettings(**{name: value for name, value in by_name.items() if name in taken}),
            CacheOptions(**{name: value for name, value in by_name.items() if name in known}),
        )
        self._run: TrainingRun | None = None
        self._replaced = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._release()  # of a training that was stopped by an error
        trainer = _calling_trainer()
        self._run = TrainingRun(trainer, self._options, kwargs["train_dataloader"])
        self._replaced.enter_context(replaced(trainer, "training_step", trainer_calls(self._run, trainer)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._run is not None
        self._run.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._run is not None
        self._run.after_step(state.global_step - 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.saved(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, self._run = self._run, None
        self._release()
        if run is not None:
            run.finish(state.global_step)

    def _release(self) -> None:
        self._replaced.close()
        if self._run is not None:
            self._run.close()
            self._run = None


def _calling_trainer() -> Trainer:
    """The trainer that calls the callback: transformers gives callbacks everything but the trainer."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise UserError("SketchCallback is called by no trainer", "add it with trainer.add_callback")
