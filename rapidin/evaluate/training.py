"""The one trainer: AdamW on the completion tokens, all weights or a LoRA adapter.

The demo, the examples and the evaluations tune models with it. It is small on purpose: one device, float32,
batches padded on the right, and the same weights whenever the same things are asked for again, also of a run
that was killed and gone on with. Users' own models come from their own trainers; what this one writes has the
layout of theirs (`save_model`, `Checkpoints`), so that everything downstream can be tried on it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.errors import UserError
from rapidin.files import replace_file, replacing

if TYPE_CHECKING:
    from rapidin.data.encoding import Encoded
    from rapidin.gradients.model import LoadedModel

NOT_A_TARGET = -100
ATTENTION = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, the loss of the last


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to tune.

    epochs: passes over the examples, each in an order of its own; steps: instead of them, so many batches.
    batch: examples a step; the last one of a pass may be smaller. learning_rate: the highest. warm_up: steps
    in which it rises to that in a straight line. schedule: "linear" falls to zero after that, "constant"
    stays. betas, weight_decay: AdamW's, for all weights. clip: the longest gradient that is not cut to
    this length, None for any. seed: of the orders, and of dropout where the model has it.
    """

    epochs: int = 1
    steps: int | None = None
    batch: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 1
    schedule: Literal["linear", "constant"] = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float | None = 1.0
    seed: int = 0

    def count(self, examples: int) -> int:
        """Steps in all for so many examples."""
        return self.steps if self.steps is not None else self.epochs * -(-examples // self.batch)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of `steps`."""
        warm_up = min(max(1, self.warm_up), steps)
        rising = (step + 1) / warm_up
        falling = (steps - step) / (steps - warm_up + 1) if self.schedule == "linear" else 1.0
        return self.learning_rate * min(1.0, rising, falling)

    def batches(self, examples: int) -> Iterator[list[int]]:
        """The rows of each step."""
        rng, order = random.Random(self.seed), list(range(examples))
        left = self.count(examples)
        while left:
            rng.shuffle(order)
            for start in range(0, examples, self.batch)[:left]:
                yield order[start : start + self.batch]
                left -= 1

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON has it."""
        return asdict(self) | {"betas": list(self.betas)}


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where and after which steps `tune` leaves folders `checkpoint-STEP` of the Hugging Face Trainer's
    layout.

    In each: the model or the adapter, the tokenizer where one is given, `trainer_state.json` with the
    learning rate of every step so far, and `optimizer.pt`, the optimizer's state with its parameters in the
    Trainer's order (those that it gives weight decay first).
    """

    folder: Path
    steps: Collection[int] = field(default=())
    tokenizer: Any = None

    @staticmethod
    def spread(folder: Path, count: int, steps: int, tokenizer: Any = None) -> Checkpoints:
        """`count` checkpoints at even distances, the last of them after the last step."""
        if count > steps:
            raise UserError(f"{count} checkpoints of {steps} steps", "ask for fewer")
        return Checkpoints(folder, sorted({round(steps * n / count) for n in range(1, count + 1)}), tokenizer)


def tune(
    model: Any,
    examples: Sequence[Encoded],
    recipe: Recipe,
    *,
    pad: int = 0,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    state: State | None = None,
) -> float:
    """Tune the weights of `model` that need a gradient; the mean loss of the steps of the last pass.

    examples: with target tokens all (`Status.OK`). pad: the id that short texts are filled up with; nothing
    sees it. state: kept at times on disk, and gone on from. The same arguments give the same weights on one
    machine, gone on or not. Raises UserError where there are no examples or no weights, or where the loss
    is no number any more.
    """
    if not examples:
        raise UserError("there is no example to tune on that has a completion token")
    groups = _groups(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise UserError("no weight of the model needs a gradient, so none can be tuned")
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    first = state.load(named, optimizer) if state else 0
    device, steps = weights[0].device, recipe.count(len(examples))
    history: list[dict[str, float]] = []
    seen: list[float] = []
    model.train()
    with torch.random.fork_rng():
        for step, rows in enumerate(recipe.batches(len(examples))):
            rate = recipe.rate(step, steps)
            history.append({"step": step + 1, "learning_rate": rate})
            if step < first:
                continue
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # of each step, so that dropout goes on too
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _loss(model, [examples[row] for row in rows], pad, device)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(weights, recipe.clip)
            optimizer.step()
            seen.append(loss.item())
            if not seen[-1] < float("inf"):
                raise UserError(
                    f"the loss of step {step + 1} is {seen[-1]}", "tune with a lower --learning-rate"
                )
            history[-1]["loss"] = seen[-1]
            if checkpoints and step + 1 in checkpoints.steps:
                _save_checkpoint(checkpoints, model, optimizer, step + 1, steps, recipe, history)
            if state and (step + 1) % state.every == 0:
                state.save(step + 1, named, optimizer)
            if on_step:
                on_step(step + 1, steps, seen[-1])
    model.eval()
    last = seen[-Recipe(batch=recipe.batch).count(len(examples)) :]  # those of one pass
    return sum(last) / len(last) if last else float("nan")


def collate(examples: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels, each [B, T] int64, padded on the right.

    labels hold NOT_A_TARGET at the tokens whose loss does not count.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, NOT_A_TARGET)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, :length] = ids[row, :length].where(torch.tensor(example.target), NOT_A_TARGET)
    return ids, mask, labels


def _loss(model: Any, examples: Sequence[Encoded], pad: int, device: torch.device) -> Tensor:
    """Mean loss over the completion tokens of a batch."""
    ids, mask, labels = (part.to(device) for part in collate(examples, pad))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOT_A_TARGET)


@torch.no_grad()
def losses(model: Any, examples: Sequence[Encoded], *, batch_tokens: int = 2048) -> Tensor:
    """Mean loss of each example over its completion tokens: [n] float32 on the CPU, in their order."""
    from rapidin.gradients.batch import Batch, example_losses

    model.eval()
    device = next(iter(model.parameters())).device
    found = torch.zeros(len(examples))
    order = sorted(range(len(examples)), key=lambda n: len(examples[n].ids))
    while order:
        longest = len(examples[order[-1]].ids)
        chosen = order[-max(1, batch_tokens // longest) :]
        del order[-len(chosen) :]
        batch = Batch.of([(examples[n].ids, examples[n].target) for n in chosen], device)
        found[chosen] = example_losses(model, batch).float().cpu()
    return found


class Tuner:
    """Tunes one model again and again, each time from where it was.

    loaded: the base, in float32; its model is changed in place. lora: rank of an adapter that is new each
    time, None for all weights. targets: names of the adapter's modules, or "all-linear".
    """

    def __init__(
        self, loaded: LoadedModel, *, lora: int | None = None, targets: Sequence[str] | str = "all-linear"
    ) -> None:
        self.loaded, self.lora, self.targets = loaded, lora, targets
        self._model = loaded.model
        self._start: dict[str, Tensor] = {}
        if lora is None:
            self._start = {name: value.clone() for name, value in loaded.model.state_dict().items()}
            loaded.model.requires_grad_(True)

    def tuned(self, examples: Sequence[Encoded], recipe: Recipe, **options: Any) -> Any:
        """The model tuned on these; it is the same object every time. options: those of `tune`."""
        if self.lora is None:
            self._model.load_state_dict(self._start)
        else:
            if hasattr(self._model, "peft_config"):
                self._model = self._model.unload()
            self._model = add_lora(self._model, rank=self.lora, targets=self.targets, seed=recipe.seed)
        pad = self.loaded.tokenizer.pad_token_id
        tune(self._model, examples, recipe, pad=pad if pad is not None else 0, **options)
        return self._model


def add_lora(model: Any, *, rank: int = 8, targets: Sequence[str] | str = ALL_LINEAR, seed: int = 0) -> Any:
    """The model with a LoRA adapter on the modules of these names, or on "all-linear"; only the adapter
    trains.

    Raises UserError where the model has no such modules.
    """
    from peft import LoraConfig, get_peft_model

    conv = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=conv,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            named = targets if isinstance(targets, str) else ", ".join(targets)
            names = sorted(
                {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) or conv}
            )
            raise UserError(f"the model has no modules {named}", f"it has {', '.join(names[:12])}") from error


# ------------------------------------------------------------------------------------------------ saving


def save_model(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """A Hugging Face folder, or a PEFT folder for an adapter, that appears whole or not at all.

    The tokenizer goes with a whole model. An older folder of that name is replaced.
    """
    part = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.save_pretrained(part)
    if tokenizer is not None and not hasattr(model, "peft_config"):
        tokenizer.save_pretrained(part)
    _settle(part, folder)


def _settle(part: Path, folder: Path) -> None:
    for path in part.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


# The Trainer's rule for what it gives no weight decay: by name, or as a weight of a LayerNorm.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _groups(model: Any) -> list[dict[str, Any]]:
    """The weights in the two groups and the order that the Hugging Face Trainer has."""
    norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[name in norms or bool(_NO_DECAY.search(name.lower()))].append(weight)
    return [{"params": group} for group in groups]


def _save_checkpoint(
    kept: Checkpoints,
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: int,
    steps: int,
    recipe: Recipe,
    history: Sequence[Mapping[str, float]],
) -> None:
    name = kept.folder / f"checkpoint-{step}"
    part = kept.folder / f"checkpoint-{step}.partial"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.save_pretrained(part)
    if kept.tokenizer is not None:
        kept.tokenizer.save_pretrained(part)
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    described = {
        "global_step": step,
        "max_steps": steps,
        "train_batch_size": recipe.batch,
        "log_history": list(history),
    }
    (part / "trainer_state.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    _settle(part, name)


class State:
    """What a killed run goes on from: weights and optimizer, every so many steps.

    A safetensors file and `step.json`, which names it and is replaced last, so that what is named is whole.
    settings: what must be the same for a run to go on; every: steps between two saved states. `load` raises
    UserError where the settings are others.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], every: int = 20) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(dict(settings), default=str))
        self.every = every

    def load(self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Put weights and optimizer as they were; the step to go on with, 0 where there is no state."""
        from safetensors.torch import load_file

        described = self.folder / "step.json"
        if not described.exists():
            return 0
        saved = json.loads(described.read_text(encoding="utf-8"))
        keys = sorted({*self.settings, *saved["settings"]})
        changed = [key for key in keys if saved["settings"].get(key) != self.settings.get(key)]
        if changed:
            raise UserError(
                f"{self.folder} was begun with other settings ({', '.join(changed)})", "name another --out"
            )
        tensors = load_file(self.folder / saved["file"])
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                optimizer.state[weight] = {
                    part: tensors[f"{part}.{name}"].to("cpu" if part == "step" else weight.device)
                    for part in ("exp_avg", "exp_avg_sq", "step")
                }
        return int(saved["step"])

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Keep what `load` puts back."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight.{name}": weight.detach().contiguous() for name, weight in weights.items()}
        for name, weight in weights.items():
            for part, value in optimizer.state[weight].items():
                tensors[f"{part}.{name}"] = value.contiguous()
        file = f"step-{step}.safetensors"
        with replacing(self.folder / file) as partial:
            try:
                save_file(tensors, partial)
            except SafetensorError as error:
                raise UserError(f"cannot write '{self.folder / file}': {error}") from None
        described = {"step": step, "file": file, "settings": self.settings}
        replace_file(self.folder / "step.json", (json.dumps(described, indent=1) + "\n").encode())
        for old in self.folder.glob("step-*.safetensors*"):
            if old.name != file:
                old.unlink()

    def remove(self) -> None:
        """Forget it: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
