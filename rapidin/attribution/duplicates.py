"""Duplicates: hits that say the same become one hit with a count.

Exact ones are records with the same hash, counted over the whole cache. Near ones are sought among the hits
found: texts without case, spaces and punctuation, whose sets of three neighbouring words have a Jaccard
similarity (Broder, 1997) of at least `NEAR`. What is near to a near one is folded too; the first hit leads.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rapidin.cache import Cache
from rapidin.data.records import record_parts
from rapidin.results.types import Hit

NEAR = 0.8
SHINGLE = 3  # words
MOST_NAMED = 100  # copies of a hit whose line numbers are kept

# Chinese, Japanese and Korean writing puts no spaces between words: each character is one.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def wanted_for(top_k: int) -> int:
    """Candidates to ask a scan for, so that as a rule `top_k` are left when they are folded."""
    return 4 * top_k + 32


Shingles = frozenset[tuple[str, ...]]


def shingles(text: str) -> Shingles:
    """Runs of `SHINGLE` words in a text, or all of its words where it has fewer; where it has none, the text
    itself without spaces."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if not words:
        return frozenset({("".join(text.split()),)})
    n = min(SHINGLE, len(words))
    return frozenset(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def exact_copies(cache: Cache, rows: Sequence[int]) -> dict[int, list[int]]:
    """Of each of these rows the line numbers of all other rows that hold the same record and count.

    From one pass over the hashes of the cache.
    """
    if not rows:
        return {}
    hashes = cache.records(list(rows))
    every: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for first, part in cache.shards():
        same = torch.isin(part.record, hashes) & (part.status == 0)
        for place in same.nonzero()[:, 0].tolist():
            every[int(part.record[place])].append((first + place, int(part.index[place])))
    return {
        row: [index for other, index in every[number] if other != row]
        for row, number in zip(rows, hashes.tolist(), strict=True)
    }


def shingles_of(hits: Sequence[Hit]) -> dict[int, Shingles]:
    """By row, the shingles of hits whose example is at hand."""
    return {hit.row: shingles(" ".join(record_parts(hit.example))) for hit in hits if hit.example is not None}


def fold(
    hits: Sequence[Hit],
    exact: Mapping[int, Sequence[int]],
    said: Mapping[int, Shingles] | None = None,
) -> list[Hit]:
    """Hits of one end, best first, without those that say the same as one before them; ranks are given anew.

    exact: by row, the line numbers of other rows with the same record, as `exact_copies` gives them. said:
    `shingles_of` these hits, and of any others. A hit that has folded others names their line numbers, and
    those of the exact copies of all of them, in `copies`. Hits without their example are folded by `exact`
    alone. A helpful and a harmful hit are never one.
    """
    leader = list(range(len(hits)))

    def lead(n: int) -> int:
        while leader[n] != n:
            leader[n] = leader[leader[n]]
            n = leader[n]
        return n

    for a, b in _pairs(hits, exact, shingles_of(hits) if said is None else said):
        first, second = sorted((lead(a), lead(b)))
        leader[second] = first
    folded: dict[int, set[int]] = defaultdict(set)
    for n, hit in enumerate(hits):
        folded[lead(n)] |= {hit.index, *exact.get(hit.row, ())}
    found: list[Hit] = []
    for n, hit in enumerate(hits):
        if lead(n) != n:
            continue
        others = sorted(folded[n] - {hit.index})
        more = max(0, len(others) - MOST_NAMED)
        found.append(replace(hit, rank=len(found) + 1, copies=tuple(others[:MOST_NAMED]), copies_more=more))
    return found


def _pairs(
    hits: Sequence[Hit], exact: Mapping[int, Sequence[int]], said: Mapping[int, Shingles]
) -> list[tuple[int, int]]:
    """Places of hits of one side that say the same."""
    found: list[tuple[int, int]] = []
    by_index = {hit.index: n for n, hit in enumerate(hits)}
    side = [(hit.score > 0) - (hit.score < 0) for hit in hits]
    for n, hit in enumerate(hits):
        others = (by_index[index] for index in exact.get(hit.row, ()) if index in by_index)
        found += [(n, other) for other in others if side[n] == side[other]]
    sets = [said.get(hit.row) for hit in hits]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # of a shingle, among the hits before
    for n, mine in enumerate(sets):
        if mine is None:
            continue
        common = Counter(other for shingle in mine for other in holders[shingle])
        for other, count in common.items():
            theirs = sets[other]
            assert theirs is not None
            if side[n] == side[other] and count >= NEAR * (len(mine) + len(theirs) - count):
                found.append((other, n))
        for shingle in mine:
            holders[shingle].append(n)
    return found
