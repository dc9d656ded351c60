"""Parts of a generation: which tokens they are, and that their scores are parts of the generation's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fitted import fitted
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from tiny import records, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble, Member
from rapidin.attribution.generate import generations_of
from rapidin.attribution.query_sketch import sketch_generations, sketch_targets
from rapidin.data.encoding import Encoder
from rapidin.data.spans import Span, find_spans, split_words
from rapidin.errors import UserError

QUERIES = [
    {"prompt": "Howdy! What is the capital of France?", "completion": " The capital of France is Paris."},
    {"prompt": "One, two,", "completion": " three, four, five: the quick brown fox."},
]
TOKENIZER = tiny_tokenizer()


# ---------------------------------------------------------------------------------------------- pieces


@tries(60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_make_up_the_text(text: str) -> None:
    encoder = Encoder(TOKENIZER, max_length=1024)
    ids = encoder.encode_pair("", text + ".").ids
    pieces = encoder.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text + ".</s>"


def test_a_character_of_several_tokens_is_said_by_its_last_one() -> None:
    encoder = Encoder(TOKENIZER, max_length=64)
    ids = list(TOKENIZER("a\U0001f600b", add_special_tokens=False)["input_ids"])
    assert encoder.pieces(ids) == ["a", "", "", "", "\U0001f600", "b"]
    assert encoder.pieces(ids[:3])[:1] == ["a"]  # cut within it: what is there is shown
    assert "".join(encoder.pieces(ids[:3])) == TOKENIZER.decode(ids[:3])
    assert encoder.pieces([]) == []


# ----------------------------------------------------------------------------------------------- spans


def test_words_are_found_wherever_they_stand_as_words() -> None:
    pieces = [" The", " planet", "s", " and", " a", " Plan", "et", ".", " C++", " planet", "</s>"]
    spans, missing = find_spans(["planet", "C++", "Zorgon", "a planet."], pieces, "".join(pieces[:-1]))
    assert spans == [
        Span("planet", (5, 6, 9)),
        Span("C++", (8,)),
        Span("a planet.", (4, 5, 6, 7)),
    ]
    assert missing == ["Zorgon"]


def test_spans_are_places_in_the_completion() -> None:
    pieces = ["? The", " cap", "ital", " is"]  # the first token holds the prompt's last character
    spans, _ = find_spans([(1, 4), (5, 6), (4, 12)], pieces, " The capital is")
    assert spans == [Span("The", (0,)), Span("c", (1,)), Span(" capital", (1, 2))]
    with pytest.raises(UserError, match=r"no token .* span \(90, 95\)"):
        find_spans([(90, 95)], pieces, " The capital is")


def test_hot_words_as_they_are_written() -> None:
    assert split_words("planet| Zorgon||planet") == ["planet", "Zorgon"]
    assert split_words(["a b"]) == ["a b"]
    for wrong in (3, {"a": 1}, ["a", 2]):
        with pytest.raises(UserError, match="hot words must be text"):
            split_words(wrong)


# ---------------------------------------------------------------------------------------------- queries

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (tiny_llama, {}),
    "summed loss": (tiny_llama, {"loss": "sum"}),
    "flat, several points": (
        lambda: tiny_lora(tiny_llama()),
        {"projection": "flat", "at": [0.2, 0.8], "width": 128},
    ),
    "all of GPT-2": (tiny_gpt2, {"include": ["*"], "preconditioner": "off"}),
    "Adam's preconditioner": (tiny_llama, {"preconditioner": "sample"}),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Attributor, Any]:
    model, options = KINDS[request.param]
    attributor = Attributor(model(), tiny_tokenizer(), **{"width": 64} | options)
    cache = attributor.cache(records(), tmp_path_factory.mktemp("targets"), shard_rows=7)
    return fitted(attributor, cache), cache


def test_tokens_sum_to_the_generation(made: tuple[Attributor, Any]) -> None:
    attributor, _ = made
    texts = generations_of(attributor.source, QUERIES, targets="tokens")
    tokens, whole = sketch_targets(attributor.source, texts), sketch_generations(attributor.source, texts)
    assert tokens is not None
    assert [len(text.spans) for text in texts] == [sum(text.encoded.target) for text in texts]
    at = 0
    for text, sketch in zip(texts, whole, strict=True):
        summed = tokens[at : at + len(text.spans)].sum(0)
        at += len(text.spans)
        assert float((summed - sketch).norm() / sketch.norm()) < 1e-5
        assert "".join(text.pieces).endswith(text.completion + "</s>")


@pytest.mark.parametrize("method", ["dot", "fisher", "datainf"])
@pytest.mark.parametrize("normalize", ["layer", "none", "cosine"])
def test_scores_of_tokens_are_parts_of_the_scores(
    made: tuple[Attributor, Any], method: str, normalize: str
) -> None:
    attributor, cache = made
    options: dict[str, Any] = {"method": method, "normalize": normalize, "top_k": 5}
    results = attributor.query(cache, QUERIES, targets="tokens", **options)
    plain = attributor.query(cache, QUERIES, **options)
    scores = attributor.scores(cache, QUERIES, method=method, normalize=normalize)
    for n, (result, alone) in enumerate(zip(results, plain, strict=True)):
        # Asking for tokens changes nothing of the whole.
        assert [(hit.row, hit.score) for hit in result.top] == [(hit.row, hit.score) for hit in alone.top]
        size = float(scores[n][~scores[n].isnan()].abs().max())
        for hit in (*result.top, *result.bottom):
            assert len(hit.targets) == len(result.targets) == len(result.pieces)
            assert sum(hit.targets) == pytest.approx(hit.score, abs=1e-4 * size)
        for place, target in enumerate(result.targets):
            assert (target.positions, target.text) == ((place,), result.pieces[place])
            assert target.influence == pytest.approx(
                sum(hit.targets[place] for hit in result.top) / 5, abs=1e-6 * size
            )
            ranked = [hit.score for hit in target.top]
            assert ranked == sorted(ranked, reverse=True)
            for hit in (*target.top, *target.bottom):
                assert hit.targets[place] == pytest.approx(hit.score, abs=1e-5 * size)
        # The best of a token are the best of the whole cache for it.
        worst = min(hit.targets[0] for hit in result.targets[0].top)
        others = [
            h for h in (*result.top, *result.bottom) if h.row not in {t.row for t in result.targets[0].top}
        ]
        assert all(hit.targets[0] <= worst + 1e-6 * size for hit in others)


def test_a_token_has_the_gradient_of_its_own_loss() -> None:
    model = tiny_llama()
    attributor = Attributor(model, tiny_tokenizer(), width=64, preconditioner="off")
    texts = generations_of(attributor.source, QUERIES[:1], targets="tokens")
    ids = torch.tensor([texts[0].encoded.ids])
    counted = [n for n, counts in enumerate(texts[0].encoded.target) if counts]
    name = attributor.source.targets[3].name
    weight = dict(model.named_parameters())[name]
    weight.requires_grad_(True)
    logits = model(ids).logits[0].float().log_softmax(-1)
    tokens = sketch_targets(attributor.source, texts)
    assert tokens is not None
    for place in (0, 2, len(counted) - 1):
        t = counted[place]
        loss = -logits[t - 1, ids[0, t]] / len(counted)
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
        from rapidin import ops

        want = ops.matrix_sketch(grad, 64, seed=attributor.source.sketcher.seeds[3])
        assert torch.allclose(tokens[place, 3], want, atol=1e-5 * float(want.norm()))


def test_hot_words_of_records_and_of_python(made: tuple[Attributor, Any]) -> None:
    attributor, cache = made
    asked = [QUERIES[0] | {"hotwords": "capital|Rome|paris"}, QUERIES[1]]
    first, second = attributor.query(cache, asked, targets="hotwords", top_k=3)
    assert [target.text for target in first.targets] == ["capital", "paris"]
    assert (first.missing, second.targets, second.missing) == (("Rome",), [], ())
    assert first.to_json()["missing"] == ["Rome"]
    chosen = [["capital", (0, 4)], [(1, 6)]]
    first, second = attributor.query(cache, QUERIES, targets=chosen, top_k=3)
    assert [target.text for target in first.targets] == ["capital", " The"]
    tokens = attributor.query(cache, QUERIES, targets="tokens", top_k=30)[0]
    word = attributor.query(cache, QUERIES, targets=chosen, top_k=30)[0].targets[0]
    rows = {hit.row: hit for hit in tokens.top}
    for hit in word.top:
        want = sum(rows[hit.row].targets[place] for place in word.positions)
        assert hit.score == pytest.approx(want, abs=1e-5 * max(abs(h.score) for h in tokens.top))


def test_members_of_an_ensemble_add_up_for_tokens_too(tmp_path: Path) -> None:
    members = []
    for seed in (0, 1):
        attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=64, seed=seed)
        attributor.cache(records(), tmp_path / str(seed))
        members.append(Member(tmp_path / str(seed), 1.0 + seed, attributor.source))
    options: dict[str, Any] = {"targets": "tokens", "contributions": True, "examples": records()}
    result = Ensemble(members).query(QUERIES, top_k=30, **options)[0]
    for hit in result.top:
        assert sum(hit.targets) == pytest.approx(hit.score, abs=1e-5)
        assert hit.tokens is not None
        assert hit.tokens.by_target is not None
        assert sum(hit.tokens.contributions) == pytest.approx(hit.score, abs=1e-4)
        assert hit.tokens.by_target.sum(1) == pytest.approx(hit.targets, abs=1e-4)


def test_what_cannot_be_asked_of_parts(made: tuple[Attributor, Any], tmp_path: Path) -> None:
    attributor, cache = made
    for options, words in (
        ({"targets": "letters"}, "unknown targets 'letters'"),
        ({"targets": [["a"]]}, "targets for 1 generations, but there are 2"),
        ({"targets": "tokens", "together": True}, "single generations"),
        ({"candidates": 20}, "`candidates` is the number that `rescore` looks at"),
        ({"rescore": "finer"}, "cannot rescore by 'finer'"),
        ({"rescore": "exact", "candidates": 3}, "`candidates` 3 is less than `top_k` 10"),
        ({"rescore": "exact", "method": "fisher"}, "`method='dot'`"),
        ({"contributions": True, "examples": False}, "needs the training examples"),
    ):
        with pytest.raises(UserError, match=words):
            attributor.query(cache, QUERIES, **options)
    paper = Attributor(tiny_llama(), tiny_tokenizer(), width=128, projection="rapidgrad")
    whole = paper.cache(records(5), tmp_path / "rapidgrad")
    with pytest.raises(UserError, match="rapidgrad"):
        paper.query(whole, QUERIES, targets="tokens")


def test_long_completions_are_asked_in_batches_of_their_tokens() -> None:
    """Whatever the batches, the same sketches: a target's text ends before its token."""
    words = [random.Random(3).choice(["fox", "dog", "seven", "Paris"]) for _ in range(30)]
    asked = [{"prompt": "Say", "completion": " " + " ".join(words)}]
    found = []
    for tokens in (1, 200, 4096):
        attributor = Attributor(
            tiny_llama(), tiny_tokenizer(), width=64, batch_tokens=tokens, preconditioner="off"
        )
        texts = generations_of(attributor.source, asked, targets="tokens")
        found.append(sketch_targets(attributor.source, texts))
    for sketch in found[1:]:
        assert found[0] is not None
        assert sketch is not None
        assert float((sketch - found[0]).norm() / found[0].norm()) < 1e-5
