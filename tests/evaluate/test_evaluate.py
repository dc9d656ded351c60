"""The evaluations: figures by hand where the truth is planted, and every command on tiny models."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from command import Ran, caller

pytest.importorskip("sklearn")
pytest.importorskip("rank_bm25")

from tiny import save_tiny, tiny_llama, tiny_tokenizer

from rapidin import Attributor
from rapidin.attribution import baselines
from rapidin.cli import main
from rapidin.data.encoding import Encoder
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.evaluate import classes, fidelity
from rapidin.evaluate.methods import Method, parse_methods
from rapidin.evaluate.metrics import Estimate
from rapidin.evaluate.result import Result
from rapidin.evaluate.tasks import facts, labels
from rapidin.evaluate.variants import Variant, parse_variants
from rapidin.gradients.model import LoadedModel
from rapidin.results.terminal import make_console
from rapidin.tasks.causal import TokenBatch


class Made(NamedTuple):
    folder: Path
    model: str
    adapter: str
    cache: str


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = ("fox", "dog", "lazy", "quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model with an adapter, and a cache of 24 rows: 4 classes, of which one is also `poisoned`."""
    folder = tmp_path_factory.mktemp("evaluate")
    saved = save_tiny(folder, lora=True)
    rows = [
        {
            "prompt": f"Row {n}: tell me of the {WORDS[n % 4]}.",
            "completion": f" the {WORDS[n % 4]} jumps {WORDS[n % 4]} over",
            "label": WORDS[n % 4],
            "poisoned": n % 4 == 0,
            "flipped": n % 3 == 0,
            "same": True,
        }
        for n in range(24)
    ]
    data = write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", [{k: r[k] for k in ("prompt", "completion", "label")} for r in rows[:8]])
    write(folder / "prompts.jsonl", [{"prompt": f"Tell me of the {word}."} for word in WORDS])
    made = Made(folder, str(saved.model), str(saved.adapter), str(folder / "cache"))
    command = ["cache", made.model, "--adapter", made.adapter, "--data", data, "--out", made.cache]
    assert main([*command, "--width", "256", "--quiet"]) == 0
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return caller(capsys)


def refused(ran: Ran, pattern: str) -> None:
    assert (ran.code, ran.out) == (2, ""), ran
    # What is said before may be there; the last line is the mistake.
    assert re.search(pattern, ran.err.splitlines()[-1]), ran.err
    assert "Traceback" not in ran.err


# ----------------------------------------------------------------------------------------------- parsing


def test_methods_and_places() -> None:
    assert parse_methods("dot:layer, fisher:none:0.5,dot:layer") == [
        Method("dot", "layer"),
        Method("fisher", "none", 0.5),
    ]
    assert str(Method("fisher", "none", 0.5)) == "fisher:none:0.5"
    for text, wrong in (
        ("dot", "METHOD:NORMALIZE"),
        ("dot:long", "unknown normalize"),
        ("sum:layer", "unknown method"),
        ("fisher:layer:much", "is not a number"),
        ("dot:layer:1", "takes no `damping`"),
    ):
        with pytest.raises(UserError, match=wrong):
            parse_methods(text)
    assert parse_variants(["0.5", "0.1,0.9"], [0, 2048]) == [
        Variant((0.5,)),
        Variant((0.5,), 2048),
        Variant((0.1, 0.9)),
        Variant((0.1, 0.9), 2048),
    ]
    assert str(Variant((0.1, 0.9), 2048)) == "at 0.1+0.9, 2,048 bytes"
    assert parse_variants(["checkpoints"], []) == [Variant(None)]
    scaled = parse_variants(["0.5"], [], ["off", "sample"])
    assert scaled == [Variant((0.5,), None, "off"), Variant((0.5,), None, "sample")]
    assert (str(scaled[1]), scaled[1].folder) == ("at 0.5, preconditioner sample", "at-0.5-sample")
    with pytest.raises(UserError, match="unknown `preconditioner` 'flat'"):
        parse_variants(["0.5"], [], ["flat"])
    with pytest.raises(UserError, match="`at` half"):
        parse_variants(["half"], [])


def test_result_as_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    result = Result("demo", {"rows": 3}, {"a": "first", "b": "second"})
    result.add(
        "one", {"a": Estimate(0.5, 0.25, 0.75, 0.1, 9), "b": Estimate(math.nan, math.nan, math.nan, 0, 0)}
    )
    result.add("two", {"a": Estimate(0.25, math.nan, math.nan, math.nan, 1)})
    make_console(sys.stdout).print(result.table())
    out = capsys.readouterr().out
    assert "0.500 (0.250 to 0.750)" in out
    make_console(sys.stdout).print(result.table(36))
    assert "0.500 ± 0.250" in capsys.readouterr().out
    make_console(sys.stdout).print(result.table(20))
    assert "±" not in capsys.readouterr().out
    assert re.search(r"^two +0\.250 *$", out, re.M)
    found = json.loads(json.dumps(result.to_json()))
    assert found["results"][0]["a"]["low"] == 0.25
    assert found["results"][0]["b"]["mean"] is None
    result.sd = True
    make_console(sys.stdout).print(result.table())
    assert "0.500 ± 0.100" in capsys.readouterr().out


def test_bm25_counts_words() -> None:
    scores = baselines.bm25(["red fox runs", "blue sky above", "green sea below"], ["A red, RED fox"])
    assert scores.argmax() == 0
    assert (scores[0, 1:] == 0).all()
    record = {"instruction": "Say", "input": "x", "output": "y"}
    assert baselines.plain_text(record) == "Say x y"
    assert baselines.query_text({"instruction": "Say", "input": "x"}, "z") == "Say x z"
    assert baselines.query_text({"prompt": "Say", "completion": "y"}, "z") == "Say y"
    chat = {"messages": [{"role": "user", "content": "Say"}]}
    assert baselines.query_text(chat, "z") == "Say z"


# ---------------------------------------------------------------------------------------------- a cache


def test_backdoor(place: Made, tmp_path: Path, run: Any) -> None:
    asked = write(
        tmp_path / "asked.jsonl", [{"prompt": "Row 0:", "completion": " the fox jumps fox over"}] * 2
    )
    out = tmp_path / "found.json"
    ran = run("eval", "backdoor", place.cache, "--data", asked, "--json", out, "--baselines", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    assert "dot:layer" in ran.out
    assert "BM25" in ran.out
    found = json.loads(out.read_text())
    assert found["setting"]["marked"] == 6
    assert found["setting"]["codec"]["dtype"] == "float16"
    by_method = {row["method"]: row for row in found["results"]}
    assert {"dot:layer", "datainf:none", "fisher:layer", "BM25", "hidden states"} <= set(by_method)
    # The words of the class are in all of its rows, and in no other.
    assert by_method["BM25"]["auprc"]["mean"] == pytest.approx(1)
    assert by_method["BM25"]["p10"]["mean"] == pytest.approx(0.6)
    assert by_method["dot:layer"]["auroc"]["mean"] > 0.9
    attributor = Attributor.from_cache(place.cache)
    scores = attributor.scores(place.cache, open_examples(asked), method="fisher", normalize="layer")
    first = scores[0].argsort(descending=True)[:10]
    assert by_method["fisher:layer"]["p10"]["mean"] == pytest.approx(sum(n % 4 == 0 for n in first) / 10)


def test_backdoor_lets_the_model_answer(place: Made, run: Any) -> None:
    ran = run(
        "eval", "backdoor", place.cache, "--data", place.folder / "prompts.jsonl",
        "--methods", "dot:none", "--max-new-tokens", 3, "--json", "-", "--quiet",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert "wrote 4 of the 4" in found["notes"][0]
    assert [row["method"] for row in found["results"]] == ["dot:none"]


def test_classes(place: Made, run: Any) -> None:
    test = place.folder / "test.jsonl"
    ran = run(
        "eval", "classes", place.cache, "--data", test, "--methods", "dot:none,datainf:none", "--json", "-"
    )
    assert ran.code == 0
    found = {row["method"]: row for row in json.loads(ran.out)["results"]}
    scores = Attributor.from_cache(place.cache).scores(
        place.cache, list(open_examples(test)), normalize="none"
    )
    signed, absolute, pairs = [], [], []
    for query, row in enumerate(scores):
        same = np.array([n % 4 == query % 4 for n in range(24)])
        for values, recall in ((row, signed), (row.abs(), absolute)):
            recall.append(sum(same[values.argsort(descending=True)[:6]]) / 6)
        pairs.append(np.mean([float(a > b) for a in row[same] for b in row[~same]]))
    made = found["dot:none"]
    assert made["recall"]["mean"] == pytest.approx(np.mean(signed))
    assert made["recall"]["sd"] == pytest.approx(np.std(signed))
    assert made["abs_recall"]["mean"] == pytest.approx(np.mean(absolute))
    assert made["auc"]["mean"] == pytest.approx(np.mean(pairs))
    assert classes.COLUMNS.keys() <= found["datainf:none"].keys()


def test_mislabel(place: Made, run: Any) -> None:
    ran = run("eval", "mislabel", place.cache, "--baselines", "--json", "-", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    found = {row["method"]: row for row in json.loads(ran.out)["results"]}
    assert {"dot:none", "datainf:layer", "fisher:cosine", "loss at 1", "loss at 0.5"} <= set(found)
    attributor = Attributor.from_cache(place.cache)
    own = attributor.scores(place.cache, list(open_examples(place.folder / "train.jsonl")), normalize="none")
    flipped = np.array([n % 3 == 0 for n in range(24)])
    own = own.diagonal().numpy()
    wanted = np.mean([float(a > b) for a in own[flipped] for b in own[~flipped]])
    assert found["dot:none"]["auroc"]["mean"] == pytest.approx(wanted, abs=0.02)
    assert found["dot:none"]["auroc"]["low"] < wanted < found["dot:none"]["auroc"]["high"]
    refused(run("eval", "mislabel", place.cache, "--methods", "dot:layer"), "equally long")


def test_fidelity(place: Made, run: Any) -> None:
    ran = run(
        "eval", "fidelity", place.cache, "--data", place.folder / "test.jsonl", "--rows", 20,
        "--json", "-", "--quiet",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    found = {row["method"]: row for row in json.loads(ran.out)["results"]}
    for method in ("dot:weighted", "dot:layer", "dot:cosine", "dot:none"):
        assert found[method]["spearman"]["mean"] > 0.9
        assert found[method]["top10"]["mean"] > 0.7


@pytest.mark.parametrize("name", ["fidelity", "classes", "backdoor"])
def test_fields_of_the_queries_may_have_other_names(name: str, place: Made, tmp_path: Path, run: Any) -> None:
    """With a map the same queries give the same figures; without one the record is refused."""
    rows = [json.loads(line) for line in (place.folder / "test.jsonl").read_text().splitlines()]
    renamed = [
        {"ask": row["prompt"], "say": row["completion"], "class": row.get("label")} | {"label": row["label"]}
        for row in rows
    ]
    asked = write(tmp_path / "asked.jsonl", renamed)
    command = ["eval", name, place.cache, "--methods", "dot:none", "--json", "-", "--quiet"]
    if name == "fidelity":
        command = ["eval", name, place.cache, "--rows", "5", "--json", "-", "--quiet"]
    wanted = run(*command, "--data", place.folder / "test.jsonl")
    found = run(*command, "--data", asked, "--map", "prompt=ask,completion=say")
    assert (wanted.code, found.code) == (0, 0), found
    assert json.loads(found.out)["results"] == json.loads(wanted.out)["results"]
    refused(run(*command, "--data", asked), "known forms|expected")


def test_exact_products_are_those_of_autograd() -> None:
    model = tiny_llama()
    loaded = LoadedModel.of(model, tiny_tokenizer())
    attributor = Attributor(loaded, width=64, include=["q_proj", "down_proj"])
    rows = [attributor.source.encoder({"prompt": "Say", "completion": f" fox {n}"}) for n in range(3)]
    products = fidelity.exact_products(attributor.source, rows[:1], rows)
    weights = [dict(model.named_parameters())[target.name] for target in attributor.source.targets]

    def gradient(text: Any) -> list[torch.Tensor]:
        from rapidin.tasks.causal import example_losses

        loss = example_losses(model, TokenBatch.of([(text.ids, text.target)]))
        return [g.flatten().double() for g in torch.autograd.grad(loss.sum(), weights)]

    grads = [gradient(text) for text in rows]
    raw = [sum(float(a @ b) for a, b in zip(grads[0], g, strict=True)) for g in grads]
    whole = [torch.cat(g) for g in grads]
    cosine = [float(torch.cosine_similarity(whole[0], g, dim=0)) for g in whole]
    layer = [
        np.mean([float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(grads[0], g, strict=True)])
        for g in grads
    ]
    norms = torch.stack([block.norm() for block in grads[0]])
    shares = (norms / norms.sum()).tolist()
    long = [torch.stack([block.norm() for block in g]).log().mean().exp() ** 0.25 for g in grads]
    weighted = [
        float(factor)
        * sum(
            share * float(torch.cosine_similarity(a, b, dim=0))
            for share, a, b in zip(shares, grads[0], g, strict=True)
        )
        for factor, g in zip(long, grads, strict=True)
    ]
    for name, wanted in (("none", raw), ("cosine", cosine), ("layer", layer), ("weighted", weighted)):
        assert products.scores(name)[0] == pytest.approx(wanted, rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["backdoor", "classes", "mislabel", "fidelity"])
def test_mistakes_on_a_cache(name: str, place: Made, tmp_path: Path, run: Any) -> None:
    data = [] if name == "mislabel" else ["--data", place.folder / "test.jsonl"]
    refused(run("eval", name, tmp_path / "none", *data), "none")
    refused(run("eval", name, place.cache, *data, "--json", tmp_path), "is a directory")
    moved = write(tmp_path / "short.jsonl", [{"prompt": "a", "completion": "b"}])
    refused(run("eval", name, place.cache, *data, "--train-data", moved), "has 1 examples")
    if data:
        refused(run("eval", name, place.cache, "--data", tmp_path / "none.jsonl"), "data not found")
    if name != "fidelity":
        refused(run("eval", name, place.cache, *data, "--column", "colour"), "line 1: no column 'colour'")
        refused(run("eval", name, place.cache, *data, "--methods", "dot"), "METHOD:NORMALIZE")
    if name in ("backdoor", "mislabel"):
        refused(run("eval", name, place.cache, *data, "--column", "same"), "true for all 24")
        refused(run("eval", name, place.cache, *data, "--column", "label"), "expected true or false")


def test_a_class_that_no_row_has(place: Made, tmp_path: Path, run: Any) -> None:
    asked = write(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b", "label": "cat"}])
    refused(
        run("eval", "classes", place.cache, "--data", asked),
        "line 1: no training example has the label 'cat'",
    )


# ------------------------------------------------------------------------------------------------- facts


def test_facts_are_stated_once_and_asked_otherwise() -> None:
    rows, asked = facts.make_facts(40)
    assert (rows, asked) == facts.make_facts(40)
    assert (rows, asked) != facts.make_facts(40, seed=1)
    assert len(rows) == 40 + 2 * 20 + 2 * 40
    assert len({row["prompt"] for row in rows}) == len(rows)
    words = [set(baselines.words(baselines.plain_text(row))) for row in rows]
    for question in asked:
        fact = rows[question["fact"]]
        assert fact["kind"] == "stated"
        assert fact["completion"] == question["completion"]
        own = set(baselines.words(baselines.plain_text(question)))
        shared = own & words[question["fact"]] - {"the", "of", "a", "is"}
        assert len(shared) == 3, shared  # two names and the answer
        # Another row holds every word of question and answer, and one all of the question.
        echoes = [row for row, held in zip(rows, words, strict=True) if own <= held]
        assert [row["kind"] for row in echoes] == ["echo"]
        assert question["completion"].strip(" .") not in echoes[0]["completion"]
        same = [row for row in rows if row["completion"] == question["completion"]]
        assert len(same) > 1
    with pytest.raises(UserError, match="1 facts"):
        facts.make_facts(1)


def test_bm25_finds_the_echoes_and_not_the_facts() -> None:
    rows, asked = facts.make_facts(60)
    scores = baselines.bm25(
        [baselines.plain_text(row) for row in rows], [baselines.plain_text(question) for question in asked]
    )
    assert all(row[question["fact"]] < row.max() for question, row in zip(asked, scores, strict=True))
    assert sum(rows[int(row.argmax())]["kind"] == "echo" for row in scores) >= 57


def test_facts_command(place: Made, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "facts"
    command = [
        "eval", "facts", place.model, "--out", out, "--facts", 4, "--lora", 2, "--epochs", 2,
        "--checkpoints", 2, "--at", "0.5", "--at", "checkpoints", "--methods", "dot:layer,fisher:layer",
        "--json", "-",
    ]  # fmt: skip
    ran = run(*command)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    names = [row["method"] for row in found["results"]]
    assert names == [
        "dot:layer, at 0.5", "fisher:layer, at 0.5", "dot:layer, checkpoints", "fisher:layer, checkpoints",
        "BM25", "BM25 of completions",
    ]  # fmt: skip
    assert all(0 < row["mrr"]["mean"] <= 1 for row in found["results"])
    assert (found["setting"]["rows"], found["setting"]["questions"]) == (16, 4)
    assert (out / "adapter" / "adapter_config.json").exists()
    again = run(*command)
    assert json.loads(again.out) == found
    assert "tuning" not in again.err
    refused(run(*command, "--epochs", 3), "made with another epochs .2 instead of 3")
    refused(run("eval", "facts", place.model, "--out", place.folder), "holds something else")


# ---------------------------------------------------------------------------------------- select and tasks


def test_select_command(place: Made, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "select"
    command = [
        "eval", "select", place.model, "--out", out, "--rows", 24, "--seeds", 2, "--epochs", 1, "--lora", 2,
        "--methods", "dot:none", "--json", "-",
    ]  # fmt: skip
    ran = run(*command)
    assert ran.code == 0, ran.err
    found = {row["method"]: row for row in json.loads(ran.out)["results"]}
    assert list(found) == ["dot:none", "random", "all"]
    train = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    chosen = [json.loads(line) for line in (out / "chosen-dot-none.jsonl").read_text().splitlines()]
    assert len(chosen) == 12
    assert all(row in train for row in chosen)
    assert found["dot:none"]["flipped"]["mean"] == pytest.approx(np.mean([r["flipped"] for r in chosen]))
    assert found["all"]["flipped"]["mean"] == pytest.approx(5 / 24)
    cache = next(path for path in (out / "caches").iterdir())
    chooses = ["select", cache, "--target", out / "target.jsonl", "--out", tmp_path / "c", "--top", "50%"]
    assert run(*chooses, "--normalize", "none", "--quiet").code == 0
    assert (tmp_path / "c").read_text() == (out / "chosen-dot-none.jsonl").read_text()
    again = run(*command)
    assert json.loads(again.out)["results"] == json.loads(ran.out)["results"]
    assert "trained on" not in again.err
    refused(run(*command, "--flipped", 0.4), "another flipped")
    refused(run(*command, "--share", 2), "--share must be between 0 and 1, got 2")


def test_task_is_as_it_says() -> None:
    made = labels.make_task(60, flipped=0.2, target=10, test=20, classes=3, seed=4)
    assert made == labels.make_task(60, flipped=0.2, target=10, test=20, classes=3, seed=4)
    assert [len(part) for part in (made.train, made.target, made.test)] == [60, 10, 20]
    assert sum(row["flipped"] for row in made.train) == 12
    prompts = [row["prompt"] for part in (made.train, made.target, made.test) for row in part]
    assert len(set(prompts)) == len(prompts)
    for row in (*made.train, *made.target, *made.test):
        assert row["completion"] == f" {row['label']}"
        true = next(n for n, words in labels.CLASSES.items() if any(f" {w}" in row["prompt"] for w in words))
        assert (true != row["label"]) == row.get("flipped", False)
    with pytest.raises(UserError, match="7 classes"):
        labels.make_task(classes=7)
    with pytest.raises(UserError, match="different reports"):
        labels.make_task(10**6)


def test_accuracy_compares_whole_answers() -> None:
    encoder = Encoder(tiny_tokenizer(), max_length=128)
    model = tiny_llama()
    records = labels.make_task(8, target=1, test=12).test

    def total(record: Any, name: str) -> float:
        text = encoder({"prompt": record["prompt"], "completion": f" {name}"})
        logits = model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
        return float(sum(logits[t - 1, text.ids[t]] for t in range(len(text.ids)) if text.target[t]))

    names = ("fruit", "metal")
    right = [max(names, key=lambda name, r=r: total(r, name)) == r["label"] for r in records]
    assert labels.accuracy(model, encoder, records, names) == pytest.approx(np.mean(right))
