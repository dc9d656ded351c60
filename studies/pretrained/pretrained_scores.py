"""The ways to score training rows that need no other package: `WAYS`, each computed by one call.

A way is one pass over all examples, by which several methods score; its description has the name of the
package and the point where gradients are taken.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rapidin import Attributor, ops
from rapidin.attribution import baselines
from rapidin.attribution.methods import datainf as of_datainf
from rapidin.attribution.methods import fisher as of_fisher
from rapidin.cache.codec import CodecConfig
from rapidin.data.encoding import Encoded, Encoder
from rapidin.evaluate.ground_truth import GroundTruth
from rapidin.evaluate.log import Log
from rapidin.evaluate.methods import DEFAULT, each_score, parse_methods
from rapidin.evaluate.variants import Variant, VariantCaches
from rapidin.files import replacing
from rapidin.gradients.kfac import Spectrum
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import block_seed
from rapidin.gradients.preconditioner import DAMPING, TOLERANCE
from rapidin.gradients.settings import RAPIDGRAD_WIDTH
from rapidin.gradients.source import default_width

sys.path += [
    str(Path(__file__).resolve().parents[1] / name)
    for name in ("common", "damping", "lds", "readout", "fuse")
]
import damping
import fuse
import readout
from codes import coded
from pretrained_files import Scores, key
from scoring import Grams, datainf, dot, fisher
from subjects import Subject, of_records

BUDGET = 2048
Floats = npt.NDArray[np.float64]
About = dict[str, Any]
Found = tuple[About, dict[str, Floats]]  # what a way is, and its scores [test, train] by `key`

PRECONDITIONERS = {
    "off": damping.Way(None),
    "kfac": damping.Way((DAMPING, DAMPING), tolerance=TOLERANCE),
}


def encoded(truth: GroundTruth, loaded: LoadedModel) -> dict[str, list[Encoded]]:
    """The tokens of the training and the test examples, as they were trained on."""
    encoder = Encoder(loaded.tokenizer, max_length=truth.description["settings"]["max_length"])
    return {part: [encoder(record) for record in truth.examples(part)] for part in ("train", "test")}


# ------------------------------------------------------------------------------------------- rapidin


def cached(variant: Variant, truth: GroundTruth, work: Path, log: Log) -> Found:
    """The default methods of `rapidin eval` by a cache as `rapidin cache` makes it."""
    length = truth.description["settings"]["max_length"]
    caches = VariantCaches(work / "caches", truth.examples("train"), length, log=log)
    sketches, generations = caches.query(variant, truth.tuned("cpu"), list(truth.examples("test")))
    at = "checkpoints" if variant.at is None else ", ".join(f"{a:g}" for a in variant.at)
    rows = "a cache of floats" if variant.bytes is None else f"a cache of {variant.bytes:,} bytes"
    found = {
        key(str(method), variant.preconditioner, rows): scores
        for method, scores, _ in each_score(sketches, generations, parse_methods(DEFAULT))
    }
    return {"package": "rapidin", "at": at}, found


def exact(preconditioner: str, point: float, truth: GroundTruth, work: Path, log: Log) -> Found:
    """The default methods with the exact gradients of the adapter's matrices at a point."""
    subject = gradients(point, truth, work)
    way = PRECONDITIONERS[preconditioner]
    grams = Grams.cat([Grams.of(*damping.preconditioned(block, way)) for block in blocks(subject)])
    found = gram_scores(grams, sizes_of(subject), preconditioner)
    named = {key(method, preconditioner, "exact"): scores for method, scores in found}
    return {"package": "rapidin", "at": f"{point:g}"}, named


def stored(preconditioner: str, point: float, truth: GroundTruth, work: Path, log: Log) -> Found:
    """The same from what a cache stores: sketches of the default width, and rows of 2,048 bytes that have all
    been learnt from, as in any cache of so few."""
    subject, budgets = gradients(point, truth, work), (None, BUDGET)
    widths = {budget: default_width(len(subject.names), budget) for budget in budgets}
    made: dict[int, list[list[Tensor]]] = {width: [[], []] for width in widths.values()}
    for block in blocks(subject):
        sides = damping.preconditioned(block, PRECONDITIONERS[preconditioner])
        for width, groups in made.items():
            for group, side in zip(groups, sides, strict=True):
                group.append(damping.sketched(block, side, width, seed=0))
    found = {}
    for budget, width in widths.items():
        train, test = (torch.cat(group, 1) for group in made[width])
        rows, lengths, units = f"width {width:,}", train.norm(dim=2), F.normalize(train, dim=2)
        if budget is not None:
            codec = coded(units, lengths, torch.arange(len(units)), CodecConfig("sign", budget), 0)
            rows, units = f"{budget:,} bytes", codec.decode(codec.encode(units, lengths))
        grams = Grams.of((units * lengths[:, :, None]).unbind(1), test.unbind(1), lengths.T)
        for method, scores in gram_scores(grams, sizes_of(subject), preconditioner):
            found[key(method, preconditioner, rows)] = scores
    return {"package": "rapidin", "at": f"{point:g}"}, found


def gradients(point: float, truth: GroundTruth, work: Path) -> Subject:
    """The exact gradients of the adapter's matrices at a point, kept in `work` once they are computed."""
    path = work / f"gradients-{point:g}.pt"
    if not path.exists():
        length = truth.description["settings"]["max_length"]
        attributor = Attributor(truth.tuned("cpu").load(), at=point, preconditioner="off", max_length=length)
        examples = [list(truth.examples(part)) for part in ("train", "test")]
        made = of_records(f"gradients at {point:g}", "LDS", attributor, *examples, width=0)
        spectra = [[vars(side) for side in sides] for sides in made.spectra]
        value = {name: getattr(made, name) for name in ("name", "names", "shapes", "train", "test")}
        with replacing(path) as partial_path:
            torch.save(value | {"spectra": spectra}, partial_path)
        return made
    value = torch.load(path, weights_only=True, mmap=True)
    both = [(Spectrum(**rows), Spectrum(**columns)) for rows, columns in value.pop("spectra")]
    return Subject(**value, figure="LDS", width=0, spectra=both)


def blocks(subject: Subject) -> Iterator[Subject]:
    """The subject of each matrix alone."""
    for n in range(len(subject.names)):
        names = ("names", "shapes", "train", "test", "spectra")
        yield replace(subject, **{name: [getattr(subject, name)[n]] for name in names})


def sizes_of(subject: Subject) -> Tensor:
    """The numbers of each matrix."""
    return torch.tensor([rows * columns for rows, columns in subject.shapes], dtype=torch.float64)


def rapidgrad(truth: GroundTruth, work: Path, log: Log) -> Found:
    """The cosines of rows of the RapidIn paper (Lin et al., ACL 2024, section 3) at the tuned adapter: the
    flat sketches of all matrices' gradients, each at length 1, added up to 65,536 numbers."""
    subject = gradients(1.0, truth, work)
    rows = [torch.zeros(len(group[0]), RAPIDGRAD_WIDTH) for group in (subject.train, subject.test)]
    for n, name in enumerate(subject.names):
        for total, group in zip(rows, (subject.train, subject.test), strict=True):
            formed = [group[n].view(-1, *subject.shapes[n])]
            sketch = ops.flat_sketch(formed, RAPIDGRAD_WIDTH, seed=block_seed(0, name), batched=True)
            total += F.normalize(sketch, eps=1e-30)
    train, test = (F.normalize(each) for each in rows)
    scores: Floats = (test @ train.T).double().numpy()
    about = {"package": "rapidin", "at": "1"}
    return about, {key("rapidgrad", "off", f"{RAPIDGRAD_WIDTH:,} numbers"): scores}


def gram_scores(grams: Grams, sizes: Tensor, preconditioner: str) -> Iterator[tuple[str, Floats]]:
    """(method, scores) of the default methods of `rapidin eval` with rapidin's default dampings; sizes:
    numbers of each block."""
    damping_of_fisher = of_fisher.WHITE_DAMPING if preconditioner == "kfac" else of_fisher.DAMPING
    for method in parse_methods(DEFAULT):
        known = grams.normalized(method.normalize)
        if method.method == "dot":
            scores = dot(known)
        elif method.method == "datainf":
            scores = datainf(known, of_datainf.DAMPING * known.mean_square() / sizes)
        else:
            scores = fisher(known, damping_of_fisher, left_out=True)
        yield str(method), scores.numpy()


# ------------------------------------------------------------------------------------- without gradients


def without_gradients(truth: GroundTruth, work: Path, log: Log) -> Found:
    """BM25 and hidden states (RepSim) of the texts, and of the tokens that the model was trained on alone."""
    loaded = truth.tuned("cpu").load()
    length = truth.description["settings"]["max_length"]
    whole = [[baselines.plain_text(record) for record in truth.examples(part)] for part in ("train", "test")]
    read = [
        [loaded.tokenizer.decode(text.ids, skip_special_tokens=True) for text in group]
        for group in encoded(truth, loaded).values()
    ]
    found = baselines.scores_of_baselines(loaded, *whole, max_length=length)
    found[f"{baselines.WORDS} of the tokens read"] = baselines.bm25(*read)
    return {"package": "baseline", "at": ""}, found


def fused(truth: GroundTruth, work: Path, log: Log) -> Found:
    """One ranking of the default gradients, words and hidden states, as `rapidin query --fuse` makes it."""
    about, of_gradients = Scores(work).load("exact gradients at 0.5, kfac")
    _, others = Scores(work).load("baselines")
    rankings = {fuse.fusion.GRADIENTS: of_gradients[key("dot:layer", "kfac", "exact")]}
    rankings |= {name: others[name] for name in (baselines.WORDS, baselines.STATES)}
    parts = {name: fuse.reciprocal(name, scores) for name, scores in rankings.items()}
    return about, {key("fused", "kfac", "exact"): fuse.fused(parts, (1, 1, 1))}


# ----------------------------------------------------------------------------------- the output layer alone


@torch.no_grad()
def readout_factors(loaded: LoadedModel, text: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """Of the T counted tokens of a text: the errors of their probabilities [T, V], the same as the layer
    below receives them [T, E], and the hidden states that the output layer reads [T, E]."""
    kept: list[Tensor] = []
    layer = loaded.model.get_output_embeddings()
    handle = layer.register_forward_pre_hook(lambda _, given: kept.append(given[0].detach()))
    logits = loaded.model(input_ids=torch.tensor([text.ids])).logits[0]
    handle.remove()
    counted = [n for n, counts in enumerate(text.target) if counts]
    before = torch.tensor(counted) - 1
    error = logits[before].softmax(1)
    error[torch.arange(len(counted)), [text.ids[n] for n in counted]] -= 1
    return error, error @ layer.weight, kept[0][0, before]


def rise(point: float, truth: GroundTruth, work: Path, log: Log) -> Found:
    """RISE's two channels (Ran et al., arXiv 2604.16197), as ../readout has them, in exact numbers and
    count-sketched to 2,048 bytes with three seeds."""
    loaded = truth.tuned("cpu").load()
    texts = encoded(truth, loaded)
    sketched: dict[str, list[list[list[Tensor]]]] = {}
    with loaded.path.at(point):
        queries = [readout_factors(loaded, text) for text in texts["test"]]
        products = torch.zeros(2, len(queries), len(texts["train"]), dtype=torch.float64)
        lengths = torch.zeros(2, len(texts["train"]), dtype=torch.float64)
        of_queries = torch.tensor([factor_products([each], each) for each in queries], dtype=torch.float64)
        for part in ("test", "train"):
            sketched[part] = []
            for n, text in enumerate(texts[part]):
                of_text = queries[n] if part == "test" else readout_factors(loaded, text)
                sketched[part].append(
                    [
                        readout.channels_of(*(each[None] for each in of_text), seed)
                        for seed in range(readout.SEEDS)
                    ]
                )
                if part == "train":
                    products[:, :, n] = torch.tensor(factor_products(queries, of_text))
                    lengths[:, n] = torch.tensor(factor_products([of_text], of_text))[:, 0]
    roots = of_queries[:, :, 0].T.sqrt()[:, :, None] * lengths.sqrt()[:, None]
    residual, projected = products / roots.clamp(min=1e-30)
    found = {
        key("residual channel", "off", "exact"): residual,
        key("projected channel", "off", "exact"): projected,
        key("both channels", "off", "exact"): (residual + projected) / 2,
    }
    for seed in range(readout.SEEDS):
        sides = [
            [torch.cat([each[seed][channel] for each in sketched[part]]) for channel in (0, 1)]
            for part in ("train", "test")
        ]
        for name, scores in readout.readout_scores((sides[0], sides[1])).items():
            found[key(name, "off", f"{BUDGET:,} bytes", f"seed {seed}")] = scores
    about = {"package": "RISE", "at": f"{point:g}"}
    return about, {name: scores.double().numpy() for name, scores in found.items()}


def factor_products(
    queries: Sequence[tuple[Tensor, Tensor, Tensor]], text: tuple[Tensor, Tensor, Tensor]
) -> list[list[float]]:
    """Inner products of the channels of queries with a text's, of each channel [queries]: of sums of outer
    products over tokens, without forming these, whose numbers are vocabulary times hidden size."""
    found: list[list[float]] = [[], []]
    for query in queries:
        hidden = query[2] @ text[2].T
        for channel in (0, 1):
            found[channel].append(float(((query[channel] @ text[channel].T) * hidden).sum()))
    return found


# ---------------------------------------------------------------------------------------------- all ways

_CACHES = (
    Variant((0.5,), None),
    Variant((0.5,), BUDGET),
    Variant((0.1, 0.5, 0.9), BUDGET),
    Variant(None, None, "off"),
)
Way = Callable[[GroundTruth, Path, Log], Found]
_MADE = [(point, way) for point in (1.0, 0.75, 0.5) for way in PRECONDITIONERS]
WAYS: dict[str, Way] = {
    "baselines": without_gradients,
    **{f"exact gradients at {point:g}, {way}": partial(exact, way, point) for point, way in _MADE},
    **{f"stored gradients at {point:g}, {way}": partial(stored, way, point) for point, way in _MADE},
    "rapidgrad": rapidgrad,
    **{f"RISE at {point:g}": partial(rise, point) for point in (1.0, 0.5)},
    "fused": fused,
    **{f"cache {variant}": partial(cached, variant) for variant in _CACHES},
}
