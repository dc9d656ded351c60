"""A query as the page shows it: which hits it has, what each token selects, and the numbers for the
script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapidin.data.encoding import answer_start
from rapidin.results.html import shades, templates
from rapidin.results.html.text import shown_length
from rapidin.results.sinks import sinks_of
from rapidin.results.text import has_shares
from rapidin.results.types import Hit, QueryResult

_HIT_BYTES, _TOKEN_BYTES = 2600, 18  # approximate size on a page of a hit without its text, and of a token


@dataclass(frozen=True)
class Entry:
    """A hit on the page.

    side: 1 for one of the most helpful, -1 for one of the most harmful, 0 for a hit of a part of the
    generation alone; whole: its score for the whole generation, if known.
    """

    hit: Hit
    side: int
    whole: float | None


@dataclass(frozen=True)
class View:
    """A query as the page shows it.

    number: its index among the queries; room: bytes for the hits of parts of the generation alone. Those that
    do not fit are left out, the best hits of each part last. parted: how many hits of both ends have the
    contributions of their tokens to each part, the best first; the others have those to the whole alone.
    others_asked: how many characters the prompt has in common with those of the page's other queries, at its
    start and at its end.
    """

    result: QueryResult
    number: int
    room: float = math.inf
    parted: int | None = None
    others_asked: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """The prefix of the ids of its elements."""
        return f"q{self.number + 1}"

    @cached_property
    def owners(self) -> list[int]:
        """For each token of the generation the index of the smallest target that contains it, or -1."""
        owners = [-1] * len(self.result.pieces)
        targets = self.result.targets
        for n in sorted(range(len(targets)), key=lambda n: -len(targets[n].positions)):
            for position in targets[n].positions:
                if 0 <= position < len(owners):
                    owners[position] = n
        return owners

    @cached_property
    def others(self) -> list[int]:
        """Targets that no token selects: those larger than the targets of their tokens, or without tokens."""
        return [n for n in range(len(self.result.targets)) if n not in self.owners]

    @property
    def covered(self) -> bool:
        """Whether the targets that tokens select add up to the generation: each token is in exactly one."""
        selected = set(self.owners)
        sizes = sum(len(self.result.targets[n].positions) for n in selected if n >= 0)
        return bool(selected) and -1 not in selected and sizes == len(self.owners)

    @cached_property
    def entries(self) -> list[Entry]:
        """The hits of both ends, then those that are hits of a part of the generation alone."""
        result = self.result
        ends = [(hit, side) for side, hits in ((1, result.helpful), (-1, result.harmful)) for hit in hits]
        of_targets = [hit for target in result.targets for hit in (*target.top, *target.bottom)]
        by_row: dict[int, list[Hit]] = {}
        for hit in (*(hit for hit, _ in ends), *of_targets):
            by_row.setdefault(hit.row, []).append(hit)
        entries = [Entry(_merged(hit, by_row[hit.row]), side, hit.score) for hit, side in ends]
        shown = {hit.row for hit, _ in ends}
        others = {row: hits for row, hits in by_row.items() if row not in shown}
        return entries + self._entries_of_parts(others)

    def _entries_of_parts(self, by_row: dict[int, list[Hit]]) -> list[Entry]:
        """The hits of parts of the generation alone, as many as there is room for: the best of all parts
        first,
        then the second best of all parts, and so on."""
        covered, owners, room = self.covered, sorted(set(self.owners)), self.room
        entries: list[Entry] = []
        for hits in sorted(by_row.values(), key=lambda hits: min(hit.rank for hit in hits)):
            hit = _merged(hits[0], hits)
            if len(hit.targets) != len(self.result.targets):
                continue
            room -= _bytes(hit) + shades.levels_bytes(_by_target(self.result, hit).size)
            if room < 0:
                break
            whole = math.fsum(hit.targets[n] for n in owners) if covered else None
            entries.append(Entry(hit, 0, whole))
        return entries

    @cached_property
    def peak(self) -> float:
        """The contribution that has the last shade: the largest in the hits of the whole generation."""
        rows = [e.hit.tokens.contributions for e in self.entries if e.side and e.hit.tokens is not None]
        return max((shades.peak_of(row, self.sinks) for row in rows), default=0.0)

    @cached_property
    def templates(self) -> list[tuple[int, int]]:
        """For each entry how many characters its prompt has of its template, at its start and at its end."""
        return self._templates[0]

    @cached_property
    def asked(self) -> tuple[int, int]:
        """How many characters the query's prompt has of its template, at its start and at its end."""
        return self._templates[1]

    @cached_property
    def _templates(self) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """`templates` and `asked`. The prompts of hits with tokens have the same templates as the query's;
        those without are as the data has them."""
        found = [(0, 0)] * len(self.entries)
        tokens = [n for n, entry in enumerate(self.entries) if entry.hit.tokens is not None]
        prompts = [prompt_of(entry.hit) for entry in self.entries]
        others = [n for n, entry in enumerate(self.entries) if entry.hit.tokens is None and prompts[n]]
        *ends, asked = templates.cuts([*(prompts[n] for n in tokens), self.result.prompt])
        ends += templates.cuts([prompts[n] for n in others])
        for n, each in zip(tokens + others, ends, strict=True):
            found[n] = each
        return found, self.others_asked if asked == (0, 0) else asked

    @property
    def question(self) -> str:
        """The query's prompt without its template; "" if it has lines of which it is not known."""
        head, tail = self.asked
        prompt = self.result.prompt
        text = prompt[head : len(prompt) - tail].strip()
        return text if head or tail or "\n" not in text else ""

    @property
    def has_templates(self) -> bool:
        """Whether some hit's prompt begins with a template."""
        return any(head for head, _ in self.templates)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Runs of two tokens of the generation or more whose best hit is the same row: first and last token
        and the row's entry. They are as long as they can be, as OLMoTrace's spans are (Liu et al., 2025)."""
        at = {entry.hit.row: n for n, entry in enumerate(self.entries)}
        best = []
        for owner in self.owners:
            hits = self.result.targets[owner].top if owner >= 0 else []
            best.append(at.get(hits[0].row) if hits and hits[0].score > 0 else None)
        runs, start = [], 0
        for n in range(1, len(best) + 1):
            if n == len(best) or best[n] != best[start]:
                entry = best[start]
                if entry is not None and n - start > 1:
                    runs.append((start, n - 1, entry))
                start = n
        return runs

    @property
    def size(self) -> int:
        """The approximate number of bytes of the hits of the whole generation on the page, but for
        `numbers`."""
        return sum(_bytes(hit) for hit in (*self.result.helpful, *self.result.harmful))

    @cached_property
    def selects(self) -> bool:
        """Whether a part of the generation can be selected: some hit has its parts of the score by target."""
        count = len(self.result.targets)
        return count > 0 and any(len(entry.hit.targets) == count for entry in self.entries)

    @property
    def numbers(self) -> int:
        """How many numbers `Tokens.by_target` has in the hits of the whole generation."""
        return sum(self.numbers_of)

    @cached_property
    def numbers_of(self) -> list[int]:
        """How many numbers `Tokens.by_target` has in each hit of the whole generation, the best first."""
        return [_by_target(self.result, hit).size for hit in self._best_first]

    @property
    def _best_first(self) -> list[Hit]:
        """The hits of both ends by their rank."""
        return sorted((*self.result.helpful, *self.result.harmful), key=lambda hit: hit.rank)

    @cached_property
    def sinks(self) -> frozenset[int]:
        """The positions of attention sinks in the hits."""
        return sinks_of([entry.hit for entry in self.entries])

    def script(self, most: int) -> dict[str, Any]:
        """The data that the script reads (see `page.js`). most: levels of `shades.levels`."""
        result = self.result
        kept = self._best_first[: self.parted]
        parted = {hit.row for hit in kept} | {e.hit.row for e in self.entries if not e.side}
        return {
            "bounded": result.bounded,
            "fused": result.fusion is not None,
            "ends": [len(result.top), len(result.bottom)],
            "mean": _mean(result),
            "shares": has_shares(_mean(result) or 0.0, [target.influence for target in result.targets]),
            "owners": self.owners,
            "influence": [_finite(target.influence) for target in result.targets],
            "baselines": list(dict.fromkeys(n for e in self.entries if e.side for n in e.hit.standings)),
            "levels": most,
            "runs": self.runs,
            "sinks": sorted(self.sinks),
            "hits": [
                _entry_data(result, entry, most, entry.hit.row in parted, tail)
                for entry, (_, tail) in zip(self.entries, self.templates, strict=True)
            ],
        }


def prompt_of(hit: Hit) -> str:
    """What is in front of what counts, as the page shows it."""
    if hit.tokens is None:
        return hit.parts[0]
    return "".join(hit.tokens.pieces[: answer_start(hit.tokens.counts)])


def _merged(hit: Hit, same: Sequence[Hit]) -> Hit:
    """The hit with the fields that it lacks and other hits of the same row have."""
    return replace(
        hit,
        example=hit.example or next((h.example for h in same if h.example), None),
        decoded=hit.decoded or next((h.decoded for h in same if h.decoded), None),
        targets=hit.targets or next((h.targets for h in same if h.targets), ()),
        tokens=hit.tokens or next((h.tokens for h in same if h.tokens), None),
        copies=hit.copies or next((h.copies for h in same if h.copies), ()),
    )


def _bytes(hit: Hit) -> int:
    """The approximate size of a hit on the page, but for `Tokens.by_target`."""
    texts: Sequence[str] = hit.parts
    if hit.tokens is not None:
        texts = hit.tokens.pieces
    text = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if hit.tokens is not None:
        text += _TOKEN_BYTES * len(hit.tokens.pieces)
    return _HIT_BYTES + 6 * len(hit.targets) + 12 * len(hit.layers) + text


def _by_target(result: QueryResult, hit: Hit) -> NDArray[np.float32]:
    """`Tokens.by_target` of a hit; empty if it has none of the right shape."""
    none = np.zeros((0, 0), np.float32)
    if hit.tokens is None or hit.tokens.by_target is None:
        return none
    fits = hit.tokens.by_target.shape == (len(result.targets), len(hit.tokens.pieces))
    return hit.tokens.by_target if fits else none


def _entry_data(result: QueryResult, entry: Entry, most: int, parted: bool, tail: int) -> dict[str, Any]:
    hit = entry.hit
    value: dict[str, Any] = {"row": hit.row, "index": hit.index, "side": entry.side}
    if entry.whole is not None:
        value["score"] = _finite(entry.whole)
    if entry.side:
        value["rank"] = hit.rank
    if hit.error is not None and entry.side:
        value["error"] = _finite(hit.error)
    if hit.ranks is not None and entry.side:
        value |= {"ranks": list(hit.ranks), "tied": hit.tied}
    if hit.p is not None and entry.side:
        value |= {"p": hit.p, "q": hit.q}
    if hit.estimate is not None:
        value["estimate"] = _finite(hit.estimate)
    if hit.copies or hit.copies_more:
        value |= {"copies": list(hit.copies), "more": hit.copies_more}
    if hit.standings:
        value["standings"] = {name: [_finite(s.score), s.rank] for name, s in hit.standings.items()}
    if hit.targets and len(hit.targets) == len(result.targets):
        value["targets"] = shades.floats(hit.targets)
    if tail:
        text = prompt_of(hit)[-tail:]
        value["tail"] = shown_length(text if hit.tokens is not None else text.rstrip("\r\n"))
    if hit.tokens is not None:
        value["tokens"] = shades.floats(hit.tokens.contributions)
        value["lengths"] = list(map(shown_length, hit.tokens.pieces))
        by_target = _by_target(result, hit)
        if parted and by_target.size:
            value["byTarget"] = shades.levels(by_target, most)
    return value


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(result: QueryResult) -> float | None:
    """The mean score of the most helpful hits, of which the influence of each target is a part."""
    scores = [hit.score for hit in result.helpful if math.isfinite(hit.score)]
    return math.fsum(scores) / len(scores) if scores else None
