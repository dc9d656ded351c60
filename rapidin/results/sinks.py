"""Attention sinks: positions of a text that most others attend to, whatever it says.

What the model reads there reaches every later token, so most of each row's contribution may gather at it: at
the first token, and behind a special one at the first word of a template. Such contributions are in the
score, but tell no row from another, so they are left out of lists of the strongest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidin.results.types import Hit, Tokens

_MOST = 0.5  # share of the contributions of all later tokens that a sink has at least, in every row
_LEAST_ROWS = 3  # that show a sink behind the first token


def sinks_of(hits: Sequence[Hit]) -> frozenset[int]:
    """The positions of sinks in the hits of a query: the first, and those after it that gather most in every
    hit."""
    rows = [hit.tokens for hit in hits if hit.tokens is not None]
    sinks = {0}
    shortest = min((len(row.pieces) for row in rows), default=0)
    while len(rows) >= _LEAST_ROWS and len(sinks) < shortest - 1 and _is_sink(rows, len(sinks)):
        sinks.add(len(sinks))
    return frozenset(sinks)


def _is_sink(rows: Sequence[Tokens], position: int) -> bool:
    """Whether the same token at a position gathers most of what it and all later ones contribute, in every
    row."""
    return len({row.pieces[position] for row in rows}) == 1 and all(
        abs(row.contributions[position]) > _MOST * sum(map(abs, row.contributions[position:])) for row in rows
    )


def without_sinks(tokens: Tokens, sinks: frozenset[int]) -> list[float]:
    """The contributions of a row's tokens, 0 at its sinks."""
    return [0.0 if n in sinks else value for n, value in enumerate(tokens.contributions)]
