"""Choosing training data, and the table of self-influence, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from tiny import records, save_tiny

import rapidin
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.selection import best_rows, count_of, group_by, table
from rapidin.cli import main
from rapidin.errors import UserError

QUERIES = [r | {"group": "ab"[n % 2]} for n, r in enumerate(records(4, seed=9))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    saved = save_tiny(folder, lora=True)
    rows = records()
    rows[3]["completion"] = ""
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "target.jsonl").write_text("".join(json.dumps(r) + "\n" for r in QUERIES))
    made = ["--data", str(folder / "train.jsonl"), "--width", "64", "--quiet", "--out", str(folder / "cache")]
    assert main(["cache", str(saved.model), "--adapter", str(saved.adapter), *made]) == 0
    return folder


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("by", [None, "group"])
@pytest.mark.parametrize("method", ["dot", "fisher"])
def test_the_chosen_are_those_that_help_most(
    place: Path, tmp_path: Path, method: str, by: str | None
) -> None:
    out, all_scores = tmp_path / "chosen.jsonl", tmp_path / "scores.csv"
    command = ["select", str(place / "cache"), "--target", str(place / "target.jsonl"), "--top", "20%"]
    command += ["--out", str(out), "--scores", str(all_scores), "--method", method, "--quiet"]
    assert main(command + (["--by", by] if by else [])) == 0
    attributor = Attributor.from_cache(place / "cache")
    each = attributor.scores(place / "cache", QUERIES, method=method)  # type: ignore[arg-type]
    worth = torch.stack([each[::2].mean(0), each[1::2].mean(0)]).amax(0) if by else each.mean(0)
    worth = torch.where(worth.isnan(), -torch.inf, worth)
    best = sorted(worth.argsort(descending=True)[:6].tolist())
    rows = lines(place / "train.jsonl")
    assert lines(out) == [rows[n] for n in best]
    with all_scores.open() as file:
        found = list(csv.DictReader(file))
    assert [n for n, row in enumerate(found) if row["chosen"] == "True"] == best
    assert len(found) == 30
    name = "score a" if by else "score"
    want = each[::2].mean(0) if by else each.mean(0)
    assert found[3][name] == ""
    assert float(found[4][name]) == pytest.approx(float(want[4]), rel=1e-3)


def test_mistakes_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["select", str(place / "cache"), "--target", str(place / "target.jsonl"), "--quiet"]
    out = ["--out", str(tmp_path / "x.jsonl")]
    for more, words in (
        ([*out, "--top", "some"], "neither a number nor a share"),
        ([*out, "--top", "0"], "use more than 0"),
        ([*out, "--top", "31"], "at most all of them"),
        ([*out, "--top", "30"], "only 29 examples have a gradient"),
        ([*out, "--by", "kind"], "no column 'kind'"),
        (["--out", str(tmp_path / "none" / "x.jsonl")], "the directory does not exist"),
        ([*out, "--method", "dot", "--damping", "1"], "takes no --damping"),
        (["--out", str(place / "train.jsonl")], "is read as input, and would be overwritten"),
        ([*out, "--scores", str(place / "target.jsonl")], "is read as input, and would be overwritten"),
    ):
        assert main([*command, *more]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["self.csv", "self.jsonl"])
def test_self_influence_is_a_table_of_all_examples(
    place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    command = ["self", str(place / "cache"), "--method", "fisher", "--normalize", "layer", "--top-k", "3"]
    assert main([*command, "--out", str(out)]) == 0
    want = rapidin.self_influence(rapidin.Cache(place / "cache"), method="fisher", normalize="layer")
    found = lines(out) if name.endswith("jsonl") else list(csv.DictReader(out.open()))
    assert [int(row["index"]) for row in found] == list(range(30))  # type: ignore[call-overload]
    assert found[3]["self_influence"] in ("", None)
    got = [float(row["self_influence"]) for n, row in enumerate(found) if n != 3]  # type: ignore[arg-type]
    assert got == pytest.approx([float(x) for n, x in enumerate(want) if n != 3])
    shown = capsys.readouterr().out
    assert "Largest self-influence" in shown
    best = int(torch.where(want.isnan(), -torch.inf, want).argmax())
    assert f" {best} " in shown.splitlines()[4]
    assert main([*command, "--out", "-"]) == 0
    assert capsys.readouterr().out.startswith("index,self_influence\n0,")


def test_shares_and_groups() -> None:
    assert [count_of(t, 1000) for t in ("5%", "12", "0.01%", "100%")] == [50, 12, 1, 1000]
    for wrong in ("", "%", "x", "-1", "101%", "nan%", "1.5"):
        with pytest.raises(UserError):
            count_of(wrong, 1000)
    assert group_by([{"g": 1}, {"g": 2}, {"g": 1}], "g") == {"1": [0, 2], "2": [1]}
    nan = float("nan")
    assert best_rows(torch.tensor([[1.0, nan, 3.0, 0.0], [2.0, nan, 0.0, 3.0]]), 2) == [2, 3]
    assert table({"a": [1, 2], "b": [nan, "x,y"]}, "t.csv") == 'a,b\n1,\n2,"x,y"\n'
