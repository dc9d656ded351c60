"""What tokens of training examples bring to scores, sketched and exact, against gradients that are formed."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_types import tiny_causal
from fitted import fitted
from own_gradients import exact_gradients
from tiny import records, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor

from rapidin.attribution import methods, token_contributions
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.attribution.generate import generations_of
from rapidin.attribution.hit_gradients import sketched_contributions
from rapidin.attribution.options import NORMALIZE
from rapidin.attribution.query_sketch import target_texts
from rapidin.errors import UserError
from rapidin.results.types import Hit, QueryResult
from rapidin.tasks.causal import TokenBatch, example_losses

QUERIES = [
    {"prompt": "Howdy! What is the capital of France?", "completion": " The capital of France is Paris."},
    {"prompt": "One, two,", "completion": " three, four, five."},
]
ROWS = records()
ALL = [(m, n) for m in methods.METHODS for n in NORMALIZE]

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (tiny_llama, {}),
    "flat": (tiny_llama, {"projection": "flat", "width": 128}),
    "rapidgrad": (lambda: tiny_lora(tiny_llama()), {"projection": "rapidgrad", "width": 128}),
    "several points, Adam's preconditioner": (
        lambda: tiny_lora(tiny_llama()),
        {"at": [0.2, 0.8], "preconditioner": "sample"},
    ),
    # Conv1D, biases, norms, embeddings, of which one is the output head, too
    "all of GPT-2": (tiny_gpt2, {"include": ["*"], "preconditioner": "off"}),
    "all of GPT-2, kfac": (tiny_gpt2, {"include": ["*"]}),
    "routed experts": (lambda: tiny_causal("mixtral"), {}),
}


def hits(result: QueryResult) -> list[Hit]:
    return [*result.top, *result.bottom]


QUICK = ("plain", "flat", "rapidgrad")


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.full) for k in KINDS]
)
def test_positions_make_up_the_score(kind: str, tmp_path: Path) -> None:
    model, options = KINDS[kind]
    attributor = Attributor(model(), tiny_tokenizer(), **{"width": 64} | options)
    cache = attributor.cache(ROWS, tmp_path, dtype="float32")
    targets = None if kind == "rapidgrad" else "tokens"
    for method, normalize in (
        ALL
        if kind == "plain"
        else [("dot", "weighted"), ("dot", "layer"), ("dot", "cosine"), ("fisher", "none")]
    ):
        results = attributor.query(
            cache, QUERIES, targets=targets, method=method, normalize=normalize,
            contributions=True, examples=ROWS, top_k=6,
        )  # fmt: skip
        for result in results:
            size = max(abs(hit.score) for hit in hits(result))
            for hit in hits(result):
                tokens = hit.tokens
                assert tokens is not None
                encoded = attributor.source.encoder(ROWS[hit.row])
                assert len(tokens.pieces) == len(tokens.contributions) == len(encoded.ids)
                assert list(tokens.counts) == encoded.target
                # DataInf's turned vectors are thousands of times as large as the products they make.
                close = 5e-3 if method == "datainf" else 1e-4
                assert sum(tokens.contributions) == pytest.approx(hit.score, abs=close * size)
                if targets is None:
                    assert tokens.by_target is None
                    continue
                assert tokens.by_target is not None
                assert tokens.by_target.shape == (len(result.targets), len(encoded.ids))
                assert tokens.by_target.sum(1) == pytest.approx(hit.targets, abs=close * size)
                assert tokens.by_target.sum(0) == pytest.approx(tokens.contributions, abs=close * size)
                # What is read after the last token that counts brings nothing.
                assert tokens.contributions[-1] == pytest.approx(0, abs=1e-6 * size)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"bytes": 256, "sample": 16}])
def test_positions_of_packed_rows_make_up_the_score_as_far_as_the_code_goes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=128)
    cache = attributor.cache(ROWS, tmp_path, **options)
    result = attributor.query(cache, QUERIES, contributions=True, examples=ROWS, top_k=30)[0]
    got = torch.tensor([sum(hit.tokens.contributions) for hit in result.top if hit.tokens])
    want = torch.tensor([hit.score for hit in result.top])
    assert float((got - want).norm() / want.norm()) < (0.02 if "dtype" in options else 0.6)


def test_a_position_brings_its_own_outer_product() -> None:
    """Against gradients made by hand: what reaches a layer's output at a position, and its input there."""
    model = tiny_llama()
    attributor = Attributor(
        model, tiny_tokenizer(), width=64, preconditioner="off", include=["q_proj", "down_proj"]
    )
    text = attributor.source.encoder(ROWS[3])
    held: dict[str, tuple[Tensor, Tensor]] = {}
    names = [target.name.removesuffix(".weight") for target in attributor.source.targets]
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, output: Tensor) -> None:
            output.register_hook(lambda grad: held.__setitem__(name, (args[0].detach()[0], grad[0])))

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    example_losses(model, TokenBatch.of([(text.ids, text.target)])).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    vectors = torch.randn(3, len(names), 64)
    (products,), (sketches,) = attributor.source.sketcher.positions(
        TokenBatch.of([(text.ids, text.target)]), vectors
    )
    from rapidin import ops

    for n, name in enumerate(names):
        columns, rows = held[name]
        for t in range(len(text.ids)):
            one = ops.matrix_sketch(
                torch.outer(rows[t], columns[t]), 64, seed=attributor.source.sketcher.seeds[n]
            )
            assert torch.allclose(products[t, :, n], vectors[:, n] @ one, atol=1e-5)
        whole = ops.matrix_sketch(rows.T @ columns, 64, seed=attributor.source.sketcher.seeds[n])
        assert torch.allclose(sketches[n], whole, atol=1e-5)


# ------------------------------------------------------------------------------------------------- exact


def formed(attributor: Attributor, text: Any) -> list[Tensor]:
    """The gradient of each target at each point, [O, I] float64."""
    found = []
    for number in range(len(attributor.source.points)):
        with attributor.source.at(number):
            exact = exact_gradients(attributor.source.sketcher, (text.ids, text.target), number)
            found += [gradient.double() for gradient in exact]
    return found


def exact_score(
    query: list[Tensor], whole: list[Tensor], row: list[Tensor], normalize: str, factor: float = 1.0
) -> float:
    """query: the gradient, or a part of it, of `whole`; factor: the mean of those of all rows."""
    if normalize == "layer":
        parts = [
            float((q * y).sum() / (w.norm() * y.norm())) for q, w, y in zip(query, whole, row, strict=True)
        ]
        return sum(parts) / len(parts)
    if normalize == "weighted":
        sums = [float((q * y).sum() / y.norm()) for q, y in zip(query, row, strict=True)]
        logs = [float(y.norm().log()) for y in row]
        return sum(sums) / sum(float(w.norm()) for w in whole) * exp(sum(logs) / len(logs) / 4) / factor
    dot = sum(float((q * y).sum()) for q, y in zip(query, row, strict=True))
    if normalize == "none":
        return dot
    sizes = [sum(float(g.square().sum()) for g in grads) ** 0.5 for grads in (whole, row)]
    return dot / (sizes[0] * sizes[1])


EXACT = (
    "plain",
    "several points, Adam's preconditioner",
    "kfac, adapter",
    "routed experts",
    "all of GPT-2, kfac",
)


@pytest.mark.parametrize(
    ("kind", "normalize"),
    [
        (k, n)
        if k == "plain" or (k, n) == ("routed experts", "layer")
        else pytest.param(k, n, marks=pytest.mark.full)
        for k in EXACT
        for n in methods.NORMALIZE
    ],
)
def test_exact_scores_are_those_of_formed_gradients(kind: str, normalize: str, tmp_path: Path) -> None:
    model, options = KINDS.get(kind, (lambda: tiny_lora(tiny_llama()), {}))
    attributor = Attributor(model(), tiny_tokenizer(), **{"width": 16} | options)
    cache = attributor.cache(ROWS, tmp_path)
    told: list[tuple[str, int, int]] = []
    results = attributor.query(
        cache, QUERIES, targets="tokens", normalize=normalize, rescore="exact", candidates=7, top_k=4,
        contributions=True, examples=ROWS, on_stage=lambda *told_of: told.append(told_of),
    )  # fmt: skip
    estimates = attributor.scores(cache, QUERIES, normalize=normalize)
    attributor = fitted(attributor, cache)
    lengths = cache.lengths()[cache.status() == 0]
    factor = float((lengths.log().mean(1).exp() ** 0.25).mean())
    live = (~estimates[0].isnan()).nonzero()[:, 0].tolist()
    rows = {n: formed(attributor, attributor.source.encoder(ROWS[n])) for n in live}
    for n, (result, query) in enumerate(zip(results, QUERIES, strict=True)):
        assert result.exact
        whole = formed(attributor, attributor.source.encoder(query))
        want = {row: exact_score(whole, whole, rows[row], normalize, factor) for row in rows}
        size = max(map(abs, want.values()))
        seen = estimates[n].nan_to_num(0)
        order = seen.argsort(stable=True).tolist()
        candidates = {*order[-7:], *order[:7]}
        ranked = sorted(candidates & want.keys(), key=lambda row: -want[row])
        assert [hit.row for hit in result.top] == ranked[:4]
        assert [hit.row for hit in result.bottom] == ranked[::-1][:4]
        for hit in hits(result):
            assert hit.score == pytest.approx(want[hit.row], abs=1e-5 * size)
            assert hit.estimate == pytest.approx(float(estimates[n, hit.row]), abs=1e-6 * size)
            assert hit.tokens is not None
            assert sum(hit.tokens.contributions) == pytest.approx(hit.score, abs=1e-6 * size)
            assert sum(hit.targets) == pytest.approx(hit.score, abs=1e-4 * size)
        text = generations_of(attributor.source, [query], targets=[[(2, 9)]])[0]
        asked = target_texts([text], attributor.settings.loss)
        (part,), (weight,) = asked.texts, asked.weights
        spanned = [weight * g for g in formed(attributor, part)]
        hit = result.top[0]
        got = sum(hit.targets[place] for place in text.spans[0].positions)
        assert got == pytest.approx(
            exact_score(spanned, whole, rows[hit.row], normalize, factor), abs=1e-4 * size
        )
    assert {stage for stage, _, _ in told} >= {"tokens of the answer", "scan caches", "exact gradients"}
    _, done, total = [step for step in told if step[0] == "exact gradients"][-1]
    assert done >= total > 0


@pytest.mark.parametrize("normalize", methods.NORMALIZE)
def test_queries_in_several_chunks_get_the_same(normalize: str) -> None:
    attributor = Attributor(
        tiny_lora(tiny_llama()), tiny_tokenizer(), width=16, at=[0.2, 0.8], preconditioner="off"
    )
    source, rows = attributor.source, [attributor.source.encoder(row) for row in ROWS[:3]]
    queries = [source.encoder(row) for row in (*QUERIES, *ROWS[3:6])]
    given: Any = (source, queries, [1.0, -2.0, 0.5, 1.0, 1.0], [0, 1, 1, 3, 4], rows, normalize)
    with source.at(0):
        sizes = [
            4
            * sum(
                gradient.smallest().elements
                for gradient in token_contributions.exact_gradients(source, query, 0)
            )
            for query in queries
        ]
    whole = token_contributions.exact(*given)
    for memory_bytes in (2 * max(sizes), 1):
        passes: list[int] = []
        got = token_contributions.exact(*given, passes.append, memory_bytes)
        chunks = passes[-1] // (len(rows) * len(source.points))
        assert chunks == 5 if memory_bytes == 1 else chunks in (2, 3)
        for of_text, want in zip(got, whole, strict=True):
            torch.testing.assert_close(of_text, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert passes[-1] == 5 * len(rows) * len(source.points)
    query = methods.prepare(torch.randn(5, source.blocks, 16), normalize=normalize)
    done: list[int] = []
    together = sketched_contributions(source, rows, query, on_text=done.append)
    assert done[-1] == len(rows)
    for n, row in enumerate(rows):
        assert together[n].shape == (5, row.length)
        (alone,) = sketched_contributions(source, [row], query, memory_bytes=1)
        torch.testing.assert_close(alone, together[n], rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_exact_scores_of_a_target_set_are_the_weighted_mean(tmp_path: Path) -> None:
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=16)
    cache = attributor.cache(ROWS, tmp_path)
    asked = [QUERIES[0] | {"weight": 3.0}, QUERIES[1] | {"weight": -1.0}]
    options: dict[str, Any] = {"rescore": "exact", "candidates": 30, "top_k": 30, "examples": ROWS}
    alone = attributor.query(cache, QUERIES, **options)
    scores = [{hit.row: hit.score for hit in result.top} for result in alone]
    (result,) = attributor.query(cache, asked, together=True, contributions=True, **options)
    for hit in result.top:
        want = 0.75 * scores[0][hit.row] - 0.25 * scores[1][hit.row]
        assert hit.score == pytest.approx(want, abs=1e-6)
        assert hit.tokens is not None
        assert sum(hit.tokens.contributions) == pytest.approx(want, abs=1e-6)


def test_exact_and_sketched_contributions_agree_with_many_bins(tmp_path: Path) -> None:
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=16384)
    cache = attributor.cache(ROWS[:8], tmp_path)
    options: dict[str, Any] = {"contributions": True, "examples": ROWS[:8], "top_k": 8}
    (sketched,) = attributor.query(cache, QUERIES[:1], **options)
    (exact,) = attributor.query(cache, QUERIES[:1], rescore="exact", **options)
    want = {hit.row: hit.tokens for hit in exact.top}
    for hit in sketched.top:
        ours, theirs = hit.tokens, want[hit.row]
        assert ours is not None
        assert theirs is not None
        assert ours.contributions == pytest.approx(theirs.contributions, abs=0.02)


def test_a_finer_cache_and_its_own_sketches(tmp_path: Path) -> None:
    attributor = Attributor(tiny_llama(), tiny_tokenizer(), width=64)
    coarse = attributor.cache(ROWS, tmp_path / "coarse", bytes=128, sample=0)
    fine = attributor.cache(ROWS, tmp_path / "fine", dtype="float32")
    ensemble = Ensemble([Member(coarse.path, 1.0, attributor.source)])
    (result,) = ensemble.query(
        QUERIES[:1], rescore=fine, targets="tokens", contributions=True, examples=ROWS, top_k=5
    )
    for hit in hits(result):
        assert hit.tokens is not None
        assert sum(hit.tokens.contributions) == pytest.approx(hit.score, abs=1e-5)
        assert sum(hit.targets) == pytest.approx(hit.score, abs=1e-5)


def test_what_has_no_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attributor = Attributor(tiny_gpt2(), tiny_tokenizer(), width=64, include=["*"], preconditioner="off")
    cache = attributor.cache(ROWS, tmp_path)
    # A module that mixes positions has no gradient of single ones.
    norm = next(m for m in attributor.loaded.model.modules() if isinstance(m, torch.nn.LayerNorm))
    whole = norm.forward
    monkeypatch.setattr(norm, "forward", lambda input: whole(input + input.mean(1, keepdim=True)))
    for rescore in (None, "exact"):
        with pytest.raises(UserError, match="does not come token by token"):
            attributor.query(cache, QUERIES, contributions=True, rescore=rescore, examples=ROWS)
    (result,) = attributor.query(cache, QUERIES[:1], rescore="exact", examples=ROWS)
    assert result.exact
    assert result.top[0].tokens is None
