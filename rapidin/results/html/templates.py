"""Which part of a prompt is what its template says, found from what prompts have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from rapidin.results.html.text import common_start

_LINES, _WORDS = 16, 40  # characters of a template at least: of whole lines, and of the start of one line
_PART = 3  # one of so many prompts has a template, at least

_TAIL = re.compile(r"\s*(?:\n|<\||</|\[/)")  # where the text behind a question may begin


def cuts(texts: Sequence[str]) -> list[tuple[int, int]]:
    """How many characters each prompt has of its template, at its start and at its end; 0 where there is
    none.

    There may be several templates, such as one for tasks with an input and one for those without. The prompts
    of one have their first line in common, and a template ends with a line: the words that several questions
    begin with are no part of it.
    """
    heads = _heads(texts)
    rests = [text[head:] for text, head in zip(texts, heads, strict=True)]
    distinct = {rest for rest, head in zip(rests, heads, strict=True) if head}
    tail = ""
    if len(distinct) > 1:
        backwards = [rest[::-1] for rest in distinct]
        tail = min(backwards)[: common_start(min(backwards), max(backwards))][::-1]
        found = _TAIL.search(tail)
        tail = tail[found.start() :] if found else ""
    is_asked = all(rest[: len(rest) - len(tail)].strip() for rest in distinct)
    return [(head, len(tail) if head and is_asked else 0) for head in heads]


def _heads(texts: Sequence[str]) -> list[int]:
    """How many characters of each text its template has at its start."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        return [0] * len(texts)
    by_line: dict[str, list[str]] = {}
    for text in distinct:
        by_line.setdefault(_first_line(text), []).append(text)
    heads: dict[str, int] = dict.fromkeys(distinct, 0)
    for group in by_line.values():
        if len(group) > 1 and _PART * len(group) >= len(distinct):
            start = min(group)[: common_start(min(group), max(group))]
            end = min(start.rfind("\n") + 1, *(len(text.rstrip()) for text in group))
            heads.update(dict.fromkeys(group, end if end >= _LINES else 0))
    known = {text[:head] for text, head in heads.items() if head}
    if not known:
        length = common_start(min(distinct), max(distinct))
        heads = dict.fromkeys(distinct, length if length >= _WORDS else 0)
    for text, head in heads.items():
        if not head:
            heads[text] = max((_alike(text, one) for one in known), default=0)
    return [heads[text] for text in texts]


def _first_line(text: str) -> str:
    """The first line of a text that says something, with the white space in front."""
    found = re.match(r"\s*[^\n]*(?:\n|$)", text)
    return found[0] if found else ""


def _alike(text: str, known: str) -> int:
    """How much of a text is a template that begins as a known one does, and whose last line is the same."""
    line = known.rstrip().rpartition("\n")[2] + "\n"
    at = text.find(line)
    return at + len(line) if at >= 0 and common_start(text, known) >= _WORDS else 0


def shared_ends(texts: Sequence[str]) -> list[tuple[int, int]]:
    """How many characters each text has at its start and at its end as others do: whole words that all have,
    and whole lines that another has."""
    if len(set(texts)) < 2:
        return [(0, 0)] * len(texts)
    heads = _shared_heads(texts)
    tails = _shared_heads([text[head:][::-1] for text, head in zip(texts, heads, strict=True)])
    return list(zip(heads, tails, strict=True))


def _shared_heads(texts: Sequence[str]) -> list[int]:
    """How much of each text to leave out at its start: the words that all begin with, and the lines that
    another begins with too, since there may be several templates."""
    common = _shared_length(texts)
    distinct = sorted(set(texts))
    heads = dict.fromkeys(distinct, common)
    for pair in pairwise(distinct):  # a text has its longest common start with one beside it
        length = common_start(*pair)
        for text in pair:
            lines = text[: min(length, len(text.rstrip()))].rfind("\n") + 1
            heads[text] = max(heads[text], lines)
    return [heads[text] for text in texts]


def _shared_length(texts: Sequence[str]) -> int:
    """The length of the common prefix of all texts, up to its last white space."""
    first, last = min(texts), max(texts)  # their common prefix is that of all texts
    start = first[: common_start(first, last)]
    return max((n for n, character in enumerate(start, 1) if character.isspace()), default=0)
