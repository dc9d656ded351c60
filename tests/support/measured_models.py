"""What a user gets of a model: its sketches against autograd's own gradients, one example at a time.

The reference takes nothing of rapidin but the sketch: the model's plain call, the cross-entropy of its
logits, ``loss.backward()``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from own_gradients import SEED, WIDTH, reference_sketch
from tiny import VOCABULARY, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F

from rapidin.data.encoding import Encoded, Status
from rapidin.errors import UserError
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import Target, find_targets
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import TokenBatch, example_losses

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

    refused: the message of the UserError, "" if there was none; fault: another error, or why no gradient
    makes sense; errors: the largest relative error of each parameter's sketch, over the texts, in one call
    and one call each; together: whether all texts shared a pass; by_autograd: parameters whose gradient
    autograd itself gives; share: of the elements outside embeddings and head that count.
    """

    refused: str = ""
    fault: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    together: bool = False
    by_autograd: Sequence[str] = ()
    share: float = 0.0

    def wrong(self, tolerance: float = TOLERANCE) -> list[str]:
        """Parameters whose sketches differ from autograd's, the worst first."""
        worst = sorted(self.errors, key=lambda name: -self.errors[name])
        return [f"{name} {self.errors[name]:.1g}" for name in worst if self.errors[name] > tolerance]

    def text(self, tolerance: float = TOLERANCE) -> str:
        """The outcome in a cell of the table."""
        if self.refused or self.fault:
            return f"refused: {self.refused}" if self.refused else f"wrong: {self.fault}"
        if self.wrong(tolerance):
            return "wrong"
        some = f", {len(self.by_autograd)} of {len(self.errors)} by autograd" if self.by_autograd else ""
        return "right" + some + ("" if self.together else ", one at a time")


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


def own_sketches(model: Any, targets: Sequence[Target], chosen: Sequence[Encoded]) -> Tensor:
    """[examples, targets, WIDTH] from `own_gradients`."""
    rows = []
    for text in chosen:
        grads = own_gradients(model, text)
        rows.append(torch.stack([reference_sketch(target, grads.get(target.name)) for target in targets]))
    return torch.stack(rows)


def relative_errors(got: Tensor, want: Tensor) -> Tensor:
    """[parameters]: the largest error of an example's sketch, relative to its size."""
    sizes = want.norm(dim=-1)
    floor = NEGLIGIBLE * sizes.square().mean(1, keepdim=True).sqrt()
    return ((got - want).norm(dim=-1) / sizes.maximum(floor).clamp(min=1e-30)).nan_to_num(torch.inf).amax(0)


class _Watched:
    """Notes how many examples a pass has."""

    def __init__(self, sketcher: Any) -> None:
        self._sketcher, self.most = sketcher, 0

    def __call__(self, batch: TokenBatch, **arguments: Any) -> Any:
        result = self._sketcher(batch, **arguments)
        self.most = max(self.most, len(batch.ids))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sketcher, name)


def make_source(model: Any, chosen: Sequence[Encoded], include: tuple[str, ...] = ()) -> GradientSource:
    """The source as caching these texts makes it, without a preconditioner."""
    loaded = LoadedModel.of(model, _tokenizer())
    settings = GradientSettings(at=1.0, include=include, width=WIDTH, seed=SEED, preconditioner="off")
    source = GradientSource(loaded, settings)
    loaded.identity  # noqa: B018  (the manifest has it)
    return source.with_check(source.checked(chosen))


Reference = Callable[[Any, Sequence[Target], Sequence[Encoded]], Tensor]


def outcome(
    make: Callable[[], Any], include: tuple[str, ...] = (), reference: Reference = own_sketches
) -> Outcome:
    """Sketches of `texts` of the model that `make` makes, in one call and one call each, against the
    reference. include: as `--include`; default: what counts by default."""
    chosen, model = texts(), make()
    try:
        source = make_source(model, chosen, include)
        watched = _Watched(source.sketcher)
        source.sketcher = watched  # type: ignore[assignment]
        together, status = source.sketches(chosen)
        alone = torch.cat([source.sketches([text])[0] for text in chosen])
    except UserError as error:
        return Outcome(refused=str(error))
    except Exception as error:  # a user would see it, and so does the table
        return Outcome(fault=f"{type(error).__name__}: {error}".splitlines()[0])
    if bool((status != int(Status.OK)).any()):
        return Outcome(fault=f"status {status.tolist()}")
    names = [target.name for target in source.targets]
    expected = reference(model, source.targets, chosen)
    errors = torch.maximum(relative_errors(together, expected), relative_errors(alone, expected))
    return Outcome(
        errors=dict(zip(names, errors.tolist(), strict=True)),
        together=watched.most == len(chosen),
        by_autograd=watched.single_names,
        share=_share(model, source),
    )


def _share(model: Any, source: GradientSource) -> float:
    head = model.get_output_embeddings()
    outside = {
        id(p)
        for module in model.modules()
        if module is head or isinstance(module, torch.nn.Embedding)
        for p in module.parameters()
    }
    sizes = {
        target.name: prod(target.shape)
        for target in find_targets(model, include=["*"])
        if id(model.get_parameter(target.name)) not in outside
    }
    return sum(sizes.get(target.name, 0) for target in source.targets) / sum(sizes.values())


def looks_ahead(model: Any) -> bool:
    """Whether the logits of earlier positions depend on the last token, by more than rounding."""
    ids = torch.tensor([texts()[0].ids])
    other = ids.clone()
    other[:, -1] = 3 + (ids[:, -1] + 7) % (VOCABULARY - 3)
    with torch.no_grad():
        one, two = model.eval()(input_ids=ids).logits, model(input_ids=other).logits
    return bool((one - two)[:, :-1].abs().max() > TOLERANCE * one.abs().max())


def speed(model: Any, seconds: float = 0.2) -> float:
    """Examples sketched per second of processor time, relative to forward and backward passes of the same
    parameters without rapidin; of eight texts of 96 tokens."""
    chosen = texts((96,) * 8, seed=1)
    source = make_source(model, chosen)
    batch = TokenBatch.of([(text.ids, text.target) for text in chosen])
    model.requires_grad_(False)
    for target in source.targets:
        parameter = model.get_parameter(target.name)
        parameter.requires_grad_(parameter.is_floating_point())
    model.get_input_embeddings().requires_grad_(True)  # packed weights get no gradient, but pass one on

    def bare() -> None:
        example_losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    return _seconds(bare, seconds) / _seconds(lambda: source.sketches(chosen), seconds)


def _seconds(step: Callable[[], Any], seconds: float) -> float:
    """Of processor time: the least of some calls, after one to warm up."""
    step()
    least, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.process_time()
        step()
        taken = time.process_time() - start
        least, spent = min(least, taken), spent + taken
    return least
