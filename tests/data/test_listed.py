"""Data sets by name: entries of LLaMA-Factory's list, and names on a simulated Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_forms import CHATS, ENCODER, PROMPTS, encoded, lines_of, written

from rapidin.data.examples import open_examples
from rapidin.errors import UserError

ALPACA = [
    {"instruction": "Hi", "input": f"there {n}", "output": f"Ho {n}", "system": "Be kind."} for n in range(3)
]
ALPACA_CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Hi\nthere {n}"},
            {"role": "assistant", "content": f"Ho {n}"},
        ]
    }
    for n in range(3)
]
TAGGED = [
    {
        "talk": [
            {"who": {"user": "U", "assistant": "A"}[turn["role"]], "says": turn["content"]}
            for turn in chat["messages"][1:]
        ],
        "rules": chat["messages"][0]["content"],
    }
    for chat in CHATS
]
TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A"}
LISTED: dict[str, Any] = {
    "plain": {"file_name": "alpaca.json"},
    "columns": {
        "file_name": "alpaca.json",
        "columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system"},
    },
    "tagged": {
        "file_name": "tagged.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "rules"},
        "tags": TAGS,
    },
    "ranked": {
        "file_name": "ranked.json",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
    },
    "history": {
        "file_name": "history.json",
        "columns": {"prompt": "instruction", "response": "output", "history": "history"},
    },
    "elsewhere": {"ms_hub_url": "a/b"},
    "marked": {"file_name": "alpaca.json", "columns": {"kto_tag": "label"}},
    "sampled": {"file_name": "alpaca.json", "num_samples": 2},
    "pictures": {"file_name": "alpaca.json", "columns": {"images": "images"}},
    "odd": {"file_name": "alpaca.json", "formatting": "xml"},
    "gone": {"file_name": "gone.json"},
}


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    written(tmp_path / "alpaca.json", json.dumps(ALPACA))
    written(tmp_path / "tagged.jsonl", lines_of(TAGGED))
    written(tmp_path / "ranked.json", json.dumps([{"question": "Q", "good": "A", "bad": "B"}]))
    past = [["Hi", "Ho"], ["Hm", "Ah"]]
    written(tmp_path / "history.json", json.dumps([{"instruction": "So", "output": "Oh", "history": past}]))
    return written(tmp_path / "dataset_info.json", json.dumps(LISTED))


def test_entries_are_read_as_llama_factory_reads_them(listing: Path) -> None:
    examples = open_examples(f"{listing}:columns")
    assert [ENCODER(record) for record in examples] == encoded(ALPACA_CHATS)
    assert examples[1]["original"]["instruction"] == "Hi"
    assert encoded(f"{listing}:tagged") == encoded(CHATS)
    assert encoded(f"{listing.parent}:tagged") == encoded(CHATS)  # the folder stands for its list
    without = [{"messages": chat["messages"][1:]} for chat in ALPACA_CHATS]
    assert encoded(f"{listing}:plain") == encoded(without)  # `system` is no column of the entry
    said = [turn["content"] for turn in open_examples(f"{listing}:history")[0]["messages"]]
    assert said == ["Hi", "Ho", "Hm", "Ah", "So", "Oh"]
    assert examples.path == f"{listing}:columns"
    assert open_examples(examples.path, checked=False).identity == examples.identity
    with pytest.raises(UserError, match="'prompt', 'chosen', 'rejected'"):  # no form of a causal model
        open_examples(f"{listing}:ranked")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "lists several data sets: plain, .*; name one, as in .*dataset_info.json:plain"),
        (":other", "lists no data set 'other'; it lists plain"),
        (":elsewhere", "is not a file, and not on the Hugging Face hub"),
        (":marked", "has 'kto_tag', marks of good and bad answers, which is not read"),
        (":sampled", "has 'num_samples', a random sample"),
        (":pictures", "has images, which are not read"),
        (":odd", "unknown formatting 'xml'; use alpaca or sharegpt"),
        (":gone", "data not found: .*gone.json"),
    ],
)
def test_entries_that_cannot_be_read_are_refused(listing: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        open_examples(f"{listing}{name}")


def test_a_list_of_one_needs_no_name_and_other_files_of_the_name_are_data(tmp_path: Path) -> None:
    written(tmp_path / "d.json", json.dumps(ALPACA))
    only = written(tmp_path / "dataset_info.json", json.dumps({"only": {"file_name": "d.json"}}))
    assert len(open_examples(only)) == 3
    written(only, json.dumps(PROMPTS))
    assert encoded(only) == encoded(PROMPTS)


# --------------------------------------------------------------------------------------------------- the hub


class Hub:
    """Stands for the hub: `load_dataset` of one data set of two splits. asked: the arguments of the calls."""

    def __init__(self, datasets: Any) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.fetched = 0
        self._datasets = datasets

    def load_dataset(self, name: str, configuration: str | None, *, streaming: bool) -> Any:
        self.asked.append((name, configuration, streaming))
        if name != "owner/name":
            raise self._datasets.exceptions.DatasetNotFoundError(f"no {name}")
        data = self._datasets.Dataset.from_list(PROMPTS)
        if not streaming:
            return self._datasets.DatasetDict(train=data, test=data.select([0]))
        rows = self._datasets.IterableDataset.from_generator(self._rows)
        return self._datasets.IterableDatasetDict({"train": rows})

    def _rows(self) -> Iterator[dict[str, Any]]:
        for row in PROMPTS:
            self.fetched += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    datasets = pytest.importorskip("datasets")
    made = Hub(datasets)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


def test_names_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = open_examples("owner/name/main:train")
    assert [ENCODER(record) for record in examples] == encoded(PROMPTS)
    assert hub.asked == [("owner/name", "main", False)]
    assert examples.path == "hf://datasets/owner/name/main:train"
    assert list(open_examples(examples.path, checked=False)) == PROMPTS
    entry = {"only": {"hf_hub_url": "owner/name", "subset": "main", "columns": {"prompt": "prompt"}}}
    listing = written(tmp_path / "dataset_info.json", json.dumps(entry))
    pretraining = open_examples(listing)
    assert [record["text"] for record in pretraining] == [row["prompt"] for row in PROMPTS]
    for name, reason in [
        ("owner/name", "has several splits: train, test; name one, as in owner/name:train"),
        ("owner/name:dev", "no split 'dev'; its splits are train, test"),
        ("owner/other", "data not found: owner/other is no file or folder, and no data set of the Hugging"),
    ]:
        with pytest.raises(UserError, match=reason):
            open_examples(name)


def test_streaming_fetches_rows_as_they_are_read(hub: Hub) -> None:
    examples = open_examples("owner/name", limit=2, streaming=True)
    assert hub.asked == [("owner/name", None, True)]
    assert list(examples) == PROMPTS[:2]
    assert hub.fetched <= 3  # datasets reads one row ahead
    assert examples.path == "hf://datasets/owner/name"
    assert examples.reading.to_json() == {"streaming": True}


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    with pytest.raises(UserError, match=r"the Hugging Face hub cannot be reached \(no connection\)"):
        open_examples("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        open_examples("hf://datasets/owner/name:train")
