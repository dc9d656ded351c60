"""Chat templates in the style of well-known models, chats that they write, and what trainers train on.

    python tests/support/chat_tables.py          # the table of docs/guide/chats.md
    python tests/support/chat_tables.py --trl    # chat_templates/trained.json, by SFTTrainer of TRL 1.16

Each template marks the assistant's own text by `{% generation %}`. `unmarked` takes the marks away, so that
the two ways of finding that text can be compared.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

HERE = Path(__file__).parent / "chat_templates"
TRAINED = HERE / "trained.json"
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "chats.md"
DATE = "2025-03-09"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.jinja"))}

Record = dict[str, Any]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
SYSTEM = {"role": "system", "content": "Be kind."}
ASK, ANSWER = {"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "An owl."}
MORE, LAST = (
    {"role": "user", "content": "And a fish?"},
    {"role": "assistant", "content": "A trout, née Forelle."},
)
THOUGHT = {"role": "assistant", "content": "<think>\nIt flies.\n</think>\n\nAn owl."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "content": "sunny"}

# What a template reads: one turn, several, with a system message, with tools, with thoughts, begun by the
# assistant, as lists of parts, with arguments of its own.
CHATS: dict[str, Record] = {
    "one turn": {"messages": [ASK, ANSWER]},
    "turns": {"messages": [ASK, ANSWER, MORE, LAST]},
    "unanswered": {"messages": [ASK, ANSWER, MORE]},
    "system": {"messages": [SYSTEM, ASK, ANSWER, MORE, LAST]},
    "tools": {
        "messages": [ASK, ANSWER, MORE, CALLED, RESULT, LAST],
        "tools": [WEATHER],
    },
    "thoughts": {"messages": [ASK, THOUGHT, MORE, THOUGHT]},
    "steps": {
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [CALL]},
            RESULT,
            {"role": "assistant", "content": "Sunny.", "reasoning_content": "It says so."},
            MORE,
            LAST,
        ],
        "tools": [WEATHER],
    },
    "channels": {
        "messages": [ASK, {**ANSWER, "thinking": "It flies."}, MORE, {**LAST, "thinking": "It swims."}]
    },
    "thinking off": {"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
    "documents": {"messages": [ASK, ANSWER], "documents": [{"title": "Birds", "text": "The owl hoots."}]},
    "assistant first": {"messages": [ANSWER, ASK, LAST]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Name a bird."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "An owl."}]},
        ]
    },
}
_TOOLS = {"llama-3", "mistral-v3", "qwen-2.5", "qwen-3", "harmony"}
_THOUGHTS = {"qwen-3", "deepseek-r1"}
_NO_SYSTEM = {"gemma", "mistral-v1", "mistral-v3"}
_STRICT = {"llama-2"}  # a chat must begin with the user


def cases() -> Iterator[tuple[str, str]]:
    """Each template with each chat that it writes."""
    for template in TEMPLATES:
        for chat in CHATS:
            only = {
                "tools": _TOOLS,
                "thoughts": _THOUGHTS,
                "steps": {"qwen-3"},
                "channels": {"harmony"},
                "thinking off": {"qwen-3", "smollm-3"},
                "documents": {"command-r"},
                "parts": {"gemma-3"},
                "system": set(TEMPLATES) - _NO_SYSTEM,
                "assistant first": set(TEMPLATES) - _STRICT,
            }.get(chat, set(TEMPLATES))
            if template in only:
                yield template, chat


def unmarked(template: str) -> str:
    """The template without its marks. A comment in their place keeps the spaces as they are."""
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)


def prompted(record: Record) -> Record | None:
    """A chat as a conversational prompt and its completion (TRL); None if it has no answer at the end."""
    *before, last = record["messages"]
    if last["role"] != "assistant" or not before:
        return None
    rest = {name: value for name, value in record.items() if name != "messages"}
    return {"prompt": before, "completion": [last], **rest}


def tokenizer_of(template: str, *, marks: bool = True) -> Any:
    """The tiny tokenizer with a template, and one token for each mark of a turn in it."""
    tokenizer = tiny_tokenizer()
    text = TEMPLATES[template]
    special = {
        *re.findall(r"<[|｜][^|｜<>]+[|｜]>", text),
        *re.findall(r"\[/?[A-Z_]+\]", text),
        *re.findall(r"</?[a-z]+_[a-z_]+>", text),
        *re.findall(r"</?think>", text),
        *(f"<|{role}|>" for role in ("user", "assistant", "system") if "'<|' + message" in text),
    }
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    tokenizer.chat_template = text if marks else unmarked(text)
    return tokenizer


def counted(tokenizer: Any, ids: list[int], counts: list[bool]) -> list[str]:
    """The texts of the runs of tokens that count."""
    runs: list[list[int]] = []
    for n, token in enumerate(ids):
        if counts[n]:
            if n and counts[n - 1]:
                runs[-1].append(token)
            else:
                runs.append([token])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


# ----------------------------------------------------------------------------------- what TRL trains on


def trained() -> dict[str, dict[str, Any]]:
    """The ids and labels that SFTTrainer makes of each chat: of its marks, and as prompt and completion."""
    import datetime as dates
    import tempfile

    import transformers.utils.chat_template_utils as rendering
    from datasets import Dataset
    from tiny import tiny_llama
    from trl import SFTConfig, SFTTrainer

    class Fixed(dates.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromisoformat(DATE)

    rendering.datetime = Fixed
    made: dict[str, dict[str, Any]] = {}
    for template, chat in cases():
        record = CHATS[chat]
        for kind, marks, row in (("marks", True, record), ("prompt", False, prompted(record))):
            if row is None or "documents" in record:  # TRL passes no documents
                continue
            tokenizer = tokenizer_of(template, marks=marks)
            model = tiny_llama(vocab_size=len(tokenizer))
            row = {n: json.dumps(v) if n == "tools" else v for n, v in row.items()}
            with tempfile.TemporaryDirectory() as folder:
                config = SFTConfig(
                    output_dir=folder,
                    use_cpu=True,
                    report_to=[],
                    max_length=None,
                    assistant_only_loss=marks,
                    bf16=False,
                )
                data = Dataset.from_list([row])
                try:
                    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
                except Exception as error:
                    print(template, chat, kind, repr(error)[:200])
                    continue
                example = trainer.train_dataset[0]
            labels = example.get("labels") or example["input_ids"]
            counts = [label != -100 for label in labels]
            made[f"{template}: {chat}, {kind}"] = {
                "text": tokenizer.decode(example["input_ids"], clean_up_tokenization_spaces=False),
                "counted": counted(tokenizer, example["input_ids"], counts),
            }
    return made


# ------------------------------------------------------------------------------------------- the table


# In the style of which models a template is, and what is unusual in it.
STYLES = {
    "chatml": ("ChatML (SmolLM2, Yi, many fine-tunes)", ""),
    "command-r": ("Command R, Aya", "`documents` stand before the chat."),
    "deepseek-r1": (
        "DeepSeek-R1 and its distilled models",
        "The generation prompt opens a thought; thoughts of answers are left out.",
    ),
    "gemma": ("Gemma, Gemma 2", "No system message; contents are trimmed."),
    "gemma-3": ("Gemma 3 and other models with images", "Contents may be lists of parts."),
    "harmony": ("GPT-OSS (Harmony)", "Writes the date; the last answer ends in another token; channels."),
    "llama-2": ("Llama 2", "No generation prompt; the system message is inside the first turn."),
    "llama-3": ("Llama 3.1 to 3.3", "Writes the date; `tools`."),
    "mistral-v1": ("Mistral 7B v0.1, Mixtral", "No generation prompt."),
    "mistral-v3": ("Mistral v3 and later", "`tools` stand before the last question, so they move."),
    "phi-3": ("Phi-3, Phi-3.5", "The chat, but no turn, ends in the end-of-text token."),
    "qwen-2.5": ("Qwen2.5, QwQ", "`tools`; a default system message."),
    "qwen-3": (
        "Qwen3",
        "`enable_thinking`; earlier thoughts are left out; an empty thought before the last answer.",
    ),
    "smollm-3": ("SmolLM3", "Has `{% generation %}` marks, which begin before the header; writes the date."),
    "vicuna": ("Vicuna", "No generation prompt, but a header of the assistant."),
    "zephyr": ("Zephyr, StableLM", ""),
}


def rows() -> list[tuple[str, str, str, str, str]]:
    """The rows of the table: template, models, what is unusual, chats, and the target text of an answer."""
    from rapidin.data.encoding import Encoder

    made = []
    for template, (models, unusual) in STYLES.items():
        tokenizer = tokenizer_of(template, marks=template == "smollm-3")
        encoded = Encoder(tokenizer, max_length=4096, date=DATE)(CHATS["one turn"])
        (target,) = counted(tokenizer, encoded.ids, encoded.target)
        shown = target.replace("\n", "\u23ce").replace("|", "\\|")
        chats = ", ".join(chat for name, chat in cases() if name == template)
        made.append((template, models, unusual, chats, f"`{shown}`"))
    return made


def table() -> str:
    """The table of docs/guide/chats.md."""
    import doc_tables

    header = ("template", "in the style of", "unusual", "chats compared", "target tokens of one answer")
    return doc_tables.table(header, rows())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl", action="store_true")
    if parser.parse_args().trl:
        TRAINED.write_text(json.dumps(trained(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    sys.path.append(str(PAGE.parents[2] / "studies" / "common"))
    import doc_tables

    doc_tables.write(PAGE, "templates", table())


if __name__ == "__main__":
    main()
