"""Errors of scores are as large as they are said to be: against exact gradients, and between seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fitted import fitted
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from tiny import tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

from rapidin.attribution import token_contributions
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.generate import generations_of
from rapidin.attribution.methods import METHODS, NORMALIZE
from rapidin.attribution.methods.vectors import mean_factor
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import QuerySketch, scans_of, sketch_generations
from rapidin.attribution.scan import all_scores
from rapidin.attribution.score_errors import details, partners, rank_intervals
from rapidin.cache import Cache
from rapidin.ops.reference import sketch_hash

TEXT = "the cat sat on a mat while rain fell over far hills and nobody saw it go home again"
WORDS = TEXT.split()
QUERIES = 4


def made_records() -> list[dict[str, Any]]:
    """36 rows, of which the first are almost the queries after them."""
    generator = torch.Generator().manual_seed(0)

    def said(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist())

    records = [{"prompt": said(3) + " ", "completion": said(3 + n % 7)} for n in range(36 + QUERIES)]
    for n in range(QUERIES):
        asked = records[36 + n]
        records[n] = {"prompt": asked["prompt"], "completion": asked["completion"] + " " + said(2)}
    return records


RECORDS = made_records()
ROWS, ASKED = RECORDS[:36], RECORDS[36:]
EVERY = torch.arange(36).expand(QUERIES, 36)


def queried(folder: Path, seed: int = 0, **settings: Any) -> tuple[Attributor, Cache, QuerySketch]:
    options = {key: settings.pop(key) for key in ("dtype", "bytes", "sample") if key in settings}
    settings = {"width": 64, "preconditioner": "off", "include": ["proj"]} | settings
    model = settings.pop("model", None) or tiny_llama(hidden_size=64, intermediate_size=96)
    attributor = Attributor(model, tiny_tokenizer(), seed=seed, **settings)
    cache = attributor.cache(ROWS, folder / f"cache-{seed}", shard_rows=11, **options)
    texts = generations_of(attributor.source, ASKED)
    attributor = fitted(attributor, cache)
    return attributor, cache, QuerySketch(cache, sketch_generations(attributor.source, texts), 1.0)


def measured(
    part: QuerySketch | list[QuerySketch], normalize: str, method: str = "dot"
) -> tuple[Tensor, Tensor]:
    """Scores and errors of all rows [QUERIES, 36] float64."""
    parts = part if isinstance(part, list) else [part]
    found = details(scans_of(parts, [], ScoringConfig(normalize, method)), EVERY)
    return found.scores.double(), found.errors.double()


def rms(z: Tensor) -> float:
    return float(z.square().mean().sqrt())


SETTINGS: dict[str, dict[str, Any]] = {
    "float16": {},
    "wide": {"width": 256},
    "flat": {"projection": "flat", "width": 128},
    "one bit": {"dtype": "sign", "sample": 0},
    "two points": {"at": [0.4, 0.6], "model": "lora", "include": ["lora"]},
}


IN_FULL = ("wide", "two points")


@pytest.mark.parametrize(
    "setting", [pytest.param(s, marks=pytest.mark.full) if s in IN_FULL else s for s in SETTINGS]
)
def test_errors_are_those_against_exact_gradients(setting: str, tmp_path: Path) -> None:
    found: dict[str, list[Tensor]] = {name: [] for name in NORMALIZE}
    true: dict[str, Tensor] = {}
    for seed in range(6):
        settings = dict(SETTINGS[setting])
        if settings.get("model") == "lora":
            settings["model"] = tiny_lora(tiny_llama(hidden_size=64, intermediate_size=96), r=16)
        attributor, _, part = queried(tmp_path, seed, **settings)
        for normalize, made in found.items():
            if normalize not in true:
                asked, rows = (
                    [attributor.source.encoder(record) for record in records] for records in (ASKED, ROWS)
                )
                exact = token_contributions.exact(
                    attributor.source, asked, [1.0] * QUERIES, range(QUERIES), rows, normalize
                )
                true[normalize] = torch.stack([positions.sum(1) for positions in exact], 1)
            scores, errors = measured(part, normalize)
            made.append((scores - true[normalize] / mean_factor(part.cache, normalize)) / errors)
    for normalize, made in found.items():
        z = torch.stack(made)
        assert 0.8 < rms(z) < 1.2, normalize
        assert abs(float(z.mean())) < 0.3, normalize
        assert float((z.abs() < 1.96).double().mean()) > 0.9, normalize


def test_errors_are_those_between_seeds(tmp_path: Path) -> None:
    """For the methods whose truth no exact gradient tells, too."""
    parts = [queried(tmp_path, seed, preconditioner="kfac")[2] for seed in range(4)]
    for method in METHODS:
        made = [measured(part, "layer", method) for part in parts]
        z = [(a - b) / torch.hypot(x, y) for n, (a, x) in enumerate(made) for b, y in made[:n]]
        assert 0.6 < rms(torch.stack(z)) < 1.4, method


def test_details_are_those_of_a_scan(tmp_path: Path) -> None:
    """Scores, and parts that sum to them; rows in any order, some of them none."""
    _, _, part = queried(tmp_path, include=["*layers*"])
    _, _, packed = queried(tmp_path / "packed", include=["*layers*"], bytes=1024, sample=0)
    rows = torch.stack(
        [torch.randperm(36, generator=torch.Generator().manual_seed(n)) for n in range(QUERIES)]
    )
    rows[:, 3] = -1
    for parts in ([part], [packed], [part, packed]):
        for method in METHODS:
            for normalize in NORMALIZE:
                wanted = scans_of(parts, [], ScoringConfig(normalize, method))
                every = all_scores(wanted).gather(1, rows.clamp(min=0))
                found = details(wanted, rows)
                assert bool(found.scores[:, 3].isnan().all())
                assert bool(found.errors[:, 3].isnan().all())
                kept = rows >= 0
                size = float(every.abs().max())
                close = 2e-2 if method == "datainf" else 5e-3  # scans of packed rows round queries
                torch.testing.assert_close(found.scores[kept], every[kept], rtol=0, atol=close * size)
                summed = found.by_layer.double().sum(2).float()
                torch.testing.assert_close(summed[kept], found.scores[kept], rtol=1e-4, atol=1e-5 * size)
                assert found.layers == tuple(block.name for block in part.cache.layers)
                assert float(found.errors[kept].min()) >= 0


def test_an_example_is_certain_of_itself(tmp_path: Path) -> None:
    attributor, cache, _ = queried(tmp_path, dtype="float32")
    texts = generations_of(attributor.source, ROWS[:2])
    for normalize in ("layer", "cosine", "weighted"):
        wanted = scans_of(
            [QuerySketch(cache, sketch_generations(attributor.source, texts))],
            texts,
            ScoringConfig(normalize),
        )
        found = details(wanted, torch.tensor([[0, 5], [1, 5]]))
        if normalize != "weighted":  # an example with a large gradient has more
            assert found.scores[:, 0].tolist() == pytest.approx([1, 1], abs=1e-4)
        assert float(found.errors[:, 0].max()) < 1e-3 * float(found.errors[:, 1].min())


def test_targets_are_measured_by_their_generation(tmp_path: Path) -> None:
    """The error of a part that is all of a generation is the generation's."""
    attributor, cache, _ = queried(tmp_path)
    (text,) = generations_of(attributor.source, ASKED[:1], targets=[[ASKED[0]["completion"].strip()]])
    assert len(text.spans) == 1
    sketch = sketch_generations(attributor.source, [text])
    both = QuerySketch(cache, sketch, 1.0, sketch / 2)
    for normalize in NORMALIZE:
        found = details(scans_of([both], [text], ScoringConfig(normalize)), EVERY[:2], owners=[0, 0])
        torch.testing.assert_close(found.scores[1], found.scores[0] / 2)
        torch.testing.assert_close(found.errors[1], found.errors[0] / 2)


def test_several_caches(tmp_path: Path) -> None:
    """Another seed brings news, the same one does not."""
    first, same, other = (queried(tmp_path / str(n), seed=seed)[2] for n, seed in enumerate((0, 0, 1)))
    alone = measured(first, "layer")[1]
    halves = [QuerySketch(part.cache, part.sketch, 0.5) for part in (first, same, other)]
    torch.testing.assert_close(measured([halves[0], halves[1]], "layer")[1], alone)
    two = measured([halves[0], halves[2]], "layer")[1]
    torch.testing.assert_close(two, torch.hypot(alone, measured(other, "layer")[1]) / 2, rtol=1e-4, atol=1e-9)


def test_tiny_gradients_have_errors(tmp_path: Path) -> None:
    """In float32 the squares of such products are 0."""
    _, cache, part = queried(tmp_path)
    small = QuerySketch(cache, part.sketch * 1e-18)
    plain, tiny = measured(part, "none"), measured(small, "none")
    for a, b in zip(plain, tiny, strict=True):
        torch.testing.assert_close(b * 1e18, a, rtol=1e-3, atol=0)


def test_one_bin_has_no_error_that_is_known(tmp_path: Path) -> None:
    _, _, part = queried(tmp_path, width=1)
    assert bool(measured(part, "none")[1].isnan().all())


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    _, _, part = queried(tmp_path)
    with pytest.raises(IndexError, match="not in the cache"):
        details(scans_of([part], [], ScoringConfig()), torch.tensor([[3, 36]]))


@pytest.mark.parametrize(
    ("rows", "columns", "k"), [(5, 7, 16), (40, 9, 16), (16, 32, 16), (1, 50, 8), (3, 1, 4)]
)
def test_partners_are_counted(rows: int, columns: int, k: int) -> None:
    counts = []
    for seed in range(150):
        out = sketch_hash.bins(seed, 0, rows, k)[:, None]
        place = ((out + sketch_hash.bins(seed, 2, columns, k)) % k).flatten()
        load = torch.bincount(place, minlength=k).double()
        counts.append(float((load * (load - 1)).sum() / len(place)))
    spread = torch.tensor(counts).std() / math.sqrt(len(counts))
    assert partners(rows, columns, k) == pytest.approx(
        sum(counts) / len(counts), abs=4 * float(spread) + 1e-9
    )


def test_rank_intervals_by_hand() -> None:
    found = rank_intervals([0.9, 0.5, 0.49, 0.48, 0.1], [0.01] * 5)
    assert [(place.first, place.last, place.tied) for place in found] == [
        (1, 1, False),
        (2, 4, False),
        (2, 4, True),
        (2, 4, True),
        (5, 5, False),
    ]
    assert [(p.first, p.last, p.tied) for p in rank_intervals([0.5, 0.4], [0.0, math.nan])] == [
        (1, 2, False),
        (1, 2, True),
    ]
    assert rank_intervals([], []) == []
    same = rank_intervals([0.5, 0.5], [0.0, 0.0])
    assert [(p.first, p.last, p.tied) for p in same] == [(1, 2, False), (1, 2, True)]


@tries(100)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 0.3)), min_size=1, max_size=20))
def test_rank_intervals_hold_the_rank_that_is_shown(pairs: list[tuple[float, float]]) -> None:
    pairs.sort(key=lambda pair: -pair[0])
    found = rank_intervals([score for score, _ in pairs], [error for _, error in pairs])
    for n, place in enumerate(found):
        assert 1 <= place.first <= n + 1 <= place.last <= len(pairs)
    assert not found[0].tied
