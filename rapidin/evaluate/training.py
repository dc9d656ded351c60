"""The trainer of the package: AdamW on the completion tokens, for all weights or a LoRA adapter.

The demo, the examples and the evaluations tune models with it. It is small on purpose: one device, float32,
batches padded on the right. The same arguments give the same weights on one machine, also for a run that was
killed and resumed. Users train their models with trainers of their own; `rapidin.evaluate.saving` writes the
same layout as theirs, so that everything downstream can be tried on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rapidin import ops
from rapidin.errors import UserError
from rapidin.evaluate.settings import Recipe
from rapidin.gradients.adam import without_weight_decay
from rapidin.tasks.causal import TokenBatch, batch_loss, example_losses

if TYPE_CHECKING:
    from rapidin.data.encoding import AnyExample, Encoded
    from rapidin.evaluate.saving import Checkpoints, ResumeState
    from rapidin.gradients.model import LoadedModel
    from rapidin.tasks.task import Task

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

OnStep = Callable[[int, int, float], None]  # steps done, steps in total, loss of the last step


# ------------------------------------------------------------------------------------------ the loop


def tune(
    model: Any,
    examples: Sequence[Encoded],
    recipe: Recipe,
    *,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    state: ResumeState | None = None,
) -> float:
    """Tune the weights of `model` that require a gradient; return the mean loss of the last epoch's steps.

    examples: all with target tokens (`Status.OK`). state: saved regularly, and resumed from. Raises UserError
    if there are no examples or no weights to tune, or if the loss diverges.
    """
    if not examples:
        raise UserError("there is no example to tune on that has a completion token")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise UserError("no weight of the model requires a gradient, so there is nothing to tune")
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    done, steps = state.load(weights, optimizer) if state else 0, recipe.count(len(examples))
    history: list[dict[str, float]] = []
    step_losses: list[float] = []
    model.train()
    with torch.random.fork_rng():
        for step, batch in enumerate(recipe.batches(len(examples)), start=1):
            rate = recipe.rate(step - 1, steps)
            history.append({"step": step, "learning_rate": rate})
            if step <= done:
                continue
            # Seeded at each step, so that a resumed run draws the same dropout masks.
            torch.manual_seed(recipe.seed * 1_000_003 + step - 1)
            loss = _step(model, optimizer, weights, [examples[n] for n in batch], rate, recipe.clip)
            if not loss < float("inf"):
                raise UserError(f"the loss of step {step} is {loss}", "tune with a lower `learning_rate`")
            step_losses.append(loss)
            history[-1]["loss"] = loss
            if checkpoints and step in checkpoints.steps:
                checkpoints.save(model, optimizer, step, steps, recipe.batch, history)
            if state and step % state.every == 0:
                state.save(step, weights, optimizer)
            if on_step:
                on_step(step, steps, loss)
    model.eval()
    last_epoch = step_losses[-Recipe(batch=recipe.batch).count(len(examples)) :]
    return sum(last_epoch) / len(last_epoch) if last_epoch else float("nan")


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
    examples: Sequence[Encoded],
    rate: float,
    clip: float | None,
) -> float:
    """Take one optimizer step on these examples, and return their mean loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    device = next(iter(weights.values())).device
    with ops.faster_linear(model):
        loss = batch_loss(model, TokenBatch.of([(each.ids, each.target) for each in examples], device))
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    if clip is not None:
        nn.utils.clip_grad_norm_(weights.values(), clip)
    optimizer.step()
    return loss.item()


def parameter_groups(model: Any) -> list[dict[str, Any]]:
    """The trained weights in the two groups, and in the order, of the Hugging Face Trainer."""
    undecayed = without_weight_decay(model)
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[name in undecayed].append(weight)
    return [{"params": group} for group in groups]


# --------------------------------------------------------------------------------- models and adapters


class Tuner:
    """Tunes one model several times, each time from its first weights.

    loaded: the base model in float32, changed in place. lora: rank of the adapter, which is new each time, or
    its configuration, of peft; None to tune all weights. targets: names of the modules with an adapter of
    this rank, or "all-linear".
    """

    def __init__(
        self, loaded: LoadedModel, *, lora: Any = None, targets: Sequence[str] | str = "all-linear"
    ) -> None:
        self.loaded, self.lora, self.targets = loaded, lora, targets
        self._model = loaded.model
        self._start: dict[str, Tensor] = {}
        # Of an adapter that trains weights of the model too, `unload` leaves those behind.
        trains = getattr(lora, "bias", "none") != "none" or getattr(lora, "modules_to_save", None)
        if lora is None or trains:
            self._start = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        if lora is None:
            loaded.model.requires_grad_(True)

    def tuned(self, examples: Sequence[Encoded], recipe: Recipe, **options: Any) -> Any:
        """The model tuned on these examples, the same object at every call. options: those of `tune`."""
        if hasattr(self._model, "peft_config"):
            self._model = self._model.unload()
        if self._start:
            self._model.load_state_dict(self._start)
        if self.lora is not None:
            if isinstance(self.lora, int):
                self._model = add_lora(self._model, rank=self.lora, targets=self.targets, seed=recipe.seed)
            else:
                self._model = add_adapter(self._model, copy.deepcopy(self.lora), seed=recipe.seed)
        tune(self._model, examples, recipe, **options)
        return self._model


def add_lora(model: Any, *, rank: int = 8, targets: Sequence[str] | str = ALL_LINEAR, seed: int = 0) -> Any:
    """The model with a trainable LoRA adapter on the modules of these names, or on "all-linear".

    seed: of the adapter's first weights. Raises UserError if the model has no such modules.
    """
    from peft import LoraConfig

    conv = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=conv,
    )
    return add_adapter(model, config, seed=seed)


def add_adapter(model: Any, config: Any, *, seed: int = 0) -> Any:
    """The model with a new, trainable adapter of this configuration of peft.

    seed: of the adapter's first weights. Raises UserError if the model has not the modules that it names.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            targets = config.target_modules
            missing = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
            kinds = (nn.Linear,) if not config.fan_in_fan_out else (nn.Module,)
            names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, kinds)})
            raise UserError(
                f"the model has no modules {missing}", f"it has {', '.join(names[:12])}"
            ) from error


@torch.no_grad()
def losses(
    model: Any, examples: Sequence[AnyExample], *, batch_tokens: int = 2048, task: Task | None = None
) -> Tensor:
    """Each example's loss, by default its mean over the completion tokens: [n] float32 on the CPU."""
    model.eval()
    device = next(iter(model.parameters())).device
    result = torch.zeros(len(examples))
    order = sorted(range(len(examples)), key=lambda n: examples[n].length)
    while order:
        longest = examples[order[-1]].length
        chosen = order[-max(1, batch_tokens // longest) :]
        del order[-len(chosen) :]
        some: list[Any] = [examples[n] for n in chosen]
        with ops.faster_linear(model):
            if task is None:
                texts = TokenBatch.of([(each.ids, each.target) for each in some], device)
                found = example_losses(model, texts)
            else:
                found = task.losses(model, task.batch(some, device))
        result[chosen] = found.float().cpu()
    return result
