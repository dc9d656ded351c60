"""Chats: what reaches the template, and which of its tokens have a loss, against transformers and TRL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_tables
import doc_tables
import pytest
from chat_tables import CHATS, DATE, cases, counted, prompted, tokenizer_of
from tiny import tiny_llama, tiny_tokenizer

from rapidin import Attributor
from rapidin.data.chats import Chat, ChatTemplate
from rapidin.data.encoding import Encoded, Encoder
from rapidin.data.examples import open_examples
from rapidin.data.records import record_hash, record_parts
from rapidin.errors import UserError

CASES = list(cases())
TRAINED = json.loads(chat_tables.TRAINED.read_text(encoding="utf-8"))
SMOLLM_MARKS_ITS_HEADER = "smollm-3"
# The empty thought is written by the generation prompt, and marked as the assistant's.
MARKED_OTHERWISE = {("qwen-3", "thinking off")}


def encoder(template: str, *, marks: bool, **options: Any) -> Encoder:
    return Encoder(tokenizer_of(template, marks=marks), max_length=4096, date=DATE, **options)


def shown(encode: Encoder, made: Encoded) -> dict[str, Any]:
    text = encode.tokenizer.decode(made.ids, clean_up_tokenization_spaces=False)
    return {"text": text, "counted": counted(encode.tokenizer, made.ids, made.target)}


def targets(encode: Encoder, record: dict[str, Any]) -> list[str]:
    made: list[str] = shown(encode, encode(record))["counted"]
    return made


# -------------------------------------------------------------------------------- the table of templates


@pytest.mark.parametrize(("template", "chat"), CASES)
def test_the_marks_of_a_template_give_the_mask_of_transformers(template: str, chat: str) -> None:
    tokenizer = tokenizer_of(template)
    record = CHATS[chat]
    arguments = {name: record[name] for name in ("tools", "documents") if name in record}
    expected = tokenizer.apply_chat_template(
        record["messages"],
        return_dict=True,
        return_assistant_tokens_mask=True,
        **arguments,
        **record.get("chat_template_kwargs", {}),
    )
    made = Encoder(tokenizer, max_length=4096)(record)
    assert made.ids == expected["input_ids"]
    mask = [bool(each) for each in expected["assistant_masks"]]
    assert made.target == [False, *mask[1:]]
    assert any(mask)


@pytest.mark.parametrize(("template", "chat"), CASES)
def test_turns_are_found_without_marks_where_the_marks_are(template: str, chat: str) -> None:
    marked, found = (shown(e, e(CHATS[chat])) for e in (encoder(template, marks=m) for m in (True, False)))
    if template == SMOLLM_MARKS_ITS_HEADER:
        header = "<|im_start|>assistant\n"
        marked["counted"] = [text.removeprefix(header) for text in marked["counted"]]
    if (template, chat) in MARKED_OTHERWISE:
        marked["counted"] = [text.removeprefix("<think>\n\n</think>\n\n") for text in marked["counted"]]
    assert found == marked


@pytest.mark.parametrize(("template", "chat"), CASES)
def test_chats_are_what_trl_trains_on(template: str, chat: str) -> None:
    """`chat_templates/trained.json` holds what SFTTrainer makes of them."""
    record = CHATS[chat]
    if "documents" in record:
        pytest.skip("TRL reads no documents")
    for kind, marks, row in (("marks", True, record), ("prompt", False, prompted(record))):
        if row is None:
            continue
        row = {name: json.dumps(value) if name == "tools" else value for name, value in row.items()}
        encode = encoder(template, marks=marks)
        assert shown(encode, encode(open_examples([row])[0])) == TRAINED[f"{template}: {chat}, {kind}"], kind


def test_the_page_has_the_table() -> None:
    assert doc_tables.read(chat_tables.PAGE, "templates") == chat_tables.table()
    assert set(chat_tables.STYLES) == set(chat_tables.TEMPLATES)
    assert len(chat_tables.STYLES) >= 12


@pytest.mark.parametrize("template", ["qwen-3", "phi-3", "harmony", "mistral-v3"])
@pytest.mark.parametrize("marks", [True, False])
def test_the_last_turn_and_turns_without_weight(template: str, marks: bool) -> None:
    record = CHATS["turns"]
    every = targets(encoder(template, marks=marks), record)
    assert targets(encoder(template, marks=marks, turns="last"), record) == every[-1:]
    messages = [m | {"weight": 0} if m == chat_tables.ANSWER else m for m in record["messages"]]
    assert targets(encoder(template, marks=marks), {"messages": messages}) == every[-1:]
    messages = [m | {"train": False} if m == chat_tables.LAST else m for m in record["messages"]]
    (first,) = targets(encoder(template, marks=marks), {"messages": messages})
    assert first.startswith(every[0])
    unanswered = shown(e := encoder(template, marks=marks), e(CHATS["unanswered"]))
    assert unanswered["counted"] == every[:1]


# ------------------------------------------------------------------------------------- what is passed on


def test_tools_and_arguments_of_a_record_reach_the_template() -> None:
    encode = encoder("qwen-2.5", marks=False)
    tools = CHATS["tools"]
    text = shown(encode, encode(tools))["text"]
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert encode(tools | {"tools": json.dumps(tools["tools"])}) == encode(tools)
    assert encode.prompt_text(tools) == text[: text.rindex("A trout")]
    for nothing in (None, [], "[]", ""):
        plain = {"messages": CHATS["turns"]["messages"]}
        assert encode(plain | {"tools": nothing, "chat_template_kwargs": None}) == encode(plain)
    thinking = encoder("qwen-3", marks=False)
    off = CHATS["thinking off"]
    assert targets(thinking, off) == ["An owl.<|im_end|>\n"]
    assert thinking.prompt_text(off).endswith("assistant\n<think>\n\n</think>\n\n")
    named = off | {"chat_template_kwargs": '{"enable_thinking": false}'}
    assert thinking(named) == thinking(off)


def test_arrays_of_tools_are_read() -> None:
    numpy = pytest.importorskip("numpy")
    encode, record = encoder("qwen-2.5", marks=False), CHATS["tools"]
    assert encode(record | {"tools": numpy.array(record["tools"], dtype=object)}) == encode(record)


def test_arguments_that_cannot_be_used() -> None:
    encode, chat = encoder("qwen-2.5", marks=False), CHATS["one turn"]
    for tools in ("weather", "[1]", {"name": "weather"}, ["weather"]):
        with pytest.raises(UserError, match=r"'tools' is .*, expected a list of JSON schemas"):
            encode(chat | {"tools": tools})
    with pytest.raises(UserError, match=r"'chat_template_kwargs' is .*, expected an object"):
        encode(chat | {"chat_template_kwargs": [1]})
    with pytest.raises(UserError, match="'chat_template_kwargs' cannot set 'tokenize'"):
        encode(chat | {"chat_template_kwargs": {"tokenize": True}})
    assert encode(chat | {"documents": "a column of its own"}) == encode(chat)


def test_the_fields_are_part_of_a_records_hash() -> None:
    chat = CHATS["one turn"]
    hashes = {record_hash(chat), record_hash(CHATS["thinking off"]), record_hash(CHATS["documents"])}
    assert len(hashes) == 3
    # That of a chat without them is what earlier caches have.
    hello = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    assert record_hash(hello) == HELLO_HASH


HELLO_HASH = 2987846720799732364

# ---------------------------------------------------------------------------------- contents of messages

CALLING = {"role": "assistant", "tool_calls": [chat_tables.CALL]}


@pytest.mark.parametrize("message", [CALLING, CALLING | {"content": None}, CALLING | {"content": ""}])
def test_null_and_absent_contents_beside_tool_calls(message: dict[str, Any]) -> None:
    messages = [chat_tables.ASK, message, chat_tables.RESULT, chat_tables.LAST]
    encode = encoder("qwen-2.5", marks=False)
    called, answered = targets(encode, open_examples([{"messages": messages}])[0])
    assert called.startswith('<tool_call>\n{"name": "weather"')
    assert answered == "A trout, née Forelle.<|im_end|>\n"
    assert encode.chats.notes() == []
    # A template that needs a content gets an empty one; that it leaves out the calls is said.
    plain = encoder("chatml", marks=False)
    assert targets(plain, {"messages": messages}) == ["<|im_end|>\n", "A trout, née Forelle.<|im_end|>\n"]
    assert plain.chats.notes() == ["the chat template does not write tool calls (1 call)"]
    assert "weather" in record_parts({"messages": messages[:2]})[1]


def test_what_is_not_read_is_said_once_in_python(tmp_path: Path) -> None:
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    chats = [{"messages": [image, chat_tables.ANSWER]}] * 3
    attributor = Attributor(tiny_llama(), tiny_tokenizer(chat=True), width=64, preconditioner="off")
    for name in ("cache", "again"):
        with pytest.warns(UserWarning, match="parts of messages that are not text are not read: 3 image$"):
            attributor.cache(chats, tmp_path / name)
    assert attributor.show(chats[:1]).notes == ["parts of messages that are not text are not read: 1 image"]


def test_tools_that_a_template_does_not_write_are_said() -> None:
    encode = encoder("chatml", marks=False)
    encode(CHATS["one turn"] | {"tools": [chat_tables.WEATHER]})
    assert encode.chats.notes() == ["the chat template does not write 'tools' (1 chat)"]


class Spaced:
    """A tokenizer that writes a space behind the text of its template."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        return str(self.inner.apply_chat_template(*args, **options)) + " "


def test_marks_that_do_not_fit_the_text_are_said() -> None:
    fits = encoder("chatml", marks=True)
    assert targets(fits, CHATS["one turn"]) == ["An owl.<|im_end|>\n"]
    assert fits.chats.notes() == []
    other = Encoder(Spaced(tokenizer_of("chatml", marks=True)), max_length=4096)
    other(CHATS["one turn"])
    assert other.chats.notes() == [
        "the marks {% generation %} of the chat template do not fit the text that the tokenizer writes, "
        "so the assistant's turns are found in the text (1 chat)"
    ]


def test_a_chat_that_is_refused_is_not_counted() -> None:
    encode = encoder("chatml", marks=False)
    encode.rows = 1  # the model has no embeddings of the chat's tokens
    with pytest.raises(UserError, match="embeddings of 1 tokens"):
        encode(CHATS["one turn"] | {"tools": [chat_tables.WEATHER]})
    assert encode.chats.notes() == []


@pytest.mark.parametrize("template", ["chatml", "gemma-3", "phi-3"])
def test_lists_of_parts(template: str) -> None:
    encode = encoder(template, marks=False)
    assert targets(encode, CHATS["parts"]) == targets(encode, CHATS["one turn"])
    assert encode.completion_text(CHATS["parts"]) == "An owl."
    assert record_parts(CHATS["parts"]) == ("Name a bird.", "An owl.")
    assert encode.chats.notes() == []
    image = {"type": "image_url", "image_url": {"url": "owl.png"}}
    asked = {"role": "user", "content": [image, {"type": "text", "text": "Name a bird."}]}
    record = open_examples([{"messages": [asked, chat_tables.ANSWER]}])[0]
    text = shown(encode, encode(record))["text"]
    assert "Name a bird." in text
    assert "owl.png" not in text
    assert ("<start_of_image>" in text) == (template == "gemma-3")  # its template has a mark for them
    encode(record)
    assert encode.chats.notes() == ["parts of messages that are not text are not read: 2 image_url"]


def test_a_template_for_lists_of_parts_alone() -> None:
    encode = encoder("gemma-3", marks=False)
    tokenizer = encode.tokenizer
    strings = "message['content'] is string"
    tokenizer.chat_template = tokenizer.chat_template.replace(strings, "false")
    lists = Encoder(tokenizer, max_length=4096)
    assert targets(lists, CHATS["turns"]) == targets(encode, CHATS["turns"])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, r"messages\[0\].content is null, expected text"),
        (7, r"messages\[0\].content is a number \(7\), expected text"),
        ([7], r"messages\[0\].content\[0\] is a number \(7\), expected a part"),
        ([{"type": "text", "text": "\ud800"}], r"content\[0\].text contains half a character"),
    ],
)
def test_contents_that_cannot_be_read(content: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        open_examples([{"messages": [{"role": "user", "content": content}, chat_tables.ANSWER]}])


# ---------------------------------------------------------------------------------------- unusual templates

NO_PROMPT = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"


def plain(template: str) -> Encoder:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    return Encoder(tokenizer, max_length=4096)


def test_the_header_of_a_template_without_a_generation_prompt_does_not_count() -> None:
    encode = plain(NO_PROMPT)
    assert targets(encode, CHATS["turns"]) == ["An owl.</s>\n", "A trout, née Forelle.</s>\n"]
    assert targets(encode, CHATS["assistant first"]) == ["An owl.</s>\n", "A trout, née Forelle.</s>\n"]
    assert encode.chats.notes() == []
    # Of a completion after a prompt all counts that the prompt does not have, as in TRL.
    record = open_examples([prompted(CHATS["one turn"])])[0]
    assert targets(encode, record) == ["<|assistant|>\nAn owl.</s>\n"]


def test_a_header_that_is_not_found_is_said() -> None:
    encode = plain(
        NO_PROMPT.replace("{{ m['content'] }}", "{{ m['content'] | upper | replace('\ue000', '') }}")
    )
    assert targets(encode, CHATS["one turn"]) == ["<|assistant|>\nAN OWL.</s>\n"]
    assert encode.chats.notes()[0].startswith("the chat template has no generation prompt, and the header")
    assert encode.chats.notes()[0].endswith("(1 turn)")


def test_a_thought_that_the_generation_prompt_opens() -> None:
    opened = NO_PROMPT + "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
    encode = plain(opened)
    assert targets(encode, CHATS["turns"]) == ["An owl.</s>\n", "A trout, née Forelle.</s>\n"]
    kept = {"messages": [chat_tables.ASK, chat_tables.THOUGHT]}
    assert targets(encode, kept) == ["It flies.\n</think>\n\nAn owl.</s>\n"]


def test_roles_that_a_template_leaves_out() -> None:
    """The end-of-text token, which only the end of a chat has, does not hide where a turn ends."""
    encode = plain(
        "{% for m in messages if m['role'] in ('user', 'assistant') %}"
        "<|{{ m['role'] }}|>\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    messages = [chat_tables.ASK, chat_tables.ANSWER, chat_tables.RESULT, chat_tables.LAST]
    made = targets(encode, {"messages": messages})
    assert made == ["An owl.<|im_end|>\n", "A trout, née Forelle.<|im_end|>\n</s>"]


def test_thoughts_that_become_empty_as_a_chat_goes_on() -> None:
    encode = plain(
        "{% set asked = namespace(last=-1) %}"
        "{% for m in messages if m.role == 'user' %}{% set asked.last = messages.index(m) %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}"
        "<think>{{ m.reasoning_content if loop.index0 > asked.last }}</think>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert targets(encode, CHATS["steps"]) == [
        "<think></think><call>weather</call><|im_end|>\n",
        "<think></think>Sunny.<|im_end|>\n",
        "<think></think>A trout, née Forelle.<|im_end|>\n",
    ]


def test_a_chat_that_the_assistant_begins() -> None:
    encode = encoder("llama-3", marks=False)
    begun = {"messages": [chat_tables.ANSWER]}
    assert targets(encode, begun) == ["An owl.<|eot_id|>"]
    assert encode.prompt_text(begun).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert encode.completion_text(begun) == "An owl."


# ------------------------------------------------------------------------------------------------ the date


@pytest.mark.parametrize(
    ("date", "written"),
    [("2024-02-05", "5 February 24, 00:00 100% %d"), ("2031-12-31T23:05", "31 December 31, 23:05 100% %d")],
)
def test_a_template_writes_the_date_that_is_given(date: str, written: str) -> None:
    template = "  {{ strftime_now('%-d %B %y, %H:%M 100%% %%d') }}{{ '|' }}\n  {% if true %}x{% endif %}"
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    now = ChatTemplate(tokenizer).text(Chat(CHATS["one turn"]["messages"]))
    then = ChatTemplate(tokenizer, date).text(Chat(CHATS["one turn"]["messages"]))
    assert then == f"  {written}|\nx"
    assert now.partition("|")[2] == "\nx"  # the rest is as without a date
    assert now.startswith("  ")


def test_a_date_of_the_record_itself_is_kept() -> None:
    encode = encoder("llama-3", marks=False)
    record = CHATS["one turn"] | {"chat_template_kwargs": {"date_string": "1 May 1999"}}
    assert "Today Date: 1 May 1999" in shown(encode, encode(record))["text"]
    assert "Today Date: 09 Mar 2025" in shown(encode, encode(CHATS["one turn"]))["text"]


def test_what_is_no_date_is_refused() -> None:
    with pytest.raises(UserError, match="'yesterday' is not a date; as in 2026-01-31"):
        encoder("llama-3", marks=False).dated("yesterday")(CHATS["one turn"])
