"""The preconditioner of gradients: scaled by a root of their second moment, as the steps of optimizers are.

It has two forms. Both are a linear map on each of the two sides of a layer's gradient, so the map is applied
to the two factors, here or by the sketch itself (`ops.LowRank`), and the gradient is never formed.

**Adam's.** A model tuned with Adam moves along the gradient over the root of its second moment V, element by
element. So the gradients of both sides, training and query alike, are brought into the units of such steps:
scaled by ``V^-p``, p = 1/2 (1/4 would put one step's root into a product of two; 1/2 predicts retrainings
better, docs/how-it-works.md). V is kept as Adafactor keeps it (Shazeer & Stern, 2018, section 3): for a
parameter's gradient [O, I], with r and c the row and column means of the second moment,

    V_oi ~ r_o c_i / mean(r)

so that ``V^-p`` is a scale of the rows and one of the columns. r and c come from a sample of the data or from
the optimizer's own state.

**K-FAC's** (`rapidin.gradients.kfac`). Not elements but directions: with S and A the second moments of the
two factors, from a sample, rows are turned by ``(S / m_S + d)^-p m_S^-p``, m_S the mean eigenvalue of S and d
the damping, and columns likewise by A. With p = 1/2 a product of two gradients is one under K-FAC's inverse
Fisher information, ``<(S (x) A)^-1 q, y>``: the influence function (Grosse et al., 2023, section 3). Of wide
sides only the strongest directions are known, ``rest (I + U diag(gain) U^T)``.
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

from rapidin.cache.learned_files import read_preconditioner
from rapidin.cache.manifest import Manifest
from rapidin.cache.names import PRECONDITIONER
from rapidin.errors import UserError
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.parameters import Target, matrix_shape
from rapidin.gradients.scale import Scale, _scale
from rapidin.gradients.squares import Squares

EXPONENT = 0.5  # of V, on each of the two sides of a product
FLOOR = 0.01  # r and c are at least this share of their own means
SAMPLE = 256  # examples, for Adam's
KFAC_SAMPLE = 128  # for K-FAC's, which every token tells something of
STREAM = 18  # of the keyed hash in docs/sketch.md, that draws them
RANK = 64  # directions of a side that K-FAC's preconditioner knows
DAMPING = 0.1  # of a side, in units of its mean eigenvalue

Kind = Literal["off", "sample", "kfac", "optimizer"]


@dataclass(frozen=True)
class Preconditioner:
    """Scales of each parameter by name. points: one table for each point of the path, or one for all."""

    points: Sequence[Mapping[str, Scale]]

    def at(self, point: int | None) -> Mapping[str, Scale]:
        """The table of a point, by its number; TypeError where there are several and none is named."""
        if len(self.points) == 1:
            return self.points[0]
        if point is None:
            raise TypeError(
                f"the preconditioner differs between {len(self.points)} points: say which by its number"
            )
        return self.points[point]

    def to(self, device: torch.device) -> Preconditioner:
        """The same on a device."""
        return Preconditioner([{name: s.to(device) for name, s in table.items()} for table in self.points])

    def check(self, targets: Sequence[Target], points: int) -> None:
        """Raise UserError where this is not the preconditioner of these parameters at so many points."""
        fits = len(self.points) in (1, points)
        for table in self.points:
            for target in targets:
                o, i = matrix_shape(target.shape)
                s = table.get(target.name)
                fits = fits and s is not None and s.shape == (o, i)
        if not fits:
            raise UserError("the cache's preconditioner is for other parameters than its layer table", _AGAIN)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name: ``<point>/<parameter>/rows`` and ``.../columns``, and of directions ``.../rows_basis``,
        ``.../rows_gain`` and so on."""
        tensors = {}
        for n, table in enumerate(self.points):
            for name, scale in table.items():
                for side, numbers, directions in (
                    ("rows", scale.rows, scale.row_directions),
                    ("columns", scale.columns, scale.column_directions),
                ):
                    tensors[f"{n}/{name}/{side}"] = numbers.cpu().contiguous()
                    if directions is not None:
                        tensors[f"{n}/{name}/{side}_basis"] = directions.basis.cpu().contiguous()
                        tensors[f"{n}/{name}/{side}_gain"] = directions.gain.cpu().contiguous()
        return tensors

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
        """Of what `tensors` gave; ValueError or KeyError where it is something else."""
        sides: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, value in tensors.items():
            number, rest = key.split("/", 1)
            name, side = rest.rsplit("/", 1)
            if value.dtype != torch.float32 or value.ndim != (2 if side.endswith("_basis") else 1):
                raise ValueError(f"'{key}' is no list of float32 numbers")
            if not bool(value.isfinite().all()):
                raise ValueError(f"'{key}' holds NaN or Inf")
            sides.setdefault(int(number), {}).setdefault(name, {})[side] = value
        if sorted(sides) != list(range(len(sides))) or not sides:
            raise ValueError("a point is missing")
        return Preconditioner(
            [{name: _scale(parts) for name, parts in sides[n].items()} for n in range(len(sides))]
        )

    @staticmethod
    def read(manifest: Manifest) -> Preconditioner | None:
        """The preconditioner of a cache, None where it has none.

        Raises UserError where the file is missing or not as the manifest says.
        """
        record = manifest.preconditioner
        if record is None:
            return None
        if manifest.folder is None or record["sha256"] is None:
            raise UserError(
                "the cache's preconditioner is not made yet", "run the same 'rapidin cache' again"
            )
        return read_preconditioner(manifest.folder, record, Preconditioner.of_tensors)


_AGAIN = "cache again"


@dataclass(frozen=True)
class PreconditionerConfig:
    """Which preconditioner a cache is made with.

    kind: "off"; Adam's, from a "sample" or the "optimizer" (its state); or "kfac", from a sample too.
    exponent: p above. floor: see `Scale.of`. sample: examples that a sample has. rank, damping: directions of
    a side, and d above, of "kfac". made: the preconditioner, where it is known before the cache is made.
    """

    kind: Kind = "off"
    exponent: float = EXPONENT
    floor: float = FLOOR
    sample: int = SAMPLE
    rank: int = RANK
    damping: float = DAMPING
    made: Preconditioner | None = None

    @staticmethod
    def of(
        value: PreconditionerConfig | str | Path | None,
        model: nn.Module,
        targets: Sequence[Target],
        trained: Sequence[str] | None = None,
    ) -> PreconditionerConfig:
        """What `Attributor` takes: None or "off", "sample", "kfac", or the path of an optimizer's state.

        trained: names of the parameters that were tuned, by default all. Raises UserError where the state
        cannot be read or is not that of these parameters.
        """
        if isinstance(value, PreconditionerConfig):
            return value
        if value is None or value == "off":
            return PreconditionerConfig()
        if value == "sample":
            return PreconditionerConfig("sample")
        if value == "kfac":
            return PreconditionerConfig("kfac", sample=KFAC_SAMPLE)
        from rapidin.gradients.adam import second_moments

        moments = second_moments(Path(value), model, targets, trained)
        table = {name: Scale.of(r, c, EXPONENT, FLOOR) for name, (r, c) in moments.items()}
        return PreconditionerConfig("optimizer", sample=0, made=Preconditioner([table]))

    @staticmethod
    def recorded(manifest: Manifest) -> PreconditionerConfig:
        """The choice that a cache was made with."""
        record = manifest.preconditioner
        if record is None:
            return PreconditionerConfig()
        # What came from an optimizer's state is in the cache; the state may be gone.
        made = Preconditioner.read(manifest) if record["kind"] == "optimizer" else None
        settings = {k: v for k, v in record.items() if k not in ("file", "bytes", "sha256")}
        return PreconditionerConfig(**settings, made=made)

    def to_json(self) -> str | dict[str, Any]:
        """What the manifest of a new cache says of it."""
        if self.kind == "off":
            return "off"
        own = {"rank": self.rank, "damping": self.damping} if self.kind == "kfac" else {"floor": self.floor}
        return {
            "kind": self.kind,
            "exponent": self.exponent,
            **own,
            "sample": self.sample,
            "file": PRECONDITIONER,
            "bytes": 0 if self.made is None else len(self.made.data),
            "sha256": None if self.made is None else self.made.sha256,
        }


class Moments:
    """Second moments of the gradients of `targets`, as row and column means, gathered batch by batch."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list(targets)
        self._sums: list[Squares] | None = None
        self._examples: Tensor | int = 0

    @property
    def examples(self) -> int:
        """How many examples had finite gradients. Waits for the GPU."""
        return int(self._examples)

    def add(self, squares: Sequence[Squares]) -> None:
        """Add a batch: for each target the sums of squares of each example's rows and columns.

        Examples with a value that is not finite are left out. Does not wait for a GPU.
        """
        finite = torch.stack([(r.isfinite().all(1) & c.isfinite().all(1)) for r, c in squares]).all(0)
        self._examples = self._examples + finite.sum()
        counts = finite[:, None]
        kept = [(torch.where(counts, r, 0.0).sum(0), torch.where(counts, c, 0.0).sum(0)) for r, c in squares]
        before = self._sums
        self._sums = (
            kept if before is None else [(r + s, c + d) for (r, c), (s, d) in zip(before, kept, strict=True)]
        )

    def scales(self, exponent: float, floor: float) -> dict[str, Scale]:
        """The scale of each target, on the CPU; UserError where no example had a gradient."""
        examples = self.examples
        if self._sums is None or not examples:
            raise UserError(
                "no example of the preconditioner's sample has a gradient that is finite",
                "say --precondition off",
            )
        table = {}
        for target, (r, c) in zip(self.targets, self._sums, strict=True):
            rows, columns = r.cpu() / (len(c) * examples), c.cpu() / (len(r) * examples)
            table[target.name] = Scale.of(rows, columns, exponent, floor)
        return table


def kfac_scales(moments: FactorMoments, exponent: float, damping: float) -> dict[str, Scale]:
    """K-FAC's scale of each target, on the CPU; targets that no gradient reached are left as they are."""
    return {
        target.name: Scale.of_spectra(moments.spectra(n), matrix_shape(target.shape), exponent, damping)
        for n, target in enumerate(moments.targets)
    }
