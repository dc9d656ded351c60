"""Gradients that are kept while the preconditioner is fitted give the sketches of a pass of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_types import tiny_causal
from tiny import records, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.data.encoding import AnyExample, Status
from rapidin.gradients.kept import KeptGradients
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.preconditioner import Preconditioner, PreconditionerConfig
from rapidin.gradients.scale import Scale
from rapidin.gradients.source import GradientSource

KFAC = PreconditionerConfig("kfac", sample=12, rank=5)
ALL = {"include": ("*",)}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (lambda: tiny_lora(tiny_llama()), {}),
    "whole llama": (lambda: tiny_llama(attention_bias=True), ALL),
    "tied llama": (lambda: tiny_llama(tie_word_embeddings=True), ALL),
    "whole gpt2": (tiny_gpt2, ALL),
    "routed": (lambda: tiny_causal("mixtral"), ALL),
    "flat": (lambda: tiny_lora(tiny_llama()), {"projection": "flat"}),
    "rapidgrad": (lambda: tiny_lora(tiny_llama()), {"projection": "rapidgrad"}),
}


def source_of(model: Any, **settings: Any) -> GradientSource:
    return Attributor(model, tiny_tokenizer(), **{"width": 64, "preconditioner": KFAC} | settings).source


def encoded(source: GradientSource) -> list[AnyExample]:
    return [source.example(record) for record in records(12)]


def sketched(
    source: GradientSource, fitted: Preconditioner, kept: KeptGradients, count: int = 12
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Sketches [count, blocks, width] and status [count] of the texts whose gradients are kept, and their
    numbers."""
    out = torch.zeros(count, source.blocks, source.width)
    status, numbers = torch.full((count,), 255, dtype=torch.uint8), []
    for chosen, sketch, of_batch in source.with_preconditioner(fitted).of_kept(kept):
        out[chosen], status[chosen] = sketch, of_batch
        numbers += chosen
    return out, status, numbers


@pytest.mark.parametrize("name", MODELS)
def test_their_sketches_are_those_of_a_pass_of_their_own(name: str) -> None:
    make, settings = MODELS[name]
    source, kept = source_of(make(), **settings), KeptGradients()
    texts = encoded(source)
    fitted = source.fit_preconditioner(texts, kept=kept)
    assert fitted.data == source.fit_preconditioner(texts).data
    got, status, numbers = sketched(source, fitted, kept)
    want, _ = source.with_preconditioner(fitted).sketches(texts)
    assert sorted(numbers) == list(range(12))
    assert status.tolist() == [0] * 12
    # Of the same batches, so nothing but a gradient that was formed is rounded in another way.
    assert float(want.norm(dim=-1).amin(0).max()) > 0
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
    assert float(error.max()) < 1e-5
    assert list(source.of_kept(kept)) == []  # they are let go of


def test_factors_give_the_same_bits() -> None:
    """Layers that are wide for the number of tokens are not formed."""
    source, kept = source_of(tiny_llama(hidden_size=256, intermediate_size=256)), KeptGradients()
    texts = encoded(source)
    fitted = source.fit_preconditioner(texts, kept=kept)
    got, _, _ = sketched(source, fitted, kept)
    assert torch.equal(got, source.with_preconditioner(fitted).sketches(texts)[0])


def test_no_more_is_kept_than_the_limit_allows() -> None:
    source, everything = source_of(tiny_lora(tiny_llama()), batch_tokens=1), KeptGradients()
    texts = encoded(source)
    want = source.fit_preconditioner(texts, kept=everything)
    assert everything.bytes > 0
    some = KeptGradients(everything.bytes // 2)
    assert source.fit_preconditioner(texts, kept=some).data == want.data
    assert everything.bytes // 4 < some.bytes <= everything.bytes // 2
    got, status, numbers = sketched(source, want, some)
    whole, _, _ = sketched(source, want, everything)
    assert 3 <= len(numbers) <= 8
    assert torch.equal(got[numbers], whole[numbers])
    assert (status == 255).sum() == 12 - len(numbers)
    nothing = KeptGradients(100)  # less than a single batch takes
    assert source.fit_preconditioner(texts, kept=nothing).data == want.data
    assert (nothing.bytes, list(nothing.taken())) == (0, [])


def test_none_are_kept_once_memory_has_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept = source_of(tiny_lora(tiny_llama()), batch_tokens=64), KeptGradients()
    texts = encoded(source)
    add, failed = FactorMoments.add_factors, []

    def short(self: FactorMoments, n: int, columns: torch.Tensor, rows: torch.Tensor) -> None:
        if kept.bytes:  # from the second batch on
            failed.append(n)
            torch.empty(1 << 50, dtype=torch.uint8)
        add(self, n, columns, rows)

    monkeypatch.setattr(FactorMoments, "add_factors", short)
    fitted = source.fit_preconditioner(texts, kept=kept)
    assert len(failed) == 1
    assert list(kept.taken()) == []
    for name, scale in source.fit_preconditioner(texts).points[0].items():
        torch.testing.assert_close(fitted.points[0][name].rows, scale.rows, rtol=1e-4, atol=0.0)
        torch.testing.assert_close(fitted.points[0][name].columns, scale.columns, rtol=1e-4, atol=0.0)


def test_gradients_that_are_changed_in_place_afterwards_are_not_sketched() -> None:
    source, kept = source_of(tiny_llama(hidden_size=256, intermediate_size=256)), KeptGradients()
    inputs: list[torch.Tensor] = []
    layer = source.loaded.model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    texts = encoded(source)
    fitted = source.fit_preconditioner(texts, kept=kept)
    handle.remove()
    inputs[-1].zero_()
    _, _, numbers = sketched(source, fitted, kept)
    assert len(numbers) < 12


def test_a_sketch_that_is_not_finite_says_so() -> None:
    source, kept = source_of(tiny_lora(tiny_llama()), batch_tokens=1), KeptGradients()
    texts = encoded(source)
    fitted = source.fit_preconditioner(texts, kept=kept)
    name, scale = next(iter(fitted.points[0].items()))
    endless = Scale(torch.full_like(scale.rows, torch.inf), scale.columns)
    fitted = Preconditioner([{**fitted.points[0], name: endless}])
    got, status, _ = sketched(source, fitted, kept)
    want, expected = source.with_preconditioner(fitted).sketches(texts)
    assert int(Status.NONFINITE) in expected.tolist()
    assert torch.equal(status, expected)
    assert torch.equal(got[status > 0], want[expected > 0])


def test_they_are_not_kept_where_the_model_stands_at_several_points() -> None:
    source = source_of(tiny_lora(tiny_llama()), at=[0.0, 1.0])
    assert not source.keeps_gradients
    assert source_of(tiny_lora(tiny_llama()), at=[1.0]).keeps_gradients
    assert not source_of(tiny_lora(tiny_llama()), preconditioner="sample").keeps_gradients
