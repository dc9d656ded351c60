"""Examples as the model reads them: their tokens, and which of them have a loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from rapidin.results.html.text import block, isolated, plain
from rapidin.results.text import CONTROL, escape

_UNSAFE = re.compile(f"(?![\n\t])[{CONTROL}]")
_OPEN, _CLOSE = "[[", "]]"  # around tokens that have a loss, where there are no colours
_TARGET = "bold green"
_MARK = '<mark style="background:#bde5c8">'


@dataclass(frozen=True)
class ShownText:
    """A text that the model reads: its name if an example has several, and its tokens.

    ids, pieces, target: of each token its id, its text, and whether it has a loss.
    """

    name: str
    ids: Sequence[int]
    pieces: Sequence[str]
    target: Sequence[bool]

    def runs(self) -> Iterator[tuple[str, bool]]:
        """The text in runs of tokens that have a loss, or have none."""
        if not self.ids:
            yield "".join(self.pieces), False
        start = 0
        for end in range(1, len(self.ids) + 1):
            if end == len(self.ids) or self.target[end] != self.target[start]:
                yield "".join(self.pieces[start:end]), self.target[start]
                start = end


@dataclass(frozen=True)
class ShownExample:
    """One example as the model reads it.

    row, where: its number, and its location in the data; status: "ok", or why it has no gradient; truncated:
    whether its end was cut off; label: the label that it is to be given, "" for none.
    """

    row: int
    where: str
    texts: Sequence[ShownText]
    status: str = "ok"
    truncated: bool = False
    label: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(text.ids) for text in self.texts)

    @property
    def targets(self) -> int:
        """Number of tokens that have a loss."""
        return sum(sum(text.target) for text in self.texts)

    def to_json(self) -> dict[str, Any]:
        """The example as JSON values."""
        texts = [
            {
                "name": text.name,
                "text": "".join(text.pieces),
                "ids": list(text.ids),
                "pieces": list(text.pieces),
                "loss": [bool(each) for each in text.target],
            }
            for text in self.texts
        ]
        return {
            "row": self.row,
            "where": self.where,
            "status": self.status,
            "truncated": self.truncated,
            "tokens": self.tokens,
            "targets": self.targets,
            "label": self.label,
            "texts": texts,
        }

    @property
    def facts(self) -> str:
        """The numbers of tokens, and what else is to be known, on one line."""
        facts = [f"{self.tokens:,} token{'s' * (self.tokens != 1)}"]
        facts += [f"{self.targets:,} with a loss"] if not self.label or self.targets else []
        facts += ["truncated"] if self.truncated else []
        facts += [f"label: {_safe(self.label)}"] if self.label else []
        facts += [f"not used: {self.status.replace('_', ' ')}"] if self.status != "ok" else []
        return ", ".join(facts)


class Reading(list[ShownExample]):
    """Examples as the model reads them. As text, [[ and ]] are around tokens that have a loss; a notebook
    colours them.

    notes: what is to be known of how they were read, a line each.
    """

    def __init__(self, examples: Sequence[ShownExample] = (), notes: Sequence[str] = ()) -> None:
        super().__init__(examples)
        self.notes = list(notes)

    def report(self) -> RenderableType:
        """The examples for a terminal with colours."""
        blocks: list[RenderableType] = []
        for example in self:
            if blocks:
                blocks.append(Text(""))
            blocks.append(Text(f"{_safe(example.where)}: {example.facts}", style="bold"))
            for text in example.texts:
                if text.name:
                    blocks.append(Text(f"{text.name}:", style="dim"))
                blocks.append(_coloured(text))
        return Group(*blocks)

    def to_json(self) -> str:
        """The examples as a JSON list."""
        return json.dumps([example.to_json() for example in self], ensure_ascii=False, indent=1)

    def __repr__(self) -> str:
        lines = []
        for example in self:
            lines += ["", f"{_safe(example.where)}: {example.facts}"]
            for text in example.texts:
                lines += [f"{text.name}:"] if text.name else []
                lines.append(_bracketed(text))
        return "\n".join(lines[1:])

    def _repr_html_(self) -> str:
        return "".join(_html(example) for example in self)


def _safe(text: str) -> str:
    """The text with its line breaks and tabs, and other control characters as escapes."""
    return _UNSAFE.sub(escape, text)


def _bracketed(text: ShownText) -> str:
    return "".join(f"{_OPEN}{_safe(run)}{_CLOSE}" if target else _safe(run) for run, target in text.runs())


def _coloured(text: ShownText) -> Text:
    """A line break that has a loss is shown by a mark, since a colour does not show it."""
    made = Text()
    for run, target in text.runs():
        made.append(_safe(run).replace("\n", "↵\n") if target else _safe(run), _TARGET if target else "dim")
    return made


def _html(example: ShownExample) -> str:
    parts = [f"<p><b>{isolated(plain(example.where))}</b>: {plain(example.facts)}</p>"]
    for text in example.texts:
        runs = "".join(f"{_MARK}{block(run)}</mark>" if target else block(run) for run, target in text.runs())
        name = f"<small>{isolated(plain(text.name))}</small>" if text.name else ""
        parts.append(f'{name}<pre style="white-space:pre-wrap">{runs}</pre>')
    return "".join(parts)
