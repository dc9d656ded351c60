"""What a trainer's loss makes of the loss of each example.

The loss of a step is a sum over its examples, each with a factor: a mean over the tokens of a batch, or of
all batches of an optimizer step, or over the pairs of a batch; besides the number of processes and the scale
of mixed precision. The factors are not worked out from the trainer's settings, which differ between its
versions. Autograd has them: the gradient of the final loss with respect to what the model returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rapidin.data.encoding import Encoded, Status
from rapidin.data.records import NO_LOSS
from rapidin.errors import UserError

Kind = Literal["tokens", "pairs"]

_REMEDY = "cache after training with 'rapidin cache'"
_TOLERANCE = 1e-4  # relative, of losses that are computed in two ways
_UNIFORM = 1e-3  # relative, of the weights of tokens


@dataclass(slots=True)
class TextBatch:
    """The texts of a batch as the trainer's model gets them.

    kind: texts with a loss of each, or pairs, of which the first half of the rows are the chosen texts and
    the second half the rejected ones. ids: [B, T]; counts: [B, T] bool, positions whose next token has a
    loss; real: [B, T] bool, not padding; lengths: the number of tokens of each text, if they stand one after
    the other in a single row (padding-free).
    """

    kind: Kind
    ids: Tensor
    counts: Tensor
    real: Tensor
    lengths: list[int] | None = None

    @staticmethod
    def of(kind: Kind, inputs: Mapping[str, Any], lengths: list[int]) -> TextBatch:
        """The texts of the inputs of a training step. lengths: of the examples, -1 where it is not known.

        Raises UserError for inputs that are not those of such texts.
        """
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if kind == "pairs" and inputs.get("completion_mask") is not None and ids is not None:
            labels = ids.masked_fill(inputs["completion_mask"] == 0, NO_LOSS)
        if ids is None or labels is None or labels.shape != ids.shape or "shift_labels" in inputs:
            raise UserError(
                "the batches of the training are not input_ids with labels of their shape", _REMEDY
            )
        counts = torch.zeros_like(labels, dtype=torch.bool)
        counts[:, :-1] = labels[:, 1:] != NO_LOSS
        mask = inputs.get("attention_mask")
        texts = len(ids) if kind == "tokens" else len(ids) // 2
        flat = len(ids) == 1 and mask is None and (len(lengths) > 1 or "position_ids" in inputs)
        if flat and min(lengths) >= 0 and sum(lengths) <= ids.shape[1] and kind == "tokens":
            real = (torch.arange(ids.shape[1], device=ids.device) < sum(lengths))[None]
            return TextBatch(kind, ids, counts, real, lengths)
        if len(lengths) != texts:
            raise UserError(
                f"a batch has {len(lengths)} examples and {texts} rows: packed texts can be told apart "
                "only where their batches are padding-free",
                "use padding_free=True, or no packing",
            )
        return TextBatch(kind, ids, counts, torch.ones_like(counts) if mask is None else mask.bool())

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.ids) if self.lengths is None else len(self.lengths)

    @property
    def owners(self) -> Tensor:
        """The text of each position, [B, T] int64."""
        if self.lengths is None:
            rows = torch.arange(len(self.ids), device=self.ids.device)
            return rows[:, None].expand_as(self.ids)
        ends = torch.tensor(self.lengths, device="cpu").cumsum(0).to(self.ids.device)
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return torch.searchsorted(ends, places, right=True).clamp(max=self.texts - 1)[None]

    @property
    def targets(self) -> Tensor:
        """The number of tokens of each text that have a loss, [texts] int64."""
        total = torch.zeros(self.texts, dtype=torch.int64, device=self.ids.device)
        return total.index_add_(0, self.owners.flatten(), self.counts.flatten().long())

    def encoded(self, most: int = 2) -> list[Encoded]:
        """The first texts, or of pairs the chosen and the rejected text of each, as rapidin reads them."""
        half = len(self.ids) // 2
        chosen = list(range(min(most, self.texts)))
        if self.kind == "pairs":
            chosen = [n for pair in range(min(most, half)) for n in (pair, half + pair)]
        owners, made = self.owners.expand_as(self.ids), []
        for n in chosen:
            mine = (owners == n) & self.real
            ids = self.ids[mine].tolist()
            target = [False, *self.counts[mine].tolist()[:-1]][: len(ids)]
            made.append(Encoded(ids, target, Status.OK if any(target) else Status.NO_TARGET))
        return made


def kind_of(trainer: Any) -> Kind:
    """What a trainer's loss is made of. Raises UserError for one that no example has a loss of its own in, or
    that rapidin does not know."""
    kinds = type(trainer).__mro__
    names = [kind.__name__ for kind in kinds]
    if "DPOTrainer" in names:
        derived = kinds[: names.index("DPOTrainer")]
        own = [n for kind in derived for n, value in vars(kind).items() if "loss" in n and callable(value)]
        if own:  # no values are compared where the loss is of pairs
            raise UserError(f"the trainer has a loss of its own ({own[0]})", _REMEDY)
        _check_pairs(trainer)
        return "pairs"
    of_trl = [kind.__name__ for kind in kinds if kind.__module__.partition(".")[0] == "trl"]
    if of_trl and "SFTTrainer" not in names:
        raise UserError(f"the loss of {of_trl[0]} is not known", _REMEDY)
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise UserError("the trainer has a loss of its own (compute_loss_func)", _REMEDY)
    if getattr(trainer, "label_smoother", None) is not None:
        raise UserError("the loss with label smoothing is not known", _REMEDY)
    if getattr(trainer.args, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise UserError(f"the loss '{trainer.args.loss_type}' is not known", _REMEDY)
    return "tokens"


def _check_pairs(trainer: Any) -> None:
    args = trainer.args
    kinds = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    other = None
    if kinds != ["sigmoid"]:
        other = f"the loss {' + '.join(kinds)}"
    elif str(getattr(args, "f_divergence_type", "reverse_kl")).rpartition(".")[2].lower() != "reverse_kl":
        other = f"f_divergence_type '{args.f_divergence_type}'"
    else:
        for name in ("ld_alpha", "use_weighting", "label_smoothing", "rpo_alpha", "aux_loss_enabled"):
            if getattr(args, name, None) or getattr(trainer, name, None):
                other = f"'{name}'"
    if "ref" in getattr(trainer.model, "peft_config", ()):
        raise UserError(
            "the training starts from a tuned adapter, and rapidin compares with the model without one",
            "merge that adapter into the model first, or train a new one",
        )
    if other:
        raise UserError(
            f"of DPO's losses the sigmoid loss alone is known, and the training uses {other}", _REMEDY
        )


@dataclass(slots=True)
class Factors:
    """The factors of a step's examples, as the backward pass shows them.

    scale: of the sum of all token losses, or of all pairs' losses, in the final loss; calls: of the model
    with gradients; total: the sum of all token losses, and final: the final loss, where they are compared;
    checks: what raises UserError if values do not agree.
    """

    scale: Tensor | None = None
    calls: int = 0
    total: Tensor | None = None
    final: Tensor | None = None
    checks: list[Callable[[], None]] = field(default_factory=list)

    def compare(self) -> None:
        """Raises UserError if the final loss is not the multiple of the sum of all token losses."""
        if self.total is None or self.final is None or self.scale is None:
            return
        expected = self.total * self.scale
        if not bool((self.final - expected).abs() <= _TOLERANCE * expected.abs() + 1e-6):
            raise UserError("the trainer adds something to the loss of its model", _REMEDY)

    def of_examples(self, batch: TextBatch) -> Tensor:
        """The factor of each text's own loss, [texts]: the mean over its tokens, or the pair's."""
        if self.scale is None or self.calls != 1:
            raise UserError(
                "the trainer's loss is not the one that its model returned"
                if self.scale is None
                else f"the model was called {self.calls} times with gradients in one step",
                _REMEDY,
            )
        if batch.kind == "pairs":
            return self.scale.expand(len(batch.ids))
        return self.scale * batch.targets


class LossWatch:
    """Finds the factors of the losses of a trainer's steps.

    thorough: compare values of losses, too, which waits for the device; for the first batch that has a loss.
    """

    def __init__(self, trainer: Any, kind: Kind) -> None:
        self._trainer, self.kind = trainer, kind
        self.thorough = True

    @contextlib.contextmanager
    def watching(self, batch: TextBatch) -> Iterator[Factors]:
        """Inside the block the trainer runs one step over a batch."""
        factors = Factors()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._watching_loss(batch, factors))
            if self.kind == "tokens":
                hook = self._model_hook(batch, factors)
                stack.callback(self._trainer.model.register_forward_hook(hook, with_kwargs=True).remove)
            yield factors
        for check in (*factors.checks, factors.compare) if self.thorough else ():
            check()
        self.thorough = self.thorough and not bool(batch.counts.any())

    @contextlib.contextmanager
    def _watching_loss(self, batch: TextBatch, factors: Factors) -> Iterator[None]:
        """The loss that the trainer computes: of pairs it is their mean, else a multiple of the model's."""
        original = self._trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            loss = made[0] if isinstance(made, tuple) else made
            if not loss.requires_grad:
                return made
            if self.kind == "pairs":
                factors.calls += 1
            # The hook must not hold the loss: the two would keep each other, and all of the graph.
            value = loss.detach().clone()

            def on_gradient(grad: Tensor) -> None:
                if self.kind == "pairs":
                    factors.scale = grad.detach().float() / (len(batch.ids) // 2)
                elif self.thorough:
                    factors.final = (grad * value).detach().float()

            _on_gradient(loss, on_gradient)
            return made

        with replaced(self._trainer, "compute_loss", compute_loss):
            yield

    def _model_hook(self, batch: TextBatch, factors: Factors) -> Callable[..., None]:
        def hook(model: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            log_probs = getattr(output, "log_probs", None)
            loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
            if isinstance(log_probs, Tensor) and log_probs.requires_grad:
                factors.calls += 1
                factors.total = -log_probs.detach().float().sum()
                _on_gradient(log_probs, lambda grad: _of_tokens(grad, batch, factors))
            elif isinstance(loss, Tensor) and loss.requires_grad and loss.ndim == 0:
                factors.calls += 1
                items = kwargs.get("num_items_in_batch")
                total = batch.counts.sum() if items is None else torch.as_tensor(items, device=loss.device)

                def on_gradient(grad: Tensor) -> None:
                    factors.scale = grad.detach().float() / total

                _on_gradient(loss, on_gradient)
                factors.total = loss.detach().float() * total
                if self.thorough:
                    _check_loss(factors.total, output, batch, factors)

        return hook


def _on_gradient(tensor: Any, hook: Callable[[Tensor], None]) -> None:
    tensor.register_hook(hook)


def _of_tokens(grad: Tensor, batch: TextBatch, factors: Factors) -> None:
    """The factor from the gradients of the log-probability of each token, which are all the same."""
    counts = batch.counts[:, : grad.shape[1]]
    weights = -grad.detach().float()
    most, least = (weights.masked_fill(~counts, fill) for fill in (-torch.inf, torch.inf))
    factors.scale = most.max().clamp(min=0.0)
    even = (most.max() - least.min()) <= _UNIFORM * most.max().abs()

    def check() -> None:
        if not bool(even | ~counts.any()):
            raise UserError("the trainer's loss gives the tokens of a batch different weights", _REMEDY)

    factors.checks.append(check)


def _check_loss(total: Tensor, output: Any, batch: TextBatch, factors: Factors) -> None:
    """Compare the model's loss with the cross-entropy of its logits, if it returned them."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != batch.ids.shape:
        return
    labels = batch.ids.roll(-1, 1).masked_fill(~batch.counts, NO_LOSS)
    with torch.no_grad():
        expected = F.cross_entropy(logits.detach().float().flatten(0, 1), labels.flatten(), reduction="sum")

    def check() -> None:
        if not bool((total - expected).abs() <= _TOLERANCE * expected.abs() + 1e-6):
            raise UserError(
                "the model's loss is not the mean of the cross-entropies of the next tokens", _REMEDY
            )

    factors.checks.append(check)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block an object's method is another function."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
