"""Texts of data and models as markup: none of their characters act, and none are invisible."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape as _html

from rapidin.results.text import CONTROL, INVISIBLE, escape

_UNSAFE = re.compile(f"[{CONTROL}{INVISIBLE}]")
_UNSAFE_IN_BLOCK = re.compile(f"(?![\n\t])[{CONTROL}{INVISIBLE}]")


def plain(text: str) -> str:
    """The text on one line, for an attribute or a label: runs of white space become a space."""
    return _html(_UNSAFE.sub(escape, " ".join(text.split())))


def shortened(text: str, characters: int) -> str:
    """`plain` of the text cut at the end to at most `characters`."""
    text = " ".join(text[: 8 * characters].split())
    return plain(text if len(text) <= characters else text[: characters - 1].rstrip() + "…")


def common_start(a: Sequence[str], b: Sequence[str]) -> int:
    """How many characters, or tokens, two texts have in common at their start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(a), len(b)))


def isolated(markup: str) -> str:
    """Text of data or a model inside of other text, whose direction it must not change."""
    return f"<bdi>{markup}</bdi>"


def block(text: str) -> str:
    """The text with its line breaks, for an element that keeps white space."""
    return _UNSAFE_IN_BLOCK.sub(_shown, _html(text))


def trimmed_block(text: str) -> str:
    """`block` of the text without line breaks at its start and end."""
    return block(text.strip("\r\n"))


def piece(text: str) -> str:
    """A token's text: line breaks also get an element, for which the style sheet draws a sign."""
    return _UNSAFE.sub(_shown, _html(text))


def token(text: str, shade: str, title: str = "") -> str:
    """A token as an element. shade: its class in the style sheet, "" for none."""
    classes = f"{shade} void".strip() if not text else shade
    return (
        "<span"
        + (f' class="{classes}"' if classes else "")
        + (f' title="{title}"' if title else "")
        + f">{piece(text)}</span>"
    )


def marked(text: str, classes: str) -> str:
    """A token that is an element only if it has a class: a page has very many of them."""
    quote = '"' if " " in classes else ""
    return f"<b class={quote}{classes}{quote}>{piece(text)}</b>" if classes else piece(text)


def shared(markup: str) -> str:
    """The text of a template, which the script hides unless it is asked for."""
    return f'<div class="shared">{markup}</div>' if markup else ""


def shown_length(text: str) -> int:
    """How long `piece` of a text is for the script, which counts in units of UTF-16."""
    return len(_UNSAFE_IN_BLOCK.sub(escape, text).encode("utf-16-le")) // 2


def _shown(match: re.Match[str]) -> str:
    if match[0] == "\n":
        return '<i class="nl">\n</i>'
    return "\t" if match[0] == "\t" else f'<i class="esc">{escape(match)}</i>'
