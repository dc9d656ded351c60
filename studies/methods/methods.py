"""Which method, normalization, points, damping and preconditioner predict retraining best, also from 2 KB?

    python studies/methods/methods.py [--extra FOLDER] [--parts exact,codecs,peers,kfac,ways] --out FILE.json

Parts, each for every set; a part of a set that FILE already has is not repeated.

`exact`: gradients of the blocks' twelve matrices, through their Gram matrices, so without approximation.
Points of the line from the base to the tuned model, and real checkpoints of the same tuning done again; each
point and matrix is a block. Every method with every normalization and several dampings. Then the optimizer's
preconditioner: gradients times a power of the second moment V of their elements, V ~ r c^T / mean(r) from its
row means r and column means c, each plus a hundredth of its mean:

    1/4, 1/2     V^-1/4 or V^-1/2 on both sides, V from the training texts' gradients at the point
    train 1/2    V^-1/2 on the training side only
    elements 1/4 the same as 1/4 with V itself
    adam 1/2     V from the optimizer's state (exp_avg_sq) at the end of tuning

`codecs`: the recommended methods from sketches in floats, by width, and from codecs of 2,048 bytes that have
learnt from all rows, at one point also from half of them or from none; three seeds. One codec holds all
blocks.

`peers`: one point, half-way, at the same bytes: a double-sided projection in float16 (as LoGra and Bergson
keep it), its TrackStar score (rows and query under the inverse root of the second moment, then of length 1
as a whole), LoRIF's rank-c factors of a double-sided projection (arXiv 2601.21929) and TRAK's dense
projection of the whole gradient; three seeds. Rows are scored as they decode, queries are not truncated.

`kfac`: K-FAC's preconditioner (`rapidin.gradients.preconditioner`) with exact gradients, as a cache had it
(rank 64, damping 0.1; ../damping has others), with fewer or all directions, and from the first 30 texts
alone; then through sketches and codes.

`ways`: other ways to have it, half-way, layer by layer: other dampings, with all directions; and all of the
inverse on the query's side, the rows as they are, exactly and through the sketch and codec of 2,048 bytes.

`fisher` scores a row by the moment of all rows, `fisher, left out` by that of the others (see scoring.py).
Damping is in units of `scoring.mean_eigenvalue`. low and high: 95% bootstrap interval over the test texts;
loss: what is lost against exact gradients with the same points, method and damping, with its paired interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rapidin.cache.codec import ROW_OVERHEAD, CodecConfig
from rapidin.gradients.kfac import FactorMoments, kfac_scales
from rapidin.gradients.parameters import Target, Use
from rapidin.gradients.preconditioner import EXPONENT, RANK
from rapidin.gradients.scale import Scale

sys.path.append(str(Path(__file__).resolve().parents[1] / "lds"))
from codes import coded, dense, floats, folded, sketches, two_sides
from exact import factors, gradients
from lds import RetrainedSet, block_matrices, sets
from make import tune_again
from scoring import NORMALIZE, Grams, datainf, dot, fisher

PATH = (0.1, 0.3, 0.5, 0.7, 0.9)
THREE = (0.1, 0.5, 0.9)
SHARES = tuple(k / 6 for k in range(1, 7))
DAMPINGS = {"energy": (0.03, 0.1, 0.2, 0.3, 1.0, 3.0), "count": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}
BEST = (0.1, 0.2, 0.3)  # of those, counted in energy
WHITE = (0.2, 0.5, 1.0, 3.0)  # with K-FAC's preconditioner
# texts that K-FAC's moments are taken from (None: all), directions of a side (None: all)
KFAC = {
    "kfac": (None, RANK),
    "kfac, rank 16": (None, 16),
    "kfac, whole": (None, None),
    "kfac of 30 texts": (30, RANK),
}
SIDE_DAMPING = 0.1  # of a side; the default when this was measured (../damping chose another)
SIDE_DAMPINGS = (0.01, 0.03, SIDE_DAMPING, 0.3)
EPS = 0.01
WIDTH = 8192
WIDTHS = (512, 4096, 8192)
BUDGET, LARGE = 2048, 16384
SEEDS = (0, 1, 2)
RANKS = (1, 2, 4)
RESAMPLES = 2000

Values = npt.NDArray[np.float64]  # LDS of each test text
Scores = dict[tuple[str, str, float], Tensor]  # by normalize, method, damping


def interval(values: Values) -> list[float]:
    """The mean over the test texts and its 95% interval by resampling them."""
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[chosen].mean(1), (0.025, 0.975))
    return [round(float(x), 4) for x in (values.mean(), low, high)]


class Study:
    """The rows of results, written to a file after each part of a set."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = json.loads(out.read_text())["results"] if out.exists() else []
        self.new: list[dict[str, Any]] = []

    def has(self, name: str, part: str) -> bool:
        return any(row["set"] == name and row["part"] == part for row in self.rows)

    def add(self, values: Sequence[Values], exact: Values | None = None, **about: Any) -> None:
        """A row: values by seed."""
        mean = np.mean(values, axis=0)
        row = dict(about)
        row["lds"], row["low"], row["high"] = interval(mean)
        if len(values) > 1:
            row["seeds"] = [round(float(v.mean()), 4) for v in values]
        if exact is not None:
            row["loss"] = interval(exact - mean)
        self.new.append(row)

    def save(self) -> None:
        self.rows += self.new
        self.new = []
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        self.out.write_text(f'{{"results": [\n{lines}\n]}}\n')


# ------------------------------------------------------------------------------------------- methods


def all_methods(grams: Grams, sizes: Tensor) -> Iterator[tuple[str, str, float, Tensor]]:
    """(normalize, method, damping, scores) of everything that `exact` compares; sizes: numbers of a block."""
    for normalize in NORMALIZE:
        known = grams.normalized(normalize)
        yield normalize, "dot", 0.0, dot(known)
        for scale in (0.1, 10.0):  # 0.1: as the paper has it
            yield normalize, "datainf", scale, datainf(known, scale * known.mean_square() / sizes)
        yield normalize, "datainf, sizes alike", 0.1, datainf(known, 0.1 * known.mean_square())
        for kind, dampings in DAMPINGS.items():
            for damping in dampings:
                yield normalize, f"fisher, {kind}", damping, fisher(known, damping, kind)
        for damping in BEST:
            yield normalize, "fisher, left out", damping, fisher(known, damping, left_out=True)


def main_methods(grams: Grams, dampings: Sequence[float] = BEST) -> Scores:
    """Scores of unit blocks by the methods that codecs are judged by."""
    found = {("layer", "dot", 0.0): dot(grams)}
    for damping in dampings:
        found["layer", "fisher, energy", damping] = fisher(grams, damping)
        found["layer", "fisher, left out", damping] = fisher(grams, damping, left_out=True)
    return found


def named(key: tuple[str, str, float]) -> dict[str, Any]:
    return dict(zip(("normalize", "method", "damping"), key, strict=True))


# ------------------------------------------------------------------------------------------ preconditioner


def rank_one(moment: Tensor, power: float) -> Tensor:
    """(r c^T / mean r)^-power of a second moment [out, in], as one row of numbers."""
    r, c = moment.mean(1), moment.mean(0)
    r, c = r + EPS * r.mean(), c + EPS * c.mean()
    return torch.outer(r / r.mean(), c).pow(-power).flatten()


def own_moments(train: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
    """Second moments of the elements, [out, in] of each matrix."""
    return [g.square().mean(0).view(shape) for g, shape in zip(train, shapes, strict=True)]


def scaled(group: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    return [g * s for g, s in zip(group, scales, strict=True)]


# --------------------------------------------------------------------------------------------- parts


class Case:
    """A set, with the gradients at a point made when asked for."""

    def __init__(self, truth: RetrainedSet) -> None:
        self.truth = truth
        self.ids = truth.texts()
        self.layers = block_matrices(truth.model())
        self.shapes = [layer.weight.shape for layer in self.layers.values()]
        self.sizes = torch.tensor([shape.numel() for shape in self.shapes], dtype=torch.float64)

    def gradients(self, at: float | dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of the training and of the test texts: [n, numbers] of each matrix."""
        model = self.truth.model(at)
        train, test = (gradients(self.truth, model, ids) for ids in self.ids)
        return train, test

    def values(self, scores: Tensor) -> Values:
        return self.truth.by_text(scores)

    def with_kfac(self, at: float, texts: int | None, rank: int | None) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients at a point in K-FAC's preconditioner, its moments from the first so many training
        texts."""
        scales = self.kfac(at, texts, rank)
        train, test = self.gradients(at)
        return self.preconditioned(train, scales), self.preconditioned(test, scales)

    def kfac(
        self, at: float, texts: int | None, rank: int | None, damping: float = SIDE_DAMPING
    ) -> list[Scale]:
        """What K-FAC's preconditioner turns each matrix's gradients by at a point; arguments as
        `with_kfac`."""
        model = self.truth.model(at)
        rank = max(max(shape) for shape in self.shapes) if rank is None else rank
        targets = [
            Target(name, tuple(shape), (Use(name, "linear"),))
            for name, shape in zip(self.layers, self.shapes, strict=True)
        ]
        moments = FactorMoments(targets, rank, seed=0)
        for batch in factors(self.truth, model, self.ids[0][:texts]):
            moments.examples += len(batch[0][0])
            for n, (inputs, outputs) in enumerate(batch):
                moments.add_factors(n, inputs, outputs)
        return list(kfac_scales(moments, EXPONENT, damping, tolerance=0.0).values())

    def preconditioned(self, group: list[Tensor], scales: list[Scale]) -> list[Tensor]:
        return [
            scale.formed(g.view(-1, *shape)).flatten(1)
            for g, shape, scale in zip(group, self.shapes, scales, strict=True)
        ]

    def with_preconditioner(self, at: float) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients at a point times V^-1/2, V of the point."""
        train, test = self.gradients(at)
        scales = [rank_one(v, 0.5) for v in own_moments(train, self.shapes)]
        return scaled(train, scales), scaled(test, scales)


def exact_part(study: Study, case: Case, name: str) -> None:
    again = tune_again(case.truth, SHARES)
    print(f"{name}: the tuning done again ends {again.apart:.3f} from the stored one", flush=True)
    places: dict[str, list[Any]] = {
        "1": [1.0],
        "0.5": [0.5],
        "0.1+0.5+0.9": list(THREE),
        "0.1+0.3+0.5+0.7+0.9": list(PATH),
        "checkpoint 1/3": [again.states[SHARES[1]]],
        "6 checkpoints": [again.states[share] for share in SHARES],
    }
    grams: dict[Any, Grams] = {}
    preconditioned: dict[tuple[str, float], Grams] = {}
    for at in (*PATH, 1.0, *again.states.values()):
        train, test = case.gradients(at)
        key = at if isinstance(at, float) else id(at)
        grams[key] = Grams.of(train, test)
        if not isinstance(at, float) or at not in THREE:
            continue
        own = own_moments(train, case.shapes)
        elements = [(v + EPS * v.mean()).pow(-0.25).flatten() for v in own]
        half = [rank_one(v, 0.5) for v in own]
        both = {
            "1/4": [rank_one(v, 0.25) for v in own],
            "1/2": half,
            "elements 1/4": elements,
            "adam 1/2": [rank_one(v, 0.5) for v in again.moments],
        }
        for way, scales in both.items():
            preconditioned[way, float(at)] = Grams.of(scaled(train, scales), scaled(test, scales))
        preconditioned["train 1/2", float(at)] = Grams.of(scaled(train, half), test)
    for label, points in places.items():
        chosen = Grams.cat([grams[at if isinstance(at, float) else id(at)] for at in points])
        sizes = case.sizes.repeat(len(points))
        for *key, scores in all_methods(chosen, sizes):
            study.add([case.values(scores)], set=name, part="exact", points=label, **named(tuple(key)))
    for label in ("0.5", "0.1+0.5+0.9"):
        sizes = case.sizes.repeat(len(places[label]))
        for way in dict.fromkeys(way for way, _ in preconditioned):
            chosen = Grams.cat([preconditioned[way, at] for at in places[label]])
            about = {"set": name, "part": "exact", "points": label, "preconditioner": way}
            for normalize in NORMALIZE:
                known = chosen.normalized(normalize)
                found = {
                    (normalize, "dot", 0.0): dot(known),
                    (normalize, "datainf", 0.1): datainf(known, 0.1 * known.mean_square() / sizes),
                }
                for damping in DAMPINGS["energy"]:
                    found[normalize, "fisher, energy", damping] = fisher(known, damping)
                for key, scores in found.items():
                    study.add([case.values(scores)], **about, **named(key))


def unit(sketch: Tensor) -> Tensor:
    return F.normalize(sketch, dim=2)


def of_rows(rows: Tensor, queries: Tensor) -> Grams:
    """Of unit blocks [n, blocks, width] as they were decoded."""
    grams = Grams.of(rows.unbind(1), queries.unbind(1))
    return Grams(grams.train, grams.cross, grams.lengths, torch.ones_like(grams.true))


def codecs_of(
    train: Tensor, test: Tensor, seed: int, budget: int, learn_from: Sequence[str]
) -> Iterator[tuple[str, int, Grams]]:
    """(what a codec has learnt from, its bytes a row, what it makes of sketches [n, blocks, width])."""
    rows, lengths = unit(train), train.norm(dim=2)
    half = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: len(rows) // 2]
    chosen = {"nothing": None, "half": half, "all": torch.arange(len(rows))}
    for name in learn_from:
        sample = chosen[name]
        codec = coded(rows, lengths, sample, CodecConfig("sign", budget), seed)
        decoded = codec.decode(codec.encode(rows, lengths))
        yield name, codec.row_bytes + ROW_OVERHEAD, of_rows(decoded, unit(test))


class Gathered:
    """Values of several seeds, until all of them are there."""

    def __init__(self, case: Case, dampings: Sequence[float] = BEST) -> None:
        self.case, self.dampings = case, dampings
        self.values: dict[str, list[Values]] = {}
        self.exact: dict[tuple[str, tuple[str, str, float]], Values] = {}

    def add_exact(self, group: str, grams: Grams) -> None:
        for key, scores in main_methods(grams, self.dampings).items():
            self.exact[group, key] = self.case.values(scores)

    def add(self, scores: Scores, **about: Any) -> None:
        for key, found in scores.items():
            name = json.dumps([about, named(key)])
            self.values.setdefault(name, []).append(self.case.values(found))

    def hand_over(self, study: Study, group: Callable[[dict[str, Any]], str], **more: Any) -> None:
        for name, values in self.values.items():
            about, key = json.loads(name)
            exact = self.exact.get((group(about), (key["normalize"], key["method"], key["damping"])))
            study.add(values, exact, **more, **about, **key)


def codecs_part(study: Study, case: Case, name: str) -> None:
    gathered = Gathered(case)
    for preconditioner in ("none", "1/2"):
        gather_codecs(
            gathered, preconditioner, case.gradients if preconditioner == "none" else case.with_preconditioner
        )
        print(f"{name}: codecs, preconditioner {preconditioner}", flush=True)
    gathered.hand_over(study, _place, set=name, part="codecs")


def _place(about: dict[str, Any]) -> str:
    return f"{about['points']} {about['preconditioner']}"


def gather_codecs(
    gathered: Gathered, preconditioner: str, at_point: Callable[[float], tuple[list[Tensor], list[Tensor]]]
) -> None:
    """Sketches and codecs of gradients at one point and at three."""
    layers, dampings = gathered.case.layers, gathered.dampings
    made: dict[int, list[tuple[Tensor, Tensor]]] = {seed: [] for seed in SEEDS}
    exact = []
    for at in THREE:
        train, test = at_point(at)
        exact.append(Grams.of(train, test).normalized("layer"))
        for seed in SEEDS:
            of = [sketches(x, layers, WIDTH, seed).half() for x in (train, test)]
            made[seed].append((of[0], of[1]))
    for points, which in (("0.5", [1]), ("0.1+0.5+0.9", [0, 1, 2])):
        about: dict[str, Any] = {"points": points, "preconditioner": preconditioner}
        gathered.add_exact(_place(about), Grams.cat([exact[i] for i in which]))
        for seed in SEEDS:
            train, test = (torch.cat([made[seed][i][j].float() for i in which], 1) for j in (0, 1))
            for width in WIDTHS:
                grams = of_rows(unit(folded(train, width)), unit(folded(test, width)))
                size = floats(width * train.shape[1], train.shape[1])
                gathered.add(main_methods(grams, dampings), **about, codec="floats", bytes=size, width=width)
            # as wide as a cache has it that is told no width
            width = WIDTH if len(which) == 1 else WIDTH // 2
            of = folded(train, width), folded(test, width)
            few = points == "0.5" and preconditioner != "1/2"
            learn_from = ("nothing", "half", "all") if few else ("all",)
            for learnt, _, grams in codecs_of(*of, seed, BUDGET, learn_from):
                what = {"codec": f"learnt from {learnt}", "budget": BUDGET, "width": width}
                gathered.add(main_methods(grams, dampings), **about, **what)


def kfac_part(study: Study, case: Case, name: str) -> None:
    for way, (texts, rank) in KFAC.items():
        grams = {at: Grams.of(*case.with_kfac(at, texts, rank)) for at in (1.0, *THREE)}
        for label, points in (("1", [1.0]), ("0.5", [0.5]), ("0.1+0.5+0.9", list(THREE))):
            chosen = Grams.cat([grams[at] for at in points])
            sizes = case.sizes.repeat(len(points))
            for normalize in NORMALIZE:
                known = chosen.normalized(normalize)
                found = {
                    (normalize, "dot", 0.0): dot(known),
                    (normalize, "datainf", 0.1): datainf(known, 0.1 * known.mean_square() / sizes),
                }
                for damping in WHITE:
                    found[normalize, "fisher, left out", damping] = fisher(known, damping, left_out=True)
                for key, scores in found.items():
                    about = {"set": name, "part": "kfac", "points": label, "preconditioner": way}
                    study.add([case.values(scores)], **about, **named(key))
        print(f"{name}: {way}", flush=True)
    gathered = Gathered(case, WHITE)
    gather_codecs(gathered, "kfac", lambda at: case.with_kfac(at, *KFAC["kfac"]))
    gathered.hand_over(study, _place, set=name, part="kfac")


def ways_part(study: Study, case: Case, name: str) -> None:
    about: dict[str, Any] = {"set": name, "part": "ways", "points": "0.5", "normalize": "layer"}
    about |= {"method": "dot", "damping": 0.0}
    train, test = case.gradients(0.5)
    for damping in SIDE_DAMPINGS:
        scales = case.kfac(0.5, None, None, damping)
        sides = (case.preconditioned(group, scales) for group in (train, test))
        grams = Grams.of(*sides).normalized("layer")
        study.add([case.values(dot(grams))], **about, preconditioner="kfac, whole", side_damping=damping)
    scales = case.kfac(0.5, *KFAC["kfac"])
    # A root on each side, both on this one.
    whole = case.preconditioned(case.preconditioned(test, scales), scales)
    grams = Grams.of(train, whole).normalized("layer")
    about["preconditioner"] = "kfac, query's side"
    exact = case.values(dot(grams))
    study.add([exact], **about)
    by_seed = []
    for seed in SEEDS:
        rows, queries = (sketches(x, case.layers, WIDTH, seed) for x in (train, whole))
        ((_, _, coded_grams),) = codecs_of(rows, queries, seed, BUDGET, ("all",))
        by_seed.append(case.values(dot(coded_grams)))
    study.add(by_seed, exact, **about, codec="learnt from all", budget=BUDGET, width=WIDTH)


def trackstar(rows: Sequence[Tensor], queries: Sequence[Tensor], damping: float) -> Tensor:
    """Cosine of whole rows after each block's inverse root of (F + damping x mean eigenvalue): [test, n]."""
    preconditioned: list[list[Tensor]] = [[], []]
    for x, q in zip(rows, queries, strict=True):
        values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
        added = damping * values.square().sum() / values.sum()
        root = (vectors / (values.clamp(min=0) + added).sqrt()) @ vectors.T
        for out, y in zip(preconditioned, (x, q), strict=True):
            out.append(y.double() @ root)
    whole = [F.normalize(torch.cat(parts, 1)) for parts in preconditioned]
    return whole[1] @ whole[0].T


def truncated(matrices: Tensor, rank: int) -> Tensor:
    """[n, d_out, d_in] of their `rank` largest singular values, the two factors kept in float16."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    root = values[:, :rank].sqrt()
    out, into = left[:, :, :rank] * root[:, None], right[:, :rank] * root[:, :, None]
    return out.half().float() @ into.half().float()


def as_units(blocks: Sequence[Tensor]) -> Tensor:
    return torch.stack([F.normalize(x.flatten(1)) for x in blocks], 1)


def peers_part(study: Study, case: Case, name: str) -> None:
    gathered = Gathered(case)
    blocks = len(case.layers)
    for preconditioner in ("none", "1/2"):
        groups = case.gradients(0.5) if preconditioner == "none" else case.with_preconditioner(0.5)
        gathered.add_exact(preconditioner, Grams.of(*groups).normalized("layer"))
        for seed in SEEDS:
            for budget in (BUDGET, LARGE):
                about = {"points": "0.5", "preconditioner": preconditioner, "budget": budget}
                numbers = (budget - floats(0, blocks)) // 2 // blocks  # of a block
                side = int(numbers**0.5)
                train, test = two_sides(groups, case.shapes, side, seed)
                # Scaled before float16: small gradients would vanish in it.
                kept = [x / x.square().mean().sqrt() for x in train]
                kept = [x.half().float() for x in kept]
                found = main_methods(of_rows(as_units(kept), as_units(test)))
                gathered.add(found, **about, codec="double-sided", side=side)
                for damping in BEST:
                    flat = [x.flatten(1) for x in kept], [x.flatten(1) for x in test]
                    scores = {("cosine", "trackstar", damping): trackstar(*flat, damping)}
                    gathered.add(scores, **about, codec="double-sided", side=side)
                if preconditioner != "none":
                    continue
                for rank in RANKS:
                    side = numbers // rank // 2
                    if side > min(min(shape) for shape in case.shapes):
                        continue
                    train, test = two_sides(groups, case.shapes, side, seed)
                    kept = [truncated(F.normalize(x.flatten(1)).view_as(x), rank) for x in train]
                    found = main_methods(of_rows(as_units(kept), as_units(test)))
                    gathered.add(found, **about, codec=f"LoRIF, rank {rank}", side=side)
            if preconditioner == "none":  # a dense matrix for more bytes takes minutes to draw
                both = torch.cat([torch.cat(group, 1) for group in groups])
                drawn = F.normalize(dense(both, (BUDGET - floats(0, 1)) // 2, seed))
                rows, queries = (x[:, None] for x in drawn.split([len(x[0]) for x in groups]))
                about = {"points": "0.5", "preconditioner": preconditioner, "budget": BUDGET}
                found = main_methods(of_rows(rows.half().float(), queries))
                found = {("cosine", *key[1:]): scores for key, scores in found.items()}
                gathered.add(found, **about, codec="TRAK, dense projection")
                sketched = [sketches(x, case.layers, WIDTH, seed) for x in groups]
                about["budget"] = LARGE  # with 2,048 bytes it is among the codecs
                for learnt, _, grams in codecs_of(sketched[0], sketched[1], seed, LARGE, ("all",)):
                    gathered.add(main_methods(grams), **about, codec=f"learnt from {learnt}")
            print(f"{name}: peers, preconditioner {preconditioner}, seed {seed}", flush=True)
    gathered.hand_over(study, lambda about: about["preconditioner"], set=name, part="peers")


# ------------------------------------------------------------------------------------------- tables

DAMPING = 0.2  # of the tables
EXACT_ROWS: list[dict[str, Any]] = [
    {"normalize": "none", "method": "dot"},
    {"normalize": "cosine", "method": "dot"},
    {"normalize": "layer", "method": "dot"},
    {"normalize": "none", "method": "datainf", "damping": 0.1},
    {"normalize": "layer", "method": "datainf", "damping": 0.1},
    {"normalize": "none", "method": "fisher, energy", "damping": DAMPING},
    {"normalize": "cosine", "method": "fisher, energy", "damping": DAMPING},
    *({"normalize": "layer", "method": "fisher, energy", "damping": d} for d in DAMPINGS["energy"][:-1]),
    {"normalize": "layer", "method": "fisher, left out", "damping": DAMPING},
    *({"normalize": "layer", "method": "fisher, count", "damping": d} for d in (0.03, 0.3, 1.0)),
]
PRECONDITIONER_ROWS: list[dict[str, Any]] = [
    {"normalize": "none", "method": "dot"},
    {"normalize": "layer", "method": "dot"},
    {"normalize": "layer", "method": "datainf", "damping": 0.1},
    {"normalize": "layer", "method": "fisher, energy", "damping": DAMPING},
]
CODEC_COLUMNS = ("dot", "fisher, energy", "fisher, left out")


class Tables:
    """Markdown of what a study found; a cell has the LDS of every set, in their order."""

    def __init__(self, study: Study) -> None:
        self.rows = study.rows
        self.sets = list(dict.fromkeys(row["set"] for row in study.rows))

    def found(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows, one a set, that are so; a field that is None in `wanted` is to be missing."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def cell(self, key: str = "lds", **wanted: Any) -> str:
        rows = self.found(**wanted)
        values = [row[key] if key == "lds" else row[key][0] for row in rows]
        return " ".join(f"{value:.3f}" for value in values) if values else ""

    def exact(self) -> Iterator[str]:
        points = list(dict.fromkeys(row["points"] for row in self.rows if row["part"] == "exact"))
        yield f"| normalize | method | damping | {' | '.join(points)} |"
        yield "| --- " * (3 + len(points)) + "|"
        for row in EXACT_ROWS:
            cells = [self.cell(part="exact", points=p, preconditioner=None, **row) for p in points]
            yield f"| {row['normalize']} | {row['method']} | {row.get('damping', '')} | {' | '.join(cells)} |"

    def preconditioner(self) -> Iterator[str]:
        ways = list(dict.fromkeys(row.get("preconditioner") for row in self.rows if row["part"] == "exact"))
        settings = [" ".join(list(row.values())[:2]) for row in PRECONDITIONER_ROWS]
        yield f"| preconditioner | {' | '.join(settings)} |"
        yield "| --- " * (1 + len(PRECONDITIONER_ROWS)) + "|"
        for way in ways:
            cells = [
                self.cell(part="exact", points="0.1+0.5+0.9", preconditioner=way, **row)
                for row in PRECONDITIONER_ROWS
            ]
            yield f"| {way or 'none'} | {' | '.join(cells)} |"

    def codecs(self) -> Iterator[str]:
        """Sketches and codecs, with what is lost against exact gradients."""
        titles = " | ".join(CODEC_COLUMNS)
        yield f"| points | preconditioner | codec | dimension | {titles} | lost, left out |"
        yield "| --- " * (5 + len(CODEC_COLUMNS)) + "|"
        chosen = {
            (row["points"], row["preconditioner"], row["codec"], row["width"])
            for row in self.rows
            if row["part"] == "codecs"
        }
        for points, preconditioner, codec, width in sorted(chosen):
            at = {
                "part": "codecs",
                "points": points,
                "preconditioner": preconditioner,
                "codec": codec,
                "width": width,
            }
            cells = [self.cell(**at, method=m, damping=DAMPING if m != "dot" else 0.0) for m in CODEC_COLUMNS]
            cells.append(self.cell("loss", **at, method="fisher, left out", damping=DAMPING))
            yield f"| {points} | {preconditioner} | {codec} | {width} | {' | '.join(cells)} |"

    def peers(self) -> Iterator[str]:
        yield f"| bytes | preconditioner | codec | numbers a side | {' | '.join(CODEC_COLUMNS)} | trackstar |"
        yield "| --- " * (5 + len(CODEC_COLUMNS)) + "|"
        chosen = dict.fromkeys(
            (row["budget"], row["preconditioner"], row["codec"], row.get("side"))
            for row in self.rows
            if row["part"] != "exact" and row["points"] == "0.5" and "budget" in row
        )
        for budget, preconditioner, codec, side in sorted(
            chosen, key=lambda c: (c[0], c[1], c[2], c[3] or 0)
        ):
            at = {
                "points": "0.5",
                "budget": budget,
                "preconditioner": preconditioner,
                "codec": codec,
                "side": side,
            }
            methods = (*CODEC_COLUMNS, "trackstar")
            cells = [self.cell(**at, method=m, damping=DAMPING if m != "dot" else 0.0) for m in methods]
            yield f"| {budget:,} | {preconditioner} | {codec} | {side or ''} | {' | '.join(cells)} |"


PARTS: dict[str, Callable[[Study, Case, str], None]] = {
    "exact": exact_part,
    "codecs": codecs_part,
    "peers": peers_part,
    "kfac": kfac_part,
    "ways": ways_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extra", type=Path, help="one more set, a folder like those in studies/lds")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only print the tables of what FILE has")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Study(args.out)
    if args.tables:
        tables = Tables(study)
        for table in (tables.exact, tables.preconditioner, tables.codecs, tables.peers):
            print("\n".join(table()), end="\n\n")
        return
    for part in args.parts.split(","):
        for folder in [*sets(), *([args.extra] if args.extra else [])]:
            if not study.has(folder.name, part):
                PARTS[part](study, Case(RetrainedSet(folder)), folder.name)
                study.save()
                print(f"{folder.name}: {part} done", flush=True)


if __name__ == "__main__":
    main()
