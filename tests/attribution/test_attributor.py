"""The two loops: what is cached, what is found, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitted import fitted
from tiny import records, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.generate import generations_of
from rapidin.attribution.options import NORMALIZE
from rapidin.cache import Cache
from rapidin.cache.progress import Progress
from rapidin.data.encoding import Status
from rapidin.errors import UserError
from rapidin.tasks.causal import TokenBatch


@pytest.fixture(scope="module")
def attributor() -> Attributor:
    return Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=64)


@pytest.fixture(scope="module")
def cache(attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return attributor.cache(records(), tmp_path_factory.mktemp("cache"), shard_rows=7)


def raw(attributor: Attributor, rows: list[dict[str, Any]]) -> torch.Tensor:
    """[n, blocks, width]: each record alone."""
    encoded = [attributor.source.encoder(record) for record in rows]
    with attributor.loaded.path.at(attributor.source.points[0]):
        return torch.cat([attributor.source.sketcher(TokenBatch.of([(e.ids, e.target)]))[0] for e in encoded])


def test_rows_are_the_examples_own_sketches_in_order(attributor: Attributor, cache: Cache) -> None:
    want = raw(fitted(attributor, cache), records())
    got = cache.sketches().view(want.shape) * cache.lengths()[:, :, None]
    assert float((got - want).norm() / want.norm()) < 1e-3  # float16
    assert cache.index().tolist() == list(range(30))
    assert cache.manifest.counts["ok"] == 30
    assert cache.manifest.gradient["at"] == [0.5]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_scores_are_what_the_formulas_say(attributor: Attributor, cache: Cache, normalize: str) -> None:
    query = {"prompt": "the fox: ", "completion": "seven lazy dogs"}
    alone = fitted(attributor, cache)
    g, x = raw(alone, [query])[0].double(), raw(alone, records()).double()
    products = torch.einsum("bk,nbk->nb", g, x)
    lengths = x.norm(dim=-1) * g.norm(dim=-1)
    long = x.norm(dim=-1).log().mean(1).exp() ** 0.25
    want = {
        "layer": (products / lengths).mean(1),
        "weighted": (products / x.norm(dim=-1)).sum(1) / g.norm(dim=-1).sum() * long / long.mean(),
        "none": products.sum(1),
        "cosine": products.sum(1) / (x.flatten(1).norm(dim=1) * g.norm()),
    }[normalize]
    (result,) = attributor.query(cache, [query], top_k=30, normalize=normalize)  # type: ignore[arg-type]
    got = torch.empty(30, dtype=torch.float64)
    for hit in result.top:
        got[hit.row] = hit.score
    assert float((got - want).abs().max() / want.std()) < 5e-3
    assert [hit.row for hit in result.top] == [hit.row for hit in result.bottom][::-1]
    assert [hit.rank for hit in result.top] == list(range(1, 31))


def test_an_example_is_its_own_best_explanation(attributor: Attributor, cache: Cache) -> None:
    rows = records()
    results = attributor.query(cache, rows[:6], top_k=3, examples=rows, normalize="layer")
    for n, result in enumerate(results):
        assert result.top[0].index == n
        assert result.top[0].score == pytest.approx(1.0, abs=1e-3)
        assert result.top[0].example == rows[n]
        assert len(result.top) == len(result.bottom) == 3


def test_many_queries_at_once_are_each_alone(attributor: Attributor, cache: Cache) -> None:
    queries = records(5, seed=3)
    together = attributor.query(cache, queries, top_k=4)
    for query, result in zip(queries, together, strict=True):
        (alone,) = attributor.query(cache, [query], top_k=4)
        assert [h.row for h in alone.top] == [h.row for h in result.top]
        assert [h.score for h in alone.top] == pytest.approx([h.score for h in result.top], abs=1e-5)


def test_one_pair_record_or_prompt_and_a_data_frame_are_asked_as_they_are_meant(
    attributor: Attributor, cache: Cache
) -> None:
    import pandas as pd

    pair = ("one two: ", "three")
    record = dict(zip(("prompt", "completion"), pair, strict=True))
    (wanted,) = attributor.query(cache, [pair], top_k=3)
    for given in (pair, record, [record], [list(pair)], pd.DataFrame([record]), iter([pair])):
        (found,) = attributor.query(cache, given, top_k=3)
        assert (found.prompt, found.completion, found.top) == (*pair, wanted.top)
    for given in ("one two: ", ["one two: "], {"prompt": "one two: "}):
        (found,) = attributor.query(cache, given, top_k=3, max_new_tokens=3)
        assert found.generated
        assert found.prompt == "one two: "
    for given in (7, [("a", "b", "c")], [None]):
        with pytest.raises(UserError, match=r"give .* pairs, prompts, or records"):
            attributor.query(cache, given)


def test_answers_are_written_without_dropout_and_the_model_is_left_as_it_was(
    attributor: Attributor, cache: Cache
) -> None:
    model = attributor.loaded.model
    wanted = generations_of(attributor.source, [{"prompt": "one two: "}], 8)[0].completion
    model.train()
    try:
        found = [
            generations_of(attributor.source, [{"prompt": "one two: "}], 8)[0].completion for _ in range(5)
        ]
        assert model.training
    finally:
        model.eval()
    assert found == [wanted] * 5


def test_shards_change_no_hit(attributor: Attributor, cache: Cache, tmp_path: Path) -> None:
    whole = attributor.cache(records(), tmp_path / "one", shard_rows=1000)
    queries = records(3, seed=4)
    for a, b in zip(attributor.query(cache, queries), attributor.query(whole, queries), strict=True):
        assert [(h.row, round(h.score, 5)) for h in a.top] == [(h.row, round(h.score, 5)) for h in b.top]
        assert [h.row for h in a.bottom] == [h.row for h in b.bottom]


def test_caching_twice_gives_the_same_bytes_and_resuming_does_no_work(
    attributor: Attributor, tmp_path: Path
) -> None:
    for name in "ab":
        attributor.cache(records(), tmp_path / name, shard_rows=7)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]
    seen: list[Progress] = []
    attributor.cache(records(), tmp_path / "a", shard_rows=7, on_progress=seen.append)
    assert seen[-1].done == seen[-1].total == seen[-1].resumed == 30
    assert seen[-1].tokens == 0


def test_a_stopped_run_goes_on(attributor: Attributor, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done >= 50:  # 32 are sketched as the preconditioner is fitted
            raise Stop

    rows = records(60)
    with pytest.raises(Stop):
        attributor.cache(rows, tmp_path / "stopped", shard_rows=7, on_progress=stop)
    done = len(Cache(tmp_path / "stopped"))
    assert 7 <= done < 60
    seen: list[Progress] = []
    again = attributor.cache(rows, tmp_path / "stopped", shard_rows=7, on_progress=seen.append)
    assert done < seen[0].resumed < 60
    assert seen[-1].done == 60
    whole = attributor.cache(rows, tmp_path / "whole", shard_rows=7)
    assert torch.equal(again.sketches(), whole.sketches())


def test_examples_that_cannot_count_are_counted_and_never_hit(attributor: Attributor, tmp_path: Path) -> None:
    rows = records(6)
    rows.insert(1, {"prompt": "", "completion": ""})
    rows.insert(3, {"prompt": "tips", "completion": ""})
    rows.append({"prompt": "one ", "completion": "two " * 300})
    made = attributor.cache(rows, tmp_path / "truncate")
    assert made.manifest.counts == {
        "ok": 7, "empty": 1, "no_target": 1, "too_long": 0, "nonfinite": 0, "malformed": 0, "too_large": 0,
        "truncated": 1,
    }  # fmt: skip
    (result,) = attributor.query(made, [("the ", "fox")], top_k=100)
    assert sorted(h.row for h in result.top) == [0, 2, 4, 5, 6, 7, 8]
    skipping = Attributor(attributor.loaded, width=64, too_long="skip")
    made = skipping.cache(rows, tmp_path / "skip")
    assert made.status().tolist()[-1] == Status.TOO_LONG
    (result,) = skipping.query(made, [("the ", "fox")], top_k=100)
    assert sorted(h.row for h in result.bottom) == [0, 2, 4, 5, 6, 7]


def test_gradients_with_nan_are_counted_and_never_hit(tmp_path: Path) -> None:
    model = tiny_llama()
    tokenizer = tiny_tokenizer()
    (bad,) = tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    attributor = Attributor(model, tokenizer, width=32)
    rows = [*records(4), {"prompt": "Z", "completion": "two"}, *records(4, seed=5)]
    made = attributor.cache(rows, tmp_path)
    assert made.manifest.counts["nonfinite"] == 1
    assert made.status()[4] == Status.NONFINITE
    assert bool(made.sketches().isfinite().all())
    for normalize in NORMALIZE:
        (result,) = attributor.query(made, [("the ", "fox")], top_k=100, normalize=normalize)  # type: ignore[arg-type]
        assert sorted(h.row for h in result.top) == [0, 1, 2, 3, 5, 6, 7, 8]
    with pytest.raises(UserError, match="NaN or Inf"):
        attributor.query(made, [("Z", "two")])


def test_several_points_are_several_groups_of_blocks_and_add_up(
    attributor: Attributor, tmp_path: Path
) -> None:
    both = Attributor(attributor.loaded, width=64, at=[0.25, 0.5])
    made = both.cache(records(), tmp_path / "both")
    assert len(made.layers) == 2 * len(attributor.layers)
    queries = records(2, seed=6)
    parts = []
    for at in (0.25, 0.5):
        one = Attributor(attributor.loaded, width=64, at=at)
        cache = one.cache(records(), tmp_path / str(at))
        results = one.query(cache, queries, top_k=30, normalize="layer")
        parts.append(
            torch.stack(
                [torch.tensor([s for _, s in sorted((h.row, h.score) for h in r.top)]) for r in results]
            )
        )
    got = [
        torch.tensor([s for _, s in sorted((h.row, h.score) for h in r.top)])
        for r in both.query(made, queries, top_k=30, normalize="layer")
    ]
    torch.testing.assert_close(torch.stack(got), (parts[0] + parts[1]) / 2, atol=1e-5, rtol=0)


def test_the_models_own_answer_is_the_tuned_models_and_its_own_tokens(
    attributor: Attributor, cache: Cache
) -> None:
    prompt = "What is the capital of "
    ids = torch.tensor([attributor.loaded.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        written = attributor.loaded.model.generate(input_ids=ids, do_sample=False, max_new_tokens=8)[
            0, ids.shape[1] :
        ]
    (result,) = attributor.query(cache, [{"prompt": prompt}], max_new_tokens=8)
    assert result.generated
    assert result.completion == attributor.loaded.tokenizer.decode(written, skip_special_tokens=True)
    assert result.completion == attributor.generate(prompt, max_new_tokens=8)


def test_a_cache_of_another_model_seed_or_tokenizer_is_refused(attributor: Attributor, cache: Cache) -> None:
    others = {
        "another adapter": Attributor(tiny_lora(tiny_llama(), seed=5), tiny_tokenizer(), width=64),
        "another model": Attributor(tiny_lora(tiny_llama(3)), tiny_tokenizer(), width=64),
        "another tokenizer": Attributor(attributor.loaded.model, tiny_tokenizer(bos=True), width=64),
        "(sketch)": Attributor(attributor.loaded, width=64, seed=1),
        "(gradient)": Attributor(attributor.loaded, width=64, at=1),
    }
    for words, other in others.items():
        with pytest.raises(UserError) as error:
            other.query(cache, [("a", "b")])
        assert words in str(error.value)
    with pytest.raises(UserError, match=r"seed: 0 in the cache, 1 requested"):
        Attributor(attributor.loaded, width=64, seed=1).cache(records(), cache.path)
    with pytest.raises(UserError, match="from other data"):
        attributor.cache(records(30, seed=9), cache.path, shard_rows=7)


def test_changed_training_data_is_never_shown_as_if_it_were_the_old(
    attributor: Attributor, cache: Cache
) -> None:
    rows = records()
    changed = [{**row, "completion": "else"} for row in rows]
    with pytest.raises(UserError, match="not what was cached"):
        attributor.query(cache, rows[:1], examples=changed)
    (result,) = attributor.query(cache, rows[:1], examples=False)
    assert result.top[0].example is None


@pytest.mark.parametrize("projection", ["tensor", "flat", "rapidgrad"])
def test_every_parameter_of_gpt2_in_each_projection(tmp_path: Path, projection: Any) -> None:
    model, rows = tiny_gpt2(), records(12)
    width = 2048 if projection == "rapidgrad" else 128
    made = Attributor(model, tiny_tokenizer(), width=width, include=["*"], projection=projection)
    cache = made.cache(rows, tmp_path)
    assert len(cache.layers) == (1 if projection == "rapidgrad" else len(made.source.targets))
    assert [r.top[0].index for r in made.query(cache, rows)] == list(range(12))


def test_rapidgrad_estimates_the_layer_normalized_score(tmp_path: Path) -> None:
    """One block of many numbers and a block a layer tell the same, up to the noise of both."""
    model, rows, queries = tiny_llama(), records(40), records(3, seed=8)
    scores = []
    for projection, width in (("tensor", 2048), ("rapidgrad", 16384)):
        made = Attributor(model, tiny_tokenizer(), width=width, projection=projection, preconditioner="off")  # type: ignore[arg-type]
        cache = made.cache(rows, tmp_path / projection)
        results = made.query(cache, queries, top_k=40, normalize="layer")
        ordered = [[h.score for h in sorted(r.top, key=lambda h: h.row)] for r in results]
        scores.append(torch.tensor(ordered))
    # A cosine of the sums against a mean of cosines: the same order, not the same scale.
    for a, b in zip(*scores, strict=True):
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.97


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 0}, "width"),
        ({"seed": -1}, "seed"),
        ({"projection": "round"}, "use one of tensor, flat, rapidgrad"),
        ({"loss": "max"}, "use one of mean, sum"),
        ({"max_length": 4096}, "context of 128"),
        ({"include": ["nothing_like_it"]}, "no parameter's name matches"),
        ({"exclude": ["*"]}, "no parameter is left"),
        ({"projection": "flat", "width": 100}, "multiple of 128"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Attributor(tiny_llama(), tiny_tokenizer(), **settings)
    assert words in str(error.value)


def test_queries_that_do_not_fit(attributor: Attributor, cache: Cache) -> None:
    for call, words in (
        (lambda: attributor.query(cache, []), "no generation"),
        (lambda: attributor.query(cache, [("a", "b")], top_k=0), "must be at least 1"),
        (
            lambda: attributor.query(cache, [("a", "b")], normalize="unit"),
            f"use one of {', '.join(NORMALIZE)}",
        ),  # type: ignore[arg-type]
        (lambda: attributor.query(cache, [("a", "b")], method="magic"), "use one of dot, datainf, fisher"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError) as error:
            call()
        assert words in str(error.value)


def test_a_layer_that_mixes_examples_is_told_once_and_changes_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    settings: dict[str, Any] = {"width": 32, "preconditioner": "off"}
    plain = Attributor(model, tiny_tokenizer(), **settings).cache(records(12), tmp_path / "plain")
    inner = model.model.layers[1].mlp.forward

    def by_tokens(x: torch.Tensor) -> torch.Tensor:  # some tokens at a time, and nothing says which they are
        chosen = torch.masked_select(x, x == x).view(-1, x.shape[-1])
        return torch.cat([inner(chosen[:1]), inner(chosen[1:])]).view(x.shape)

    model.model.layers[1].mlp.forward = by_tokens
    attributor = Attributor(model, tiny_tokenizer(), **settings)
    seen: list[Progress] = []
    mixed = attributor.cache(records(12), tmp_path / "mixed", on_progress=seen.append)
    messages = [p.message for p in seen if p.message]
    assert "compared with autograd's: equal within" in messages[0]
    assert messages[1:] == [
        "examples are processed one at a time: the inputs of the layer of "
        "'model.layers.1.mlp.gate_proj.weight' have no example axis"
    ]
    unchecked = Attributor(model, tiny_tokenizer(), **settings)
    seen.clear()
    unchecked.cache(records(12), tmp_path / "unchecked", on_progress=seen.append, check=False)
    assert [p.message for p in seen if p.message] == [
        "examples are processed one at a time: a layer mixes the examples of a batch, such as that of "
        "'model.layers.1.mlp.gate_proj.weight'"
    ]
    torch.testing.assert_close(mixed.sketches(), plain.sketches(), atol=2e-3, rtol=0)


def test_hits_of_a_cache_with_a_gap_are_the_right_examples(attributor: Attributor, tmp_path: Path) -> None:
    rows = records()
    attributor.cache(rows, tmp_path, shard_rows=7)
    (tmp_path / "shard-000001.safetensors").unlink()

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attributor.cache(rows, tmp_path, shard_rows=7, on_progress=stop)
    results = attributor.query(tmp_path, [rows[3], rows[20]], top_k=30, examples=rows)
    assert [r.top[0].index for r in results] == [3, 20]
    assert all(hit.example == rows[hit.index] for r in results for hit in r.top)
    assert {hit.index for hit in results[0].top} == {*range(7), *range(14, 30)}


def test_a_forgotten_adapter_is_called_just_that(attributor: Attributor, cache: Cache) -> None:
    plain = Attributor(tiny_llama(), tiny_tokenizer(), width=64)
    with pytest.raises(UserError, match="was made with an adapter, and none is given"):
        plain.query(cache, [("a", "b")])
