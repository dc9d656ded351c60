"""The preconditioner of gradients: an inverse root of their second moment, from K-FAC or Adam.

Both forms are a linear map on each of the two sides of a layer's gradient, so the map is applied to the two
factors, here or by the sketch itself (`ops.LowRank`), and the gradient is never formed.

**Adam's** (`rapidin.gradients.adam`). A model tuned with Adam moves along the gradient divided by the root of
its second moment V, element by element. So the gradients of both sides, training and query alike, are
expressed in the units of such steps: scaled by ``V^-p``, p = 1/2 (1/4 would put one step's root into a
product of two; 1/2 predicts retrainings better, docs/guide/how-it-works.md). V is factored as in Adafactor
(Shazeer & Stern, 2018, section 3): for a parameter's gradient [O, I], with r and c the row and column means
of the second moment,

    V_oi ~ r_o c_i / mean(r)

so that ``V^-p`` is a scale of the rows and one of the columns. r and c come from a sample of the data or from
the optimizer's state.

**K-FAC's** (`rapidin.gradients.kfac`). With S and A the second moments of the two factors, from a sample,
rows are multiplied by ``(S / m_S + d)^-p m_S^-p``, m_S the mean eigenvalue of S and d the damping, and
columns likewise by A. With p = 1/2 a product of two gradients is one under K-FAC's inverse Fisher
information, ``<(S (x) A)^-1 q, y>``: the influence function (Grosse et al., 2023, section 3). Of wide sides
only the leading eigenvectors U are known, and the map is ``trailing (I + U diag(gain) U^T)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rapidin.errors import UserError
from rapidin.gradients.adam import second_moments
from rapidin.gradients.parameters import Target
from rapidin.gradients.scale import Scale

EXPONENT = 0.5  # p, of V on each of the two sides of a product
FLOOR = 0.01  # the least that r and c count as, in units of their own means
SAMPLE = 256  # examples of the sample for Adam's
KFAC_SAMPLE = 128  # examples of the sample for K-FAC's, to which every token contributes
_FEWEST = 32
STREAM = 18  # of the keyed hash in docs/reference/sketch.md that draws the sample
RANK = 64  # most eigenvectors of a wide side that K-FAC's preconditioner keeps
DAMPING = 1.0  # d, of a side, in units of its mean eigenvalue: studies/damping
TOLERANCE = 0.01  # by how much leaving out directions may change preconditioned gradients: studies/damping

Kind = Literal["off", "sample", "kfac", "optimizer"]


@dataclass(frozen=True)
class Preconditioner:
    """Scales of each parameter by name. points: one table for each point of the path, or one for all."""

    points: Sequence[Mapping[str, Scale]]

    def at(self, point: int | None) -> Mapping[str, Scale]:
        """The table of a point, by its number. Raises TypeError if there are several and none is named."""
        if len(self.points) == 1:
            return self.points[0]
        if point is None:
            raise TypeError(
                f"the preconditioner differs between {len(self.points)} points: name one by number"
            )
        return self.points[point]

    def to(self, device: torch.device) -> Preconditioner:
        """The same on a device."""
        return Preconditioner([{name: s.to(device) for name, s in table.items()} for table in self.points])

    def check(self, targets: Sequence[Target], points: int) -> None:
        """Raises UserError unless this is a preconditioner of these parameters at so many points."""
        fits = len(self.points) in (1, points)
        for table in self.points:
            for target in targets:
                scale = table.get(target.name)
                fits = fits and scale is not None and scale.shape == target.matrix
        if not fits:
            raise UserError(
                "the cache's preconditioner is for other parameters than its layer table", "cache again"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all scales, named ``<point>/<parameter>/<name>`` (`Scale.tensors`)."""
        return {
            f"{n}/{parameter}/{name}": tensor
            for n, table in enumerate(self.points)
            for parameter, scale in table.items()
            for name, tensor in scale.tensors.items()
        }

    @cached_property
    def data(self) -> bytes:
        """The bytes of a safetensors file with `tensors`."""
        from safetensors.torch import save

        data: bytes = save(self.tensors)
        return data

    @property
    def sha256(self) -> str:
        """Checksum of `data`."""
        return hashlib.sha256(self.data).hexdigest()

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> Preconditioner:
        """The preconditioner with these `tensors`. Raises ValueError or KeyError if they are not those of
        one."""
        points: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in tensors.items():
            number, tensor_name = key.split("/", 1)
            parameter, name = tensor_name.rsplit("/", 1)
            axes = 2 if name.endswith("_basis") else 1
            if tensor.dtype != torch.float32 or tensor.ndim != axes:
                raise ValueError(
                    f"'{key}' must be float32 with {axes} axes, got {tensor.dtype} with {tensor.ndim}"
                )
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"'{key}' holds NaN or Inf")
            points.setdefault(int(number), {}).setdefault(parameter, {})[name] = tensor
        if sorted(points) != list(range(len(points))) or not points:
            raise ValueError("a point is missing")
        return Preconditioner(
            [
                {parameter: Scale.of_tensors(named) for parameter, named in points[n].items()}
                for n in range(len(points))
            ]
        )


@dataclass(frozen=True)
class PreconditionerConfig:
    """Which preconditioner a cache is made with.

    kind: "off"; Adam's, from a "sample" or from the state of the "optimizer"; or "kfac", from a sample too.
    exponent: p above. floor: see `Scale.of`. sample: most examples in the sample. rank: most eigenvectors of
    a side, damping: d above, and tolerance: which of them are kept (`kfac.needed_directions`), of "kfac"; a
    cache that was begun keeps its own unless another than the default is given here. fitted: the
    preconditioner, if it is known before the cache is made.
    """

    kind: Kind = "off"
    exponent: float = EXPONENT
    floor: float = FLOOR
    sample: int = SAMPLE
    rank: int = RANK
    damping: float = DAMPING
    tolerance: float = TOLERANCE
    fitted: Preconditioner | None = None

    def sample_of(self, rows: int) -> int:
        """How many of so many training examples are in the sample: a quarter of them, but at least 32 and at
        most `sample`.

        More take longer and change little: studies/lds/README.md, "How many examples the moments need".
        """
        return min(self.sample, rows, max(_FEWEST, rows // 4))

    @staticmethod
    def of(
        value: PreconditionerConfig | str | Path | None,
        model: nn.Module,
        targets: Sequence[Target],
        trained: Sequence[str] | None = None,
    ) -> PreconditionerConfig:
        """The settings for None or "off", "sample", "kfac", or the path of an optimizer's state.

        trained: names of the parameters that were tuned, by default all. Raises UserError if the state cannot
        be read or is not that of these parameters.
        """
        if isinstance(value, PreconditionerConfig):
            return value
        if value is None or value == "off":
            return PreconditionerConfig()
        if value == "sample":
            return PreconditionerConfig("sample")
        if value == "kfac":
            return PreconditionerConfig("kfac", sample=KFAC_SAMPLE)
        return PreconditionerConfig.of_moments(second_moments(Path(value), model, targets, trained))

    @staticmethod
    def of_moments(moments: Mapping[str, tuple[Tensor, Tensor]]) -> PreconditionerConfig:
        """The settings for the second moments of an optimizer: row and column means of each parameter's."""
        table = {name: Scale.of(r, c, EXPONENT, FLOOR) for name, (r, c) in moments.items()}
        return PreconditionerConfig("optimizer", sample=0, fitted=Preconditioner([table]))

    @staticmethod
    def from_json(
        settings: str | Mapping[str, Any], fitted: Preconditioner | None = None
    ) -> PreconditionerConfig:
        """The settings that `to_json` returned.

        fitted: the preconditioner that came from an optimizer's state, which may be gone. Raises TypeError
        for an unknown setting.
        """
        if isinstance(settings, str):
            return PreconditionerConfig()
        return PreconditionerConfig(**settings, fitted=fitted)

    def to_json(self) -> str | dict[str, Any]:
        """The settings as JSON values; "off" for no preconditioner. What was fitted is not among them."""
        if self.kind == "off":
            return "off"
        of_kind: dict[str, Any] = {"floor": self.floor}
        if self.kind == "kfac":
            of_kind = {"rank": self.rank, "damping": self.damping, "tolerance": self.tolerance}
        return {"kind": self.kind, "exponent": self.exponent, **of_kind, "sample": self.sample}
