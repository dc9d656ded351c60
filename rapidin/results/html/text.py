"""Texts of data and models as markup: nothing in them acts, and nothing in them is out of sight."""

from __future__ import annotations

import re
from html import escape as _quoted

from rapidin.results.text import STEERING, escape

# What has no width of its own, and tag characters, which can spell words that only a model reads. Joiners
# stay: scripts and emoji need them.
_UNSEEN = "\xad\u200b\u2060-\u2064\ufeff\U000e0000-\U000e007f"
_HIDDEN = re.compile(f"(?![\n\t])[{STEERING}{_UNSEEN}]")
_MARKED = re.compile(f"[{STEERING}{_UNSEEN}]")


def plain(text: str) -> str:
    """The text on one line, for an attribute or a label: runs of white space become a space."""
    return _quoted(_MARKED.sub(escape, " ".join(text.split())))


def shortened(text: str, characters: int) -> str:
    """`plain` of the text cut at the end to at most so many characters."""
    text = " ".join(text[: 8 * characters].split())
    return plain(text if len(text) <= characters else text[: characters - 1].rstrip() + "…")


def block(text: str) -> str:
    """The text with its line breaks, for an element that keeps white space."""
    return _HIDDEN.sub(_shown, _quoted(text))


def piece(text: str) -> str:
    """A token's text: line breaks have a sign besides, which the style sheet draws."""
    return _MARKED.sub(_shown, _quoted(text))


def _shown(match: re.Match[str]) -> str:
    if match[0] == "\n":
        return '<i class="nl">\n</i>'
    return "\t" if match[0] == "\t" else f'<i class="esc">{escape(match)}</i>'
