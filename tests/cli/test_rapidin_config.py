"""RapidIn's own configuration as the options of `rapidin cache` and `rapidin query`."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import caller
from tiny import save_tiny

from rapidin.cache.manifest import Manifest
from rapidin.cli.rapidin_config import defaults_of
from rapidin.errors import UserError

ROWS = [{"prompt": f"Give {n} tips.", "completion": f" One, two, {n}."} for n in range(8)]


def caching(**influence: Any) -> dict[str, Any]:
    """A configuration for caching, as RapidIn's examples have it."""
    return {
        "data": {"train_data_path": "train.jsonl"},
        "influence": {
            "outdir": "out",
            "seed": 42,
            "cal_words_infl": False,
            "n_threads": 2,
            "RapidGrad": {"enable": True, "RapidGrad_K": 4096, "shuffle_lambda": 20},
            "skip_test": True,
            "grads_path": "grads",
            **influence,
        },
        "model": {"model_path": "model", "lora_path": "adapter", "max_length": 48, "load_in_4bit": True},
    }


def written(folder: Path, config: Any) -> str:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def test_what_caching_takes_from_it(tmp_path: Path) -> None:
    defaults, unused = defaults_of(written(tmp_path, caching(colour="red")), "cache")
    assert defaults == {
        "model": "model",
        "adapter": "adapter",
        "max_length": 48,
        "data": ["train.jsonl"],
        "out": "grads",
        "seed": 42,
        "at": "1",
        "preconditioner": "off",
        "projection": "rapidgrad",
        "width": 4096,
    }
    # All that has a value is used or named, and what is switched off is neither.
    assert set(unused) == {
        "influence.outdir",
        "influence.n_threads",
        "influence.RapidGrad.shuffle_lambda",
        "influence.skip_test",
        "influence.colour",
        "model.load_in_4bit",
    }


def test_what_a_query_takes_from_it(tmp_path: Path) -> None:
    config = caching(top_k=7, cal_words_infl=True)
    config["data"]["test_data_path"] = "test.jsonl"
    defaults, unused = defaults_of(written(tmp_path, config), "query")
    assert defaults == {"cache": ["grads"], "data": "test.jsonl", "top_k": 7}
    assert "with RapidGrad" in unused["influence.cal_words_infl"]
    for flag in ("--ask", "--prompt"):
        defaults, unused = defaults_of(written(tmp_path, config), "query", [flag])
        assert "data" not in defaults
        assert "data.test_data_path" in unused
    config["influence"]["RapidGrad"]["enable"] = False
    defaults, _ = defaults_of(written(tmp_path, config), "query")
    assert defaults["tokens"] is True
    assert {
        "data.train_data_path",
        "influence.seed",
        "model.model_path",
        "influence.RapidGrad.enable",
    } <= set(unused)


def test_without_rapidgrad_gradients_are_sketched(tmp_path: Path) -> None:
    config = caching(RapidGrad={"enable": False, "RapidGrad_K": 4096}, infl_method="IF")
    defaults, unused = defaults_of(written(tmp_path, config), "cache")
    assert not {"projection", "width"} & set(defaults)
    assert "sketched" in unused["influence.RapidGrad.enable"]
    assert {"influence.RapidGrad.RapidGrad_K", "influence.infl_method"} <= set(unused)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "is no configuration of RapidIn"),
        ("{}", "is no configuration of RapidIn"),
        ({"model": "gpt2"}, "is no configuration of RapidIn"),
        (caching(seed="42"), "'influence.seed' in .* must be a whole number, got \"42\""),
        (caching(grads_path=3), "'influence.grads_path' in .* must be a text, got 3"),
        (caching(RapidGrad={"enable": True, "RapidGrad_K": [16, 32]}), "has several sizes"),
        (caching(RapidGrad={"enable": True, "RapidGrad_K": True}), "must be a whole number, got true"),
        (caching(RapidGrad={"enable": "false"}), 'must be true or false, got "false"'),
    ],
)
def test_what_is_no_configuration(config: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        defaults_of(written(tmp_path, config), "cache")


def test_from_caching_to_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = caller(capsys)
    saved = save_tiny(tmp_path, lora=True)
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", ROWS), ("test", ROWS[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = caching(top_k=3)
    config["data"]["test_data_path"] = "test.jsonl"
    config["model"] |= {"model_path": str(saved.model), "lora_path": str(saved.adapter)}
    path = written(tmp_path, config)

    made = run("cache", "--rapidin-config", path)
    assert made.code == 0, made.err
    manifest = Manifest.read(tmp_path / "grads")
    assert manifest.complete
    assert (manifest.sketch["projection"], manifest.width, manifest.sketch["seed"]) == ("rapidgrad", 4096, 42)
    assert "influence.RapidGrad.shuffle_lambda: one keyed permutation" in made.err

    asked = run("query", "--rapidin-config", path, "--json", "-")
    assert asked.code == 0, asked.err
    found = json.loads(asked.out)["queries"][0]
    assert 0 < len(found["top"]) <= 3
    assert found["top"][0]["index"] == 0

    # An option that is given counts instead.
    other = run("cache", "--rapidin-config", path, "--width", "512", "--out", "other", "--quiet")
    assert other.code == 0, other.err
    assert Manifest.read(tmp_path / "other").width == 512


def test_options_that_are_given_count_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = caller(capsys)
    saved = save_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = caching()
    config["data"]["test_data_path"] = "test.jsonl"
    config["model"] = {"model_path": str(saved.model)}
    path = written(tmp_path, config)
    made = run("cache", "--rapidin-config", path, "--projection", "tensor", "--width", "64", "-q")
    assert (made.code, made.err) == (0, "")
    assert Manifest.read(tmp_path / "grads").sketch["projection"] == "tensor"
    asked = run("query", "--rapidin-config", path, "--prompt", "Give 3 tips.", "--completion", " One.")
    assert asked.code == 0, asked.err
    assert "data.test_data_path: another generation is given" in asked.err


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = caller(capsys)
    ran = run("cache", "--rapidin-config", str(tmp_path / "no.json"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert "cannot be read" in ran.err
    ran = run("query", "--rapidin-config", written(tmp_path, {"influence": {"top_k": 5}}), "--ask", "Why?")
    assert ran.code == 2
    assert "CACHE" in ran.err
