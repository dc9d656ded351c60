"""Training data written again without some rows: in every form that data is read in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_forms import ALPACA, FILES, PROMPTS, arrow, encoded, lines_of, several, table, written

from rapidin.data.dropping import write_without
from rapidin.data.examples import open_examples
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
        ([0], "a.csv", "is read as input, and would be overwritten; write to another file"),
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


def configured(folder: Path) -> tuple[str, str]:
    """Two files, as a list of LLaMA-Factory and a configuration of Axolotl name them."""
    for name, rows in (("a.jsonl", ALPACA[:1]), ("b.jsonl", ALPACA[1:])):
        written(folder / name, lines_of(rows))
    entries = {"one": {"file_name": "a.jsonl"}, "two": {"file_name": "b.jsonl"}}
    written(folder / "dataset_info.json", json.dumps(entries))
    names = "".join(f" - path: {name}.jsonl\n   type: alpaca\n" for name in "ab")
    return str(folder), str(written(folder / "train.yml", "datasets:\n" + names))


def test_no_input_is_overwritten(tmp_path: Path) -> None:
    folder, config = configured(tmp_path)
    lists = written(tmp_path / "lists.json", json.dumps({"one": PROMPTS, "two": PROMPTS}))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for data, out in (
        (f"{lists}:one", "lists.json"),
        (f"{folder}:two", "b.jsonl"),
        (f"{folder}:two", "dataset_info.json"),
        (config, "b.jsonl"),
        (config, "train.yml"),
        (Files((f"{config}:0", f"{config}:1")), "link.jsonl"),
    ):
        with pytest.raises(UserError, match=r"is read as input, and would be overwritten"):
            write_without(data, [0], tmp_path / out)
        with pytest.raises(UserError, match=r"is read as input, and would be overwritten"):
            write_without(data, [0], tmp_path / "new.json", dropped=tmp_path / out)
    with pytest.raises(UserError, match=r"would be among the remaining ones"):
        write_without(config, [0], tmp_path / "new.jsonl", dropped=tmp_path / "new.jsonl")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_of_other_tools_stay_as_their_files_have_them(tmp_path: Path) -> None:
    folder, config = configured(tmp_path)
    for data in (config, Files((f"{folder}:one", f"{folder}:two"))):
        write_without(data, [1], tmp_path / "out.jsonl", dropped=tmp_path / "gone.jsonl")
        assert (tmp_path / "out.jsonl").read_text() == lines_of([ALPACA[0], ALPACA[2]])
        assert (tmp_path / "gone.jsonl").read_text() == lines_of([ALPACA[1]])


def test_folders_of_files_become_one_folder(tmp_path: Path) -> None:
    for name, rows in (("a/1", PROMPTS[:1]), ("a/2", PROMPTS[1:2]), ("b/3", PROMPTS[2:]), ("b/4", [])):
        written(tmp_path / f"{name}.jsonl", lines_of(rows))
    write_without(Files((str(tmp_path / "a"), str(tmp_path / "b"))), [1], tmp_path / "out")
    left = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert left == {
        "1.jsonl": lines_of(PROMPTS[:1]),
        "2.jsonl": "",
        "3.jsonl": lines_of(PROMPTS[2:]),
        "4.jsonl": "",
    }


def test_tables_keep_their_form_and_compression(tmp_path: Path) -> None:
    rows = arrow(PROMPTS)
    import pyarrow as pa
    import pyarrow.parquet as pq

    for codec in ("zstd", "gzip", "none"):
        pq.write_table(rows, tmp_path / "a.parquet", row_group_size=1, compression=codec)
        write_without(tmp_path / "a.parquet", [1], tmp_path / "b.parquet")
        left = pq.ParquetFile(tmp_path / "b.parquet")
        stored = left.metadata.row_group(0).column(0).compression
        assert stored == ("UNCOMPRESSED" if codec == "none" else codec.upper())
        assert [left.metadata.row_group(n).num_rows for n in range(left.num_row_groups)] == [1, 1]
    for make in (pa.ipc.new_stream, pa.ipc.new_file):
        with make(str(tmp_path / "a.arrow"), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=1)
        write_without(tmp_path / "a.arrow", [0, 1], tmp_path / "b.arrow")
        first = (tmp_path / "a.arrow").read_bytes()[:6]
        assert (tmp_path / "b.arrow").read_bytes()[:6] == first
        assert encoded(tmp_path / "b.arrow") == encoded(PROMPTS[2:])


def test_bytes_are_not_written_as_text(tmp_path: Path) -> None:
    arrow(PROMPTS)
    import pyarrow.parquet as pq

    rows = [row | {"image": {"bytes": b"\xff"}} for row in PROMPTS]
    pq.write_table(arrow(rows), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet\[0\] has bytes, such as an image, which JSON cannot hold"
    ):
        write_without(tmp_path / "a.parquet", [1], tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()
    write_without(tmp_path / "a.parquet", [1], tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").to_pylist() == [rows[0], rows[2]]


def test_tables_without_rows_keep_their_schema(tmp_path: Path) -> None:
    rows = arrow(PROMPTS)
    import pyarrow as pa

    for name, count in (("a.arrow", 0), ("b.arrow", 3)):
        with pa.ipc.new_file(str(tmp_path / name), rows.schema) as writer:
            for batch in rows.slice(0, count).to_batches() if count else ():
                writer.write(batch)
    write_without(Files((str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow"))), [1], tmp_path / "out")
    assert pa.ipc.open_file(tmp_path / "out" / "a.arrow").read_all().equals(rows.slice(0, 0))
    assert encoded(tmp_path / "out" / "b.arrow") == KEPT


def test_the_content_of_a_file_says_what_its_form_is(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(arrow(PROMPTS), tmp_path / "plain")
    pq.write_table(arrow(PROMPTS), tmp_path / "odd.jsonl")
    written(tmp_path / "list.jsonl", json.dumps(PROMPTS))
    written(tmp_path / "lines", lines_of(PROMPTS))
    for data, out in (
        ("plain", "out"),
        ("plain", "out.parquet"),
        ("odd.jsonl", "out.jsonl"),
        ("list.jsonl", "out.jsonl"),
        ("lines", "out.ndjson"),
        ("lines", "out.JSONL.GZ"),
    ):
        write_without(tmp_path / data, [1], tmp_path / out)
        assert encoded(tmp_path / out) == KEPT
    assert (tmp_path / "out.jsonl").read_text() == lines_of([PROMPTS[0], PROMPTS[2]])
    assert (tmp_path / "out.JSONL.GZ").read_bytes()[:2] == b"\x1f\x8b"
    for data, out, words in (
        ("lines", "b.parquet", "the data is .jsonl, and '.*b.parquet' is not; name a file in .jsonl$"),
        ("plain", "b.csv", "the data is .parquet, and '.*b.csv' is not; name a file in .parquet or .jsonl"),
        ("plain", "b.parquet.gz", "a table is not compressed as a whole"),
    ):
        with pytest.raises(UserError, match=words):
            write_without(tmp_path / data, [1], tmp_path / out)
        assert not (tmp_path / out).exists()


def test_half_characters_are_written_as_they_came(tmp_path: Path) -> None:
    rows = [{"text": "é", "note": "\ud800"}, {"text": "b"}]
    plain = written(tmp_path / "a.json", json.dumps(rows))
    listed = written(tmp_path / "b.json", '{"title": "é", "rows": ' + json.dumps(rows) + "}")
    for data, out in ((plain, "out.jsonl"), (listed, "out.json"), (listed, "out.jsonl")):
        write_without(data, [1], tmp_path / out)
        assert "\\ud800" in (tmp_path / out).read_text()
        assert list(open_examples(tmp_path / out)) == rows[:1]
