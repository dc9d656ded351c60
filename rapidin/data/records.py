"""The forms of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def record_parts(record: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the completion of a record, without the forms they are put in for the model."""
    if record.get("prompt") is not None and record.get("completion") is not None:
        return str(record["prompt"]), str(record["completion"])
    if record.get("instruction") is not None and record.get("output") is not None:
        return f"{record['instruction']} {record.get('input') or ''}", str(record["output"])
    messages = record.get("messages")
    if messages:
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        last = answers[-1] if answers else len(messages)
        asked = messages[last - 1]["content"] if last else ""
        return str(asked), str(messages[last]["content"]) if answers else ""
    return str(record.get("text", "")), ""
