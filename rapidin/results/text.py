"""Texts of data and models on one line and without characters that act on a terminal; and scores, sizes and
times as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from rapidin.results.decoys import DecoyTest
    from rapidin.results.fusion import Fused
    from rapidin.results.types import QueryResult


# --------------------------------------------------------------------------------------- untrusted texts

# Characters that never reach a terminal or page: control characters, lone surrogates, line separators, and
# the marks and overrides that reorder text.
CONTROL = "\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
# Characters without a width, and tag characters, which can spell words that only a model reads: a page shows
# them too. Joiners are not among them, since scripts and emoji need them.
INVISIBLE = "\xad\u200b\u2060-\u2064\ufeff\U000e0000-\U000e007f"

_CONTROL = re.compile(f"[{CONTROL}]")
_BREAKS = str.maketrans("\t\n\r", "   ")


def one_line(text: str) -> str:
    """The text on one line: runs of white space become a space, control characters an escape."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """The text with line breaks and tabs as spaces, and control characters as escapes."""
    return _CONTROL.sub(escape, text.translate(_BREAKS))


def escape(match: re.Match[str]) -> str:
    """The character of a match as the escape that Python writes for it."""
    code = ord(match[0])
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def capital(sentence: str) -> str:
    """A sentence that begins with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def shorten(text: str, cells: int, ellipsis: str = "…") -> str:
    """The text cut at the end to at most `cells` terminal cells."""
    if cell_len(text) <= cells:
        return text
    return set_cell_size(text, max(0, cells - cell_len(ellipsis))).rstrip() + ellipsis


def shorten_middle(text: str, cells: int) -> str:
    """The text without its middle, in at most `cells` terminal cells."""
    if cell_len(text) <= cells:
        return text
    half = max(0, cells - len(" ... ")) // 2
    start, end = set_cell_size(text, half), set_cell_size(text[::-1], half)[::-1]
    return f"{start.rstrip()} ... {end.lstrip()}"


# ---------------------------------------------------------------------------------- what the scores mean

MEANING = (
    "Positive: training on the example made this generation more likely (helpful). "
    "Negative: it made it less likely (harmful)."
)

_SCALES = {
    "weighted": (
        "the mean over the layers of the cosine between the two loss gradients, weighted by the norms of the "
        "generation's gradient, times a factor for the length of the example's gradient (its fourth root, "
        "over the mean of that)"
    ),
    "layer": "the mean over the layers of the cosine between the two loss gradients, from -1 to 1",
    "cosine": "the cosine between the two loss gradients, from -1 to 1",
    "none": (
        "the dot product of the two loss gradients: to first order, how far one training step on the example "
        "lowers the generation's loss, per unit of learning rate"
    ),
}
_METHODS = {
    "datainf": "the inner product, under DataInf's inverse Hessian,",
    "fisher": "the inner product, under the damped inverse of each layer's second moment,",
}
_VECTORS = {
    "weighted": "gradients, the example's divided by its length in each layer",
    "layer": "gradients of length 1 in each layer",
    "cosine": "gradients of length 1",
    "none": "gradients",
}


def scale_text(result: QueryResult) -> str:
    """What the result's scores are, as the end of a sentence."""
    if result.method == "dot":
        return _SCALES[result.normalize]
    vectors = f"of the two loss {_VECTORS[result.normalize]}"
    return f"{_METHODS[result.method]} {vectors}: only the order is meaningful"


FUSED = "Fused ranking"
FUSED_MEANING = (
    "The fused score is the sum of weight / (60 + rank) over the rankings by gradient scores, by BM25 of the "
    "words and by the similarity of hidden states. The score is that of the gradients, and the most harmful "
    "examples are theirs alone."
)


def title_text(result: QueryResult, *, helpful: bool) -> str:
    """The title of the list of helpful or of harmful hits."""
    if not helpful:
        return "Most harmful"
    return "Most helpful" if result.fusion is None else FUSED


def rank_texts(fused: Fused) -> list[str]:
    """A hit's rank in each of the rankings that were fused, with the part of its fused score that this
    adds."""
    return [
        f"{name} without a rank" if rank is None else f"{name} #{rank:,} {percent_text(fused.share(name))}"
        for name, rank in fused.ranks.items()
    ]


def ranks_meaning(depth: int) -> str:
    """What `rank_texts` say; depth: of the rankings."""
    return (
        "BM25 #3 34%: the row is the third of that ranking, which adds 34% of the fused score. A row beyond "
        f"the best {depth:,} of a ranking, or without a word of the query, has no rank there."
    )


def no_row_text(*, helpful: bool, decoys: DecoyTest | None = None) -> str:
    """What is said in the place of a list of helpful or of harmful hits that has none; decoys: what hits had
    to pass."""
    if decoys is not None and decoys.fdr is not None and decoys.listed[not helpful]:
        return f"No row passes a false-discovery rate of {decoys.rate_text}."
    if helpful:
        return "No row is helpful: no score is positive."
    return "No row is harmful: no score is negative."


def overlap_text(name: str, count: int, result: QueryResult) -> str:
    """How many of the top hits a baseline has in its own top."""
    hits = len(result.helpful)
    what = "most helpful hits" if result.fusion is None else "hits of the fused ranking"
    return f"{count:,} of the {hits:,} {what} are also in the top {hits:,} of {name}"


NET = "Net: what of the sum is lost if the group is left out while the others stay"

# --------------------------------------------------------------------------------------------- numbers


def has_shares(total: float, parts: Sequence[float]) -> bool:
    """Whether parts that add up to a total can be told as shares of it: not if they nearly cancel out, since
    shares of a number near zero are huge."""
    return 2 * abs(total) >= math.fsum(map(abs, parts)) > 0


def error_text(error: float | None, bounded: bool) -> str:
    """A standard error, "" for None: four decimals for normalized gradients, otherwise two digits."""
    if error is None:
        return ""
    return f"{error:.4f}" if bounded else _plain(error, 2)


def decoys_note(decoys: DecoyTest) -> str:
    """What p and q are."""
    return (
        f"p: the share of {decoys.decoys:,} texts that were never trained on whose score is as far out, from "
        f"{1 / (decoys.decoys + 1):.2g} up; q: the least false-discovery rate at which the hit passes, of "
        f"{decoys.rows:,} different rows."
    )


def share_text(share: float | None) -> str:
    """A p- or q-value, "" for None."""
    return "" if share is None else f"{share:.2g}"


UNSURE = "within two errors of 0"


def is_unsure(score: float, error: float | None) -> bool:
    """Whether a score is so near to 0 that its sign may be the sketch's."""
    return error is not None and abs(score) < 2 * error


def score_text(score: float, bounded: bool) -> str:
    """A score with its sign: four decimals for normalized gradients, otherwise four digits."""
    return f"{_unsigned_zero(score, 4):+.4f}" if bounded else _plain(score or 0.0, 4, "+")


def percent_text(share: float) -> str:
    """A share as a whole percent; without a minus if it rounds to 0."""
    return f"{_unsigned_zero(share, 2):.0%}"


def _unsigned_zero(value: float, digits: int) -> float:
    """The value, or 0 if it has nothing else in so many digits behind the point."""
    return value if float(f"{value:.{digits}f}") else 0.0


_MOST_POWER, _LEAST_POWER = 12, -6  # of ten, of numbers that are written without an exponent


def _plain(value: float, digits: int, sign: str = "-") -> str:
    """A number with so many digits, without an exponent unless it is huge or tiny (`scoreText` of `page.js`
    does the same)."""
    rounded = f"{value:{sign}.{digits - 1}e}"
    power = int(rounded.partition("e")[2] or 0)
    if not math.isfinite(value) or not _LEAST_POWER <= power <= _MOST_POWER:
        return rounded
    return f"{value:{sign},.{max(0, digits - 1 - power)}f}"


def bytes_text(number: float) -> str:
    """Bytes in the unit that leaves up to three digits before the point."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def time_text(seconds: float) -> str:
    """Seconds as 25 ms, 4.5 s, 45 s, 3:20 min, 2:05 h or 12 days."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    if seconds < 360_000:
        return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"
    return f"{seconds / 86_400:,.0f} days"


_COUNTS = {
    "empty": "empty",
    "no_target": "without a completion token",
    "too_long": "skipped as too long",
    "nonfinite": "with NaN or Inf gradients",
    "malformed": "malformed",
    "too_large": "too large for memory",
}


def counts_text(counts: Mapping[str, int]) -> str:
    """How many examples have a sketch, and why the others have none."""
    parts = [f"{counts.get('ok', 0):,} with a sketch"]
    parts += [f"{counts[key]:,} {words}" for key, words in _COUNTS.items() if counts.get(key)]
    if counts.get("truncated"):
        parts.append(f"{counts['truncated']:,} truncated")
    if counts.get("unlike_sample"):
        parts.append(f"{counts['unlike_sample']:,} unlike the sample that the format was fitted on")
    return ", ".join(parts)
