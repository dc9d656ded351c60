"""Answers that are given as texts or as messages of a chat."""

from __future__ import annotations

from typing import Any

from rapidin.data.encoding import render_chat
from rapidin.data.records import Record


def messages_of(prompt: Any, answer: Any) -> list[Record] | None:
    """The chat of a prompt (text, messages, or None where the answer holds it) and its answer (text or
    messages); None if both are texts."""
    if isinstance(answer, str) and not isinstance(prompt, list):
        return None
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    return before + after


def answered(prompt: Any, answer: Any) -> Record:
    """The record of a causal model in which the answer is the completion."""
    messages = messages_of(prompt, answer)
    if messages is not None:
        return {"messages": messages}
    return {"prompt": prompt or "", "completion": answer}


def rendered(tokenizer: Any, prompt: Any, answer: Any) -> tuple[str, bool]:
    """The text of a prompt with its answer, and whether the tokenizer's special tokens belong around it."""
    messages = messages_of(prompt, answer)
    if messages is not None:
        return render_chat(tokenizer, messages, generation=False), False
    return (prompt or "") + answer, True
