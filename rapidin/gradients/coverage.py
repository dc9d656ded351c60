"""Which part of a model counts and which does not, by kind of parameter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from rapidin.gradients.parameters import Target, all_parameters, output_head

if TYPE_CHECKING:
    from torch import nn

KINDS = ("experts", "embeddings", "output head", "norms", "biases", "other")
_WEIGHTS = ("experts", "other")  # kinds that are expected to count
ENOUGH = 0.9  # of the weights
_NAMES = 3  # of each kind that are kept


@dataclass(frozen=True)
class LeftOut:
    """The parameters of one kind that do not count: how many, with how many elements, and some names."""

    kind: str
    parameters: int
    elements: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """How much of a model counts.

    counted: number of elements of the parameters that count; total: of all parameters; left_out: the
    parameters that do not count; weights: the share of elements that count among the parameters other than
    embeddings, output head, norms and biases; chosen: whether the user or an adapter determines what counts.
    With an adapter, `left_out` and `weights` are about the parameters that it trains alone.
    """

    counted: int
    total: int
    left_out: tuple[LeftOut, ...]
    weights: float = 1.0
    chosen: bool = False

    @property
    def share(self) -> float:
        """Share of the model's elements that count."""
        return self.counted / self.total

    @property
    def is_low(self) -> bool:
        """Whether more is left out than is usual, and nobody asked for that."""
        return not self.chosen and self.weights < ENOUGH

    @property
    def text(self) -> str:
        """A sentence that says what counts and what does not."""
        text = f"{_percent(self.share)} of the model's parameters are used"
        if self.left_out:
            text += f"; not used: {', '.join(map(self._named, self.left_out))}"
        return text

    @property
    def warning(self) -> str:
        """A sentence that warns that too little counts."""
        return (
            f"only {_percent(self.weights)} of the model's weights (not counting embeddings, output head, "
            f"norms and biases) are used, so influence through the other weights is missed: {self.text}"
        )

    def _named(self, part: LeftOut) -> str:
        share = _percent(part.elements / self.total)
        if part.kind not in _WEIGHTS:
            return f"{part.kind} ({share})"
        return f"{part.kind} ({share}: {part.parameters:,} parameters such as '{part.names[0]}')"

    def to_json(self) -> dict[str, Any]:
        """The coverage as a manifest stores it."""
        return asdict(self) | {"left_out": [asdict(p) | {"names": list(p.names)} for p in self.left_out]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Coverage:
        """What `to_json` wrote. Raises KeyError or TypeError if it is something else."""
        left_out = (
            LeftOut(str(p["kind"]), int(p["parameters"]), int(p["elements"]), tuple(p["names"]))
            for p in value["left_out"]
        )
        return Coverage(
            int(value["counted"]),
            int(value["total"]),
            tuple(left_out),
            float(value["weights"]),
            bool(value["chosen"]),
        )


def coverage_of(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    trained: Collection[str] | None = None,
    chosen: bool = False,
) -> Coverage:
    """The coverage of a model by the parameters that count.

    trained: names of the parameters that an adapter trains; chosen: whether the user named what counts.
    """
    counting = {target.name for target in targets}
    everything = all_parameters(model)
    considered = [t for t in everything if trained is None or t.name in set(trained)]
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    head = output_head(model)
    weights, missing = 0, 0
    left_out: dict[str, list[Target]] = {}
    for target in considered:
        kind, elements = _kind(target, classes, head), prod(target.shape)
        if kind in _WEIGHTS:
            weights += elements
        if target.name not in counting:
            left_out.setdefault(kind, []).append(target)
            missing += elements if kind in _WEIGHTS else 0
    return Coverage(
        sum(prod(t.shape) for t in everything if t.name in counting),
        sum(prod(t.shape) for t in everything),
        tuple(
            LeftOut(
                kind,
                len(left_out[kind]),
                sum(prod(t.shape) for t in left_out[kind]),
                tuple(t.name for t in left_out[kind][:_NAMES]),
            )
            for kind in KINDS
            if kind in left_out
        ),
        1 - missing / weights if weights else 1.0,
        chosen or trained is not None,
    )


def _kind(target: Target, classes: Mapping[str, str], head: str | None) -> str:
    """What a parameter is, by how it is used and what its modules are called."""
    used_by = [classes.get(use.module, "") for use in target.uses]
    if target.name.endswith("bias"):
        return "biases"
    if any(use.kind == "embedding" for use in target.uses) or any("Embedding" in name for name in used_by):
        return "embeddings"
    if head is not None and any(use.module == head for use in target.uses):
        return "output head"
    if any("Norm" in name for name in used_by):
        return "norms"
    if re.search("expert", " ".join([target.name, *used_by]), re.IGNORECASE):
        return "experts"
    return "other"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.2g}"
