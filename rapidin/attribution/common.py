"""What the hits of a query have in common more often than the training data: phrases, and values of
columns."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rapidin.attribution.duplicates import UNSPACED
from rapidin.attribution.null_scores import counted_rows, drawn_rows
from rapidin.cache import Cache
from rapidin.data.fields import other_columns
from rapidin.data.records import Record, record_parts
from rapidin.results.verdict import Common

SAMPLED = 256  # training examples whose texts the hits are compared with
MOST_NAMED = 2  # phrases of prompts, of completions, and columns, that are named
_LEAST_HITS = 3  # that have it in common
_LEAST_SHARE = 0.5  # of the hits
_LEAST_TIMES = 4  # as large a share of the hits have a phrase as of the sample: "the" is in many
_WORD_COUNTS = (
    0.75  # of a hit, where a single word is compared with a phrase: "purple" with "Only the purple"
)
_SURE = 0.01  # that as many examples would have it if they were drawn, over all phrases that are looked at
_MOST_WORDS = 6  # of a phrase
_MOST_CHARACTERS = 2000  # of a text that are looked at
_LONGEST_VALUE = 60  # characters of a column's value

_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_EDGES = re.compile(r"^\W+|\W+$")


def sampled_rows(cache: Cache) -> list[int]:
    """Rows of a cache that count, drawn by its seed."""
    return drawn_rows(cache, counted_rows(cache), SAMPLED)


class TrainingSample:
    """The texts and columns of a sample of the training data, with which hits are compared."""

    def __init__(self, records: Iterable[Record]) -> None:
        records = list(records)
        self._texts = [_texts(record) for record in records]
        self._values = Counter(pair for record in records for pair in _values(record))

    def common(self, hits: Sequence[Mapping[str, Any]]) -> tuple[Common, ...]:
        """What most of these examples have in common and few of the sample have, most common first."""
        if len(hits) < _LEAST_HITS or not self._texts:
            return ()
        least = max(_LEAST_HITS, math.ceil(_LEAST_SHARE * len(hits)))
        texts = [_texts(record) for record in hits]
        phrases = [
            each for part in (0, 1) for each in self._phrases([pair[part] for pair in texts], part, least)
        ]
        return (*phrases, *self._columns(hits, least))

    def _phrases(self, texts: Sequence[str], part: int, least: int) -> list[Common]:
        """The phrases that prompts (part 0) or completions (part 1) have in common."""
        counts = Counter(phrase for text in texts for phrase in _phrases(text))
        frequent = [phrase for phrase, count in counts.items() if count >= least]
        found = []
        for phrase in frequent:
            hits = sum(phrase in text for text in texts)
            known = sum(phrase in pair[part] for pair in self._texts)
            is_frequent = hits * len(self._texts) < _LEAST_TIMES * known * len(texts)
            if not is_frequent and self._stands_out(hits, len(texts), known, len(frequent)):
                found.append(Common(phrase, hits, len(texts), known / len(self._texts)))
        found.sort(key=lambda each: (-_counted(each), each.share, -len(each.text), each.text))
        named: list[Common] = []
        for each in found:
            if len(named) < MOST_NAMED and not any(_overlap(each.text, other.text) for other in named):
                named.append(each)
        return named

    def _columns(self, hits: Sequence[Mapping[str, Any]], least: int) -> list[Common]:
        counts = Counter(pair for record in hits for pair in _values(record))
        frequent = [pair for pair, count in counts.items() if count >= least]
        found = [
            Common(value, counts[name, value], len(hits), self._values[name, value] / len(self._texts), name)
            for name, value in frequent
            if self._stands_out(counts[name, value], len(hits), self._values[name, value], len(frequent))
        ]
        return sorted(found, key=lambda each: (-each.hits, each.share, each.column))[:MOST_NAMED]

    def _stands_out(self, hits: int, of: int, known: int, candidates: int) -> bool:
        """Whether `hits` of `of` are more than the `known` of the sample suggest, given how many phrases were
        looked at."""
        share = (known + 1) / (len(self._texts) + 2)  # as if one more example had it, and one had not
        chance = math.fsum(math.comb(of, n) * share**n * (1 - share) ** (of - n) for n in range(hits, of + 1))
        return chance * candidates <= _SURE


def _texts(record: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the completion of an example on a line each, in which phrases are looked for."""
    prompt, completion = (" ".join(part[:_MOST_CHARACTERS].split()) for part in record_parts(record))
    return prompt, completion


def _phrases(text: str) -> set[str]:
    """All runs of up to so many words of a text, and its words without the signs around them."""
    words = [match.span() for match in _WORD.finditer(text)]
    phrases = {_EDGES.sub("", text[start:end]) for start, end in words}
    for first, (start, _) in enumerate(words):
        phrases |= {text[start:end] for _, end in words[first : first + _MOST_WORDS]}
    return {phrase for phrase in phrases if any(character.isalnum() for character in phrase)}


def _counted(found: Common) -> float:
    """How many hits have it, for the order: a phrase comes before a word that hardly more hits have."""
    return found.hits * (1.0 if len(_WORD.findall(found.text)) > 1 else _WORD_COUNTS)


def _overlap(text: str, other: str) -> bool:
    """Whether two phrases are parts of each other, or end and begin with the same words."""
    if text in other or other in text:
        return True
    words, of_other = _WORD.findall(text), _WORD.findall(other)
    return bool({*words} & {*of_other})


def _values(record: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The columns of an example that are not its text, its label too, with their values as text."""
    columns = other_columns(record)
    if record.get("label") is not None:
        columns["label"] = str(record["label"])
    return {(name, text) for name, text in columns.items() if len(text) <= _LONGEST_VALUE}
