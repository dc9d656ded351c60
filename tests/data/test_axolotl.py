"""Data sets that an Axolotl configuration names, as Axolotl reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_forms import CHATS, PROMPTS, TEXTS, encoded, lines_of, written

from rapidin.data.dropping import write_without
from rapidin.data.examples import open_examples
from rapidin.errors import UserError

yaml = pytest.importorskip("yaml")

ALPACA = [
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
]
HEADER = "Below is an instruction that describes a task"
READ_AS = [
    {
        "prompt": f"{HEADER}, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n",
        "completion": "3",
    },
    {
        "prompt": f"{HEADER}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:\n",
        "completion": "Hello.",
    },
]
TALKS = [
    {
        "talk": [
            {"who": {"user": "human", "assistant": "bot"}[turn["role"]], "says": turn["content"]}
            for turn in each["messages"][1:]
        ],
        "system": each["messages"][0]["content"],
    }
    for each in CHATS
]
FROM = {"user": "human", "assistant": "gpt", "system": "system"}
SHARED = [
    {
        "conversations": [
            {"from": FROM[turn["role"]], "value": turn["content"]}
            for turn in each["messages"]
        ]
    }
    for each in CHATS
]  # fmt: skip
CUSTOM = {
    "field_instruction": "q",
    "field_input": "more",
    "field_output": "a",
    "system_prompt": "Be kind.",
    "system_format": "<<{system}>> ",
    "format": "[{instruction} | {input}] ",
    "no_input_format": "[{instruction}] ",
}
QUESTIONS = [{"q": "Who?", "a": "Me."}, {"q": "Where?", "more": "in town", "a": "Here."}]
TAGS: dict[str, Any] = {
    "type": "chat_template",
    "field_messages": "talk",
    "message_property_mappings": {"role": "who", "content": "says"},
    "roles": {"user": ["human"], "assistant": ["bot"]},
}


def config(folder: Path, *entries: dict[str, Any], **settings: Any) -> str:
    value = {"base_model": "some/model", "datasets": list(entries)} | settings
    return str(written(folder / "config.yml", yaml.safe_dump(value)))


@pytest.mark.parametrize(
    ("entry", "rows", "read_as"),
    [
        ({"type": "alpaca"}, ALPACA, READ_AS),
        ({"type": "completion"}, TEXTS, TEXTS),
        ({"type": "completion", "field": "body"}, [{"body": row["text"]} for row in TEXTS], TEXTS),
        (TAGS, TALKS, CHATS),
        ({"type": "chat_template"}, CHATS, CHATS),
        ({"type": "sharegpt"}, SHARED, CHATS),
        (
            {"type": CUSTOM},
            QUESTIONS,
            [
                {"prompt": "<<Be kind.>> [Who?] ", "completion": "Me."},
                {"prompt": "<<Be kind.>> [Where? | in town] ", "completion": "Here."},
            ],
        ),
    ],
    ids=["alpaca", "completion", "field", "chat_template", "messages", "sharegpt", "formats"],
)
def test_types_are_read_as_axolotl_reads_them(
    entry: dict[str, Any], rows: Any, read_as: Any, tmp_path: Path
) -> None:
    written(tmp_path / "d.jsonl", lines_of(rows))
    made = config(tmp_path, {"path": "d.jsonl", "ds_type": "json"} | entry)
    assert encoded(made) == encoded(read_as)
    again = open_examples(made)
    assert again.path == f"{made}:0"
    assert open_examples(again.path, checked=False).identity == again.identity


def test_files_of_an_entry_are_those_that_are_read(tmp_path: Path) -> None:
    for name, rows in (("a", ALPACA[:1]), ("b", ALPACA[1:]), ("c", ALPACA)):
        written(tmp_path / "data" / f"{name}.jsonl", lines_of(rows))
    files = ["data/a.jsonl", "data/b.jsonl"]
    for path in ("json", "data"):
        entry = {"path": path, "type": "alpaca", "split": "train"}
        assert encoded(config(tmp_path, entry | {"data_files": files})) == encoded(READ_AS)
        assert encoded(config(tmp_path, entry | {"data_files": files[0]})) == encoded(READ_AS[:1])


def test_a_text_is_a_list_of_one(tmp_path: Path) -> None:
    written(tmp_path / "d.jsonl", lines_of(TALKS))
    alone = {"roles": {"user": "human", "assistant": "bot"}, "roles_to_train": "bot"}
    assert encoded(config(tmp_path, {"path": "d.jsonl"} | TAGS | alone)) == encoded(CHATS)
    twice = {"roles_to_train": ["bot", "assistant"]}
    assert encoded(config(tmp_path, {"path": "d.jsonl"} | TAGS | twice)) == encoded(CHATS)


def test_token_ids_have_no_type(tmp_path: Path) -> None:
    ids = [{"input_ids": each.ids, "labels": [*each.ids[:-1], each.ids[-1]]} for each in encoded(PROMPTS)]
    written(tmp_path / "d.jsonl", lines_of(ids))
    assert encoded(config(tmp_path, {"path": "d.jsonl", "type": None})) == encoded(ids)


def test_several_data_sets_are_one_after_another_or_one_by_its_number(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", lines_of(ALPACA))
    written(tmp_path / "b.jsonl", lines_of(QUESTIONS))
    made = config(tmp_path, {"path": "a.jsonl", "type": "alpaca"}, {"path": "b.jsonl", "type": CUSTOM})
    assert len(open_examples(made)) == 4
    assert encoded(f"{made}:0") == encoded(READ_AS)
    assert open_examples(f"{made}:1")[0]["completion"] == "Me."
    with pytest.raises(UserError, match=r"config.yml has no data set 2; it has 0 to 1"):
        open_examples(f"{made}:2")
    # Rows that are dropped leave files in the form that Axolotl read.
    assert write_without(made, [1, 2], tmp_path / "out") == 4
    assert (tmp_path / "out" / "a.jsonl").read_text() == lines_of(ALPACA[:1])
    assert (tmp_path / "out" / "b.jsonl").read_text() == lines_of(QUESTIONS[1:])


def test_all_tokens_have_a_loss_if_the_configuration_says_so(tmp_path: Path) -> None:
    written(tmp_path / "d.jsonl", lines_of(ALPACA))
    made = config(tmp_path, {"path": "d.jsonl", "type": "alpaca"}, train_on_inputs=True)
    assert encoded(made) == encoded([{"text": row["prompt"] + row["completion"]} for row in READ_AS])


def test_messages_without_a_loss_are_marked(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "learn": False}]
    said += [{"role": "user", "content": "Hm"}, {"role": "assistant", "content": "Ah", "learn": True}]
    written(tmp_path / "d.jsonl", lines_of([{"messages": said}]))
    entry = {"path": "d.jsonl", "type": "chat_template", "message_field_training": "learn"}
    marked = [{name: each[name] for name in ("role", "content")} for each in said]
    marked[1]["train"] = False  # type: ignore[assignment]
    assert encoded(config(tmp_path, entry)) == encoded([{"messages": marked}])
    said[2]["learn"] = True
    written(tmp_path / "d.jsonl", lines_of([{"messages": said}]))
    with pytest.raises(
        UserError, match=r"line 1: messages\[2\] is marked by 'learn', but only the assistant's"
    ):
        open_examples(config(tmp_path, entry))


@pytest.mark.parametrize(
    ("entry", "settings", "words"),
    [
        ({"type": "gpteacher"}, {}, "config.yml:0 has the type 'gpteacher', which is not read; use alpaca"),
        ({"type": "alpaca:chat"}, {}, "'alpaca:chat', which is not read; leave out its variant"),
        ({"type": "alpaca", "shards": 4}, {}, "has 'shards', a part of the data"),
        ({"type": {"field_output": "a"}}, {}, "its type has no 'format'"),
        ({"type": {"format": "{who}"}}, {}, "a format of the configuration cannot be filled in: 'who'"),
        (TAGS | {"roles_to_train": ["human"]}, {}, "trains on the turns of user, which is not read"),
        (TAGS | {"train_on_eos": "none"}, {}, "has 'train_on_eos: none'"),
        (TAGS | {"train_on_eos": "all"}, {}, "has 'train_on_eos: all', which is not read; use turn"),
        (TAGS | {"train_on_eot": "all"}, {}, "has 'train_on_eot: all'"),
        (TAGS | {"roles_to_train": []}, {}, "trains on the turns of no role, but those that are marked"),
        (TAGS | {"roles_to_train": {"a": 1}}, {}, "'roles_to_train' is an object, expected text or a list"),
        (TAGS | {"roles": ["human"]}, {}, "'roles' is a list, expected an object"),
        (TAGS | {"roles": {"user": 1}}, {}, "'roles: user' is a number .1., expected text or a list"),
        (TAGS | {"message_property_mappings": {"name": "by"}}, {}, "maps 'name' of messages"),
        (TAGS | {"drop_system_message": True}, {}, "has 'drop_system_message', chats without their system"),
        ({"type": "alpaca", "split": "train[:10%]"}, {}, "has the split 'train.:10%.', a part of the data"),
        ({"type": "alpaca", "split": "test"}, {}, "has the split 'test' of .*; name the files of that split"),
        (
            {"type": "alpaca", "path": "a/b", "data_files": "d.jsonl"},
            {},
            "'data_files' of a data set on the hub",
        ),
        ({"type": "alpaca", "path": "json", "data_files": []}, {}, "names no 'data_files'"),
        (
            {"type": "alpaca", "path": "json", "data_files": {"train": "d.jsonl"}},
            {},
            "'data_files' is an object",
        ),
        ({"type": "chat_template"}, {"train_on_inputs": True}, "'train_on_inputs' is true"),
        ({"type": "completion", "field": "body"}, {}, "'body' is nothing|'body' is .*, expected text"),
        ({"type": "alpaca", "path": "gone.jsonl"}, {}, "data not found: gone.jsonl"),
    ],
)
def test_what_cannot_be_read_is_refused(
    entry: dict[str, Any], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    written(tmp_path / "d.jsonl", lines_of(ALPACA))
    with pytest.raises(UserError, match=words):
        open_examples(config(tmp_path, {"path": "d.jsonl"} | entry, **settings))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not YAML"),
        ("- a", "expected the settings of an Axolotl configuration"),
        ("model: x", "has no list 'datasets'"),
        ("datasets: []", "has no list 'datasets'"),
        ("datasets: [{type: alpaca}]", "config.yml:0 has no 'path'"),
        ("datasets: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_other_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        open_examples(written(tmp_path / "config.yml", content))
