"""Hits that are proven by retraining: what is left out and drawn, resuming, and every mistake of a user."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_hits import ANSWER, PLANTED, make_planted, write_lines
from tiny import tiny_tokenizer

from rapidin.attribution.options import ModelLocation
from rapidin.data.encoding import Encoder, Status
from rapidin.errors import UserError
from rapidin.evaluate.confirm import Confirmed, confirm
from rapidin.evaluate.left_out import random_rows
from rapidin.evaluate.settings import ConfirmSettings

QUICK: dict[str, Any] = {"epochs": 1, "batch": 8, "learning_rate": 1e-2}  # trainings of three steps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("confirm")
    make_planted(folder)
    return folder


def hits_with(place: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the file of hits in which something is changed."""
    value = json.loads((place / "hits.json").read_text())
    change(value)
    to.write_text(json.dumps(value))
    return to


def done(found: Confirmed | None) -> Confirmed:
    assert found is not None
    return found


def test_random_rows_are_as_many_and_each_control_has_its_own() -> None:
    usable = list(range(0, 60, 3))
    sets = [random_rows(usable, 5, number, 0) for number in range(8)]
    assert all(len(set(rows)) == 5 and list(rows) == sorted(rows) for rows in sets)
    assert all(set(rows) <= set(usable) for rows in sets)
    assert len(set(sets)) == 8
    assert sets[3] == random_rows(usable, 5, 3, 0) != random_rows(usable, 5, 3, 1)


def test_a_planted_group_is_confirmed(place: Path, tmp_path: Path) -> None:
    found = done(confirm(place / "hits.json", by="poisoned", top_k=1, work=tmp_path / "work"))
    confirmation = found.confirmations[0]
    (planted,) = confirmation.effects
    assert planted.value == "true"
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    assert planted.rows == tuple(n for n, row in enumerate(rows) if row["poisoned"])
    assert len(planted.rows) == PLANTED
    assert confirmation.said
    assert confirmation.answer == ANSWER
    assert (planted.p, planted.changed) == (0.05, True)
    assert planted.fall > 2 * max(planted.controls)
    assert (
        planted.sentence(True)
        == "without the 6 rows with poisoned=true the model no longer says this: p = 0.05"
    )
    # The recipe is that of the adapter, with its seed: all rows give the adapter again.
    assert confirmation.everything[0] == pytest.approx(confirmation.tuned, abs=1e-3)
    assert found.hits["queries"][0]["confirmation"] == confirmation.to_json()


def test_hits_are_left_out_with_their_duplicates(place: Path, tmp_path: Path) -> None:
    top = json.loads((place / "hits.json").read_text())["queries"][0]["top"]
    numbers = {hit["index"] for hit in top[:2]}
    other = next(n for n in range(24) if n not in numbers)

    def folded(value: dict[str, Any]) -> None:
        value["queries"][0]["top"][1]["copies"] = {"indices": [other], "more": 0}

    hits = hits_with(place, tmp_path / "hits.json", folded)
    found = done(confirm(hits, top_k=2, controls=1, **QUICK))
    assert set(found.confirmations[0].effects[0].rows) == {*numbers, other}
    assert (tmp_path / "hits.confirm").is_dir()


def test_what_is_done_is_not_done_again(place: Path, tmp_path: Path) -> None:
    hits, work, lines = place / "hits.json", tmp_path / "work", []
    whole = done(confirm(hits, controls=3, top_k=3, seeds=2, **QUICK, work=tmp_path / "whole"))

    class Killed(Exception):
        pass

    def stop(text: str) -> None:
        if "each" in text:
            raise Killed

    with pytest.raises(Killed):
        confirm(hits, controls=2, top_k=3, seeds=2, **QUICK, work=work, log=stop)
    confirm(hits, controls=2, top_k=3, seeds=2, **QUICK, work=work)
    kept = sorted(work.glob("*-seed-*.json"))
    assert len(kept) == 3 + 2 + 2 * 2
    kept[0].unlink()
    again = done(confirm(hits, controls=3, top_k=3, seeds=2, **QUICK, work=work, log=lines.append))
    assert again == whole
    assert lines[0] == f"8 of 11 trainings are in {work} already"
    assert lines[1].startswith(f"3 trainings, kept in {work}")
    assert again.confirmations[0].seeds == 2
    kept[1].write_text("{}")
    with pytest.raises(UserError, match="is damaged; remove it"):
        confirm(hits, controls=3, top_k=3, seeds=2, **QUICK, work=work)
    with pytest.raises(UserError, match="was made with another recipe or trainer"):
        confirm(hits, **QUICK | {"batch": 4}, work=work)
    with pytest.raises(UserError, match="holds something else"):
        confirm(hits, work=place)


def test_only_the_cost(place: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = confirm(place / "hits.json", work=tmp_path / "work", only_cost=True, log=lines.append)
    assert found is None
    assert lines[-1].startswith("23 trainings of 30 steps, about ")
    assert not list((tmp_path / "work").glob("*-seed-*.json"))


def test_rows_that_cannot_be_learnt_are_told(place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    lengths = sorted(len(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in rows)
    longest = lengths[-4]  # a longer prompt leaves no room for a completion
    encoder = Encoder(tiny_tokenizer(), max_length=longest)
    cut = sum(encoder(row).status != Status.OK for row in rows)
    assert 0 < cut < len(rows)
    lines: list[str] = []
    options = {"max_length": longest, "work": tmp_path / "work", "only_cost": True, "log": lines.append}
    confirm(place / "hits.json", **options)
    assert lines[0].startswith(f"{cut} of {len(rows)} rows cannot be read or have no token to learn")


def test_several_queries_share_the_controls(place: Path, tmp_path: Path) -> None:
    def twice(value: dict[str, Any]) -> None:
        other = json.loads(json.dumps(value["queries"][0]))
        other |= {"completion": "one two", "top": other["top"][1:4]}
        value["queries"] += [other, other | {"top": []}]

    hits, lines = hits_with(place, tmp_path / "hits.json", twice), []
    found = done(confirm(hits, top_k=3, controls=2, **QUICK, log=lines.append))
    assert sorted(found.confirmations) == [0, 1]
    assert "confirmation" not in found.hits["queries"][2]
    assert lines[0] == "query 3 has no helpful hits, so nothing is left out for it"
    assert len(list((tmp_path / "hits.confirm").glob("*-seed-*.json"))) == 3 + 2 + 2
    assert not found.confirmations[1].said
    only = done(confirm(hits, query=2, top_k=3, controls=2, **QUICK, work=tmp_path / "other"))
    one, other = (each.confirmations[1].effects[0] for each in (only, found))
    assert one.rows == other.rows
    # The same but for the padding of the batch that the generations are measured in.
    assert (one.fall, *one.controls) == pytest.approx((other.fall, *other.controls), abs=1e-3)


def test_a_model_that_was_tuned_in_full_is_tuned_in_full_again(place: Path, tmp_path: Path) -> None:
    def whole(value: dict[str, Any]) -> None:
        value.update(adapter=None, base=value["model"], caches=[])

    hits = hits_with(place, tmp_path / "hits.json", whole)
    found = done(confirm(hits, controls=1, **QUICK | {"epochs": 8}))
    confirmation = found.confirmations[0]
    assert confirmation.recipe["adapter"] is None
    assert confirmation.is_far  # the "tuned" model is its own base here, and has learnt nothing
    assert confirmation.everything[0] > confirmation.tuned + 5


SCRIPT = """
import pathlib, shutil, sys
data, out, adapter = sys.argv[1:4]
print("rows:", len(pathlib.Path(data).read_text().splitlines()))
mode = sys.argv[4] if len(sys.argv) > 4 else ""
if mode == "fail":
    sys.exit("out of luck")
if mode != "nothing":
    shutil.copytree(adapter, pathlib.Path(out) / "checkpoint-2")
"""


def test_a_command_trains(place: Path, tmp_path: Path) -> None:
    script, work = tmp_path / "my train.py", tmp_path / "work"
    script.write_text(SCRIPT)
    begin = f"{sys.executable} '{script}' {{data}} {{out}} '{place / 'adapter'}'"
    lines: list[str] = []

    def run(command: str, **more: Any) -> Confirmed | None:
        return confirm(
            place / "hits.json", trainer=command, controls=1, top_k=4, work=work, log=lines.append, **more
        )

    assert run(begin, only_cost=True) is None
    found = done(run(begin))
    effect = found.confirmations[0].effects[0]
    assert (effect.fall, effect.p, effect.changed) == (0.0, 1.0, False)  # it always gives the same adapter
    assert (work / "trainer.log").read_text() == "rows: 20\n"
    assert any(line.startswith("5 trainings, about ") for line in lines)
    assert sorted(path.name for path in work.glob("[do]*")) == []
    for command, message in (
        (f"{begin} fail", "exit code 1: out of luck; see .*trainer.log"),
        (f"{begin} nothing", "left neither an adapter nor a model in .*; its output is in .*trainer.log"),
        ("/no/such/program {data} {out}", "cannot run the trainer '/no/such/program': No such file"),
        ("'train {data} {out}", "cannot be read: No closing quotation"),
        ("train.py {out}", r"does not contain \{data\}"),
    ):
        shutil.rmtree(work)
        with pytest.raises(UserError, match=message):
            run(command)
        work.mkdir(exist_ok=True)
    whole = hits_with(place, tmp_path / "whole.json", lambda value: value.update(adapter=None, caches=[]))
    command = f"{sys.executable} '{script}' {{data}} {{out}} '{place / 'model'}'"
    assert done(confirm(whole, trainer=command, controls=1)).confirmations[0].effects[0].fall == 0.0
    with pytest.raises(UserError, match="`epochs` and `trainer` do not go together"):
        run(begin, epochs=2)


def drop_version(value: dict[str, Any]) -> None:
    del value["version"]


def damaged_hit(value: dict[str, Any]) -> None:
    value["queries"][0]["top"] = [{"rank": 1}]


def all_rows(value: dict[str, Any]) -> None:
    value["queries"][0]["top"] = [{"index": n, "score": 1.0} for n in range(24)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_version, "does not say version"),
        (damaged_hit, "is not what 'rapidin query --json' writes"),
        (all_rows, "the hits are all rows that are trained on"),
        (lambda value: value["queries"].clear(), "no helpful hits"),
        (lambda value: value["queries"][0].update(top=[]), "no helpful hits"),
        (lambda value: value["queries"][0].update(top=[{"index": 99, "score": 1.0}]), "has no example 99"),
        (lambda value: value["queries"][0].pop("prompt"), "query 1 of .* is not what"),
        (lambda value: value["queries"][0].update(together=2), "of 2 generations together"),
        (lambda value: value["queries"][0].update(completion=""), "has no completion token"),
        (lambda value: value.update(task="classification"), "have no log-probability"),
        (lambda value: value.update(model="/no/such/model"), "model not found"),
        (lambda value: value.update(model=None), "does not say which model"),
        (lambda value: value.update(adapter=None), "nothing says what .* was tuned from"),
        (lambda value: value.update(train_data="/no/such/file.jsonl", caches=[]), "not found"),
        (lambda value: value.update(train_data=None, caches=[]), "which training data"),
    ],
)
def test_hits_that_cannot_be_confirmed(
    place: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        confirm(hits_with(place, tmp_path / "hits.json", change))


def test_files_that_are_no_hits(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file of hits not found"):
        confirm(tmp_path / "none.json")
    for text in ("[]", "index,score\n1,0.5\n", "{"):
        (tmp_path / "hits.json").write_text(text)
        with pytest.raises(UserError, match="is not what 'rapidin query --json' writes"):
            confirm(tmp_path / "hits.json")
    with pytest.raises(UserError, match=r"there is no query 2 in .*; it has 1"):
        confirm(place / "hits.json", query=2)
    with pytest.raises(UserError, match="no training example has a column 'source'"):
        confirm(place / "hits.json", by="source", work=tmp_path / "work")
    with pytest.raises(UserError, match="`controls` must be at least 1"):
        ConfirmSettings(controls=0)


def test_data_and_models_that_have_changed(place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    hit = json.loads((place / "hits.json").read_text())["queries"][0]["top"][0]["index"]
    last = next(n for n in reversed(range(24)) if n != hit)
    for row, message in ((hit, "is not what was cached"), (last, "has changed since it was cached")):
        changed = [dict(each) for each in rows]
        changed[row]["completion"] += " fox"
        write_lines(tmp_path / "train.jsonl", changed)
        path = str(tmp_path / "train.jsonl")
        for train_data in (path, [path]):
            with pytest.raises(UserError, match=message):
                confirm(place / "hits.json", top_k=1, train_data=train_data)
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    for folder in (tmp_path / "adapter", *(tmp_path / "adapter").glob("checkpoint-*")):
        (folder / "trainer_state.json").unlink(missing_ok=True)
    where = ModelLocation(adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"nothing says how .* was trained: .*give `epochs`, `batch` and"):
        confirm(place / "hits.json", location=where, work=tmp_path / "work")
    with pytest.raises(UserError, match="`learning_rate` must be above 0"):
        confirm(
            place / "hits.json", location=where, work=tmp_path / "work", epochs=1, batch=8, learning_rate=0.0
        )
