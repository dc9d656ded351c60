"""Parts of a generation that have scores of their own: each token, hot words, or spans of its text.

The query vector of a span is the gradient of its tokens' part of the generation's loss. The generation's
gradient is the sum over its tokens, so the scores of spans are parts of the generation's score: those of all
tokens sum to it. RapidIn (Lin et al., ACL 2024, section 3.3) restricts the loss to a token in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rapidin.errors import UserError, short

HOTWORDS = "hotwords"  # the field of a record that lists them, as in RapidIn's test data

# Of each generation: words of its text, or (start, end) in the characters of its completion.
SpanChoices = Sequence["str | tuple[int, int]"]
Targets = Literal["tokens", "hotwords"] | Sequence[SpanChoices]


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a generation. text: the text of its tokens; positions: the indices of its tokens among the
    tokens of the generation that count."""

    text: str
    positions: tuple[int, ...]


def check_targets(targets: Targets | None, generations: int) -> None:
    """Raises UserError if these are not valid targets for this number of generations."""
    if targets is None or targets in ("tokens", "hotwords"):
        return
    if isinstance(targets, str):
        raise UserError(
            f"unknown targets '{targets}'", "use 'tokens', 'hotwords', or a list for each generation"
        )
    if len(targets) != generations:
        raise UserError(
            f"targets for {len(targets)} generations, but there are {generations}", "give a list for each"
        )


def split_words(value: Any) -> list[str]:
    """Hot words as a list, from "planet|Zorgon" as in RapidIn's test data, or from a list. Raises UserError
    for anything else."""
    words = value.split("|") if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise UserError(
            f"hot words must be text or a list of texts, got {short(value)}",
            'write them as in "planet|Zorgon"',
        )
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))


def find_spans(
    chosen: SpanChoices | None, pieces: Sequence[str], completion: str
) -> tuple[list[Span], list[str]]:
    """The chosen spans of a generation, and the chosen words that it does not contain.

    chosen: None for each token by itself; the span of a word is every occurrence of it as a whole word, in
    upper or lower case. pieces: the texts of the tokens that count. completion: the text that (start, end)
    refer to. Raises UserError for a span without a token.
    """
    if chosen is None:
        return [Span(piece, (position,)) for position, piece in enumerate(pieces)], []
    text = "".join(pieces)
    edges = [0]  # token i is text[edges[i] : edges[i + 1]]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    shift = max(0, text.find(completion))  # the first token may include the prompt's last character
    spans: list[Span] = []
    missing: list[str] = []
    for choice in chosen:
        if isinstance(choice, str):
            ranges = _occurrences(choice, text)
            if not ranges:
                missing.append(choice)
                continue
        else:
            ranges = [(choice[0] + shift, choice[1] + shift)]
        positions = tuple(
            position
            for position in range(len(pieces))
            if any(edges[position] < end and edges[position + 1] > start for start, end in ranges)
        )
        if not positions:
            raise UserError(f"no token of the completion is in the span {short(choice)}")
        spans.append(Span(choice if isinstance(choice, str) else text[slice(*ranges[0])], positions))
    return spans, missing


def _occurrences(word: str, text: str) -> list[tuple[int, int]]:
    """The ranges of a whole word in a text, in upper or lower case."""
    # \b would not find a word that begins or ends with a punctuation mark.
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    return [match.span() for match in pattern.finditer(text)]
