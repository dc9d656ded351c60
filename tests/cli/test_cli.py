"""The command line, from end to end on a tiny model: what is printed where, and every mistake of a user."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command import Ran, caller
from passes import at_pass
from tiny import CONTEXT, save_tiny

from rapidin.cache.manifest import Manifest
from rapidin.cli import main
from rapidin.gradients.coverage import Coverage

# 12 examples that have a sketch, and on the lines 3, 4 and 6 three that need care; line 5 is blank.
ROWS: list[Any] = [
    {"prompt": f"Give {n} tips.", "completion": f" One, two, {n}.", "label": n} for n in range(12)
]
ROWS[3:3] = [
    {"prompt": "Nothing to say.", "completion": ""},
    {"prompt": "", "completion": ""},
    None,
    {"prompt": "Howdy!", "completion": " one" * CONTEXT},
]
COUNTS = {"ok": 13, "no_target": 1, "empty": 1, "truncated": 1}


class Place(NamedTuple):
    """A folder with a model, an adapter, data, and caches of both."""

    folder: Path
    model: str
    adapter: str
    data: str
    cache: str
    plain_cache: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    saved = save_tiny(folder, lora=True, chat=True)
    write(folder / "train.jsonl", ROWS)
    made = Place(
        folder,
        str(saved.model),
        str(saved.adapter),
        str(folder / "train.jsonl"),
        str(folder / "cache"),
        str(folder / "plain"),
    )
    rest = ["--data", made.data, "--width", "64", "--shard-rows", "6", "--quiet"]
    assert main(["cache", made.model, "--adapter", made.adapter, "--out", made.cache, *rest]) == 0
    assert main(["cache", made.model, "--out", made.plain_cache, *rest]) == 0
    return made


@pytest.fixture
def copied(place: Place, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage."""
    return Path(shutil.copytree(place.cache, tmp_path / "cache"))


def write(path: Path, rows: list[Any]) -> str:
    """None stands for a blank line, text for a line as it is."""
    lines = ["" if row is None else row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*arguments) -> Ran"""
    return caller(capsys)


def refused(ran: Ran, *patterns: str, note: str = "") -> None:
    """Exit code 2, nothing on standard output, and one line that holds every pattern, perhaps after a `note`,
    which a process shows once."""
    assert (ran.code, ran.out) == (2, ""), ran
    noted = f"(rapidin: .*{note}.*\n)?" if note else ""
    assert re.fullmatch(f"{noted}rapidin: .*\n", ran.err), ran.err
    for pattern in patterns:
        assert re.search(pattern, ran.err), (pattern, ran.err)


# ------------------------------------------------------------------------------------------ happy path


def test_cache_info_and_verify(place: Place, tmp_path: Path, run: Any) -> None:
    out = str(tmp_path / "cache")
    command = ["cache", place.model, "--adapter", place.adapter, "--data", place.data, "--out", out]
    ran = run(*command)
    assert (ran.code, ran.out, ran.err.count("\n")) == (0, "", 1)
    assert re.match(
        r"rapidin: cached 15 examples in .* examples/s, [\d,]+ tokens/s\): 13 with a sketch,", ran.err
    )
    for words in ("1 empty", "1 without a completion token", "1 truncated", "MB in " + out):
        assert words in ran.err

    again = run(*command)
    assert again.code == 0
    assert "all 15 examples were cached before" in again.err

    ran = run("info", out)
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    for words in (
        "complete model ",
        "(prompt form)",
        "13 with a sketch, 1 empty",
        "taken at 0.5 of the way",
        "8 layers x 8,192 dimensions: 65,536 numbers, tensor projection, seed 0",
        "stored in float16",
        "end-of-text token added",
    ):
        assert words in text

    assert "taken at the model itself" in " ".join(run("info", place.plain_cache).out.split())

    ran = run("verify", out)
    assert (ran.code, ran.err) == (0, "")
    assert "OK: all checksums match (15 examples" in ran.out


@pytest.mark.parametrize("which", ["cache", "plain_cache"])
def test_query_as_json(place: Place, run: Any, which: str) -> None:
    ran = run(
        "query",
        getattr(place, which),
        "--prompt",
        "Give 7 tips.",
        "--completion",
        " One, two, 7.",
        "--normalize",
        "layer",
        "--json",
        "-",
    )
    assert ran.code == 0
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("rapidin: 1 query over 15 examples: ")
    (query,) = json.loads(ran.out)["queries"]
    assert (query["prompt"], query["completion"], query["generated"]) == (
        "Give 7 tips.",
        " One, two, 7.",
        False,
    )
    assert [hit["rank"] for hit in query["top"]] == list(range(1, 11))
    # The example itself is the most helpful one; its line, from 0, is 7 + 4 for the lines put before it.
    best = query["top"][0]
    assert (best["index"], best["example"]) == (11, ROWS[11])
    assert best["score"] == pytest.approx(1.0, abs=2e-3)
    scores = [hit["score"] for hit in query["top"]]
    assert scores == sorted(scores, reverse=True)
    lows = [hit["score"] for hit in query["bottom"]]
    assert lows == sorted(lows)
    assert all(low < 0 < scores[0] for low in lows)


def test_a_page_has_no_path_of_the_machine(place: Place, tmp_path: Path, run: Any) -> None:
    report, found = str(tmp_path / "page.html"), tmp_path / "hits.json"
    arguments = ["--prompt", "Give 7 tips.", "--completion", " One, two, 7.", "--report", report]
    ran = run("query", place.cache, *arguments, "--json", str(found))
    assert ran.code == 0, ran.err
    markup = Path(report).read_text(encoding="utf-8")
    assert str(place.folder) not in markup
    assert place.folder.name not in markup
    for name, path in (("model", place.model), ("adapter", place.adapter), ("caches", place.cache)):
        assert f"<bdi>{name}</bdi></dt><dd><bdi>{Path(path).name}</bdi>" in markup
    assert json.loads(found.read_text())["caches"] == [place.cache]


def test_plan_says_what_each_code_takes(place: Place, run: Any) -> None:
    ran = run("plan", place.model, "--examples", "1000000", "--tokens", "20")
    assert ran.code == 0, ran.err
    text = " ".join(ran.out.split())
    assert "1,000,000 examples of 20 tokens" in text
    assert re.search(r"--bytes 2048 2\.0 KB 2\.\d GB", text)
    assert re.search(r"--dtype float32 .*--dtype sign ", text)
    by_data = run("plan", place.model, "--data", place.data)
    assert by_data.code == 0
    assert "15 examples of" in by_data.out
    nothing = run("plan", place.model)
    assert nothing.code == 2
    assert "nothing to plan for" in nothing.err


def wrong_mlp(self: Any, x: Any) -> Any:
    """Uses the weight of the last projection once more, without calling it."""
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(hidden) + 0.5 * hidden @ self.down_proj.weight.T


def test_gradients_are_checked_unless_the_command_line_says_not_to(
    place: Place, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    info = " ".join(run("info", place.plain_cache).out.split())
    assert re.search(
        r"checked gradients of 14 parameters compared with autograd's: equal within \de-07", info
    )
    assert re.search(r"used 42.\d% of the model's parameters are used; not used: embeddings \(2", info)
    monkeypatch.setattr(LlamaMLP, "forward", wrong_mlp)
    checked, unchecked = str(tmp_path / "checked"), str(tmp_path / "unchecked")
    command = ["cache", place.model, "--data", place.data, "--limit", "4", "--quiet", "--out"]
    assert run(*command, checked).code == 0
    assert run(*command, unchecked, "--no-check").code == 0
    info = " ".join(run("info", checked).out.split())
    assert "autograd computes those of 2, one example at a time" in info
    names = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(2)]
    assert f"by autograd: {', '.join(names)}" in info
    assert "gradients were not compared with autograd's" in " ".join(run("info", unchecked).out.split())
    plan = " ".join(run("plan", place.model, "--examples", "10", "--tokens", "20").out.split())
    assert f"by autograd: {', '.join(names)}" in plan
    assert "of the model's parameters are used; not used: embeddings" in plan
    assert "--no-check" in run("cache", "--help").out


def test_a_model_of_which_little_counts_is_named_even_when_quiet(
    place: Place, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Coverage, "is_low", True)
    arguments = ["--data", place.data, "--limit", "4", "--quiet", "--out", str(tmp_path / "out")]
    ran = run("cache", place.model, *arguments)
    assert ran.code == 0
    assert re.fullmatch("rapidin: only 100.0% of the model's weights .* is missed: .*\n", ran.err)


def test_a_budget_from_the_command_line(place: Place, run: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ran = run("cache", place.model, "--data", place.data, "--out", out, "--bytes", "600", "--width", "64")
    assert ran.code == 0, ran.err
    info = " ".join(run("info", out).out.split())
    assert "directions of all layers in int8" in info
    assert "fitted on" in info
    found = json.loads(
        run("query", out, "--prompt", "Give 7 tips.", "--completion", " One, two, 7.", "--json", "-").out
    )
    assert found["queries"][0]["top"][0]["index"] == 11
    assert run("verify", out).code == 0


def test_query_as_a_table(place: Place, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    ran = run(
        "query", place.cache, "--prompt", "Give 7 tips.", "--completion", " One, two, 7.", "--top-k", "3",
        "--normalize", "layer",
    )  # fmt: skip
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= 90
    assert re.search(r"^ *1 +\+1\.0000 ± 0\.0000 +11 +Give 7 tips\. → +One, two, 7\.", ran.out, re.MULTILINE)
    assert (
        ran.out.index("Most helpful") < ran.out.index("Most harmful") < ran.out.index("Positive: training on")
    )
    assert "from -1 to 1" in " ".join(ran.out.split())


def test_top_k_over_the_cache_gives_all_of_it(place: Place, run: Any) -> None:
    ran = run("query", place.cache, "--prompt", "a", "--completion", "b", "--top-k", "1000", "--json", "-")
    (query,) = json.loads(ran.out)["queries"]
    assert ran.code == 0
    assert "--top-k 1000 is more than the 15 examples of the cache" in ran.err
    assert all(hit["score"] > 0 for hit in query["top"])
    assert all(hit["score"] < 0 for hit in query["bottom"])
    found = [hit["index"] for hit in query["top"] + query["bottom"]]
    assert len(set(found)) == len(found) == COUNTS["ok"]


@pytest.mark.parametrize(
    ("normalize", "words"), [("none", "dot product"), ("cosine", "the cosine between the two")]
)
def test_scales(place: Place, run: Any, normalize: str, words: str) -> None:
    ran = run(
        "query", place.cache, "--prompt", "Give 7 tips.", "--completion", " x", "--normalize", normalize
    )
    assert ran.code == 0
    assert words in " ".join(ran.out.split())


def test_query_data_the_model_writes_what_is_missing(place: Place, tmp_path: Path, run: Any) -> None:
    rows = [{"prompt": "Give 3 tips."}, {"prompt": "Give 3 tips.", "completion": " One."}]
    arguments = ["--data", write(tmp_path / "q.jsonl", rows), "--max-new-tokens", "4", "--json"]
    ran = run("query", place.cache, *arguments, str(tmp_path / "hits.json"))
    assert ran.code == 0
    assert "Query 2 of 2" in ran.out
    assert "(generated)" in ran.out
    first, second = json.loads((tmp_path / "hits.json").read_text())["queries"]
    assert first["generated"]
    assert first["completion"]
    assert not second["generated"]
    again = run("query", place.cache, *arguments, "-")
    assert json.loads(again.out)["queries"] == [first, second]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Give a tip.", "input": ""},
        {"instruction": "Give a tip.", "input": "now", "output": " One."},
        {"messages": [{"role": "user", "content": "Give a tip."}]},
        {"messages": [{"role": "user", "content": "Give a tip."}, {"role": "assistant", "content": "One."}]},
        {"text": "The quick brown fox."},
    ],
)
def test_forms_of_queries(place: Place, tmp_path: Path, run: Any, row: dict[str, Any]) -> None:
    path = write(tmp_path / "q.jsonl", [row])
    ran = run(
        "query", place.plain_cache, "--data", path, "--max-new-tokens", "3", "--top-k", "1", "--json", "-"
    )
    assert ran.code == 0, ran.err
    assert len(json.loads(ran.out)["queries"][0]["top"]) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Give a tip.", "input": "now", "output": "One."},
        {"messages": [{"role": "user", "content": "Give a tip."}, {"role": "assistant", "content": "One."}]},
        {"text": "The quick brown fox."},
    ],
)
def test_forms_of_training_data(place: Place, tmp_path: Path, run: Any, row: dict[str, Any]) -> None:
    data, out = write(tmp_path / "data.jsonl", [row, row]), str(tmp_path / "cache")
    assert run("cache", place.model, "--data", data, "--out", out, "--width", "64").code == 0
    ran = run("query", out, "--data", data, "--json", "-")
    assert [hit["score"] for hit in json.loads(ran.out)["queries"][0]["top"]] == pytest.approx(
        [1, 1], abs=2e-3
    )


def test_dataset_on_disk(place: Place, tmp_path: Path, run: Any) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([row for row in ROWS if row]).save_to_disk(tmp_path / "data")
    out = str(tmp_path / "cache")
    ran = run(
        "cache", place.model, "--data", str(tmp_path / "data"), "--out", out, "--width", "64", "--limit", "3"
    )
    assert ran.code == 0
    assert "cached 3 examples" in ran.err
    ran = run("query", out, "--prompt", "Give 1 tips.", "--completion", " One, two, 1.", "--json", "-")
    best = json.loads(ran.out)["queries"][0]["top"][0]
    assert (best["index"], best["example"]) == (1, ROWS[1])


def test_options_of_cache_reach_the_manifest(place: Place, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "cache"
    options = [
        "--at",
        "0.1,0.5,1",
        "--dtype",
        "float32",
        "--width",
        "32",
        "--seed",
        str(2**64 - 1),
        "--loss",
        "sum",
    ]
    options += ["--limit", "4", "--exclude", "v_proj", "--no-eos", "--max-length", "16", "--too-long", "skip"]
    options += [
        "--shard-rows",
        "3",
        "--batch-tokens",
        "32",
        "--model-dtype",
        "float32",
        "--device",
        "cpu",
        "-q",
    ]
    ran = run(
        "cache", place.model, "--adapter", place.adapter, "--data", place.data, "--out", str(out), *options
    )
    assert ran == (0, "", "")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["gradient"]["at"] == [0.1, 0.5, 1.0]
    assert manifest["gradient"]["loss"] == "sum"
    assert manifest["sketch"]["seed"] == 2**64 - 1
    assert manifest["sketch"]["width"] == 32
    assert manifest["text"] == {"eos": False, "max_length": 16, "too_long": "skip"}
    assert (manifest["rows"], manifest["shard_rows"], manifest["codec"]["dtype"]) == (4, 3, "float32")
    assert all("q_proj" in layer["name"] for layer in manifest["layers"])
    assert run("query", str(out), "--prompt", "Give", "--completion", " tips.", "--json", "-").code == 0


def test_model_and_adapter_and_data_that_have_moved(
    place: Place, tmp_path: Path, run: Any, copied: Path
) -> None:
    for name in ("model", "adapter", "train.jsonl"):
        (shutil.copytree if Path(place.folder / name).is_dir() else shutil.copy)(
            place.folder / name, tmp_path / name
        )
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["model"]["source"] |= {"model": "/gone/model", "adapter": "/gone/adapter"}
    manifest["data"]["path"] = "/gone/train.jsonl"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    question = ["query", str(copied), "--prompt", "a", "--completion", "b", "--json", "-"]
    refused(run(*question), "training data .* is not at /gone/train.jsonl", "--train-data", "--no-text")
    refused(run(*question, "--no-text"), "/gone/model")
    moved = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    refused(
        run(*question, *moved, "--train-data", write(tmp_path / "q.jsonl", ROWS[:2])),
        "q.jsonl has 2 examples",
    )
    shown = run(*question, *moved, "--train-data", str(tmp_path / "train.jsonl"))
    bare = run(*question, *moved, "--no-text")
    assert shown.code == bare.code == 0
    hits = json.loads(shown.out)["queries"][0]["top"]
    assert all("example" in hit for hit in hits)
    for hit in hits:
        del hit["example"]
    assert json.loads(bare.out)["queries"][0]["top"] == hits
    table = run(*question[:-2], *moved, "--no-text")
    assert table.code == 0
    assert "→" not in table.out


def test_a_training_file_that_has_grown_is_still_the_same(place: Place, tmp_path: Path, run: Any) -> None:
    data, out = write(tmp_path / "data.jsonl", ROWS[:3]), str(tmp_path / "cache")
    assert run("cache", place.model, "--data", data, "--out", out, "--width", "64").code == 0
    write(tmp_path / "data.jsonl", ROWS)
    assert run("query", out, "--prompt", "a", "--completion", "b").code == 0
    write(tmp_path / "data.jsonl", ROWS[1:])
    refused(run("query", out, "--prompt", "a", "--completion", "b"), "data.jsonl' is not what was cached")


# ----------------------------------------------------------------------------------------- bad input


def cache_arguments(place: Place, out: Path, **changes: str) -> list[str]:
    options = {
        "adapter": place.adapter,
        "data": place.data,
        "out": str(out),
        "width": "64",
        "shard-rows": "6",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    model = options.pop("model", place.model)
    return ["cache", model, *(part for name, value in options.items() for part in (f"--{name}", value))]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model": "./none"}, "model not found: './none'"),
        ({"model": "."}, "'.' is not a model: it has no config.json"),
        ({"adapter": "./none"}, "adapter not found: './none'"),
        ({"base": "./none"}, "give --adapter or --base, not both"),
        ({"data": "none.jsonl"}, "data not found: none.jsonl; give a .jsonl file"),
        ({"data": "x" * 300}, "data not found: xxx"),
        ({"model": "x" * 300}, "'xxx.*not a folder here"),
        ({"adapter": "x" * 300}, "adapter not found: 'xxx"),
        ({"data": "."}, "the folder . is not a HF dataset"),
        ({"at": "0.5,x"}, "--at must be numbers separated by commas, got 0.5,x"),
        ({"at": "2"}, "--at 2 is not between 0"),
        ({"at": "nan"}, "--at nan is not between 0"),
        ({"include": "nothing-like-it"}, "no parameter's name matches the pattern 'nothing-like-it'"),
        ({"max_length": str(CONTEXT + 1)}, f"over the model's context of {CONTEXT} tokens"),
        ({"device": "abacus"}, "'abacus'"),
        ({"width": "0"}, "Invalid value for '--width'.*see 'rapidin cache --help'"),
        ({"limit": "0"}, "'--limit'"),
        ({"seed": str(2**64)}, "'--seed'"),
        ({"dtype": "int3"}, "'--dtype'.*'float16', 'float32'"),
        ({"too_long": "drop"}, "'--too-long'.*truncate"),
        ({"bytes": "40"}, "--bytes must be at least 92, got 40"),
        ({"bytes": "400", "dtype": "float16"}, "float16 rows keep every number"),
        ({"sample": "64", "dtype": "sign"}, "needs a budget"),
    ],
)
def test_refused_options(
    place: Place,
    tmp_path: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    pattern: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*cache_arguments(place, tmp_path / "out", **changes)), pattern)


def test_a_model_name_that_nobody_has(
    place: Place, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run(*cache_arguments(place, tmp_path / "out", model="nobody/nothing")), "model 'nobody/nothing'")


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([ROWS[0], None, '{"prompt": "a", '], "data.jsonl, line 3: broken JSON"),
        (
            [{"title": "a", "body": "b"}],
            "line 1: found the fields 'title', 'body'; expected 'prompt' and",
        ),
        (
            [ROWS[0], {"text": "a"}],
            "line 2: found the fields 'text'; expected 'prompt' and 'completion' as in",
        ),
        ([{"text": 3}], "line 1: 'text' is a number"),
        ([], "no examples in .*data.jsonl"),
        ([None, None], "no examples in .*data.jsonl"),
    ],
)
def test_refused_data(place: Place, tmp_path: Path, run: Any, rows: list[Any], pattern: str) -> None:
    data = write(tmp_path / "data.jsonl", rows)
    refused(run(*cache_arguments(place, tmp_path / "out", data=data)), pattern)
    assert not (tmp_path / "out").exists()


def test_chats_for_a_model_without_a_template(place: Place, tmp_path: Path, run: Any) -> None:
    saved = save_tiny(tmp_path, chat=False)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data = write(tmp_path / "chats.jsonl", [None, chat])
    ran = run("cache", str(saved.model), "--data", data, "--out", str(tmp_path / "out"))
    refused(ran, "chats.jsonl, line 2: the data has chats .* no chat template; name .* --tokenizer, or give")
    assert not (tmp_path / "out").exists()


def test_examples_that_are_too_long(place: Place, tmp_path: Path, run: Any) -> None:
    ran = run(*cache_arguments(place, tmp_path / "out"), "--too-long", "skip")
    assert ran.code == 0
    assert "12 with a sketch" in ran.err
    assert "1 skipped as too long" in ran.err
    assert "cut" not in ran.err
    assert "1 skipped as too long" in " ".join(run("info", str(tmp_path / "out")).out.split())


def test_no_example_with_a_sketch(place: Place, tmp_path: Path, run: Any) -> None:
    data = write(tmp_path / "data.jsonl", [ROWS[3], ROWS[4]])
    ran = run(*cache_arguments(place, tmp_path / "out", data=data))
    assert ran.code == 0
    assert "0 with a sketch, 1 empty, 1 without a completion token" in ran.err
    ran = run("query", str(tmp_path / "out"), "--prompt", "a", "--completion", "b")
    assert ran.code == 0
    assert "No example in the cache has a sketch" in ran.out


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"seed": "1"}, r"another sketch \(seed: 0 in the cache, 1 requested\)"),
        ({"width": "32"}, r"another sketch \(width: 64 in the cache, 32 requested\)"),
        ({"at": "1"}, r"other gradients \(at"),
        ({"loss": "sum"}, r"other gradients \(loss: mean in the cache, sum requested\)"),
        ({"exclude": "v_proj"}, "other gradients"),
        ({"max_length": "64"}, "another treatment of the texts"),
        ({"dtype": "float32"}, "another code"),
        ({"limit": "3"}, "another number of examples"),
    ],
)
def test_a_cache_made_otherwise(
    place: Place, tmp_path: Path, run: Any, copied: Path, changes: dict[str, str], pattern: str
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    refused(run(*cache_arguments(place, copied, **changes)), pattern, "name another folder with --out")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_a_cache_made_for_another_model_or_adapter(
    place: Place, tmp_path: Path, run: Any, copied: Path
) -> None:
    other = save_tiny(tmp_path / "other", lora=True, seed=5)
    question = ["query", str(copied), "--prompt", "a", "--completion", "b"]
    for changes in ({"model": str(other.model)}, {"adapter": str(other.adapter)}):
        option, value = next(iter(changes.items()))
        note = "the adapter was made for the model"
        caching = run(*cache_arguments(place, copied, **changes))
        refused(caching, f"was made with another {option}", "--out", note=note)
        refused(run(*question, f"--{option}", value), f"cache was made with another {option}", note=note)
    # without the adapter that it was made with
    arguments = [
        "cache",
        place.model,
        "--data",
        place.data,
        "--out",
        str(copied),
        "--width",
        "64",
        "--shard-rows",
        "6",
    ]
    refused(run(*arguments), "was made with an adapter, and none is given")


def test_an_output_folder_that_holds_something_else(place: Place, tmp_path: Path, run: Any) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    refused(
        run(*cache_arguments(place, tmp_path)),
        r"holds something else \('thesis.tex'\)",
        "name another folder",
    )
    refused(run(*cache_arguments(place, tmp_path / "thesis.tex")), "cannot write into .*thesis.tex")
    refused(run(*cache_arguments(place, tmp_path / ("x" * 300))), "cannot write into .*name too long")
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_not_enough_disk_space(
    place: Place, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    refused(run(*cache_arguments(place, tmp_path / "out")), "needs .* and .* has .* free")


def test_no_such_cache(tmp_path: Path, run: Any) -> None:
    for command in (["info"], ["verify"], ["query", "--prompt", "a"]):
        refused(run(*command, str(tmp_path / "none")), "cache not found: .*none")
        refused(run(*command, str(tmp_path / "none" / ("x" * 300))), "cache not found: .*none")
        refused(run(*command, str(tmp_path)), "is not a rapidin cache: it has no manifest.json")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_shard_is_named_and_made_again(place: Place, run: Any, copied: Path, damage: str) -> None:
    shards = sorted(copied.glob("shard*"))
    assert len(shards) == 3
    whole = shards[1].read_bytes()
    if damage == "truncated":
        shards[1].write_bytes(whole[:-7])
    elif damage == "altered":
        shards[1].write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    else:
        shards[1].unlink()
    refused(run("verify", str(copied)), shards[1].name, "the same 'rapidin cache' command makes it again")
    if damage != "altered":
        refused(run("query", str(copied), "--prompt", "a", "--completion", "b"), shards[1].name)
        refused(run("info", str(copied)), shards[1].name)
    shards[1].unlink(missing_ok=True)
    ran = run(*cache_arguments(place, copied))
    assert ran.code == 0
    assert "cached 6 examples" in ran.err
    assert "after the 9 cached before" in ran.err
    assert shards[1].read_bytes() == whole
    assert run("verify", str(copied)).code == 0


def test_verify_names_every_damaged_shard(run: Any, copied: Path) -> None:
    for shard in copied.glob("shard*"):
        shard.write_bytes(b"")
    ran = run("verify", str(copied))
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "(and 2 more, on standard output)" in ran.err
    assert len(ran.out.splitlines()) == 2
    assert all(shard.name in ran.out + ran.err for shard in copied.glob("shard*"))


def test_a_damaged_manifest(run: Any, copied: Path) -> None:
    (copied / "manifest.json").write_text('{"format": "rapidin-cache", "ver')
    refused(run("info", str(copied)), "manifest.json' is damaged")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "nothing to explain; use --ask or --prompt"),
        (["--ask", "a", "--prompt", "b"], "--ask and --prompt do not go together"),
        (["--prompt", "a", "--data", "b"], "--prompt and --data do not go together"),
        (["--data", "b", "--completion", "c"], "--completion goes with --ask or --prompt"),
        (["--prompt", "a", "--completion", ""], "the completion is empty; leave out --completion"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "one " * CONTEXT], "tokens"),
        (["--data", "none.jsonl"], "data not found: none.jsonl"),
        (["--prompt", "a", "--top-k", "0"], "'--top-k'"),
        (["--prompt", "a", "--normalize", "loud"], "'--normalize'"),
        (["--prompt", "a", "--method", "magic"], "'--method'"),
        (["--prompt", "a", "--tokens", "--hotwords", "b"], "--tokens and --hotwords do not go together"),
        (["--prompt", "a", "--tokens", "--together"], "targets are parts of single generations"),
        (["--prompt", "a", "--candidates", "20"], "--candidates is the number that --rescore looks at"),
        (["--prompt", "a", "--rescore", "exact", "--method", "fisher"], "--method dot with --rescore exact"),
        (["--prompt", "a", "--contributions", "--no-text"], "needs the training examples"),
        (["--prompt", "a", "--report", "no/folder/page.html"], "cannot write no/folder/page.html"),
        (["--prompt", "a", "--each-token"], "No such option.*--each-token"),
        (["--prompt", "a", "--json", "no/folder/hits.json"], "cannot write no/folder/hits.json"),
        (["--prompt", "a", "--json", "."], "cannot write .: it is a directory"),
        (["--prompt", "\udcff"], "half a character"),
    ],
)
def test_refused_queries(place: Place, run: Any, arguments: list[str], pattern: str) -> None:
    refused(run("query", place.cache, *arguments), pattern)


def test_refused_query_data(place: Place, tmp_path: Path, run: Any) -> None:
    data = write(tmp_path / "q.jsonl", [{"prompt": "a"}, {"title": "b"}])
    refused(run("query", place.cache, "--data", data), "q.jsonl, line 2: found the fields 'title'; expected")


def test_usage_errors(run: Any) -> None:
    refused(run("bake"), "No such command 'bake'; see 'rapidin --help'")
    refused(run("cache"), "Missing argument 'MODEL'; see 'rapidin cache --help'")
    refused(run("cache", "model", "--data", "x"), "--out", "see 'rapidin cache --help'")
    refused(run("info", "a", "b"), "see 'rapidin info --help'")


# --------------------------------------------------------------------------------- stopped, and broken


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("times", "kept"), [(1, 12), (2, 6)])
def test_stopped_while_caching_goes_on(
    place: Place,
    tmp_path: Path,
    run: Any,
    number: int,
    code: int,
    times: int,
    kept: int,
) -> None:
    """A first signal finishes the shard in hand, here the second one; a second signal stops at once.

    Without a preconditioner: its sample would be all of so few examples, sketched before the shards.
    """

    def stop() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    out = tmp_path / "out"
    with at_pass(-1) as begun:
        assert run(*cache_arguments(place, tmp_path / "whole"), "--precondition", "off").code == 0
    second = len(begun) - 2  # each of the three shards takes one pass, and what is fitted comes before them
    # Started in the background, the tests inherit a Ctrl-C that is ignored; here it is not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with at_pass(second, stop):
            ran = run(*cache_arguments(place, out), "--precondition", "off")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ran.code, ran.out) == (code, "")
    said = f"rapidin: stopped with {kept} of 15 examples in {out}; rerun the same command to resume\n"
    assert ran.err == said
    assert f"unfinished: {kept} of 15" in run("info", str(out)).out
    assert f"({kept} of 15 examples" in run("verify", str(out)).out
    query = run("query", str(out), "--prompt", "a", "--completion", "b")
    assert query.code == 0
    assert "of 15 examples are cached" in query.err
    ran = run(*cache_arguments(place, out), "--precondition", "off")
    assert ran.code == 0
    assert f"cached {15 - kept} examples" in ran.err
    assert f"after the {kept} cached before" in ran.err
    for shard in (tmp_path / "whole").glob("shard*"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


def test_signal_handlers_are_put_back(place: Place, run: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run("info", place.cache)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_errors_keep_their_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("a mistake in rapidin")

    monkeypatch.setattr(Manifest, "read", fail)
    with pytest.raises(RuntimeError, match="a mistake in rapidin"):
        main(["info", place.cache])


def test_a_reader_that_has_gone(place: Place) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rapidin", "info", place.cache], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (141, b"")


def test_help_and_version_are_quick(run: Any) -> None:
    script = (
        "import sys; from rapidin.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {command} " in done.stdout for command in ("cache", "query", "info", "verify", "demo"))
    assert "positive score" in done.stdout
    assert run() == run("--help") == run("-h")
    assert re.fullmatch(r"rapidin \d+\.\d+\.\d+\S*\n", run("--version").out)
    assert "helpful" in run("query", "--help").out


def test_python_m_rapidin() -> None:
    done = subprocess.run([sys.executable, "-m", "rapidin", "info"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rapidin: Missing argument 'CACHE'; see 'rapidin info --help'\n"


@pytest.mark.parametrize(
    ("rows", "query"),
    [
        (
            [{"instruction": f"Give {n} tips.", "input": "", "output": f"One, {n}."} for n in range(6)],
            ("### Instruction:\nGive 3 tips.\n\n### Response:\n", "One, 3."),
        ),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": f"Give {n} tips."},
                        {"role": "assistant", "content": f"One, {n}."},
                    ]
                }
                for n in range(6)
            ],
            ("<|user|>\nGive 3 tips.</s>\n<|assistant|>\n", "One, 3."),
        ),
        (
            [{"prompt": f"Give {n} tips.", "completion": f"One, {n}."} for n in range(6)],
            ("Give 3 tips.", "One, 3."),
        ),
    ],
    ids=["instruction", "messages", "prompt"],
)
def test_a_question_is_put_in_the_form_of_the_training_data(
    place: Place, tmp_path: Path, run: Any, rows: list[Any], query: tuple[str, str]
) -> None:
    data, out = write(tmp_path / "train.jsonl", rows), str(tmp_path / "out")
    assert run("cache", place.model, "--data", data, "--out", out, "--width", "64").code == 0
    asked = ("query", out, "--ask", "Give 3 tips.", "--completion", query[1])
    ran = run(*asked, "--normalize", "layer", "--json", "-")
    assert ran.code == 0, ran.err
    (found,) = json.loads(ran.out)["queries"]
    assert found["prompt"].endswith(query[0])
    assert found["completion"] == query[1]
    # The very example: to the letter the same text, so every layer's cosine is 1.
    assert found["top"][0]["index"] == 3
    assert found["top"][0]["score"] == pytest.approx(1.0, abs=1e-3)
    ran = run("query", out, "--ask", "Give 3 tips.", "--max-new-tokens", "4", "--json", "-")
    assert json.loads(ran.out)["queries"][0]["generated"]
