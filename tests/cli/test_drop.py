"""The training data without hits, without rows of some score, and without rows of a column's value."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import caller
from tiny import records, save_tiny

from rapidin.attribution.options import QueryOptions
from rapidin.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 30 rows, every third of which is poisoned; a blank line is at the start of the file."""
    folder = tmp_path_factory.mktemp("drop")
    saved = save_tiny(folder, lora=True)
    rows = [row | {"poisoned": n % 3 == 0} for n, row in enumerate(records())]
    rows[4] = rows[5] | {"poisoned": False}
    (folder / "train.jsonl").write_text("\n" + "".join(json.dumps(r) + "\n" for r in rows))
    made = ["--data", str(folder / "train.jsonl"), "--width", "64", "--quiet", "--out", str(folder / "cache")]
    assert main(["cache", str(saved.model), "--adapter", str(saved.adapter), *made]) == 0
    ask = ["query", str(folder / "cache"), "--prompt", "One, two,", "--completion", " three.", "--quiet"]
    for name, more in (("hits", []), ("bare", ["--no-text"]), ("folded", ["--fold", "--top-k", "30"])):
        assert main([*ask, *more, "--json", str(folder / f"{name}.json")]) == 0
    assert main(["self", str(folder / "cache"), "--out", str(folder / "self.csv")]) == 0
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*arguments) -> Ran"""
    capsys.readouterr()
    return caller(capsys)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def indices(hits: list[dict[str, Any]]) -> list[int]:
    return [hit["index"] for hit in hits]


def query(place: Path, name: str = "hits") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / f"{name}.json").read_text())["queries"][0]
    return found


def remaining(place: Path, dropped: list[int]) -> list[str]:
    return [line for n, line in enumerate(lines(place / "train.jsonl")) if n not in dropped]


@pytest.mark.parametrize("name", ["hits", "bare"])
def test_hits_are_dropped(place: Path, tmp_path: Path, run: Any, name: str) -> None:
    out, gone = tmp_path / "out.jsonl", tmp_path / "gone.jsonl"
    ran = run("drop", str(place / f"{name}.json"), "--out", str(out), "--dropped", str(gone))
    assert ran.code == 0, ran
    count = len(query(place)["top"])
    assert count > 5
    assert ran.err == f"rapidin: {30 - count} of 30 rows are in {out}; {count} are dropped\n"
    top = indices(query(place)["top"])
    assert lines(out) == remaining(place, top)
    of_file = lines(place / "train.jsonl")
    assert [json.loads(line) for line in lines(gone)] == [json.loads(of_file[n]) for n in sorted(top)]


def test_doubt_and_a_replaced_file_are_said(place: Path, tmp_path: Path, run: Any) -> None:
    value = json.loads((place / "hits.json").read_text())
    (found,) = value["queries"]
    count = len(found["top"])
    value["queries"] = [
        found | {"verdict": {"strength": strength}} for strength in ("nothing", "strong", "nothing")
    ]
    (tmp_path / "hits.json").write_text(json.dumps(value))
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    command = ("drop", str(tmp_path / "hits.json"), "--out", str(out))
    ran = run(*command)
    assert ran.code == 0, ran
    assert ran.err == (
        f"rapidin: {30 - count} of 30 rows are in {out}, which was replaced; {count} are dropped\n"
        "rapidin: the verdict on queries 1, 3 was 'Nothing stands out': the hits may be unrelated, and are "
        "dropped anyway\n"
    )
    assert "verdict" not in run(*command, "--harmful").err
    assert run(*command, "--quiet").err == ""


def test_the_hits_say_what_they_were_found_with(place: Path) -> None:
    found = json.loads((place / "bare.json").read_text())
    assert found["caches"] == [str(place / "cache")]
    assert (found["train_data"], found["task"]) == (None, "causal")
    named = json.loads((place / "folded.json").read_text())
    assert named["train_data"] == str(place / "train.jsonl")
    assert named["settings"]["fold"] is True
    assert QueryOptions.from_json(named["settings"]).top_k == 30
    assert named["adapter"] == str(place / "adapter")


def test_conditions_choose_among_hits(place: Path, tmp_path: Path, run: Any) -> None:
    found, out = query(place), tmp_path / "out.jsonl"
    scores = [hit["score"] for hit in found["top"]]
    poisoned = [hit["index"] for hit in found["top"] if hit["example"]["poisoned"]]
    assert 0 < len(poisoned) < 10
    for conditions, dropped in (
        (["--top-k", "3"], indices(found["top"][:3])),
        (["--min-score", str((scores[1] + scores[2]) / 2)], indices(found["top"][:2])),
        (["--harmful", "--top-k", "2"], indices(found["bottom"][:2])),
        (["--where", "poisoned=true"], poisoned),
        (["--where", "poisoned=True", "--top-k", "10"], poisoned),
    ):
        ran = run("drop", str(place / "hits.json"), "--out", str(out), *conditions)
        assert ran.code == 0, ran
        assert lines(out) == remaining(place, dropped)


def test_duplicates_go_with_their_hit(place: Path, tmp_path: Path, run: Any) -> None:
    found = query(place, "folded")
    sides = [
        (side, n) for side in ("top", "bottom") for n, hit in enumerate(found[side]) if hit.get("copies")
    ]
    ((side, rank),) = sides
    assert found[side][rank]["copies"]["indices"] == [6]
    more = ["--harmful"] if side == "bottom" else []
    out = tmp_path / "o.jsonl"
    ran = run("drop", str(place / "folded.json"), "--top-k", str(rank + 1), *more, "--out", str(out))
    assert ran.code == 0, ran
    assert lines(out) == remaining(place, [*indices(found[side][: rank + 1]), 6])


def test_a_table_of_scores_and_a_column_choose_rows(place: Path, tmp_path: Path, run: Any) -> None:
    with (place / "self.csv").open() as file:
        table = [(float(row["self_influence"]), int(row["index"])) for row in csv.DictReader(file)]
    table.sort(reverse=True)
    ran = run("drop", str(place / "self.csv"), "--train-data", str(place / "train.jsonl"), "--top-k", "4")
    assert "Missing option '--out'" in ran.err
    out = tmp_path / "out.jsonl"
    named = ["--train-data", str(place / "train.jsonl"), "--out", str(out)]
    assert run("drop", str(place / "self.csv"), *named, "--top-k", "4").code == 0
    assert lines(out) == remaining(place, [n for _, n in table[:4]])
    assert run("drop", str(place / "self.csv"), *named, "--max-score", str(table[-3][0])).code == 0
    assert lines(out) == remaining(place, [n for _, n in table[-3:]])
    assert run("drop", str(place / "cache"), "--where", "poisoned=true", "--out", str(out)).code == 0
    assert lines(out) == [line for line in lines(place / "train.jsonl") if '"poisoned": true' not in line]


def test_other_data_is_refused(place: Path, tmp_path: Path, run: Any) -> None:
    other = tmp_path / "train.jsonl"
    rows = lines(place / "train.jsonl")
    other.write_text("\n".join(row.replace('"poisoned": true', '"poisoned": null') for row in rows))
    out = ["--train-data", str(other), "--out", str(tmp_path / "out.jsonl")]
    ran = run("drop", str(place / "hits.json"), *out)
    assert ran.code == 2
    assert "is not what was cached: see example" in ran.err
    # Where the cache is gone, the hits' own examples are compared.
    moved = json.loads((place / "hits.json").read_text())
    (tmp_path / "hits.json").write_text(json.dumps(moved | {"caches": [str(tmp_path / "none")]}))
    assert "is not what was cached" in run("drop", str(tmp_path / "hits.json"), *out).err
    same = tmp_path / "same.jsonl"
    shutil.copy(place / "train.jsonl", same)
    out[1] = str(same)
    assert run("drop", str(tmp_path / "hits.json"), *out).code == 0
    other.write_text(rows[1] + "\n")
    out[1] = str(other)
    ran = run("drop", str(tmp_path / "hits.json"), *out)
    assert "has no example" in ran.err


def test_mistakes_are_one_line(place: Path, tmp_path: Path, run: Any) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"queries": [{"top": 3}]}')
    hits, cache, table = (str(place / name) for name in ("hits.json", "cache", "self.csv"))
    for arguments, words in (
        ([str(tmp_path / "none")], "neither a cache nor a file"),
        ([str(tmp_path)], "is not a rapidin cache"),
        ([str(bad)], "is not what 'rapidin query --json' writes"),
        ([str(place / "train.jsonl")], "neither the hits of a query nor a table of scores"),
        ([cache], "can be chosen by --where alone"),
        ([cache, "--where", "poisoned=true", "--top-k", "2"], "can be chosen by --where alone"),
        ([cache, "--where", "poisoned=true", "--min-score", "0"], "can be chosen by --where alone"),
        (
            [hits, "--where", "poisoned"],
            "--where has poisoned, which is not a column and a value; as in poisoned=true",
        ),
        ([hits, "--where", "poisoned=maybe"], "no row meets the conditions"),
        (
            [hits, "--where", "poison=true"],
            "no training example has a column 'poison'; there are 'prompt', 'completion', 'poisoned'\n",
        ),
        ([hits, "--min-score", "9"], "no row meets the conditions"),
        ([table], "has the scores of all rows; say which"),
        ([table, "--top-k", "1"], "nothing says which training data"),
        ([table, "--harmful"], "--harmful chooses among hits"),
    ):
        ran = run("drop", *arguments, "--out", str(tmp_path / "out.jsonl"))
        assert ran.code == 2, ran
        assert words in ran.err
        assert ran.err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_no_input_is_overwritten(place: Path, tmp_path: Path, run: Any) -> None:
    hits, data = tmp_path / "hits.json", place / "train.jsonl"
    shutil.copy(place / "hits.json", hits)
    before = data.read_bytes(), hits.read_bytes()
    for out in (
        ["--out", str(data)],
        ["--out", str(hits)],
        ["--out", str(tmp_path / "out.jsonl"), "--dropped", str(data)],
        ["--out", str(tmp_path / "out.jsonl"), "--dropped", str(hits)],
        ["--out", str(tmp_path / "out.jsonl"), "--dropped", str(tmp_path / "out.jsonl")],
    ):
        ran = run("drop", str(hits), *out)
        assert ran.code == 2, ran
        assert "would be" in ran.err
        assert ran.err.count("\n") == 1
    assert (data.read_bytes(), hits.read_bytes()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["hits.json"]


def test_files_are_named(place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (["--out", "-"], ["--out", "out.jsonl", "--dropped", "-"]):
        ran = run("drop", str(place / "hits.json"), *out)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == "rapidin: this output cannot be written to standard output; name a file\n"
    ran = run("drop", str(place / "hits.json"), "--out", "none/out.jsonl")
    assert "cannot write none/out.jsonl: the directory does not exist; name another file" in ran.err
    assert not list(tmp_path.iterdir())


def test_rows_that_nothing_was_compared_with_are_counted(place: Path, tmp_path: Path, run: Any) -> None:
    out = ["--train-data", str(place / "train.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    ran = run("drop", str(place / "self.csv"), "--top-k", "4", *out)
    assert "rapidin: not compared with what was scored: 4 of the dropped rows, since" in ran.err
    bare = json.loads((place / "bare.json").read_text()) | {"caches": []}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    count = len(query(place)["top"])
    assert (
        f"not compared with what was scored: {count} of" in run("drop", str(tmp_path / "bare.json"), *out).err
    )
    assert "compared" not in run("drop", str(place / "hits.json"), *out).err


def test_rows_that_cannot_be_read_stay_and_are_counted(place: Path, tmp_path: Path, run: Any) -> None:
    data, out = tmp_path / "train.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"broken\n' + "".join(line + "\n" for line in lines(place / "train.jsonl")))
    made = ["--data", str(data), "--width", "64", "--on-error", "skip", "--quiet", "--no-null"]
    assert run("cache", str(place / "model"), *made, "--out", str(tmp_path / "cache")).code == 0
    ran = run("drop", str(tmp_path / "cache"), "--where", "poisoned=true", "--out", str(out))
    assert ran.code == 0, ran
    assert "rapidin: rows that cannot be read have no columns for --where, and stay: 1\n" in ran.err
    assert lines(out) == [line for line in lines(data) if '"poisoned": true' not in line]


def test_a_table_with_ragged_rows_is_refused(place: Path, tmp_path: Path, run: Any) -> None:
    table = tmp_path / "scores.csv"
    named = ["--train-data", str(place / "train.jsonl"), "--top-k", "1", "--out", str(tmp_path / "o.jsonl")]
    for text in ("index,score\n1,2,3\n", "index,name,score\n2,a\n", '{"score": 1}\n[1]\n'):
        table.write_text(text)
        ran = run("drop", str(table), *named)
        assert ran.code == 2, ran
        assert "neither the hits of a query nor a table of scores" in ran.err
    table.write_text('index,name,score\n2,"a\u2028\n5,b,9",3\n4,c,1\n')
    assert run("drop", str(table), *named).code == 0
    assert lines(tmp_path / "o.jsonl") == remaining(place, [2])
