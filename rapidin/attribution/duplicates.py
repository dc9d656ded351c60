"""Duplicates: hits with the same text become one hit with a count.

Exact duplicates are records with the same hash, counted over the whole cache. Near duplicates are searched
for among the hits: texts, without case, spaces and punctuation, whose sets of three neighbouring words have a
Jaccard similarity (Broder, 1997) of at least `NEAR`. Of chats both the last turns and the whole texts have to
be near: neither a long beginning that many share nor an equal end makes two of them one. What is near to a
near duplicate is folded too; the first hit stays.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rapidin.cache import Cache
from rapidin.data.records import record_parts, whole_text
from rapidin.results.types import Hit

NEAR = 0.8
SHINGLE = 3  # words
MOST_NAMED = 100  # copies of a hit whose line numbers are returned

# Chinese, Japanese and Korean have no spaces between words, so each character counts as a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

_LOW_BITS = 0xFFFF  # of a record's hash


def candidates_for(top_k: int) -> int:
    """The number of candidates of which usually at least `top_k` are left without duplicates."""
    return 4 * top_k + 32


Shingles = frozenset[tuple[str, ...]]
Texts = tuple[Shingles, Shingles]  # of an example's last turns, and of its whole text


def shingles(text: str) -> Shingles:
    """The runs of `SHINGLE` words in a text, or all of its words if it has fewer; the text without spaces if
    it has no words."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if not words:
        return frozenset({("".join(text.split()),)})
    n = min(SHINGLE, len(words))
    return frozenset(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def exact_copies(cache: Cache, rows: Sequence[int]) -> dict[int, list[int]]:
    """For each of these rows the line numbers of all other rows that count and hold the same record.

    Takes one pass over the hashes of the cache.
    """
    if not rows:
        return {}
    hashes = cache.records(list(rows))
    # Few hashes have the low bits of one of these, and only those are compared.
    known = torch.zeros(_LOW_BITS + 1, dtype=torch.bool, device="cpu")
    known[hashes & _LOW_BITS] = True
    by_hash: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for first, shard in cache.shards():
        near = known[shard.record & _LOW_BITS].nonzero()[:, 0]
        same = near[torch.isin(shard.record[near], hashes) & (shard.status[near] == 0)]
        for n in same.tolist():
            by_hash[int(shard.record[n])].append((first + n, int(shard.index[n])))
    return {
        row: [index for other, index in by_hash[record_hash] if other != row]
        for row, record_hash in zip(rows, hashes.tolist(), strict=True)
    }


def shingles_of(hits: Sequence[Hit]) -> dict[int, Texts]:
    """The shingles of hits whose example is known, by row."""
    return {hit.row: _texts_of(hit.example) for hit in hits if hit.example is not None}


def _texts_of(record: Mapping[str, Any]) -> Texts:
    last, whole = " ".join(record_parts(record)), whole_text(record)
    of_last = shingles(last)
    return of_last, of_last if whole == last else shingles(whole)


def fold(
    hits: Sequence[Hit],
    exact: Mapping[int, Sequence[int]],
    shingles_by_row: Mapping[int, Texts] | None = None,
) -> list[Hit]:
    """The hits of one end, best first, without duplicates of hits before them; with new ranks.

    exact: by row, the line numbers of other rows with the same record, from `exact_copies`. shingles_by_row:
    `shingles_of` at least these hits. A hit into which others are folded has in `copies` their line numbers,
    and those of the exact copies of all of them. Hits without their example are folded by `exact` only. A
    helpful and a harmful hit are never folded into one.
    """
    leader = list(range(len(hits)))

    def lead(n: int) -> int:
        while leader[n] != n:
            leader[n] = leader[leader[n]]
            n = leader[n]
        return n

    for a, b in _pairs(hits, exact, shingles_of(hits) if shingles_by_row is None else shingles_by_row):
        first, second = sorted((lead(a), lead(b)))
        leader[second] = first
    indices: dict[int, set[int]] = defaultdict(set)
    for n, hit in enumerate(hits):
        indices[lead(n)] |= {hit.index, *exact.get(hit.row, ())}
    folded: list[Hit] = []
    for n, hit in enumerate(hits):
        if lead(n) != n:
            continue
        others = sorted(indices[n] - {hit.index})
        more = max(0, len(others) - MOST_NAMED)
        folded.append(replace(hit, rank=len(folded) + 1, copies=tuple(others[:MOST_NAMED]), copies_more=more))
    return folded


def _pairs(
    hits: Sequence[Hit], exact: Mapping[int, Sequence[int]], shingles_by_row: Mapping[int, Texts]
) -> list[tuple[int, int]]:
    """The pairs of duplicates with the same sign, as positions in `hits`."""
    pairs: list[tuple[int, int]] = []
    by_index = {hit.index: n for n, hit in enumerate(hits)}
    signs = [(hit.score > 0) - (hit.score < 0) for hit in hits]
    for n, hit in enumerate(hits):
        others = (by_index[index] for index in exact.get(hit.row, ()) if index in by_index)
        pairs += [(n, other) for other in others if signs[n] == signs[other]]
    sets = [shingles_by_row.get(hit.row) for hit in hits]
    earlier_with: dict[tuple[str, ...], list[int]] = defaultdict(list)  # hits before n, by shingle
    for n, texts in enumerate(sets):
        if texts is None:
            continue
        shingles_of_hit, whole = texts
        common = Counter(other for shingle in shingles_of_hit for other in earlier_with[shingle])
        for other, count in common.items():
            of_other = sets[other]
            assert of_other is not None
            last, whole_of_other = of_other
            similar = _near(count, shingles_of_hit, last) and _near(
                len(whole & whole_of_other), whole, whole_of_other
            )
            if signs[n] == signs[other] and similar:
                pairs.append((other, n))
        for shingle in shingles_of_hit:
            earlier_with[shingle].append(n)
    return pairs


def _near(common: int, one: Shingles, other: Shingles) -> bool:
    """Whether two sets with so many common shingles are near."""
    return common >= NEAR * (len(one) + len(other) - common)
