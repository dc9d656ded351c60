"""Three examples in every form of file and of fields that docs/guide/data.md names."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from rapidin.data.encoding import Encoded, Encoder
from rapidin.data.examples import open_examples
from rapidin.data.sources import Files

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


def several(folder: Path) -> Files:
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
    "several": several,
    "HF dataset on disk": _saved,
    "split of a HF dataset": _saved_split,
    "pipe": _pipe,
}


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
