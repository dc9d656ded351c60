"""Training data written again without some rows: in every form that data is read in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_forms import FILES, PROMPTS, encoded, lines_of, several, table, written

from rapidin.data.dropping import write_without
from rapidin.data.sources import Files
from rapidin.errors import UserError

KEPT = encoded([PROMPTS[0], PROMPTS[2]])
FOLDERS = {"folder of shards", "pattern", "HF dataset on disk", "split of a HF dataset"}


def out_of(form: str, data: Any, folder: Path) -> Path:
    """A name of the same form in another folder."""
    folder.mkdir()
    return folder / ("out" if form in FOLDERS else Path(str(data)).name)


@pytest.mark.parametrize("form", [form for form in FILES if form not in ("pipe", "several")])
def test_a_row_is_dropped_and_the_form_stays(form: str, tmp_path: Path) -> None:
    data = FILES[form](tmp_path)
    out = out_of(form, data, tmp_path / "new")
    assert write_without(data, [1], out) == 3
    again = f"{out}:data" if form == "json, an object with a list" else str(out)
    assert encoded(again) == KEPT
    lines = tmp_path / "lines.jsonl"
    assert write_without(data, [1], lines) == 3
    assert encoded(lines) == KEPT


def test_files_keep_their_names_and_forms_in_a_folder(tmp_path: Path) -> None:
    data = several(tmp_path)
    assert write_without(data, [2], tmp_path / "out") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jsonl", "b.csv"]
    left = Files((str(tmp_path / "out" / "a.jsonl"), str(tmp_path / "out" / "b.csv")))
    assert encoded(left) == encoded(PROMPTS[:2])
    with pytest.raises(UserError, match=r"the folder '.*out' is not empty"):
        write_without(data, [2], tmp_path / "out")
    other = written(tmp_path / "other" / "a.jsonl", lines_of(PROMPTS))
    with pytest.raises(UserError, match=r"two files are named a.jsonl; name a file in .jsonl"):
        write_without(Files((str(tmp_path / "a.jsonl"), str(other))), [0], tmp_path / "both")


@pytest.mark.parametrize("rows", [[], [0], [1], [2], [0, 1], [1, 2], [0, 2]])
def test_text_files_keep_their_other_bytes(rows: list[int], tmp_path: Path) -> None:
    spaced = ['{"text":  "a", "n": 1.0}\n', "\n", '{"text":"\\u00e9"}\r\n', '{"text": "last"}']
    pieces = [spaced[0] + spaced[1], spaced[2], spaced[3]]
    plain = written(tmp_path / "a.jsonl", "\ufeff" + "".join(spaced))
    write_without(plain, rows, tmp_path / "b.jsonl")
    kept = "".join(piece for n, piece in enumerate(pieces) if n not in rows)
    assert (tmp_path / "b.jsonl").read_bytes().decode() == "\ufeff" + kept
    cells = table(PROMPTS)
    write_without(written(tmp_path / "a.csv", cells), rows, tmp_path / "b.csv")
    left = [row for n, row in enumerate(PROMPTS) if n not in rows]
    assert (tmp_path / "b.csv").read_bytes().decode() == table(left)
    listed = written(tmp_path / "a.json", json.dumps(PROMPTS, indent=3) + "\n")
    write_without(listed, rows, tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == json.dumps(left, indent=3) + "\n"
    named = written(tmp_path / "c.json", json.dumps({"v": 1, "rows": PROMPTS}, indent=4) + "\n")
    write_without(named, rows, tmp_path / "d.json")
    assert (tmp_path / "d.json").read_text() == json.dumps({"v": 1, "rows": left}, indent=4) + "\n"


def test_tables_keep_their_schema(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    wide = pa.table(
        {
            "text": pa.array(["a", "b", "c"], pa.large_string()),
            "n": pa.array([1, None, 3], pa.int8()),
        }
    ).replace_schema_metadata({"made": "by hand"})
    pq.write_table(wide, tmp_path / "a.parquet", row_group_size=2)
    write_without(tmp_path / "a.parquet", [0], tmp_path / "b.parquet")
    left = pq.read_table(tmp_path / "b.parquet")
    assert left.schema.equals(wide.schema, check_metadata=True)
    assert left.to_pylist() == [{"text": "b", "n": None}, {"text": "c", "n": 3}]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    data = written(tmp_path / "a.csv", table(PROMPTS))
    for rows, out, words in (
        ([0], "a.csv", "is the data itself; write to another file"),
        ([0], "b.parquet", "the data is .csv, and '.*b.parquet' is not; name a file in .csv or .jsonl"),
        ([0, 1, 2], "b.csv", "no row would be left"),
        ([3], "b.csv", "row 3 is to be dropped, but the data has 3 rows"),
        ([0], "none/b.csv", "cannot write .*b.csv: the directory does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            write_without(data, rows, tmp_path / out)
    with pytest.raises(UserError, match=r"no file of its own; name a file in .jsonl"):
        write_without(PROMPTS, [0], tmp_path / "b.json")
    assert data.read_bytes().decode() == table(PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
