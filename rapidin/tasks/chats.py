"""Answers that are given as texts or as messages of a chat."""

from __future__ import annotations

from typing import Any

from rapidin.data.chats import Chat, ChatTemplate, arguments_of
from rapidin.data.encoding import Encoded, Encoder
from rapidin.data.records import Record


def chat_of(record: Record, answer: Any) -> Chat | None:
    """The chat of a record's prompt (text, messages, or none where the answer holds it) and an answer (text
    or messages), whose completion is the answer, or its last message if there is no prompt; None if both are
    texts."""
    prompt = record.get("prompt")
    if isinstance(answer, str) and not isinstance(prompt, list):
        return None
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    messages = before + after
    # The other answer of a pair has counted what is not read of the prompt.
    noted = len(before) if answer is record.get("rejected") else 0
    return Chat(messages, arguments_of(record), len(before) or max(0, len(messages) - 1) or None, noted)


def encoded(encoder: Encoder, record: Record, answer: Any) -> Encoded:
    """The text of a causal model in which the answer is the completion."""
    chat = chat_of(record, answer)
    if chat is not None:
        return encoder.encode_chat(chat)
    return encoder.encode_pair(record.get("prompt") or "", answer)


def rendered(template: ChatTemplate, record: Record, answer: Any) -> tuple[str, bool]:
    """The text of a prompt with its answer, and whether the tokenizer's special tokens belong around it."""
    chat = chat_of(record, answer)
    if chat is not None:
        text = template.text(chat)
        template.count(chat, text)
        return text, False
    return (record.get("prompt") or "") + answer, True
