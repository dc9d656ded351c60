"""What a damping is judged on: gradients at one point, moments of their factors, and a measure of scores.

A subject is either a set of retrained models (`of_set`, see ../lds) or poisoned data with the adapter that
was tuned on them (`of_poison`). Its gradients are exact and without preconditioner, so every preconditioner
is tried on the same ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rapidin import Attributor, load_model
from rapidin.attribution.token_contributions import exact_gradients
from rapidin.cache.build import sample_rows
from rapidin.data.encoding import Encoded, Status
from rapidin.data.examples import open_examples
from rapidin.evaluate.metrics import auprc
from rapidin.gradients.kfac import FactorMoments, Spectrum
from rapidin.gradients.parameters import Target, Use
from rapidin.gradients.preconditioner import KFAC_SAMPLE, RANK, STREAM, PreconditionerConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "lds"))
from exact import factors
from lds import CharGPT, RetrainedSet, block_matrices

AT = 0.5
Values = npt.NDArray[np.float64]  # of each test text or query


def _unmeasured(scores: Tensor) -> Values:
    return np.full(len(scores), np.nan)


@dataclass(frozen=True)
class Subject:
    """Gradients of training and test texts, [n, numbers] of each block.

    width: dimension of a block's sketch; spectra: of the rows and the columns of each block; measure: what
    scores [test, training] are worth, for each test text: LDS or auPRC.
    """

    name: str
    figure: str
    width: int
    names: list[str]
    shapes: list[tuple[int, int]]
    train: list[Tensor]
    test: list[Tensor]
    spectra: list[tuple[Spectrum, Spectrum]]
    measure: Callable[[Tensor], Values] = _unmeasured


def of_set(folder: Path, at: float = AT) -> Subject:
    """A set of retrained models, with gradients at this point; the moments are those of all its training
    texts."""
    truth = RetrainedSet(folder)
    model = truth.model(at)
    return gradients_of(truth, model, block_matrices(model), truth.texts(), truth.by_text)


def gradients_of(
    truth: RetrainedSet,
    model: CharGPT,
    layers: dict[str, nn.Linear],
    texts: tuple[Tensor, Tensor],
    measure: Callable[[Tensor], Values] = _unmeasured,
) -> Subject:
    """The gradients of a set's model for training and test texts; the moments are those of the former."""
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    moments = FactorMoments(_targets(list(layers), shapes), RANK, seed=0)
    found: list[list[Tensor]] = []
    for ids, sampled in zip(texts, (True, False), strict=True):
        made: list[list[Tensor]] = [[] for _ in shapes]
        for batch in factors(truth, model, ids):
            for n, (inputs, outputs) in enumerate(batch):
                made[n].append((outputs.mT @ inputs).flatten(1))
                if sampled:
                    moments.add_factors(n, inputs, outputs)
            moments.examples += len(batch[0][0]) if sampled else 0
        found.append([torch.cat(parts) for parts in made])
    return Subject(
        truth.folder.name,
        "LDS",
        8192,
        list(layers),
        shapes,
        *found,
        _spectra(moments),
        measure=measure,
    )


def of_poison(
    name: str,
    model: str,
    adapter: str,
    data: str,
    queries: str,
    width: int,
    max_length: int,
    at: float = AT,
) -> Subject:
    """Data with a field `poisoned`, and the answers of the tuned model to trace; the moments are those of the
    sample that a cache takes."""
    attributor = Attributor(
        load_model(model, adapter=adapter), at=at, preconditioner="off", max_length=max_length
    )
    marked = np.array([bool(row["poisoned"]) for row in map(json.loads, Path(data).read_text().splitlines())])

    def measure(scores: Tensor) -> Values:
        return auprc(scores.numpy(), np.broadcast_to(marked, scores.shape))

    groups = [list(open_examples(file)) for file in (data, queries)]
    return of_records(name, "auPRC", attributor, groups[0], groups[1], width, measure)


def of_records(
    name: str,
    figure: str,
    attributor: Attributor,
    rows: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]],
    width: int,
    measure: Callable[[Tensor], Values] = _unmeasured,
) -> Subject:
    """Records and the model of an attributor that has one point and no preconditioner; the moments are those
    of the sample that a cache of these rows takes."""
    source = attributor.source
    shapes = [(int(o), int(i)) for o, i in (target.matrix for target in source.targets)]
    names = [target.name for target in source.targets]
    moments = FactorMoments(_targets(names, shapes), RANK, seed=0)
    config = PreconditionerConfig("kfac", sample=KFAC_SAMPLE)
    sample = set(sample_rows(len(rows), config.sample_of(len(rows)), 0, STREAM))
    found: list[list[Tensor]] = []
    for group in (rows, queries):
        made = [torch.zeros(len(group), o * i) for o, i in shapes]
        for number, record in enumerate(group):
            text = source.encoder(record)
            assert isinstance(text, Encoded)
            assert text.status == Status.OK
            with source.at(0):
                gradients = exact_gradients(source, text, 0)
            sampled = group is rows and number in sample
            moments.examples += int(sampled)
            for n, gradient in enumerate(gradients):
                made[n][number] = gradient.as_formed().flatten()
                if sampled:
                    kept = gradient.factors
                    assert kept is not None
                    assert kept.columns is not None
                    moments.add_factors(n, kept.columns[None], kept.rows[None])
            if number % 100 == 99:
                print(f"{name}: {number + 1} of {len(group)}", flush=True)
        found.append(made)
    return Subject(name, figure, width, names, shapes, *found, _spectra(moments), measure=measure)


def _targets(names: list[str], shapes: list[tuple[int, int]]) -> list[Target]:
    return [Target(name, shape, (Use(name, "linear"),)) for name, shape in zip(names, shapes, strict=True)]


def _spectra(moments: FactorMoments) -> list[tuple[Spectrum, Spectrum]]:
    found = []
    for n in range(len(moments.targets)):
        both = moments.spectra(n)
        assert both is not None
        assert isinstance(both[0], Spectrum)
        found.append((both[0], both[1]))
    return found
