"""The optimizer's geometry: gradients scaled by a root of their second moment, as Adam's steps are.

A model tuned with Adam moves along the gradient over the root of its second moment V, elementwise. So the
gradients of both sides, training and query alike, are brought into the units of such steps: scaled by
``V^-p``, p = 1/2 (1/4 would put one step's root into a product of two; 1/2 predicts retrainings better,
docs/how-it-works.md). V is kept as Adafactor keeps it (Shazeer & Stern, 2018, section 3): for a parameter's
gradient [O, I], with r and c the row and column means of the second moment,

    V_oi ~ r_o c_i / mean(r)

so that ``V^-p`` is a scale of the rows and one of the columns: the hooks scale the two factors of a gradient
and never form it. r and c come from a sample of the data or from the optimizer's own state.
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

from rapidin.cache.manifest import GEOMETRY, Manifest
from rapidin.cache.shards import read_geometry
from rapidin.errors import UserError
from rapidin.layers import Target, matrix_shape
from rapidin.squares import Squares

EXPONENT = 0.5  # of V, on each of the two sides of a product
FLOOR = 0.01  # r and c are at least this share of their own means
SAMPLE = 256  # examples
STREAM = 18  # of the keyed hash in docs/sketch.md, that draws them

Kind = Literal["off", "sample", "optimizer"]


@dataclass(frozen=True, slots=True)
class Scale:
    """``V^-p`` of one parameter: rows [O], columns [I], float32."""

    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(row_means: Tensor, column_means: Tensor, exponent: float, floor: float) -> Scale:
        """The scale for row means [O] and column means [I] of a second moment, all at least 0.

        Rows and columns without gradient count as `floor` of the mean one, so that they neither explode nor
        give NaN; a parameter without any gradient is left as it is.
        """
        r, c = row_means.double(), column_means.double()
        mean = float(r.mean())
        if not mean > 0:
            return Scale(torch.ones_like(r, dtype=torch.float32), torch.ones_like(c, dtype=torch.float32))
        # Most layers' rows are those of the output gradient, as small as the gradient is: they take up its
        # size, and inputs stay as large as they are.
        rows, columns = r.clamp(min=floor * mean), (c / mean).clamp(min=floor)
        return Scale(rows.pow(-exponent).float(), columns.pow(-exponent).float())

    def factors(self, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [B, T, I] and rows [B, T, O] of a gradient, scaled."""
        return scaled(columns, self.columns), scaled(rows, self.rows)

    def embedding(self, ids: Tensor, grads: Tensor) -> Tensor:
        """What the tokens ids [B, T] bring to an embedding's rows, [B, T, E], scaled."""
        return scaled(scaled(grads, self.columns), self.rows[ids][..., None])

    def formed(self, grads: Tensor) -> Tensor:
        """Gradients [B, O, I], scaled, in float32."""
        return scaled(grads.float(), self.rows[:, None] * self.columns)

    def to(self, device: torch.device) -> Scale:
        """The same on a device."""
        return Scale(self.rows.to(device), self.columns.to(device))


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x times a float32 scale, in one pass; float16, whose range is small, becomes float32."""
    scale = scale.to(x.device)  # a device map may have put this layer elsewhere
    if x.dtype == torch.float16:
        return x * scale
    return torch.mul(x, scale, out=torch.empty_like(x))


@dataclass(frozen=True)
class Geometry:
    """Scales of each parameter by name. points: one table for each point of the path, or one for all."""

    points: Sequence[Mapping[str, Scale]]

    def at(self, point: int | None) -> Mapping[str, Scale]:
        """The table of a point, by its number; TypeError where there are several and none is named."""
        if len(self.points) == 1:
            return self.points[0]
        if point is None:
            raise TypeError(
                f"the geometry differs between {len(self.points)} points: say which by its number"
            )
        return self.points[point]

    def to(self, device: torch.device) -> Geometry:
        """The same on a device."""
        return Geometry([{name: s.to(device) for name, s in table.items()} for table in self.points])

    def check(self, targets: Sequence[Target], points: int) -> None:
        """Raise UserError where this is not the geometry of these parameters at so many points."""
        fits = len(self.points) in (1, points)
        for table in self.points:
            for target in targets:
                o, i = matrix_shape(target.shape)
                s = table.get(target.name)
                fits = fits and s is not None and s.rows.shape == (o,) and s.columns.shape == (i,)
        if not fits:
            raise UserError("the cache's geometry is for other parameters than its layer table", _AGAIN)

    @cached_property
    def data(self) -> bytes:
        """The bytes of a safetensors file: tensors ``<point>/<parameter>/rows`` and ``.../columns``."""
        from safetensors.torch import save

        tensors = {}
        for n, table in enumerate(self.points):
            for name, scale in table.items():
                tensors[f"{n}/{name}/rows"] = scale.rows.cpu().contiguous()
                tensors[f"{n}/{name}/columns"] = scale.columns.cpu().contiguous()
        data: bytes = save(tensors)
        return data

    @property
    def sha256(self) -> str:
        """Checksum of `data`."""
        return hashlib.sha256(self.data).hexdigest()

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> Geometry:
        """What `data` holds; ValueError or KeyError where it is something else."""
        sides: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, value in tensors.items():
            number, rest = key.split("/", 1)
            name, side = rest.rsplit("/", 1)
            if value.dtype != torch.float32 or value.ndim != 1:
                raise ValueError(f"'{key}' is no list of float32 numbers")
            sides.setdefault(int(number), {}).setdefault(name, {})[side] = value
        if sorted(sides) != list(range(len(sides))) or not sides:
            raise ValueError("a point is missing")
        return Geometry([{name: Scale(**pair) for name, pair in sides[n].items()} for n in range(len(sides))])

    @staticmethod
    def read(manifest: Manifest) -> Geometry | None:
        """The geometry of a cache, None where it has none.

        Raises UserError where the file is missing or not as the manifest says.
        """
        record = manifest.geometry
        if record is None:
            return None
        if manifest.folder is None or record["sha256"] is None:
            raise UserError("the cache's geometry is not made yet", "run the same 'rapidin cache' again")
        tensors = read_geometry(manifest.folder, record)
        try:
            return Geometry.of_tensors(tensors)
        except (ValueError, KeyError, TypeError) as error:
            path = manifest.folder / record["file"]
            raise UserError(f"the geometry '{path}' is damaged: {error}", _AGAIN) from None


_AGAIN = "cache again"


@dataclass(frozen=True)
class GeometryChoice:
    """Which geometry a cache is made with.

    kind: "off", "sample" or "optimizer" (from its state). exponent: p above. floor: see `Scale.of`.
    sample: examples that a sample has. made: the geometry, where it is known before the cache is made.
    """

    kind: Kind = "off"
    exponent: float = EXPONENT
    floor: float = FLOOR
    sample: int = SAMPLE
    made: Geometry | None = None

    @staticmethod
    def of(
        value: GeometryChoice | str | Path | None,
        model: nn.Module,
        targets: Sequence[Target],
        trained: Sequence[str] | None = None,
    ) -> GeometryChoice:
        """What `Attributor` takes: None or "off", "sample", or the path of an optimizer's state.

        trained: names of the parameters that were tuned, by default all. Raises UserError where the state
        cannot be read or is not that of these parameters.
        """
        if isinstance(value, GeometryChoice):
            return value
        if value is None or value == "off":
            return GeometryChoice()
        if value == "sample":
            return GeometryChoice("sample")
        from rapidin.optimizer_state import second_moments

        moments = second_moments(Path(value), model, targets, trained)
        table = {name: Scale.of(r, c, EXPONENT, FLOOR) for name, (r, c) in moments.items()}
        return GeometryChoice("optimizer", sample=0, made=Geometry([table]))

    @staticmethod
    def recorded(manifest: Manifest) -> GeometryChoice:
        """The choice that a cache was made with."""
        record = manifest.geometry
        if record is None:
            return GeometryChoice()
        # What came from an optimizer's state is in the cache; the state may be gone.
        made = Geometry.read(manifest) if record["kind"] == "optimizer" else None
        return GeometryChoice(record["kind"], record["exponent"], record["floor"], record["sample"], made)

    def to_json(self) -> str | dict[str, Any]:
        """What the manifest of a new cache says of it."""
        if self.kind == "off":
            return "off"
        return {
            "kind": self.kind,
            "exponent": self.exponent,
            "floor": self.floor,
            "sample": self.sample,
            "file": GEOMETRY,
            "bytes": 0 if self.made is None else len(self.made.data),
            "sha256": None if self.made is None else self.made.sha256,
        }


class Moments:
    """Second moments of the gradients of `targets`, as row and column means, gathered batch by batch."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list(targets)
        self.examples = 0  # whose gradients are finite
        self._sums: list[Squares] | None = None

    def add(self, squares: Sequence[Squares]) -> None:
        """Add a batch: for each target the sums of squares of each example's rows and columns.

        Examples with a value that is not finite are left out.
        """
        finite = torch.stack([(r.isfinite().all(1) & c.isfinite().all(1)) for r, c in squares]).all(0)
        self.examples += int(finite.sum())
        kept = [(r[finite].sum(0), c[finite].sum(0)) for r, c in squares]
        before = self._sums
        self._sums = (
            kept if before is None else [(r + s, c + d) for (r, c), (s, d) in zip(before, kept, strict=True)]
        )

    def scales(self, exponent: float, floor: float) -> dict[str, Scale]:
        """The scale of each target, on the CPU; UserError where no example had a gradient."""
        if self._sums is None or not self.examples:
            raise UserError(
                "no example of the geometry's sample has a gradient that is finite", "say --geometry off"
            )
        table = {}
        for target, (r, c) in zip(self.targets, self._sums, strict=True):
            rows, columns = r.cpu() / (len(c) * self.examples), c.cpu() / (len(r) * self.examples)
            table[target.name] = Scale.of(rows, columns, exponent, floor)
        return table
