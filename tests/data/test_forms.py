"""Every form of data in docs/guide/data.md: the same three examples give the same tokens and targets."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

import rapidin
from rapidin.data.encoding import Encoded, Encoder
from rapidin.data.examples import open_examples
from rapidin.data.sources import Files

PAGE = Path(rapidin.__file__).parent.parent / "docs" / "guide" / "data.md"

Rows = list[dict[str, Any]]
PROMPTS: Rows = [
    {"prompt": "One, two,", "completion": ' "three".'},
    {"prompt": "The quick\nbrown", "completion": " fox, naïve; a\tb"},
    {"prompt": "Howdy!", "completion": " Paris"},
]
ALPACA: Rows = [
    {"instruction": f"Add {n}.", "input": "1, 2" if n else "", "output": f"Seven {n}"} for n in range(3)
]
CHATS: Rows = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": f"Ho {n}"},
        ]
    }
    for n in range(3)
]
TEXTS: Rows = [{"text": f"The lazy dog {n}."} for n in range(3)]

ENCODER = Encoder(tiny_tokenizer(chat=True), max_length=128)


def encoded(source: Any, **options: Any) -> list[Encoded]:
    return [ENCODER(record) for record in open_examples(source, **options)]


def lines_of(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(rows: Rows, delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def arrow(rows: Rows) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


# ------------------------------------------------------------------------- files: a form's name to its file


def _parquet(folder: Path) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(arrow(PROMPTS), folder / "d.parquet", row_group_size=2)
    return folder / "d.parquet"


def _feather(folder: Path) -> Path:
    from pyarrow import feather

    feather.write_feather(arrow(PROMPTS), str(folder / "d.feather"), compression="lz4", chunksize=2)
    return folder / "d.feather"


def _arrow_stream(folder: Path) -> Path:
    import pyarrow as pa

    table = arrow(PROMPTS)
    with pa.ipc.new_stream(str(folder / "d.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return folder / "d.arrow"


def _zst(folder: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    halves = [zstandard.compress(lines_of(rows).encode()) for rows in (PROMPTS[:1], PROMPTS[1:])]
    return written(folder / "d.jsonl.zst", b"".join(halves))


def _shards(folder: Path) -> Path:
    for name, rows in (("b.jsonl", PROMPTS[2:]), ("a.jsonl", PROMPTS[:2]), ("a2.jsonl", [])):
        written(folder / "shards" / name, lines_of(rows))
    written(folder / "shards" / "README.md", "# Data")
    return folder / "shards"


def _several(folder: Path) -> Files:
    first = written(folder / "a.jsonl", lines_of(PROMPTS[:1]))
    return Files((str(first), str(written(folder / "b.csv", table(PROMPTS[1:])))))


def _saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(PROMPTS).save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_split(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(PROMPTS)
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(folder / "saved")
    return f"{folder / 'saved'}:train"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    text = lines_of(PROMPTS)
    threading.Thread(target=lambda: (folder / "pipe").write_text(text), daemon=True).start()
    return folder / "pipe"


PRETTY = "\n".join(json.dumps(row, indent=1) for row in PROMPTS)
FILES: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda f: written(f / "d.jsonl", lines_of(PROMPTS)),
    "json, a list": lambda f: written(f / "d.json", json.dumps(PROMPTS, indent=2)),
    "json, an object with a list": lambda f: written(
        f / "d.json", json.dumps({"version": 1, "data": PROMPTS})
    ),
    "json, objects in sequence": lambda f: written(f / "d.json", PRETTY),
    "csv": lambda f: written(f / "d.csv", "\ufeff" + table(PROMPTS)),
    "tsv": lambda f: written(f / "d.tsv", table(PROMPTS, "\t")),
    "parquet": _parquet,
    "feather": _feather,
    "arrow": _arrow_stream,
    "gz": lambda f: written(f / "d.jsonl.gz", gzip.compress(lines_of(PROMPTS).encode())),
    "xz": lambda f: written(f / "d.csv.xz", lzma.compress(table(PROMPTS).encode())),
    "bz2": lambda f: written(f / "d.json.bz2", bz2.compress(json.dumps(PROMPTS).encode())),
    "zst": _zst,
    "folder of shards": _shards,
    "pattern": lambda f: str(_shards(f) / "*.jsonl"),
    "several": _several,
    "HF dataset on disk": _saved,
    "split of a HF dataset": _saved_split,
    "pipe": _pipe,
}


@pytest.mark.parametrize("form", FILES)
def test_a_file_of_each_form_gives_the_same_tokens(tmp_path: Path, form: str) -> None:
    source = FILES[form](tmp_path)
    examples = open_examples(source)
    assert [ENCODER(record) for record in examples] == encoded(PROMPTS)
    assert [ENCODER(examples[row]) for row in (2, 0, 1)] == [encoded(PROMPTS)[row] for row in (2, 0, 1)]
    if form == "pipe":
        assert examples.path is None
        return
    assert len(open_examples(source, limit=2)) == 2
    assert examples.path is not None
    again = open_examples(
        examples.path if isinstance(examples.path, str) else Files(tuple(examples.path)), checked=False
    )
    assert list(again) == list(examples)  # a query opens the data by the path that the cache has
    assert again.identity == examples.identity


def test_standard_input(tmp_path: Path) -> None:
    code = "from rapidin.data.examples import open_examples as o; e = o('-'); print(e.path, e[2], e[0])"
    content = gzip.compress(table(PROMPTS).encode())
    run = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True)
    assert run.stdout.decode().strip() == f"None {PROMPTS[2]} {PROMPTS[0]}"


# ------------------------------------------------------------------ fields: a form's name to rows and options


def _share_gpt() -> Rows:
    names = {"user": "human", "assistant": "gpt"}
    rows = []
    for chat in CHATS:
        system, *turns = chat["messages"]
        said = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
        rows.append({"conversations": said, "system": system["content"]})
    return rows


def _tokens() -> Rows:
    rows = []
    for n, each in enumerate(encoded(PROMPTS)):
        labels = [i if on else -100 for i, on in zip(each.ids, each.target, strict=True)]
        padded = {"input_ids": each.ids + [2] * n, "labels": labels + [-100] * n}
        rows.append(padded | {"attention_mask": [1] * len(each.ids) + [0] * n})
    return rows


def _halves(chats: Rows) -> Rows:
    return [{"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in chats]


def renamed(rows: Rows, **names: str) -> Rows:
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


FIELDS: dict[str, tuple[Rows, Rows, str | None]] = {  # what stands there, what it is the same as, and a map
    "prompt": (PROMPTS, PROMPTS, None),
    "question and answer": (renamed(PROMPTS, prompt="question", completion="answer"), PROMPTS, None),
    "prompt and response": (renamed(PROMPTS, completion="response"), PROMPTS, None),
    "instruction": (ALPACA, ALPACA, None),
    "instruction and response": (renamed(ALPACA, input="context", output="response"), ALPACA, None),
    "messages": (CHATS, CHATS, None),
    "ShareGPT": (_share_gpt(), CHATS, None),
    "conversations with roles": (renamed(CHATS, messages="conversations"), CHATS, None),
    "TRL, conversational": (_halves(CHATS), CHATS, None),
    "text": (TEXTS, TEXTS, None),
    "tokens": (_tokens(), PROMPTS, None),
    "map": (
        [{"q": {"en": row["prompt"]}, "a": row["completion"], "text": "other"} for row in PROMPTS],
        PROMPTS,
        "prompt=q.en,completion=a",
    ),
    "map to a chat": (
        [dict(zip("sqa", (turn["content"] for turn in chat["messages"]), strict=True)) for chat in CHATS],
        CHATS,
        "system=s,user=q,assistant=a",
    ),
}


@pytest.mark.parametrize("form", FIELDS)
def test_records_with_each_form_of_fields_give_the_same_tokens(tmp_path: Path, form: str) -> None:
    rows, same, names = FIELDS[form]
    expected = encoded(same)
    path = written(tmp_path / "d.jsonl", lines_of(rows))
    examples = open_examples(path, map=names)
    assert [ENCODER(record) for record in examples] == expected
    for shown, row in zip(examples, rows, strict=True):  # what a record came with is still there
        original = shown.get("original", {})
        assert all(shown.get(name) == value or original.get(name) == value for name, value in row.items())
    for suffix, content in (("csv", table([_as_cells(row) for row in rows])), ("json", json.dumps(rows))):
        if form != "map":  # its cell is an object
            assert encoded(written(tmp_path / f"d.{suffix}", content), map=names) == expected
    assert encoded(arrow(rows), map=names) == expected
    assert encoded(pytest.importorskip("pandas").DataFrame(rows), map=names) == expected


def _as_cells(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


# -------------------------------------------------------------------------------- Python: a form to an object


class Items:
    """A map-style dataset: neither a list nor an iterable."""

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return PROMPTS[row]


def _columns() -> dict[str, list[Any]]:
    return {name: [row[name] for row in PROMPTS] for name in PROMPTS[0]}


def _loader() -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(PROMPTS, batch_size=2)  # type: ignore[arg-type]


def _streamed() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(PROMPTS).to_iterable_dataset()


OBJECTS: dict[str, Callable[[Path], Any]] = {
    "list of records": lambda f: PROMPTS,
    "list of pairs": lambda f: [(row["prompt"], row["completion"]) for row in PROMPTS],
    "columns": lambda f: _columns(),
    "generator": lambda f: (row for row in PROMPTS),
    "batches": lambda f: _loader(),
    "torch dataset": lambda f: Items(),
    "datasets.Dataset": lambda f: pytest.importorskip("datasets").Dataset.from_list(PROMPTS),
    "datasets.IterableDataset": lambda f: _streamed(),
    "pandas": lambda f: pytest.importorskip("pandas").DataFrame(PROMPTS),
    "polars": lambda f: pytest.importorskip("polars").DataFrame(PROMPTS),
    "arrow table": lambda f: arrow(PROMPTS),
    "path": lambda f: FILES["jsonl"](f),
    "list of paths": lambda f: list(_several(f).paths),
    "open file": lambda f: io.StringIO(lines_of(PROMPTS)),
}


@pytest.mark.parametrize("form", OBJECTS)
def test_an_object_of_each_form_gives_the_same_tokens(tmp_path: Path, form: str) -> None:
    from rapidin.data.generations import as_records

    examples = open_examples(OBJECTS[form](tmp_path))
    assert [ENCODER(record) for record in examples] == encoded(PROMPTS)
    assert ENCODER(examples[1]) == encoded(PROMPTS)[1]
    if form not in ("torch dataset", "list of paths"):
        assert [ENCODER(record) for record in as_records(OBJECTS[form](tmp_path))] == encoded(PROMPTS)


# -------------------------------------------------------------------------------------------------- the page

ELSEWHERE = {"standard input", "HF dataset by name", "LLaMA-Factory"}  # have tests of their own


def forms_of_page() -> Iterator[tuple[str, str]]:
    """Section and form of each row of the page's tables."""
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith(("| form |", "| ---")):
            yield section, line.split(" | ")[0].removeprefix("| ")


def test_the_tests_go_through_the_page() -> None:
    if not PAGE.exists():
        pytest.skip("the package is tested without its checkout")
    rows = list(forms_of_page())
    tested = {"Files": {*FILES, *ELSEWHERE}, "Fields": set(FIELDS), "Python": set(OBJECTS)}
    assert sorted(rows) == sorted((section, form) for section, forms in tested.items() for form in forms)
