"""Caches of variants: what they are made with, and that queries are preconditioned as their rows are."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from rapidin import Attributor
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.evaluate.tuned import TunedModel
from rapidin.evaluate.variants import Variant, VariantCaches

ROWS = [{"prompt": f"Row {n}: the", "completion": f" fox {n % 4} jumps"} for n in range(16)]


@pytest.fixture
def tuned(tmp_path: Path) -> TunedModel:
    saved = save_tiny(tmp_path, lora=True)
    assert saved.adapter == tmp_path / "adapter"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TunedModel(tmp_path, str(saved.model), lora=8)


@pytest.mark.parametrize("variant", [Variant((0.5,)), Variant((0.1, 1.0), 256), Variant((1.0,), None, "off")])
def test_queries_are_scored_as_the_attributor_of_the_cache_scores_them(
    tuned: TunedModel, variant: Variant
) -> None:
    caches = VariantCaches(tuned.folder / "caches", open_examples(tuned.folder / "train.jsonl"), width=64)
    sketches, generations = caches.query(variant, tuned, ROWS[:3])
    (sketch,) = sketches
    assert [generation.completion for generation in generations] == [row["completion"] for row in ROWS[:3]]
    assert sketch.cache.path.name == f"{variant.folder}-width-64"
    attributor = Attributor.from_cache(sketch.cache.path)
    expected, status = attributor.source.sketches([attributor.source.encoder(row) for row in ROWS[:3]])
    assert not status.any()
    assert (attributor.source.preconditioner is None) == (variant.preconditioner == "off")
    torch.testing.assert_close(sketch.sketch, expected, rtol=1e-4, atol=1e-6)


def test_checkpoints_that_were_not_kept(tuned: TunedModel) -> None:
    caches = VariantCaches(tuned.folder / "caches", open_examples(tuned.folder / "train.jsonl"), width=64)
    for variant in (Variant(None), Variant((0.5,), None, "optimizer")):
        with pytest.raises(UserError, match=r"none were kept|no checkpoints were kept"):
            caches.query(variant, tuned, ROWS[:1])
