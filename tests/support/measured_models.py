"""What a user gets of a model: its sketches against autograd's own gradients, one example at a time.

The reference passes through nothing of rapidin but the sketch: the model's plain call, the cross-entropy of its
logits, ``loss.backward()``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tiny import CONTEXT, VOCABULARY, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F

from rapidin import ops
from rapidin.data.encoding import Encoded, Status
from rapidin.errors import UserError
from rapidin.gradients.batch import Batch
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import block_seed
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource

WIDTH, SEED = 128, 11
TOLERANCE = 1e-4  # of a sketch, relative to autograd's, in float32
# Of the mean size of a model's gradients. A smaller one, such as that of a key's bias, is mere rounding.
NEGLIGIBLE = 1e-3
_IGNORED = -100
_tokenizer = cache(tiny_tokenizer)

TRAINED_TOKENS = (5, 7)  # in every text, for adapters that train some tokens or begin at some
LENGTHS = (23, 9, 16, 4)


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Encoded]:
    """Texts of several lengths; the loss of the first counts throughout, that of the others from some token
    on."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        ids[1:3] = TRAINED_TOKENS
        start = 1 if row == 0 else length // 2
        made.append(Encoded(ids, [t >= start for t in range(length)], Status.OK))
    return made


@dataclass(frozen=True)
class Outcome:
    """What became of one choice of parameters.

    refused: the message of the UserError, "" if there was none; error: the largest relative error of a
    parameter's sketch, and where; batched: whether all examples shared a pass; share: of the model's elements
    that count; by_autograd: number of parameters that autograd itself gives, of how many.
    """

    refused: str = ""
    error: float = 0.0
    worst: str = ""
    batched: bool = False
    share: float = 0.0
    by_autograd: int = 0
    parameters: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return bool(self.refused) or self.error <= TOLERANCE


def own_gradients(model: Any, text: Encoded) -> dict[str, Tensor]:
    """The gradient of each parameter that is reached."""
    model.eval()
    before = [(p, p.requires_grad) for p in model.parameters()]
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for p in named.values():
        p.requires_grad_(True)
        p.grad = None
    own_loss(model, text).backward()
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    for p, needed in before:
        p.grad = None
        p.requires_grad_(needed)
    return grads


def own_loss(model: Any, text: Encoded) -> Tensor:
    """The mean loss over the tokens that count, with all the defaults of the model's call."""
    ids = torch.tensor([text.ids])
    logits = model(input_ids=ids).logits[0, -len(text.ids) :]  # after those of virtual tokens
    labels = ids[0].masked_fill(~torch.tensor(text.target), _IGNORED)
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=_IGNORED)


def own_sketches(model: Any, names: list[str], chosen: list[Encoded]) -> Tensor:
    """[examples, parameters, WIDTH] from `own_gradients`."""
    rows = []
    for text in chosen:
        grads = own_gradients(model, text)
        nothing = torch.zeros(WIDTH)
        rows.append([_sketch(grads[name].float(), name) if name in grads else nothing for name in names])
    return torch.stack([torch.stack(row) for row in rows])


def _sketch(grad: Tensor, name: str) -> Tensor:
    grad = grad.reshape(len(grad) if grad.ndim else 1, -1)
    return ops.matrix_sketch(grad, WIDTH, seed=block_seed(SEED, name))


def relative_errors(got: Tensor, want: Tensor) -> Tensor:
    """[parameters]: the largest error of an example's sketch, relative to its size."""
    sizes = want.norm(dim=-1)
    floor = NEGLIGIBLE * sizes.square().mean(1, keepdim=True).sqrt()
    return ((got - want).norm(dim=-1) / sizes.maximum(floor).clamp(min=1e-30)).nan_to_num(torch.inf).amax(0)


class _Watched:
    """Counts the examples of each pass."""

    def __init__(self, sketcher: Callable[..., Any]) -> None:
        self.inner, self.largest = sketcher, 0

    def __call__(self, batch: Batch, **arguments: Any) -> Any:
        result = self.inner(batch, **arguments)
        self.largest = max(self.largest, len(batch.ids))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def make_source(model: Any, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> GradientSource:
    loaded = model if isinstance(model, LoadedModel) else LoadedModel.of(model, _tokenizer())
    settings = GradientSettings(
        at=1.0,
        include=include,
        exclude=exclude,
        width=WIDTH,
        seed=SEED,
        preconditioner="off",
        max_length=CONTEXT,
        batch_tokens=1024,
    )
    return GradientSource(loaded, settings)


def outcome(
    make: Callable[[], Any],
    include: tuple[str, ...] = (),
    reference: Callable[[Any, list[str], list[Encoded]], Tensor] = own_sketches,
) -> Outcome:
    """Sketches of `texts`, together and one at a time, against the reference."""
    chosen = texts()
    try:
        model = make()
        source = make_source(model, include)
        watched = _Watched(source.sketcher)
        source.sketcher = watched  # type: ignore[assignment]
        together, status = source.sketches(chosen)
        alone = torch.cat([make_source(model, include).sketches([text])[0] for text in chosen])
    except UserError as error:
        return Outcome(refused=str(error))
    names = [target.name for target in source.targets]
    want = reference(model.model if isinstance(model, LoadedModel) else model, names, chosen)
    errors = torch.maximum(relative_errors(together, want), relative_errors(alone, want))
    if bool((status != int(Status.OK)).any()):
        errors = torch.full_like(errors, torch.inf)
    order = errors.argsort(descending=True).tolist()
    return Outcome(
        error=float(errors.max()),
        worst=names[order[0]],
        batched=watched.largest == len(chosen),
        share=source.coverage,
        by_autograd=len(source.sketcher.single_names),
        parameters=len(names),
        wrong=[f"{names[n]} {float(errors[n]):.2g}" for n in order if errors[n] > TOLERANCE],
    )


def leaks(model: Any) -> float:
    """How far the logits of earlier positions depend on the last token: more than rounding in a model that
    is not causal."""
    ids = torch.tensor([texts()[0].ids])
    other = ids.clone()
    other[:, -1] = 3 + (ids[:, -1] + 7) % (VOCABULARY - 3)
    with torch.no_grad():
        one, two = model.eval()(input_ids=ids).logits, model(input_ids=other).logits
    return float((one - two)[:, :-1].abs().max() / one.abs().max())


def speed(model: Any, seconds: float = 0.3) -> float:
    """Examples per second of processor time with sketches, relative to forward and backward passes alone."""
    chosen = texts((96,) * 8, seed=1)
    source = make_source(model)
    batch = Batch.of([(text.ids, text.target) for text in chosen])
    labels = batch.ids.masked_fill(~batch.target, _IGNORED)
    before = [(p, p.requires_grad) for p in model.parameters()]

    def bare() -> None:
        model(input_ids=batch.ids, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)

    sketched = _rate(lambda: source.sketches(chosen), seconds)
    for target in source.targets:
        model.get_parameter(target.name).requires_grad_(True)
    rate = _rate(bare, seconds)
    for p, needed in before:
        p.requires_grad_(needed)
    return sketched / rate


def _rate(step: Callable[[], Any], seconds: float) -> float:
    """Calls per second of processor time: the best of a few, after one to warm up."""
    step()
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.process_time()
        step()
        taken = time.process_time() - start
        best, spent = min(best, taken), spent + taken
    return 1 / best
