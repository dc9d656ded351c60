"""Parts of a generation that are asked about by themselves: each token, hot words, or spans of its text.

A target's query vector is the gradient of its own tokens' part of the generation's loss. The generation's
gradient is the sum over its tokens, so scores of targets are parts of the generation's score: those of all
tokens sum to it (RapidIn, Lin et al., ACL 2024, section 3.3, restricts the loss to a token likewise).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rapidin.errors import UserError, short

HOTWORDS = "hotwords"  # the field of a record that names them, as in RapidIn's test data

# Of each generation: words of its text, or (start, end) in the characters of its completion.
Chosen = Sequence["str | tuple[int, int]"]
Targets = Literal["tokens", "hotwords"] | Sequence[Chosen]


@dataclass(frozen=True, slots=True)
class Span:
    """A target. text: what its tokens say; places: of its tokens among those of the generation that count."""

    text: str
    places: tuple[int, ...]


def check(targets: Targets | None, generations: int) -> None:
    """Raise UserError where these are no targets of so many generations."""
    if targets is None or targets in ("tokens", "hotwords"):
        return
    if isinstance(targets, str):
        raise UserError(
            f"unknown targets '{targets}'", "say 'tokens', 'hotwords', or a list for each generation"
        )
    if len(targets) != generations:
        raise UserError(
            f"targets for {len(targets)} generations, but there are {generations}", "give a list for each"
        )


def split_words(value: Any) -> list[str]:
    """Hot words as RapidIn's test data has them, "planet|Zorgon", or a list of them; UserError for others."""
    words = value.split("|") if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise UserError(f"the hot words {short(value)} are no words", 'as in "planet|Zorgon"')
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))


def find(chosen: Chosen | None, pieces: Sequence[str], completion: str) -> tuple[list[Span], list[str]]:
    """The targets in a generation, and the words that it does not say.

    chosen: None for each token by itself; a word's target is all places where it stands as a word, whatever
    its case. pieces: texts of the tokens that count. completion: what (start, end) are places in. Raises
    UserError for a span that holds no token.
    """
    if chosen is None:
        return [Span(piece, (place,)) for place, piece in enumerate(pieces)], []
    text = "".join(pieces)
    edges = [0]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    shift = max(0, text.find(completion))  # the first token may hold the prompt's last character
    spans: list[Span] = []
    missing: list[str] = []
    for each in chosen:
        if isinstance(each, str):
            # \b would find no word that begins or ends with a sign
            wanted = re.compile(rf"(?<!\w){re.escape(each)}(?!\w)", re.IGNORECASE)
            ranges = [match.span() for match in wanted.finditer(text)]
            if not ranges:
                missing.append(each)
                continue
        else:
            ranges = [(each[0] + shift, each[1] + shift)]
        places = tuple(
            place
            for place in range(len(pieces))
            if any(edges[place] < end and edges[place + 1] > start for start, end in ranges)
        )
        if not places:
            raise UserError(f"no token of the completion lies in the span {short(each)}")
        said = each if isinstance(each, str) else text[ranges[0][0] : ranges[0][1]]
        spans.append(Span(said, places))
    return spans, missing
