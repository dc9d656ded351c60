"""LDS and poison by the damping of K-FAC's preconditioner, and by other ways to weaken it.

    python studies/damping/damping.py --set FOLDER ... --out FILE.json
    python studies/damping/damping.py --poison NAME MODEL ADAPTER DATA QUERIES ... --out FILE.json

--set is a set of retrained models (../lds). --poison is data with a field `poisoned`, the adapter tuned on
them, and absurd answers of it as queries, by the name that it has in FILE. Gradients are taken half-way, or
at the point that --at names; --way measures these ways alone. Every way is scored by `dot:layer` with exact
gradients, and those of PACKED through a sketch, in floats and in rows of 2,048 bytes of a codec that has
learnt from half of the rows or from none. A way that FILE already has at that point is not measured again.
`damping_report.py` makes the tables.

Ways, for a side's moment M with mean eigenvalue m: (M / m + d)^-p, p = 1/2 if not named

    off                     no preconditioner
    d                       the same damping d for both sides
    d, exponent p           another exponent
    d, exponents p of rows, p' of queries
                            of the two sides of a product, p + p' = 1
    d of the spectrum       d in units of sum(l^2) / sum(l), of the side's eigenvalues l: the trace over the
                            effective rank
    rows d, columns d'      a damping for output gradients (rows) and another for inputs (columns)
    w off + d               w times the score without preconditioner added
    d, tolerance t          with the directions that `kfac.needed_directions` names alone, not all that are
                            known

Scores of each way: `layer` divides each block by its length, `root` those of rows by the root of their
lengths. `weights` weighs the blocks of `layer` by the lengths of the query's, and `weighted` also multiplies
these scores by the fourth root of the geometric mean of the lengths of the row's blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapidin import ops
from rapidin.attribution.normalization import row_factors
from rapidin.cache.codec import CodecConfig
from rapidin.cache.codec.plan import typical_length
from rapidin.gradients.kfac import Spectrum, kfac_scale, needed_directions
from rapidin.gradients.parameters import block_seed
from rapidin.gradients.scale import Scale

sys.path.append(str(Path(__file__).resolve().parents[1] / "lds"))
from codes import coded
from subjects import AT, Subject, of_poison, of_set

BUDGET = 2048
SEEDS = {"LDS": (0, 1, 2), "auPRC": (0,)}  # of sketches; poison has seeds of data and training
LEARNT = ("half", "nothing")
Group = list[Tensor]  # [n, numbers] of each block


@dataclass(frozen=True)
class Way:
    """A way to precondition: dampings of rows and columns, or None for no preconditioner."""

    damping: tuple[float, float] | None
    exponent: float = 0.5
    of_spectrum: bool = False
    off: float = 0.0
    tolerance: float = 0.0
    of_queries: float | None = None

    def __str__(self) -> str:
        if self.damping is None:
            return "off"
        rows, columns = self.damping
        text = f"{rows:g}" if rows == columns else f"rows {rows:g}, columns {columns:g}"
        if self.of_spectrum:
            text += " of the spectrum"
        if self.of_queries is not None:
            text += f", exponents {self.exponent:g} of rows, {self.of_queries:g} of queries"
        elif self.exponent != 0.5:
            text += f", exponent {self.exponent:g}"
        if self.tolerance:
            text += f", tolerance {self.tolerance:g}"
        return f"{self.off:g} off + {text}" if self.off else text


def _both(
    damping: float,
    exponent: float = 0.5,
    *,
    of_spectrum: bool = False,
    off: float = 0.0,
    tolerance: float = 0.0,
) -> Way:
    return Way((damping, damping), exponent, of_spectrum, off, tolerance)


WAYS = (
    Way(None),
    *(_both(damping) for damping in (0.1, 0.3, 0.5, 1.0, 3.0)),
    Way((1.0, 0.1)),
    Way((3.0, 0.1)),
    Way((3.0, 0.3)),
    *(_both(damping, of_spectrum=True) for damping in (0.03, 0.1, 0.3)),
    _both(0.1, 0.375),
    _both(0.1, 0.25),
    _both(0.1, off=0.25),
    _both(0.1, off=1.0),
    *(_both(damping, tolerance=t) for damping in (1.0, 0.1) for t in (0.01, 0.03)),
    *(Way((d, d), p, of_queries=1.0 - p) for d in (0.1, 1.0) for p in (0.375, 0.25, 0.0)),
)
# Those that are measured through a sketch and packed rows, too.
PACKED = (
    "off",
    "0.1",
    "0.3",
    "0.5",
    "1",
    "rows 3, columns 0.3",
    "1, tolerance 0.01",
    "0.1, exponents 0.25 of rows, 0.75 of queries",
)


def typical(spectrum: Spectrum) -> float:
    """sum(l^2) / sum(l) of a side's eigenvalues, in units of their mean."""
    n = len(spectrum.eigenvectors)
    squares = float(spectrum.leading.square().sum())
    squares += (n - len(spectrum.leading)) * spectrum.trailing**2
    return squares / (n * spectrum.mean) / spectrum.mean


def scale_of(way: Way, spectra: tuple[Spectrum, Spectrum], shape: tuple[int, int]) -> Scale:
    """What a way turns a block's gradients by."""
    assert way.damping is not None
    units = [typical(spectrum) if way.of_spectrum else 1.0 for spectrum in spectra]
    rows, columns = (
        kfac_scale(spectra, shape, way.exponent, damping * unit, way.tolerance)
        for damping, unit in zip(way.damping, units, strict=True)
    )
    return Scale(rows.rows, columns.columns, rows.row_low_rank, columns.column_low_rank)


def mean_directions(subject: Subject, way: Way) -> list[float]:
    """Of a side, on average: those that are kept, and those that are known."""
    if way.damping is None or not way.tolerance:
        return []
    sides = [(side, damping) for of in subject.spectra for side, damping in zip(of, way.damping, strict=True)]
    kept = [needed_directions(side, way.exponent, damping, way.tolerance) for side, damping in sides]
    known = [side.eigenvectors.shape[1] for side, _ in sides]
    return [round(sum(counts) / len(sides), 1) for counts in (kept, known)]


def preconditioned(subject: Subject, way: Way) -> tuple[Group, Group]:
    """Training and test gradients."""
    if way.damping is None:
        return subject.train, subject.test
    of_queries = way if way.of_queries is None else replace(way, exponent=way.of_queries)
    sides = []
    for group, of_side in ((subject.train, way), (subject.test, of_queries)):
        scales = (scale_of(of_side, *of) for of in zip(subject.spectra, subject.shapes, strict=True))
        sides.append(
            [
                scale.formed(g.view(-1, *shape)).flatten(1)
                for g, shape, scale in zip(group, subject.shapes, scales, strict=True)
            ]
        )
    return sides[0], sides[1]


def sketched(subject: Subject, group: Group, width: int, seed: int) -> Tensor:
    """[n, blocks, width]."""
    blocks = [
        ops.matrix_sketch(g.view(-1, *shape), width, seed=block_seed(seed, name))
        for name, shape, g in zip(subject.names, subject.shapes, group, strict=True)
    ]
    return torch.stack(blocks, 1)


def scores(cosines: Tensor, lengths: Tensor, of_queries: Tensor) -> dict[str, Tensor]:
    """Each kind of score [test, n] from the cosines of blocks [blocks, test, n], the lengths of the blocks of
    rows [n, blocks] and of queries [test, blocks]."""
    weights = (cosines * of_queries.T[:, :, None]).sum(0)
    return {
        "layer": cosines.sum(0),
        "root": (cosines * lengths.sqrt().T[:, None]).sum(0),
        "weights": weights,
        "weighted": weights * row_factors(typical_length(lengths)).T,
    }


def exact_scores(sides: list[tuple[Group, Group]], weights: list[float]) -> dict[str, Tensor]:
    """The same from exact gradients, of one or two ways."""
    cosines, lengths = [], []
    for both, weight in zip(sides, weights, strict=True):
        for rows, queries in zip(*both, strict=True):
            cosines.append(weight * F.normalize(queries) @ F.normalize(rows).T)
        lengths.append([torch.stack([block.norm(dim=1) for block in side], 1) for side in both])
    of_rows, of_queries = (torch.cat(each, 1) for each in zip(*lengths, strict=True))
    return scores(torch.stack(cosines), of_rows, of_queries)


def measured(subject: Subject, way: Way) -> Iterator[dict[str, Any]]:
    """Rows of results: exact, then of each codec."""
    sides, weights = [preconditioned(subject, way)], [1.0]
    if way.off:
        sides, weights = [*sides, (subject.train, subject.test)], [1.0, way.off]

    directions = mean_directions(subject, way)

    def row(rows: str, by_seed: list[dict[str, Tensor]]) -> dict[str, Any]:
        found: dict[str, Any] = {"subject": subject.name, "figure": subject.figure, "way": str(way)}
        found["rows"] = rows
        if way.tolerance:
            found["directions"] = directions
        # The others weigh blocks by their lengths, and a sum has lengths of two kinds.
        for name in ("layer",) if way.off else by_seed[0]:
            values = [round(float(subject.measure(each[name]).mean()), 4) for each in by_seed]
            found[name] = values
        return found

    yield row("exact", [exact_scores(sides, weights)])
    if str(way) not in PACKED:
        return
    width = subject.width // len(sides)
    kept: dict[str, list[dict[str, Tensor]]] = {name: [] for name in ("floats", *LEARNT)}
    for seed in SEEDS[subject.figure]:
        made = [torch.cat([sketched(subject, side[n], width, seed) for side in sides], 1) for n in (0, 1)]
        lengths = made[0].norm(dim=2)
        rows, queries = (F.normalize(x, dim=2) for x in made)
        of_blocks = torch.tensor(weights).repeat_interleave(len(subject.names))
        turned = (queries * of_blocks[:, None]).transpose(0, 1)
        of_queries = made[1].norm(dim=2)
        kept["floats"].append(scores(torch.bmm(turned, rows.permute(1, 2, 0)), lengths, of_queries))
        half = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: len(rows) // 2]
        for learnt, chosen in (("half", half), ("nothing", None)):
            codec = coded(rows, lengths, chosen, CodecConfig("sign", BUDGET), seed)
            decoded = codec.decode(codec.encode(rows, lengths))
            cosines = torch.bmm(turned, decoded.permute(1, 2, 0))
            kept[learnt].append(scores(cosines, lengths, of_queries))
    for name, by_seed in kept.items():
        yield row(name, by_seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", dest="sets", action="append", type=Path, default=[])
    parser.add_argument("--poison", action="append", nargs=5, default=[])
    parser.add_argument("--width", type=int, default=4096, help="sketch dimension of a poisoned cache")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a poisoned example")
    parser.add_argument("--at", type=float, default=AT, help="where gradients are taken  [default: half-way]")
    parser.add_argument(
        "--way", action="append", default=[], choices=[str(way) for way in WAYS], metavar="WAY"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    at: float = options.at
    made: dict[str, Callable[[], Subject]] = {
        folder.name: partial(of_set, folder, at) for folder in options.sets
    }
    for name, *where in options.poison:
        made[name] = partial(of_poison, name, *where, options.width, options.max_length, at)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    wanted = set(scores(*map(torch.zeros, ((1, 1, 1), (1, 1), (1, 1)))))
    for name, make in made.items():
        there = [row for row in results if row["subject"] == name and row["at"] == at]
        known = {row["way"] for row in there if set(row) >= wanted or " off + " in row["way"]}
        ways = [way for way in WAYS if str(way) not in known and (not options.way or str(way) in options.way)]
        if not ways:
            continue
        subject = make()
        for way in ways:
            new = [row | {"at": at} for row in measured(subject, way)]
            old = [row for row in there if row["way"] == str(way)]
            place = results.index(old[0]) if old else len(results)
            results[place:] = [*new, *(row for row in results[place:] if row not in old)]
            lines = ",\n".join(json.dumps(row) for row in results)
            options.out.write_text(f"[\n{lines}\n]\n")
            print(name, at, way, [row["layer"] for row in new], flush=True)


if __name__ == "__main__":
    main()
