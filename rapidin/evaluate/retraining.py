"""Training a model again on some rows of its data: by the trainer of the package, or by a command."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rapidin.data.dropping import write_without
from rapidin.data.encoding import Encoded
from rapidin.data.opening import Reading
from rapidin.errors import UserError, reason_of
from rapidin.evaluate.saved_recipe import saved_recipe
from rapidin.evaluate.settings import TRAINING, ConfirmSettings, Recipe
from rapidin.evaluate.training import Tuner
from rapidin.evaluate.tuned import load_float32
from rapidin.files import reason
from rapidin.gradients.adapters import ADAPTER_CONFIG
from rapidin.gradients.model import LoadedModel

OnCost = Callable[[int, float], None]  # steps of a training, and the seconds that all of them take

_MEASURED_STEPS = 5  # of the first training, after one that warms up


class Trainer(Protocol):
    """Trains a model on all rows but some."""

    def trained(self, left_out: Collection[int], seed: int, on_cost: OnCost | None = None) -> Any:
        """The model that is trained without these rows. on_cost: told once what a training takes."""
        ...

    def to_json(self) -> dict[str, Any]:
        """How it trains, as JSON values."""
        ...


@dataclass
class BuiltIn:
    """The trainer of the package.

    tuner: with the base model and the configuration of the adapter; rows: the usable examples by row.
    """

    tuner: Tuner
    rows: Mapping[int, Encoded]
    recipe: Recipe

    def trained(self, left_out: Collection[int], seed: int, on_cost: OnCost | None = None) -> Any:
        """See `Trainer`. The model is the same object at every call."""
        gone = set(left_out)
        examples = [example for row, example in self.rows.items() if row not in gone]
        recipe = replace(self.recipe, seed=seed)
        if recipe.steps is not None:  # as many passes as on all rows
            recipe = replace(recipe, steps=max(1, round(recipe.steps * len(examples) / len(self.rows))))
        begun: list[float] = []
        steps = recipe.count(len(examples))
        last = min(_MEASURED_STEPS + 1, steps)

        def measured(done: int, _steps: int, _loss: float) -> None:
            begun.append(time.perf_counter())
            if on_cost is not None and done == last:
                on_cost(steps, (begun[-1] - begun[0]) / max(1, done - 1) * steps)

        return self.tuner.tuned(examples, recipe, on_step=measured)

    def to_json(self) -> dict[str, Any]:
        """The recipe and the adapter's configuration."""
        lora = self.tuner.lora
        config = None if lora is None else {key: _plain(each) for key, each in lora.to_dict().items()}
        return {"recipe": self.recipe.to_json(), "adapter": config}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


@dataclass
class Command:
    """A command of the user's, which gets a file of rows and leaves an adapter or a model in a folder.

    command: with {data}, {out} and, if it has a use for it, {seed}; data, reading: the training data;
    folder: for the files of one training and the logs; model: that an adapter is for.
    """

    command: str
    data: Any
    reading: Reading
    folder: Path
    model: str
    options: Mapping[str, Any]

    def trained(self, left_out: Collection[int], seed: int, on_cost: OnCost | None = None) -> Any:
        """See `Trainer`. Raises UserError if the command fails or leaves no model."""
        data, out, log = (self.folder / name for name in ("data.jsonl", "out", "trainer.log"))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        write_without(self.data, left_out, data, self.reading)
        values = {"{data}": str(data), "{out}": str(out), "{seed}": str(seed)}
        began = time.perf_counter()
        self._run([_filled(part, values) for part in split_command(self.command)], log)
        if on_cost is not None:
            on_cost(0, time.perf_counter() - began)
        found = _made(out)
        if found is None:
            raise UserError(
                f"the trainer left neither an adapter nor a model in {out}",
                f"its output is in {log}; the command has to write into {{out}}",
            )
        is_adapter = (found / ADAPTER_CONFIG).is_file()
        where = (self.model, str(found)) if is_adapter else (str(found), None)
        loaded = load_float32(where[0], adapter=where[1], **self.options)
        shutil.rmtree(out, ignore_errors=True)
        data.unlink()
        return loaded.model

    def _run(self, arguments: Sequence[str], log: Path) -> None:
        try:
            with log.open("wb") as file:
                done = subprocess.run(
                    arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
                )
        except OSError as error:
            raise UserError(f"cannot run the trainer '{arguments[0]}': {reason(error)}") from None
        if done.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = f": {lines[-1]}" if lines else ""
            raise UserError(f"the trainer ended with exit code {done.returncode}{last}", f"see {log}")

    def to_json(self) -> dict[str, Any]:
        """The command."""
        return {"trainer": self.command}


def split_command(command: str) -> list[str]:
    """The parts of a command, as a shell splits it. Raises UserError for one that it could not."""
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise UserError(f"the command of `trainer` cannot be read: {error}") from None
    if not parts:
        raise UserError("the command of `trainer` is empty")
    return parts


def _filled(part: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(?:data|out|seed)\}", lambda match: values[match[0]], part)


def _made(out: Path) -> Path | None:
    """The folder with an adapter or a model: `out`, else its last checkpoint; None if there is none."""
    checkpoints = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    for folder in (out, *sorted(checkpoints, key=lambda path: -int(path.name[11:]))):
        if (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
            return folder
    return None


# -------------------------------------------------------------------------------------------- the recipe


def recipe_of(settings: ConfirmSettings, folder: str, rows: int) -> Recipe:
    """The recipe of the settings, completed by what the Trainer saved in the folder of an adapter or a model.

    rows: number of examples of a training on all of them. Raises UserError if it is not known.
    """
    given = {name: getattr(settings, name) for name in TRAINING if getattr(settings, name) is not None}
    saved = saved_recipe(Path(folder), rows)
    needed = {"epochs", "batch", "learning_rate"} - given.keys()
    if saved is None and needed:
        raise UserError(
            f"nothing says how '{folder}' was trained: it has no trainer_state.json",
            "give `epochs`, `batch` and `learning_rate`, or a command with `trainer`",
        )
    recipe = saved or Recipe(weight_decay=0.0)
    if given.keys() & {"learning_rate", "warm_up", "schedule"}:
        recipe = replace(recipe, rates=())
    if "epochs" in given:
        recipe = replace(recipe, steps=None)
    recipe = replace(recipe, **given)
    if not recipe.rates and not 0 < recipe.learning_rate < float("inf"):
        if "learning_rate" in given:
            raise UserError(f"`learning_rate` must be above 0, got {recipe.learning_rate:g}")
        raise UserError("the Trainer logged no learning rate", "give `learning_rate`")
    return recipe


def adapter_config(folder: str) -> Any:
    """The configuration of a LoRA adapter, for a new one. Raises UserError for adapters of another kind."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # peft raises many kinds
        raise UserError(f"cannot read the adapter '{folder}': {reason_of(error)}") from None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UserError(
            f"the built-in trainer makes LoRA adapters, and '{folder}' is of the kind {kind}",
            "give the command that trains it with `trainer`",
        )
    config.inference_mode = False
    return config


def built_in(base: LoadedModel, adapter: str | None, rows: Mapping[int, Encoded], recipe: Recipe) -> BuiltIn:
    """The trainer of the package for an adapter on a base model; for all of its weights without one."""
    config = None if adapter is None else adapter_config(adapter)
    return BuiltIn(Tuner(base, lora=config), rows, recipe)
