"""What the trainer writes: models and adapters, checkpoints as the Hugging Face Trainer's, and resume
states."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import UserError
from rapidin.files import replace_file, replacing


def save_model(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write a Hugging Face folder, or a PEFT folder for an adapter, atomically.

    The tokenizer is saved with a whole model only. An older folder of that name is replaced.
    """

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        if tokenizer is not None and not hasattr(model, "peft_config"):
            tokenizer.save_pretrained(partial)

    _write_folder(folder, write)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Folders `checkpoint-STEP`, in the layout of the Hugging Face Trainer, that `tune` writes.

    Each holds the model or the adapter, the tokenizer if one is given, `trainer_state.json` with the learning
    rate of every step so far, and `optimizer.pt`, the optimizer's state with its parameters in the Trainer's
    order (those with weight decay first).

    folder: where they are written; steps: after which steps; tokenizer: saved in each.
    """

    folder: Path
    steps: Collection[int] = field(default=())
    tokenizer: Any = None

    @staticmethod
    def spread(folder: Path, count: int, steps: int, tokenizer: Any = None) -> Checkpoints:
        """`count` checkpoints at even distances, the last of them after the last of `steps` steps."""
        if count > steps:
            raise UserError(f"cannot keep {count} checkpoints of {steps} steps", "ask for fewer")
        return Checkpoints(folder, sorted({round(steps * n / count) for n in range(1, count + 1)}), tokenizer)

    def save(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        step: int,
        steps: int,
        batch: int,
        history: Sequence[Mapping[str, float]],
    ) -> None:
        """Write the checkpoint of a step, counted from 1, of `steps`.

        batch: examples per step; history: step, learning rate and loss of every step so far.
        """
        trainer_state = {
            "global_step": step,
            "max_steps": steps,
            "train_batch_size": batch,
            "log_history": list(history),
        }

        def write(partial: Path) -> None:
            model.save_pretrained(partial)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            torch.save(optimizer.state_dict(), partial / "optimizer.pt")
            text = json.dumps(trainer_state, indent=1) + "\n"
            (partial / "trainer_state.json").write_text(text, encoding="utf-8")

        _write_folder(self.folder / f"checkpoint-{step}", write)


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder by what `write` puts into a temporary one, which is renamed once it is on disk."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for path in partial.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


class ResumeState:
    """Weights and optimizer of a run, saved every few steps, from which a killed run resumes.

    A safetensors file, and `step.json`, which names it and is replaced last, so that the file it names is
    complete. folder: where both are written; settings: what a run must share with the one it resumes; every:
    steps between two saves.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], every: int = 20) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(dict(settings), default=str))
        self.every = every

    def load(self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Restore weights and optimizer, and return the number of steps done; 0 if nothing is saved.

        Raises UserError if the state was saved with other settings.
        """
        from safetensors.torch import load_file

        description = self.folder / "step.json"
        if not description.exists():
            return 0
        saved = json.loads(description.read_text(encoding="utf-8"))
        keys = sorted({*self.settings, *saved["settings"]})
        changed = [key for key in keys if saved["settings"].get(key) != self.settings.get(key)]
        if changed:
            raise UserError(
                f"'{self.folder}' was made with other settings ({', '.join(changed)})", "name another folder"
            )
        tensors = load_file(self.folder / saved["file"])
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                optimizer.state[weight] = {
                    key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else weight.device)
                    for key in ("exp_avg", "exp_avg_sq", "step")
                }
        return int(saved["step"])

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Save weights and optimizer after `step` steps, and remove the state saved before."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight.{name}": weight.detach().contiguous() for name, weight in weights.items()}
        for name, weight in weights.items():
            for key, value in optimizer.state[weight].items():
                tensors[f"{key}.{name}"] = value.contiguous()
        file = f"step-{step}.safetensors"
        with replacing(self.folder / file) as partial:
            try:
                save_file(tensors, partial)
            except SafetensorError as error:
                raise UserError(f"cannot write '{self.folder / file}': {error}") from None
        description = {"step": step, "file": file, "settings": self.settings}
        replace_file(self.folder / "step.json", (json.dumps(description, indent=1) + "\n").encode())
        for old in self.folder.glob("step-*.safetensors*"):
            if old.name != file:
                old.unlink()

    def remove(self) -> None:
        """Delete the state of a run that has finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
