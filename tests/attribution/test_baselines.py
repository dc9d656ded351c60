"""Baselines: batches change nothing, and hits are placed in the other rankings as counting would."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution import baselines
from rapidin.errors import UserError
from rapidin.gradients.model import LoadedModel
from rapidin.results.types import Hit, QueryResult, Standing

FOX = "The quick brown fox jumps over the lazy dog. "
TEXTS = ["", "a", *(FOX * n for n in (1, 2, 9, 40)), "One, two."] * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_batches_give_the_states_of_single_texts(kind: str) -> None:
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2, "lora": lambda: tiny_lora(tiny_llama())}[kind]()
    loaded = LoadedModel.of(model, tiny_tokenizer())
    told: list[tuple[int, int]] = []
    got = baselines.hidden_states(
        loaded,
        TEXTS,
        ["The lazy fox"],
        max_length=60,
        batch_tokens=100,
        on_progress=lambda *n: told.append(n),
    )
    states = []
    with torch.no_grad():
        for text in ["The lazy fox", *TEXTS]:
            ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :60]
            state = torch.zeros(1, 32)
            if ids.shape[1]:
                state = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            states.append(torch.nn.functional.normalize(state.double().mean(0), dim=0))
    want = torch.stack(states)
    np.testing.assert_allclose(got, (want[:1] @ want[1:].T).numpy(), atol=1e-5)
    assert got[0, 0] == 0.0
    assert told[-1] == (len(TEXTS) + 1, len(TEXTS) + 1)
    assert len(told) < len(TEXTS)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_nothing_to_read() -> None:
    loaded = LoadedModel.of(tiny_llama(), tiny_tokenizer())
    assert baselines.hidden_states(loaded, ["", ""], [""]).tolist() == [[0.0, 0.0]]


def test_both_know_their_names() -> None:
    loaded = LoadedModel.of(tiny_llama(), tiny_tokenizer())
    found = baselines.scores_of_baselines(loaded, ["a red fox", "a blue sky", "the sea"], ["the red fox"])
    assert list(found) == ["BM25", "hidden states"]
    assert found["BM25"].argmax() == 0


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rank_bm25", None)
    with pytest.raises(UserError, match=r"BM25 needs the package rank-bm25; pip install 'rapidin\[eval\]'"):
        baselines.check()


def test_hits_are_placed_among_the_rows_that_count() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = int(rng.integers(3, 12))
        scores = rng.integers(0, 4, rows).astype(np.float64)
        counted = torch.from_numpy(rng.random(rows) < 0.8)
        counted[:2] = True
        live = [row for row in range(rows) if counted[row]]
        rng.shuffle(live)
        k = int(rng.integers(1, len(live) + 1))
        hits = [Hit(n + 1, row, row, 2.5 - n) for n, row in enumerate(live)]
        result = QueryResult("p", "c", False, hits[:k], hits[::-1][:k], "layer")
        told = baselines.with_standings(result, {"BM25": scores, "other": -scores}, counted)
        for sign, name in ((1, "BM25"), (-1, "other")):
            for hit in (*told.top, *told.bottom):
                standing = hit.standings[name]
                assert standing.score == sign * scores[hit.row]
                assert standing.rank == 1 + sum(sign * scores[row] > standing.score for row in live)
            best = sorted(live, key=lambda row: (-sign * scores[row], row))[: len(told.helpful)]
            assert told.overlaps[name] == len({hit.row for hit in told.helpful} & set(best))


def test_rows_that_were_not_compared_have_no_standing() -> None:
    hits = [Hit(n + 1, n, n, 2.5 - n) for n in range(3)]
    result = QueryResult("p", "c", False, hits[:2], hits[2:], "layer")
    scores = np.array([np.nan, 0.5, 0.7, 0.6])
    told = baselines.with_standings(result, {"hidden states": scores}, torch.ones(4, dtype=torch.bool))
    assert [hit.standings for hit in (*told.top, *told.bottom)] == [
        {},
        {"hidden states": Standing(0.5, 3)},
        {"hidden states": Standing(0.7, 1)},
    ]
    assert told.overlaps == {"hidden states": 0}


def test_the_model_reads_the_texts_that_it_should_and_copies_once() -> None:
    loaded = LoadedModel.of(tiny_llama(), tiny_tokenizer())
    texts = ["a red fox", "a blue sky", "the sea", "a red fox"] * 5
    told: list[tuple[int, int]] = []
    found = baselines.scores_of_baselines(
        loaded,
        texts,
        ["the red fox", "a sky"],
        reads=lambda words: words[0] > 0,
        on_progress=lambda *n: told.append(n),
    )
    states = found["hidden states"]
    assert np.isnan(states).tolist() == (found["BM25"] <= 0)[:1].tolist() * 2
    assert told[-1][0] == told[-1][1]
    every = baselines.hidden_states(loaded, texts, ["the red fox", "a sky"])
    read = ~np.isnan(states)
    np.testing.assert_allclose(states[read], every[read], atol=1e-6)
    for row in range(4, len(texts)):
        assert every[:, row].tolist() == every[:, row % 4].tolist()
    assert every[:, 0].tolist() == every[:, 3].tolist()
