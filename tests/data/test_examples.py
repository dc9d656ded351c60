"""Reading data: what is accepted, what is refused and in which words, and which tokens count."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from tiny import tiny_tokenizer

from rapidin.data.encoding import Encoded, Encoder, Status, alpaca_prompt
from rapidin.data.examples import open_examples
from rapidin.errors import UserError

PROMPT = {"prompt": "One, two,", "completion": " three."}
INSTRUCTION = {"instruction": "Add.", "input": "1, 2", "output": "3"}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "Howdy!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is one and two?"},
        {"role": "assistant", "content": "Three."},
    ]
}
TEXT = {"text": "The quick brown fox."}
FORMS = [("prompt", PROMPT), ("instruction", INSTRUCTION), ("messages", MESSAGES), ("text", TEXT)]


def write(path: Path, *lines: Any) -> Path:
    """Lines that are not bytes or text already are written as JSON."""
    with path.open("wb") as file:
        for line in lines:
            if not isinstance(line, str | bytes):
                line = json.dumps(line)
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return path


def encoder(**options: Any) -> Encoder:
    chat, bos = options.pop("chat", False), options.pop("bos", False)
    return Encoder(tiny_tokenizer(chat, bos), **{"max_length": 128} | options)


def counted(encode: Encoder, record: dict[str, Any]) -> str:
    """The text of the tokens whose loss counts."""
    encoded = encode(record)
    assert len(encoded.ids) == len(encoded.target)
    return encode.tokenizer.decode([i for i, on in zip(encoded.ids, encoded.target, strict=True) if on])


# -------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("form", "record"), FORMS)
def test_forms(tmp_path: Path, form: str, record: dict[str, Any]) -> None:
    examples = open_examples(write(tmp_path / "data.jsonl", record, record | {"label": 3}))
    assert (len(examples), examples.form, examples.path) == (2, form, str(tmp_path / "data.jsonl"))
    assert list(examples) == [record, record | {"label": 3}]
    assert open_examples([record, record | {"label": 3}]).identity == examples.identity


def test_path_may_be_text(tmp_path: Path) -> None:
    assert len(open_examples(str(write(tmp_path / "data.jsonl", TEXT)))) == 1


def test_blank_lines_count_in_the_line_number(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", "", {"text": "a"}, "  \t", "", {"text": "b"}, {"text": "c"}, "")
    examples = open_examples(path)
    assert [examples.index(row) for row in range(3)] == [1, 4, 5]
    assert examples[2] == {"text": "c"}
    assert examples.identity == open_examples(["a", "b", "c"]).identity
    for row in (-1, 3):
        with pytest.raises(IndexError):
            examples[row]
        with pytest.raises(IndexError):
            examples.index(row)


def test_byte_order_mark_crlf_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xc3\xa9"}\r\n{"text": "b"}')
    examples = open_examples(path)
    assert [examples[1], examples[0]] == [{"text": "b"}, {"text": "aé"}]


def test_separators_inside_a_text_end_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "one\u2028two\x85three"}', TEXT)
    assert open_examples(path)[0]["text"] == "one\u2028two\x85three"


def test_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", TEXT, TEXT, '{"broken')
    assert len(open_examples(path, limit=2)) == 2
    assert len(open_examples([TEXT], limit=9)) == 1
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        open_examples(path, limit=0)


def test_identity_depends_on_the_records_and_their_order_only(tmp_path: Path) -> None:
    identity = open_examples(["a", "b"]).identity
    spread = write(tmp_path / "data.jsonl", '{ "text" :\t"a" }', "", {"text": "b"})
    assert open_examples(spread).identity == identity
    assert open_examples(["b", "a"]).identity != identity
    assert open_examples(["a", "b", "c"]).identity != identity
    assert open_examples([{"text": "a", "label": 1}, {"text": "b"}]).identity != identity
    swapped = [{"completion": "y", "prompt": "x"}]
    assert open_examples(swapped).identity == open_examples([{"prompt": "x", "completion": "y"}]).identity


def test_unchecked_examples_are_parsed_when_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", "", {"text": "a"}, "", '{"broken', {"text": "c"})
    examples = open_examples(path, checked=False)
    assert (len(examples), examples.form, examples[2], examples.index(2)) == (3, "text", {"text": "c"}, 4)
    with pytest.raises(UserError, match="line 4: broken JSON"):
        examples[1]
    with pytest.raises(UserError, match="line 4: broken JSON"):
        _ = examples.identity
    assert len(open_examples(path, checked=False, limit=1)) == 1
    assert open_examples(["a"] * 3, checked=False).identity == open_examples(["a"] * 3).identity
    with pytest.raises(UserError, match="no examples"):
        open_examples(write(tmp_path / "none.jsonl", "", " "), checked=False)


def test_a_record_with_the_fields_of_two_forms() -> None:
    both = INSTRUCTION | TEXT  # as in Alpaca on the Hub
    assert open_examples([both]).form == "instruction"
    half = {"prompt": "a prompt"} | TEXT
    assert open_examples([half]).form == "text"
    assert counted(encoder(), half) == counted(encoder(), TEXT)


def test_queries_may_lack_the_completion(tmp_path: Path) -> None:
    encode = encoder(chat=True)
    for record, rest in [
        ({"prompt": "Howdy!"}, "Howdy!"),
        ({"prompt": "Howdy!", "completion": None}, "Howdy!"),
        ({"instruction": "Add.", "input": ""}, alpaca_prompt("Add.")),
        ({"instruction": "Add.", "output": ""}, alpaca_prompt("Add.")),
        ({"messages": MESSAGES["messages"][:1]}, "<|user|>\nHowdy!</s>\n<|assistant|>\n"),
    ]:
        examples = open_examples([record], generations=True)
        assert encode.prompt_text(examples[0]) == rest
        assert encode.completion_text(examples[0]) is None
        if "output" not in record and "messages" not in record:
            with pytest.raises(UserError, match="expected 'prompt' and 'completion'"):
                open_examples([record])
    with pytest.raises(UserError, match="expected 'prompt', or 'instruction'"):
        open_examples([{"greeting": "Howdy!"}], generations=True)


def test_dataset_on_disk_and_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([INSTRUCTION, INSTRUCTION | {"input": None}, INSTRUCTION])
    data.save_to_disk(tmp_path / "data")
    examples = open_examples(tmp_path / "data", limit=2)
    assert (len(examples), examples.form, examples.index(1)) == (2, "instruction", 1)
    assert examples[1] == INSTRUCTION | {"input": None}
    assert examples.identity == open_examples(data, limit=2).identity
    assert examples.path == str(tmp_path / "data")
    assert open_examples(data.with_format("torch"))[0] == INSTRUCTION

    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has several splits: test, train; name one"):
        open_examples(tmp_path / "splits")
    with pytest.raises(UserError, match="several splits: train; choose one"):
        open_examples(datasets.DatasetDict(train=data))
    assert len(open_examples(tmp_path / "splits" / "train")) == 3

    (tmp_path / "data" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the HF dataset"):
        open_examples(tmp_path / "data")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'rapidin\[data\]'"):
        open_examples(tmp_path / "data")


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([TEXT, "", '{"text": "a"'], r"data.jsonl, line 3: broken JSON \(.* at column \d+\); fix"),
        ([TEXT, '{"text": "a"} {"text": "b"}'], "line 2: broken JSON"),
        ([TEXT, b'{"text": "\xff\xfe"}'], r"line 2: not UTF-8 text \(byte 11 of the line\)"),
        ([TEXT, "[1, 2]"], "line 2: found a list, expected a JSON object"),
        ([TEXT, "null"], "line 2: found null, expected a JSON object"),
        ([TEXT, '"text"'], "line 2: found text, expected a JSON object"),
        ([TEXT, "[" * 100_000], "line 2: JSON nested too deeply"),
        (
            [{"title": "a", "body": "b"}],
            "line 1: found the fields 'title', 'body'; expected 'prompt'",
        ),
        ([TEXT, {}], "line 2: found no fields; expected 'text' as in the examples before it"),
        ([TEXT, PROMPT], "line 2: found the fields 'prompt', 'completion'; expected 'text' as"),
        ([PROMPT, {"prompt": "a"}], "line 2: found the fields 'prompt'; expected 'prompt' and 'completion'"),
        ([{"text": None}], r"line 1: found the fields 'text' \(null\)"),
        ([{"text": 3}], r"line 1: 'text' is a number \(3\), expected text"),
        ([{"prompt": "a", "completion": True}], "'completion' is true, expected text"),
        ([INSTRUCTION | {"input": ["a"]}], "'input' is a list, expected text"),
        ([{"messages": "hi"}], "'messages' is text, expected a list of messages"),
        ([{"messages": ["hi"]}], r"messages\[0\] is text, expected an object with 'role' and 'content'"),
        ([{"messages": [{"role": "user"}]}], r"messages\[0\].content is null, expected text"),
        (['{"text": "\\ud83d"}'], "'text' contains half a character"),
        ([], "no examples in .*data.jsonl"),
        (["", "  "], "no examples in .*data.jsonl"),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_examples(write(tmp_path / "data.jsonl", *lines))
    assert "\n" not in str(caught.value)


def test_refused_sources(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source, message in [
        (tmp_path / "none.jsonl", r"data not found: .*none.jsonl; give a .jsonl file"),
        (tmp_path / "folder", "not a HF dataset saved to disk"),
        ("/dev/null", "not a regular file"),
        ([], "no examples in the data"),
        ([TEXT, 7], r"examples\[1\]: found a number \(7\)"),
        (7, "the data is a number"),
    ]:
        with pytest.raises(UserError, match=message):
            open_examples(source)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    examples = open_examples(write(tmp_path / "data.jsonl", TEXT, TEXT))
    (tmp_path / "data.jsonl").write_text(json.dumps(TEXT) + "\n{")
    with pytest.raises(UserError, match="line 2: broken JSON"):
        list(examples)


# -------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_what_counts(bos: bool, eos: bool) -> None:
    encode = encoder(bos=bos, eos=eos)
    end = "</s>" if eos else ""
    assert counted(encode, PROMPT) == " three." + end
    assert counted(encode, INSTRUCTION) == "3" + end
    assert counted(encode, TEXT) == ("The" * bos) + " quick brown fox." + end  # position 0 never counts
    whole = encode.tokenizer.decode(encode(INSTRUCTION).ids)
    assert whole == "<s>" * bos + alpaca_prompt("Add.", "1, 2") + "3" + end
    assert encode(PROMPT).status == Status.OK
    assert encode.encode_pair(PROMPT["prompt"], PROMPT["completion"]) == encode(PROMPT)


def test_alpaca_form() -> None:
    header = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
    )
    assert alpaca_prompt("Add.") == header + "### Instruction:\nAdd.\n\n### Response:\n"
    assert alpaca_prompt("Add.", "1") == header + "### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:\n"


def test_a_token_over_the_edge_counts() -> None:
    encode = encoder(eos=False)
    assert len(encode.tokenizer("The")["input_ids"]) == 1
    encoded = encode.encode_pair("one T", "he")
    assert encoded.ids[-1:] == encode.tokenizer("The")["input_ids"]
    assert encoded.target[-1]


def test_eos_is_not_doubled() -> None:
    encode = encoder()
    encoded = encode.encode_pair("Howdy!", " Paris.</s>")
    assert encoded == encode.encode_pair("Howdy!", " Paris.")
    assert encoded.ids.count(encode.tokenizer.eos_token_id) == 1


def test_what_the_tokenizer_puts_behind_is_left_out() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    encoded = Encoder(tokenizer, eos=False, max_length=99).encode_pair("Howdy!", " Paris.")
    assert encoded.ids[0] == 0
    assert 1 not in encoded.ids


def test_statuses_and_truncation() -> None:
    encode = encoder(max_length=8)
    assert encode({"text": ""}).status == Status.EMPTY
    assert encode({"prompt": "", "completion": ""}).status == Status.EMPTY
    assert encode({"prompt": "a", "completion": ""}).status == Status.NO_TARGET
    assert encode({"instruction": "", "output": ""}).status == Status.NO_TARGET
    assert encoder(eos=False)({"text": "a"}).status == Status.NO_TARGET  # position 0 is never predicted
    assert encoder(eos=False, bos=True)({"text": "a"}).status == Status.OK
    fits = encode({"prompt": "xyz", "completion": "wxyz"})  # one letter, one token, and the end
    assert (len(fits.ids), fits.status, fits.truncated) == (8, Status.OK, False)
    cut = encode({"prompt": "xyz", "completion": "wxyzw"})
    assert (len(cut.ids), cut.status, cut.truncated) == (8, Status.OK, True)
    assert cut.target == [False] * 3 + [True] * 5
    gone = encode({"prompt": "wxyzwxyz", "completion": "w"})
    assert (len(gone.ids), gone.status, gone.truncated) == (8, Status.NO_TARGET, True)
    long = encoder(max_length=8, too_long="skip")({"prompt": "xyz", "completion": "wxyzw"})
    assert (long.status, long.truncated) == (Status.TOO_LONG, False)


def test_refused_options() -> None:
    with pytest.raises(UserError, match="unknown too_long 'drop'; use 'truncate' or 'skip'"):
        encoder(too_long="drop")
    with pytest.raises(UserError, match="max_length must be at least 2, got 1"):
        encoder(max_length=1)


@pytest.mark.parametrize("text", ["naïve café", "日本語です", "a🙂b", "🙂", "e\u0301", "\x00\n\r\t "])
def test_multi_byte_text(text: str) -> None:
    encode = encoder(eos=False)
    assert counted(encode, {"prompt": "→é", "completion": text}) == text
    assert counted(encode, {"prompt": text, "completion": "é→"}) == "é→"


writing = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@tries(150)
@given(prompt=writing, completion=writing)
def test_target_tokens_give_the_completion_back(prompt: str, completion: str) -> None:
    plain, after_bos = (encode.encode_pair(prompt, completion) for encode in ENCODERS)
    if not prompt + completion:
        assert plain == after_bos == Encoded([], [], Status.EMPTY)
        return
    decode = ENCODERS[0].tokenizer.decode
    chosen = [i for i, on in zip(after_bos.ids, after_bos.target, strict=True) if on]
    text = decode(chosen, clean_up_tokenization_spaces=False)
    assert bool(chosen) == bool(completion)
    # A token may reach over the edge, and may then begin within a character.
    assert text.endswith(completion) or "\ufffd" in text
    assert len(text) <= len(completion) + 10
    assert decode(after_bos.ids[1:], clean_up_tokenization_spaces=False) == prompt + completion
    # Without BOS the rest is the same, and nothing predicts the first token.
    assert plain.ids == after_bos.ids[1:]
    assert plain.target == [False, *after_bos.target[2:]]


ENCODERS = [encoder(eos=False, bos=bos, max_length=10_000) for bos in (False, True)]


class Slow:
    """A tokenizer that reports no offsets: one token a character."""

    is_fast = False
    bos_token, eos_token_id, all_special_ids, chat_template = None, 0, [0], "yes"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        turns = "".join(f"{message['role'][0]}:{message['content']};" for message in messages)
        return turns + "a:" * add_generation_prompt


def test_tokenizers_without_offsets() -> None:
    encode = Encoder(Slow(), max_length=99)
    assert encode({"prompt": "ab", "completion": "c"}).target == [False, False, True, True]
    encoded = encode(MESSAGES)
    text = "".join(chr(i) if on else "." for i, on in zip(encoded.ids, encoded.target, strict=True))
    assert text == "." * 11 + "Hello.;" + "." * 25 + "Three.;"
    # All that follows a prompt of messages counts, as with offsets: what a tool said too.
    said = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]
    (prompted,) = open_examples([{"prompt": MESSAGES["messages"][:1], "completion": said}])
    encoded = encode(prompted)
    text = "".join(chr(i) if on else "." for i, on in zip(encoded.ids, encoded.target, strict=True))
    assert text.lstrip(".") == "x;t:y;"


# ---------------------------------------------------------------------------------------------- chats


@pytest.mark.parametrize("bos", [False, True])
def test_every_turn_of_the_assistant_counts(bos: bool) -> None:
    encode = encoder(chat=True, bos=bos)
    assert counted(encode, MESSAGES) == "Hello.</s>\nThree.</s>\n"
    assert encode.tokenizer.bos_token_id not in encode(MESSAGES).ids  # the template writes none
    assert encode.completion_text(MESSAGES) == "Three."
    assert encode.prompt_text(MESSAGES).endswith("What is one and two?</s>\n<|assistant|>\n")
    asked = {"messages": MESSAGES["messages"][:3]}
    assert encode.completion_text(asked) is None
    assert encode.prompt_text(asked) == encode.prompt_text(MESSAGES)
    assert encode({"messages": []}).status == Status.EMPTY
    assert encode({"messages": MESSAGES["messages"][:1]}).status == Status.NO_TARGET


def test_an_answer_without_weight_does_not_count() -> None:
    encode = encoder(chat=True)
    for mark in ({"weight": 0}, {"train": False}, {"training": False}):
        first, earlier, *rest = MESSAGES["messages"]
        assert counted(encode, {"messages": [first, earlier | mark, *rest]}) == "Three.</s>\n"
    marked = [message | {"weight": 1, "train": None} for message in MESSAGES["messages"]]
    assert counted(encode, {"messages": marked}) == "Hello.</s>\nThree.</s>\n"
    prompted = {"prompt": MESSAGES["messages"][:3], "completion": MESSAGES["messages"][3:]}
    examples = open_examples([prompted])  # of a conversational prompt, earlier answers do not count
    assert counted(encode, examples[0]) == "Three.</s>\n"
    assert encode(examples[0]).ids == encode(MESSAGES).ids
    assert (examples.form, examples.original(0)) == ("messages", prompted)


def test_tokens_are_read_as_they_are() -> None:
    encode = encoder(bos=True)
    record = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}
    assert encode(record) == Encoded([5, 6, 7, 8], [False, True, False, True], Status.OK)
    assert encode({"input_ids": [5, 6, 7]}).target == [False, True, True]
    masked = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
    assert encode(masked).target == [False, False, True]
    assert encode({"input_ids": []}).status == Status.EMPTY
    assert encode({"input_ids": [5, 6], "labels": [-100, -100]}).status == Status.NO_TARGET
    assert encode.prompt_text(masked) + str(encode.completion_text(masked)) == encode.tokenizer.decode(
        [5, 6, 7]
    )
    assert Encoder(tiny_tokenizer(), max_length=2)(record).ids == [5, 6]
    with pytest.raises(UserError, match="input_ids has the token 999, but the tokenizer has 320 tokens"):
        encode({"input_ids": [5, 999]})


def test_bos_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer(chat=True, bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    encode = Encoder(tokenizer, max_length=99)
    for ids in (
        encode(MESSAGES).ids,
        encode.prompt_ids(encode.prompt_text(MESSAGES)),
        encode.encode_pair(encode.prompt_text(MESSAGES), "Three.").ids,
        encode.prompt_ids("Howdy!"),
    ):
        assert ids[0] == 0
        assert ids.count(0) == 1


def test_a_template_that_writes_before_the_last_answer_only() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    thought = "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message['c", thought + "{{ message['c")
    encode = Encoder(tokenizer, max_length=128)
    assert counted(encode, MESSAGES) == "Hello.</s>\n<think></think>Three.</s>\n"
    same = [message | {"content": "Yes."} for message in MESSAGES["messages"]]
    assert counted(encode, {"messages": same}) == "Yes.</s>\n<think></think>Yes.</s>\n"
    padded = [message | {"content": message["content"] + " \n"} for message in MESSAGES["messages"]]
    tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'] | trim")
    assert counted(encode, {"messages": padded}) == "Hello.</s>\n<think></think>Three.</s>\n"


def test_check_names_the_chat_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template += (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    encode = Encoder(tokenizer, max_length=128)
    wrong = {"messages": MESSAGES["messages"][1:]}
    open_examples([MESSAGES, MESSAGES]).check(encode)
    with pytest.raises(
        UserError, match=r"line 3: the chat template rejects a chat with the roles .*user first"
    ):
        open_examples(write(tmp_path / "chats.jsonl", MESSAGES, "", wrong)).check(encode)


def test_refused_chats() -> None:
    with pytest.raises(UserError, match="no chat template"):
        encoder()(MESSAGES)
    tokenizer = tiny_tokenizer(chat=True)
    encode = Encoder(tokenizer, max_length=99)
    forwards = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages | length }}" + forwards
    assert counted(encode, MESSAGES) == "Hello.</s>\nThree.</s>\n"  # although each message changes the text
    tokenizer.chat_template = forwards.replace("in messages", "in messages | reverse")
    with pytest.raises(UserError, match=r"changes earlier text .*messages\[1\]"):
        encode(MESSAGES)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="rejects a chat with the roles user: roles must alternate"):
        encode({"messages": MESSAGES["messages"][:1]})


def test_a_record_of_no_form() -> None:
    with pytest.raises(
        UserError, match="a record has none of the known forms; its fields are 'question'; expected 'prompt'"
    ):
        encoder()({"question": "?"})


RECORDS = [{"prompt": "a", "completion": "b", "n": 1}, {"prompt": "c", "completion": "d", "n": None}]


def frames() -> dict[str, object]:
    import pandas as pd
    import pyarrow as pa

    return {"pandas": pd.DataFrame(RECORDS), "arrow": pa.Table.from_pylist(RECORDS)}


@pytest.mark.parametrize("kind", ["pandas", "arrow"])
def test_a_data_frame_is_its_rows(kind: str) -> None:
    found = open_examples(frames()[kind])
    assert [dict(record) for record in found] == RECORDS
    assert found.form == "prompt"
    assert found.where(1) == "data frame[1]"


def test_paths_and_open_files_are_what_lies_there(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, record in zip((first, second), RECORDS, strict=True):
        path.write_text(json.dumps(record) + "\n")
    for source in ([first, second], [str(first), str(second)], (str(first), second)):
        found = open_examples(source)
        assert list(found) == RECORDS
        assert found.path == [str(first), str(second)]
    with open(first) as text, open(first, "rb") as data:
        for file in (text, data):
            assert list(open_examples(file)) == RECORDS[:1]
    assert list(open_examples(iter(RECORDS))) == RECORDS


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (io.StringIO("{}"), r"the open file, line 1: found no fields"),
        (["gone.jsonl"], "data not found: gone"),
        (["gone.jsonl", "a text"], "mixes files"),
        ([Path("gone")], "data not found: gone"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(source: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_examples(source)


def test_texts_may_look_a_little_like_paths() -> None:
    texts = ["Write to config.json", "and/or", "a.b"]
    assert [record["text"] for record in open_examples(texts)] == texts


def test_an_integer_of_thousands_of_digits_is_one_malformed_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": ' + "9" * 5000 + '}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="line 1: a number with too many digits"):
        open_examples(str(path))
    assert open_examples(str(path), skip=True).malformed == {0}
