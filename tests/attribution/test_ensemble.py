"""Several caches queried as one: sums, what they must share, checkpoints and masks from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import records, save_tiny, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.checkpoints import checkpoint_folders, find_checkpoints
from rapidin.attribution.ensemble import Ensemble, Member, read_members
from rapidin.attribution.generate import generations_of
from rapidin.attribution.options import NORMALIZE, QueryOptions, ScoringConfig
from rapidin.attribution.query_sketch import sketch_generations
from rapidin.cache import Cache, Manifest
from rapidin.cli import main
from rapidin.errors import UserError
from rapidin.gradients.dropout import DropoutMask

QUERIES = records(3, seed=9)
HEAD = '{"format": "rapidin-ensemble", "version": 1, '


def made(folder: Path, seed: int, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Member:
    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=64, seed=seed)
    attributor.cache(rows or records(), folder, **settings)
    return Member(folder, 1.0, attributor.source)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Three codes, in shards of different lengths."""
    folder = tmp_path_factory.mktemp("members")
    return [
        made(folder / "a", 0, shard_rows=7),
        made(folder / "b", 1, shard_rows=11, dtype="sign"),
        made(folder / "c", 2, shard_rows=30, dtype="int8"),
    ]


def alone(member: Member, normalize: Any, method: Any = "dot") -> torch.Tensor:
    assert member.source is not None
    return Attributor(member.source).scores(member.path, QUERIES, normalize=normalize, method=method).double()


@pytest.mark.parametrize("method", ["dot", "fisher"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_scores_of_several_caches_add_up(members: list[Member], normalize: str, method: str) -> None:
    weights = [0.5, 2.0, 1.5]
    chosen = [Member(m.path, w, m.source) for m, w in zip(members, weights, strict=True)]
    total = sum(w * alone(m, normalize, method) for m, w in zip(members, weights, strict=True))
    for kind in ("mean", "tracin"):
        ensemble = Ensemble(chosen, kind=kind)  # type: ignore[arg-type]
        got = ensemble.scores(QUERIES, normalize=normalize, method=method).double()
        want = total if kind == "tracin" and normalize == "none" else total / 4
        assert float((got - want).norm() / want.norm()) < 1e-2  # integer queries are rounded to one scale
        hits = ensemble.query(QUERIES, normalize=normalize, method=method, top_k=30)
        for row, result in zip(got, hits, strict=True):
            ranked = torch.full((30,), torch.nan, dtype=torch.float64)
            ranked[[hit.row for hit in result.top]] = torch.tensor([h.score for h in result.top]).double()
            assert torch.allclose(ranked, row, atol=1e-6 * float(row.abs().max()))


def test_options_come_as_an_object_or_by_name_and_unknown_names_are_refused(members: list[Member]) -> None:
    ensemble = Ensemble(members[:1])
    by_name = ensemble.query(QUERIES, top_k=3, normalize="none", examples=False)
    at_once = ensemble.query(QUERIES, QueryOptions(top_k=3, normalize="none"), examples=False)
    assert [r.to_json() for r in by_name] == [r.to_json() for r in at_once]
    for ask in (ensemble.query, ensemble.scores):
        with pytest.raises(TypeError, match="top_n"):
            ask(QUERIES, top_n=3)
    with pytest.raises(TypeError, match="got both"):
        ensemble.query(QUERIES, QueryOptions(), top_k=3)
    with pytest.raises(TypeError, match="got both"):
        ensemble.scores(QUERIES, ScoringConfig(), method="dot")


def test_an_ensemble_of_one_is_that_cache(members: list[Member]) -> None:
    got = Ensemble(members[:1]).scores(QUERIES)
    assert torch.equal(got.double(), alone(members[0], "weighted"))


def test_rows_that_one_cache_lacks_or_does_not_count_are_left_out(tmp_path: Path) -> None:
    rows = records(12)
    whole, gap = (
        made(tmp_path / "whole", 0, rows, shard_rows=5),
        made(tmp_path / "gap", 1, rows, shard_rows=4),
    )
    manifest = Manifest.read(gap.path)
    del manifest.shards[1]  # rows 4 .. 7
    manifest.write(gap.path)
    scores = Ensemble([whole, gap]).scores(QUERIES)
    assert scores[0].isnan().nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    (result, *_) = Ensemble([whole, gap]).query(QUERIES, top_k=12)
    assert sorted(hit.row for hit in result.top) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_caches_of_other_examples_are_refused(members: list[Member], tmp_path: Path) -> None:
    other = made(tmp_path, 1, records(30, seed=5))
    with pytest.raises(UserError, match="not of the same examples"):
        Ensemble([members[0], other]).query(QUERIES)


def test_ensembles_that_are_none(members: list[Member]) -> None:
    with pytest.raises(UserError, match="no caches"):
        Ensemble([])
    for weights in ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(UserError, match="weights"):
            Ensemble([Member(m.path, w) for m, w in zip(members, weights, strict=True)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        HEAD + '"kind": "best", "members": []}',
        HEAD + '"kind": "mean", "members": [{"cache": "../a", "weight": 1}]}',
        HEAD + '"kind": "mean", "members": [{"cache": "a"}]}',
    ],
)
def test_a_damaged_or_hostile_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        read_members(tmp_path)


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text('{"format": "rapidin-ensemble", "version": 2}')
    with pytest.raises(UserError, match="format version 2"):
        read_members(tmp_path)


# ------------------------------------------------------------------------------------------- thinning


def test_a_thinned_model_is_another_model_for_all_texts_alike(tmp_path: Path) -> None:
    model, tokenizer = tiny_lora(tiny_llama()), tiny_tokenizer()
    found = []
    for seed in (0, 0, 1):
        attributor = Attributor(
            model, tokenizer, width=64, preconditioner="off", dropout=DropoutMask(0.3, seed)
        )
        found.append(sketch_generations(attributor.source, generations_of(attributor.source, QUERIES)))
        alone = sketch_generations(attributor.source, generations_of(attributor.source, QUERIES[1:2]))
        assert float((alone[0] - found[-1][1]).norm() / alone.norm()) < 1e-4
    assert torch.equal(found[0], found[1])
    assert float((found[0] - found[2]).norm() / found[0].norm()) > 0.1
    plain = Attributor(model, tokenizer, width=64, preconditioner="off")
    untouched = sketch_generations(
        plain.source, generations_of(plain.source, QUERIES)
    )  # nothing of a mask is left on the model
    assert torch.equal(
        untouched,
        sketch_generations(
            Attributor(model, tokenizer, width=64, preconditioner="off").source,
            generations_of(plain.source, QUERIES),
        ),
    )
    with pytest.raises(UserError, match="dropout"):
        DropoutMask(1.0, 0)


def test_the_manifest_says_the_mask_and_the_query_follows(tmp_path: Path) -> None:
    model, tokenizer = tiny_lora(tiny_llama()), tiny_tokenizer()
    cache = Attributor(model, tokenizer, width=64, dropout=DropoutMask(0.3, 5)).cache(records(), tmp_path)
    assert cache.manifest.gradient["dropout"] == {"rate": 0.3, "seed": 5}
    again = Attributor.like(cache.manifest, model, tokenizer)
    assert again.settings.dropout == DropoutMask(0.3, 5)
    assert again.query(cache, records()[:1], top_k=1, normalize="layer")[0].top[0].score == pytest.approx(
        1.0, abs=1e-3
    )
    with pytest.raises(UserError, match="other settings"):
        Attributor(model, tokenizer, width=64).query(cache, QUERIES)


# ---------------------------------------------------------------------------------------- checkpoints


def state(rates: dict[int, float]) -> str:
    return json.dumps(
        {"log_history": [{"step": s, "learning_rate": r, "loss": 1.0} for s, r in rates.items()]}
    )


def test_checkpoints_weigh_by_the_rates_since_the_one_before(tmp_path: Path) -> None:
    for step in (20, 100, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    found, rated = find_checkpoints(tmp_path)
    assert not rated
    assert [(c.step, c.weight) for c in found] == [(20, 20.0), (40, 20.0), (100, 60.0)]
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text(state({10: 0.1, 40: 0.1, 100: 0.0}))
    found, rated = find_checkpoints(tmp_path)
    assert rated
    assert [round(c.weight, 6) for c in found] == [
        2.0,
        2.0,
        pytest.approx(sum(0.1 * (100 - s) / 60 for s in range(41, 101))),
    ]


def test_the_folders_of_checkpoints_are_known_by_their_whole_name(tmp_path: Path) -> None:
    for name in (
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-20-old",
        "checkpoint-best-3",
        "my-checkpoint-4",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("")  # no folder
    assert list(checkpoint_folders(tmp_path)) == [20, 100]
    assert checkpoint_folders(tmp_path / "none") == {}


def test_folders_without_checkpoints_and_odd_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoints(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoints(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        find_checkpoints(tmp_path)
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(state({1: 0.0}))
    with pytest.raises(UserError, match="are all 0"):
        find_checkpoints(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapters and whole models"):
        find_checkpoints(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two checkpoints of an adapter on it, and data."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_llama()
    save_tiny(folder)
    model.name_or_path = str(folder / "model")
    for step, seed in ((10, 1), (20, 2)):
        place = folder / "trainer" / f"checkpoint-{step}"
        tiny_lora(tiny_llama(), seed).save_pretrained(place)
        (place / "trainer_state.json").write_text(state({10: 1e-3, 20: 5e-4}))
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    (folder / "target.jsonl").write_text(
        "".join(json.dumps(r | {"group": r["prompt"][0]}) + "\n" for r in QUERIES)
    )
    return folder


def test_one_command_caches_checkpoints_and_one_asks_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(run / "tracin")
    rest = ["--data", str(run / "train.jsonl"), "--width", "64", "--quiet", "--out", out]
    command = ["cache", str(run / "model"), "--checkpoints", str(run / "trainer"), *rest]
    assert main(command) == 0
    assert main(command) == 0  # all there already
    kind, members = read_members(run / "tracin")
    assert kind == "tracin"
    assert [m.path.name for m in members] == ["checkpoint-10", "checkpoint-20"]
    assert members[0].weight > members[1].weight > 0
    assert all(Cache(m.path).manifest.gradient["at"] == [1.0] for m in members)
    capsys.readouterr()
    ask = [
        "query",
        out,
        "--data",
        str(run / "target.jsonl"),
        "--normalize",
        "none",
        "--top-k",
        "30",
        "--json",
        "-",
    ]
    assert main(ask) == 0
    got = json.loads(capsys.readouterr().out)["queries"]
    total = torch.zeros(len(QUERIES), 30, dtype=torch.float64)
    for member in members:
        attributor = Attributor.from_cache(member.path)
        total += member.weight * attributor.scores(member.path, QUERIES, normalize="none").double()
    for row, query in zip(total, got, strict=True):
        scores = {hit["index"]: hit["score"] for hit in (*query["top"], *query["bottom"])}
        assert torch.tensor([scores[n] for n in range(30)]).double() == pytest.approx(row, rel=1e-3, abs=1e-6)
    assert main(["info", out]) == 0
    assert main(["verify", out]) == 0
    assert "checkpoint-20" in capsys.readouterr().out
    assert main(["self", out]) == 2
    assert "name one of them" in capsys.readouterr().err


def test_masks_are_caches_whose_mean_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(run / "masks")
    adapter = str(run / "trainer" / "checkpoint-20")
    rest = ["--data", str(run / "train.jsonl"), "--width", "64", "--quiet", "--out", out]
    command = ["cache", str(run / "model"), "--adapter", adapter, "--masks", "2", "--dropout", "0.2", *rest]
    assert main(command) == 0
    kind, members = read_members(run / "masks")
    assert (kind, [m.weight for m in members]) == ("mean", [1.0, 1.0])
    assert [Cache(m.path).manifest.gradient["dropout"]["seed"] for m in members] == [0, 1]
    assert main(["query", out, "--data", str(run / "target.jsonl"), "--quiet"]) == 0
    several = [str(m.path) for m in members]
    assert main(["query", *several, "--data", str(run / "target.jsonl"), "--quiet"]) == 0
    one, other = capsys.readouterr().out.split("Query 1 of 3")[1:]
    assert one.splitlines()[5:9] == other.splitlines()[5:9]
    assert (
        main(["cache", str(run / "model"), "--adapter", adapter, *rest[:-1], several[0], "--masks", "2"]) == 2
    )
    assert "is a single cache" in capsys.readouterr().err
    assert main([*command, "--checkpoints", str(run / "trainer")]) == 2
    assert "--checkpoints and --masks do not go together" in capsys.readouterr().err


def test_an_error_says_which_query_it_is_about(members: list[Member]) -> None:
    source = members[0].source
    assert source is not None
    long = {"prompt": "word " * 500}
    with pytest.raises(UserError, match=r"^query 2 of 2: the prompt has \d+ tokens and fills the context"):
        generations_of(source, [QUERIES[0], long])
    with pytest.raises(UserError, match=r"^the prompt has \d+ tokens"):
        generations_of(source, [long])
