"""Models that an evaluation tunes itself: tuned once with checkpoints, saved in its folder, loaded again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidin.data.encoding import Encoded, Encoder
from rapidin.evaluate.log import Log, StepLog
from rapidin.evaluate.saving import Checkpoints, ResumeState, save_model
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import Tuner
from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel
from rapidin.tasks.names import CAUSAL

MAX_LENGTH = 2048  # tokens of an example, for models without a context length of their own


def load_float32(name: str, **options: Any) -> LoadedModel:
    """`rapidin.gradients.load.load_model` in float32, without progress bars on standard error.

    transformers has no switch for the bar of GGUF files.
    """
    with open(os.devnull, "w") as devnull, redirect_stderr(devnull):
        return load_model(name, dtype="float32", task=CAUSAL, **options)


def encoder_of(loaded: LoadedModel) -> Encoder:
    """An encoder that cuts examples at the model's context length."""
    return Encoder(loaded.tokenizer, max_length=loaded.context_length or MAX_LENGTH)


@dataclass(frozen=True, slots=True)
class TunedModel:
    """The model that an evaluation tuned, in its folder.

    folder: of the evaluation; base: folder or name of the model it was tuned from; lora: rank of its adapter,
    None where all weights were tuned; device: where it is loaded to.
    """

    folder: Path
    base: str
    lora: int | None
    device: str | None = None

    @property
    def path(self) -> Path:
        """The PEFT folder of the adapter, or the Hugging Face folder of the whole model."""
        return self.folder / ("tuned" if self.lora is None else "adapter")

    @property
    def checkpoints(self) -> Path:
        """The folder with the checkpoints of the tuning."""
        return self.folder / "checkpoints"

    def load(self, checkpoint: Path | None = None) -> LoadedModel:
        """The tuned model, or one of its checkpoints, with its base, in float32."""
        path = str(checkpoint or self.path)
        if self.lora is not None:
            return load_float32(self.base, adapter=path, device=self.device)
        return load_float32(path, base=self.base, device=self.device)


def tune_and_save(
    tuned: TunedModel,
    tuner: Tuner,
    examples: Sequence[Encoded],
    recipe: Recipe,
    settings: Mapping[str, Any],
    *,
    checkpoints: int,
    log: Log,
) -> Any:
    """Tune the model on these examples, save it as `tuned`, and return it; a killed run resumes.

    settings: what a run must share with the one that it resumes; checkpoints: how many to keep.
    """
    state = ResumeState(tuned.folder / "state", settings, every=50)
    kept = None
    if checkpoints:
        steps = recipe.count(len(examples))
        kept = Checkpoints.spread(tuned.checkpoints, checkpoints, steps, tuner.loaded.tokenizer)
    progress = StepLog(log, f"tuning on {len(examples):,} examples")
    model = tuner.tuned(examples, recipe, checkpoints=kept, state=state, on_step=progress.step)
    save_model(model, tuned.path, tuner.loaded.tokenizer)
    state.remove()
    return model
