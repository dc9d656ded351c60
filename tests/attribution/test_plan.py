"""rapidin.attribution.plan: the cost of a cache, estimated from a few passes."""

from __future__ import annotations

import sys

import pytest
from tiny import tiny_llama, tiny_tokenizer

from rapidin.attribution.plan import kept_of_sample, make_plan
from rapidin.gradients.kept import KEPT_BYTES
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.settings import GradientSettings
from rapidin.gradients.source import GradientSource

TEXTS, TOKENS = 64, 64


def source() -> GradientSource:
    model = tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=3)
    settings = GradientSettings(batch_tokens=TEXTS * TOKENS)
    return GradientSource(LoadedModel.of(model, tiny_tokenizer()), settings)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the peak of memory anew")
def test_a_batch_takes_as_much_memory_as_is_extrapolated_from_some_of_its_examples() -> None:
    some = make_plan(source(), 1000, tokens=TOKENS, measured_seconds=0)
    batch = make_plan(source(), 1000, tokens=TOKENS, measured_seconds=1e9)
    assert some.formats[0].cache_bytes == batch.formats[0].cache_bytes
    # The peak of four texts is below half of the batch's.
    assert 0.75 < some.memory / batch.memory < 1.5


def test_gradients_of_the_sample_are_kept_up_to_the_limit() -> None:
    assert kept_of_sample(0, 4, 128) == (0, 0)
    assert kept_of_sample(4 << 20, 4, 37) == (37 << 20, 37)
    assert kept_of_sample(KEPT_BYTES // 2, 4, 37) == (KEPT_BYTES, 8)
