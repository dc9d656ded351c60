"""What is malformed or not meant as data: one line with its place and the right reason, never a traceback."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pytest
from data_forms import FIELDS, FILES, PROMPTS, lines_of, written

from rapidin.data.examples import open_examples
from rapidin.data.fields import FieldMap
from rapidin.data.generations import as_records
from rapidin.data.records import tokens_of
from rapidin.errors import UserError

GOOD = '{"text": "good"}'
TOO_LONG = "9" * 5000

# A JSON value that cannot be a record, and the reason.
BROKEN = {
    "digits": (f'{{"text": "a", "n": {TOO_LONG}}}', "a number with too many digits"),
    "digits within": (f'{{"text": "a", "n": [{{"m": -{TOO_LONG}}}]}}', "a number with too many digits"),
    "depth": ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "surrogate": ('{"text": "\\ud83d"}', "half a character"),
    "kind": ("7", r"found a number \(7\)"),
    "no fields": ("{}", "found no fields"),
}
# JSON that some readers stumble over, and what it is read as.
READ: dict[str, tuple[str, Any]] = {
    "not a number": ('{"text": "a", "n": NaN}', "a"),
    "infinity": ('{"text": "a", "n": [Infinity, -Infinity, 1e999]}', "a"),
    "4,300 digits": ('{"text": "a", "n": ' + "9" * 4300 + "}", "a"),
    "duplicate keys": ('{"text": "b", "text": "a"}', "a"),
    "null character": ('{"text": "a\\u0000b"}', "a\0b"),
    "depth": ('{"text": "a", "n": ' + "[" * 200 + "]" * 200 + "}", "a"),
    "carriage return": ('{"text": "a"}\r', "a"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_value_is_one_malformed_line(tmp_path: Path, kind: str) -> None:
    value, reason = BROKEN[kind]
    path = written(tmp_path / "d.jsonl", f"{GOOD}\n\n{value}\n{GOOD}\n")
    with pytest.raises(UserError, match=f"d.jsonl, line 3: .*{reason}"):
        open_examples(path)
    examples = open_examples(path, skip=True)
    assert (len(examples), examples.malformed) == (3, {1})
    assert [record for _, record in examples.good()] == [{"text": "good"}] * 2
    assert examples.identity == open_examples(path, skip=True).identity


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind != "depth"])
def test_a_broken_value_is_one_malformed_record_of_a_list(tmp_path: Path, kind: str) -> None:
    value, reason = BROKEN[kind]
    path = written(tmp_path / "d.json", f"[{GOOD},\n{value},\n{GOOD}]")
    with pytest.raises(UserError, match=rf"d.json\[1\] \(line 2\): .*{reason}"):
        open_examples(path)
    assert open_examples(path, skip=True).malformed == {1}


@pytest.mark.parametrize("kind", READ)
def test_unusual_json_is_read(tmp_path: Path, kind: str) -> None:
    value, text = READ[kind]
    path = written(tmp_path / "d.jsonl", f"{value}\n{GOOD}")
    assert open_examples(path)[0]["text"] == text
    assert len(open_examples(path).identity) == 64


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (b'{"text": "\xff"}', r"line 2: not UTF-8 text \(byte 11 of the line\)"),
        (b'{"text": "a\0b"}', "line 2: broken JSON"),
        (b'\0{"text": "ab"}', "line 2: broken JSON"),
        (b'{"text": "a"', "line 2: broken JSON"),
        (b'{"text": "a"}\r{"text": "b"}', "line 2: broken JSON"),
    ],
)
def test_broken_bytes_are_one_malformed_line(tmp_path: Path, lines: bytes, reason: str) -> None:
    path = written(tmp_path / "d.jsonl", GOOD.encode() + b"\n" + lines + b"\n")
    with pytest.raises(UserError, match=reason):
        open_examples(path)
    assert open_examples(path, skip=True).malformed == {1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('"a",b,c', "line 3: 3 cells, but the header has 2"),
        ("a", "line 3: 1 cells, but the header has 2"),
        ('"a"b,c', "line 3: broken CSV"),
        ('a,"b', "line 3: a quoted cell does not end"),
        (b"a,\xff", "line 3: not UTF-8 text"),
    ],
)
def test_a_broken_row_of_a_table(tmp_path: Path, row: str | bytes, reason: str) -> None:
    row = row if isinstance(row, bytes) else row.encode()
    path = written(tmp_path / "d.csv", b"prompt,completion\na,c\n" + row)
    with pytest.raises(UserError, match=reason):
        open_examples(path)
    examples = open_examples(path, skip=True)
    assert (len(examples), examples.malformed) == (2, {1})


def test_lines_of_a_table_are_those_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", 'prompt,completion\n"a\n\nb",c\n\nd,e\n')
    examples = open_examples(path)
    assert [examples.index(row) for row in range(2)] == [1, 5]
    assert examples[1] == {"prompt": "d", "completion": "e"}
    assert examples[0] == {"prompt": "a\n\nb", "completion": "c"}


def _itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def _deep() -> Any:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (10**5000, "a number with too many digits"),
        (_itself(), "a value contains itself"),
        (_deep(), "a value is nested too deeply"),
        ({1: 2, "a": 3}, "cannot be written as JSON"),
    ],
    ids=["digits", "itself", "depth", "keys"],
)
def test_a_value_in_memory_that_json_lacks_is_one_malformed_example(value: Any, reason: str) -> None:
    rows = [{"text": "a"}, {"text": "b", "n": value}, {"text": "c"}]
    with pytest.raises(UserError, match=rf"examples\[1\]: .*{reason}"):
        open_examples(rows)
    examples = open_examples(rows, skip=True)
    assert (len(examples), examples.malformed) == (3, {1})
    with pytest.raises(UserError, match="'text' is a number"):
        open_examples([{"text": 10**5000}])


def _half_of_a_frame() -> bytes:
    """A file that ends early; without the package, one that is damaged."""
    try:
        import zstandard
    except ImportError:
        return b"\x28\xb5\x2f\xfdrest"
    whole: bytes = zstandard.compress(b'{"text": "a"}\n' + random.Random(0).randbytes(200_000))
    return whole[:-1000]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.zip", b"PK\x03\x04rest", "is a zip archive"),
        ("d.jsonl", "\ufeff{}".encode("utf-16"), "is UTF-16 text"),
        ("d.jsonl.gz", gzip.compress(b"x" * 9000, mtime=0)[:-9], "is damaged or incomplete"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfdrest", "is damaged or incomplete"),
        ("d.jsonl.zst", _half_of_a_frame(), "is damaged or incomplete"),
        ("d.jsonl.xz", b"\xfd7zXZ\0rest", "is damaged or incomplete"),
        ("d.parquet", b"PAR1rest", "is damaged or incomplete"),
        ("d.feather", b"ARROW1rest", "is damaged or incomplete"),
        ("d.feather", b"FEA1rest", "version 1 of Feather"),
        ("d.json", b'[{"text": "a"} {"text": "b"}]', r"d.json\[0\] \(line 1\): broken JSON"),
        ("d.json", b'[{"text": "a"},\n{"text": }]', "broken JSON .*line 2"),
        ("d.json", b'{"a": [{"text": "b"}], "c": [{"text": "d"}]}', "several lists of records: a, c; name"),
        ("d.json", b'{"a": 1, "b": [2]}', "found the fields 'a', 'b'"),
        ("d.txt", b"Once upon a time.\n", "line 1: not JSON, expected one JSON object per line; give jsonl"),
        ("d.csv", b"text,text\na,b", "two columns are named 'text'"),
        ("d.csv", b"prompt,completion\n", "no examples"),
        ("d.csv", b"title,body\na,b", "found the fields 'title', 'body'; expected 'prompt'.*a map names"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_for_what_it_is(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        open_examples(written(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    sources = {name: FILES[name](tmp_path / name.replace(" ", "")) for name in _single_files(tmp_path)}
    for name, (rows, _, _) in FIELDS.items():
        sources[name] = written(tmp_path / f"{name}.jsonl", lines_of(rows))
    for name, path in sources.items():
        content = path.read_bytes()
        for _ in range(12):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged[: rng.randrange(1, len(damaged))] if rng.random() < 0.3 else damaged)
            for options in ({}, {"skip": True}, {"generations": True}, {"checked": False}):
                refusal = _refusal(path, options)
                assert "\n" not in refusal, name


def _refusal(path: Path, options: dict[str, Any]) -> str:
    """Why a file cannot be read, or nothing; any other error is the test's."""
    try:
        examples = open_examples(path, **options)
        for row in range(len(examples)):
            examples.get(row)
    except UserError as error:
        return str(error)
    return ""


def _single_files(folder: Path) -> list[str]:
    names = ["jsonl", "json, a list", "json, objects in sequence", "csv", "tsv", "gz", "xz", "bz2"]
    for module, more in (("pyarrow", ["parquet", "feather", "arrow"]), ("zstandard", ["zst"])):
        try:
            __import__(module)
        except ImportError:
            continue
        names += more
    for name in names:
        (folder / name.replace(" ", "")).mkdir()
    return names


# ---------------------------------------------------------------------------------------- paths and folders


def test_folders_and_names_that_are_not_clear_are_refused(tmp_path: Path) -> None:
    line = lines_of(PROMPTS)
    for name in ("mixed/a.jsonl", "mixed/b.csv", "splits/train-0.jsonl", "splits/test-0.jsonl"):
        written(tmp_path / name, line)
    written(tmp_path / "twice" / "a.jsonl.gz", gzip.compress(line.encode()))
    for name in ("twice/a.jsonl", "outer/train/a.jsonl", "one.jsonl", "named/a [x].jsonl"):
        written(tmp_path / name, line)
    for source, reason in [
        ("mixed", "files of several kinds: 1 .csv, 1 .jsonl; name one kind"),
        ("splits", "several splits: test, train; name one by a pattern"),
        ("twice", "has a.jsonl both compressed and not"),
        ("outer", "has no data files; name one of its folders: train"),
        ("none*.jsonl", "no file matches"),
        ("one.jsonl:part", "one record per line and no parts"),
        ("mixed:part", "has no dataset_info.json"),
        ("gone.jsonl", "data not found"),
        ("gone\0", "null character"),
    ]:
        with pytest.raises(UserError, match=reason):
            open_examples(str(tmp_path / source))
    assert len(open_examples(str(tmp_path / "splits" / "train*"))) == 3
    assert len(open_examples(str(tmp_path / "named" / "a [x].jsonl"))) == 3
    assert len(open_examples(str(tmp_path / "**" / "*.jsonl"))) == 21


def test_a_limit_counts_over_several_files(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{n}.jsonl", lines_of(PROMPTS)) for n in range(3)]
    for checked in (True, False):
        examples = open_examples(paths, limit=4, checked=checked)
        assert len(examples) == 4
        assert [examples.index(row) for row in range(4)] == [0, 1, 2, 3]
        assert examples.where(3) == f"{paths[1]}, line 1"
        assert len(open_examples(paths, limit=3, checked=checked)) == 3


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    sources = {"pyarrow": b"PAR1rest", "zstandard": b"\x28\xb5\x2f\xfdrest"}
    for module, content in sources.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"needs the package {module}; pip install 'rapidin\[data\]'"):
            open_examples(written(tmp_path / module, content))


# --------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"question": "a", "answer": "b", "context": "c"},
            "'context' beside 'question' and 'answer' would be",
        ),
        ({"system_prompt": "a", "question": "b", "response": "c"}, "'system_prompt' beside"),
        ({"question": "a", "answer": 4}, r"'completion' is a number \(4\)"),
        ({"conversations": [{"from": "human", "value": None}]}, r"messages\[0\].content is null"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "found the fields 'prompt'"),
        ({"input_ids": "1 2"}, "'input_ids' is text, expected a list of token ids"),
        ({"input_ids": [1, -2]}, "'input_ids' is a list, expected a list of token ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' is 1 values, expected one for each of the 2"),
        (
            {"input_ids": [1, 2], "labels": [2, -100]},
            r"labels\[0\] is 2, expected input_ids\[0\] \(1\) or -100",
        ),
        ({str(n): n for n in range(99)}, "'11' and 87 more"),
    ],
)
def test_records_that_are_not_clear_are_refused(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        open_examples([record])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("prompt", "the map names no field for 'prompt'; as in"),
        ("prompt=", "the map names no field for 'prompt'"),
        ("promt=a", "a map cannot make the field 'promt'; use .*prompt"),
        ("user=a", "needs both turns"),
    ],
)
def test_maps_that_cannot_be_meant_are_refused(names: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        FieldMap.of(names)


def test_a_record_without_a_mapped_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no field 'q' to read as 'prompt'; its fields are 'question'"):
        open_examples([{"question": "a"}], map="prompt=q,completion=a")
    read = open_examples([{"q": "a"}], map={"prompt": "q", "completion": "c"}, generations=True)
    assert read[0] == {"q": "a", "prompt": "a"}


def _chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Q", "chosen": " A", "rejected": " B"}, ("Q", " A", " B")),
        ({"chosen": "Hi there: yes", "rejected": "Hi there: no"}, ("Hi there:", " yes", " no")),
        ({"question": "Q", "chosen": "A", "rejected": "B"}, ("Q", "A", "B")),
        (
            {"prompt": "Q", "chosen": _chat("Q", "A"), "rejected": _chat("Q", "B")},
            (_chat("Q"), _chat("Q", "A")[1:], _chat("Q", "B")[1:]),
        ),
        (
            {"prompt": _chat("Q"), "chosen": _chat("", "A")[1:], "rejected": _chat("", "B")[1:]},
            (_chat("Q"), _chat("Q", "A")[1:], _chat("Q", "B")[1:]),
        ),
        (
            {"prompt": _chat("Q"), "chosen": "A", "rejected": "B"},
            (_chat("Q"), _chat("Q", "A")[1:], _chat("Q", "B")[1:]),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            (_chat("Q"), _chat("Q", "A")[1:], _chat("Q", "B")[1:]),
        ),
    ],
)
def test_preference_pairs_become_prompt_chosen_and_rejected(record: dict[str, Any], expected: Any) -> None:
    read = FieldMap().read(record, "")
    assert (read["prompt"], read["chosen"], read["rejected"]) == expected


# --------------------------------------------------------------------------------------------------- Python


class Frozen:
    """What pickle refuses."""

    def __reduce__(self) -> Any:
        raise TypeError("frozen")


def test_iterables_are_read_once_and_only_as_far_as_needed() -> None:
    read: list[int] = []

    def rows() -> Any:
        for n in range(10**9):
            read.append(n)
            yield {"text": str(n)}

    examples = open_examples(rows(), limit=5)
    assert read == [0, 1, 2, 3, 4]
    assert [record["text"] for record in examples] == ["0", "1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"examples\[1\] cannot be kept for reading it again"):
        open_examples(each for each in [{"text": "a"}, {"text": "b", "n": Frozen()}])
    with pytest.raises(ZeroDivisionError):  # a mistake of the caller's own is not hidden
        open_examples(1 / n and {"text": "a"} for n in (1, 0))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (7, "the data is a number"),
        (object(), "the data is a object"),
        (b'{"text": "a"}', "the data is a bytes"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, "columns of different lengths"),
        ([["a", "b"]], r"examples\[0\]: found a list"),
        ([None], r"examples\[0\]: found null"),
    ],
)
def test_objects_that_are_no_data_are_refused(source: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        open_examples(source)


def test_batches_of_tensors_and_frames_are_rows() -> None:
    import torch

    torch_batch = {
        "input_ids": torch.tensor([[5, 6, 2], [7, 8, 9]]),
        "labels": torch.tensor([[-100, 6, -100], [7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    rows = list(open_examples(batch for batch in [torch_batch]))
    assert [row["input_ids"] for row in rows] == [[5, 6, 2], [7, 8, 9]]
    assert tokens_of(rows[0]) == ([5, 6], [False, True])
    pandas = pytest.importorskip("pandas")
    chunks = (pandas.DataFrame(PROMPTS[n : n + 2]) for n in (0, 2))
    assert list(open_examples(chunks)) == PROMPTS
    single = {name: value[1] for name, value in torch_batch.items()}
    assert tokens_of(open_examples([single])[0]) == ([7, 8, 9], [True, True, True])


def test_open_files_are_read_from_where_they_are(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", lines_of(PROMPTS))
    with path.open("rb") as file:
        assert open_examples(file).path == str(path)
    with path.open() as text:
        text.readline()
        examples = open_examples(text)
    assert list(examples) == PROMPTS[1:]
    assert examples.path is None
    with pytest.raises(UserError, match="is a closed file"):
        open_examples(text)
    with path.open("ab") as file, pytest.raises(UserError, match="is not open for reading"):
        open_examples(file)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Hi", [{"prompt": "Hi"}]),
        (("Hi", "Ho"), [{"prompt": "Hi", "completion": "Ho"}]),
        (["Hi", "Ho"], [{"prompt": "Hi"}, {"prompt": "Ho"}]),
        ([["Hi", "Ho"]], [{"prompt": "Hi", "completion": "Ho"}]),
        ({"prompt": "Hi"}, [{"prompt": "Hi"}]),
        ({"prompt": ["Hi", "Ho"]}, [{"prompt": "Hi"}, {"prompt": "Ho"}]),
        ({"question": "Hi"}, [{"question": "Hi", "prompt": "Hi"}]),
        ({"prompt": "Hi", "response": "Ho"}, [{"response": "Ho", "prompt": "Hi", "completion": "Ho"}]),
    ],
)
def test_a_query_takes_texts_pairs_and_records(value: Any, expected: Any) -> None:
    assert as_records(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "generations must be a list, got int"),
        ([7], "generation 1 has no prompt and completion: 7"),
        (["Hi", {"prompt": 7}], r"generation 2: 'prompt' is a number \(7\), expected text"),
        ([{1: 2}], "generation 1: found an object, expected a JSON object with named fields"),
    ],
)
def test_what_a_query_cannot_take_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        as_records(value)
