"""Texts that nobody vouches for, on one line and without characters that act on a terminal; scores and sizes
as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from rapidin.results.types import QueryResult


MEANING = (
    "Positive: training on the example made this generation more likely (helpful). "
    "Negative: it made it less likely (harmful)."
)


SCALES = {
    "layer": "the mean over the layers of the cosine between the two loss gradients, from -1 to 1",
    "cosine": "the cosine between the two loss gradients, from -1 to 1",
    "none": (
        "the dot product of the two loss gradients: to first order, how far one training step on the example "
        "lowers the generation's loss, per unit of learning rate"
    ),
}


METHODS = {
    "datainf": "the inner product, under DataInf's inverse Hessian,",
    "fisher": "the inner product, under the damped inverse of each layer's second moment,",
}


# Control characters, half characters, line separators, and the marks and overrides that reorder text.
STEERING = "\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"


_STEERING = re.compile(f"[{STEERING}]")


def one_line(text: str) -> str:
    """The text on one line: runs of white space become a space, what could steer a terminal an escape."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """The text with line breaks and tabs as spaces, and an escape for what could steer a terminal."""
    return _STEERING.sub(escape, text.translate(_BREAKS))


_BREAKS = str.maketrans("\t\n\r", "   ")


def escape(match: re.Match[str]) -> str:
    """A character that must not act, as the escape by which Python writes it."""
    code = ord(match[0])
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shorten(text: str, cells: int, ellipsis: str = "…") -> str:
    """The text cut at the end to at most so many terminal cells."""
    if cell_len(text) <= cells:
        return text
    return set_cell_size(text, max(0, cells - cell_len(ellipsis))).rstrip() + ellipsis


def shorten_middle(text: str, cells: int) -> str:
    """The text with its middle left out, in at most so many terminal cells."""
    if cell_len(text) <= cells:
        return text
    half = max(0, cells - len(" ... ")) // 2
    head, tail = set_cell_size(text, half), set_cell_size(text[::-1], half)[::-1]
    return f"{head.rstrip()} ... {tail.lstrip()}"


def scale_text(result: QueryResult) -> str:
    """What its scores are, as the end of a sentence."""
    if result.method == "dot":
        return SCALES[result.normalize]
    vectors = {
        "layer": "gradients of length 1 in each layer",
        "cosine": "gradients of length 1",
        "none": "gradients",
    }
    of = f"of the two loss {vectors[result.normalize]}"
    return f"{METHODS[result.method]} {of}: only the order means something"


def error_text(error: float | None, bounded: bool) -> str:
    """A standard error, "" for none: four decimals where the scale is -1 to 1, else two digits."""
    if error is None:
        return ""
    return f"{error:.4f}" if bounded else f"{error:.1e}"


def score_text(score: float, bounded: bool) -> str:
    """A score with its sign: four decimals where the scale is -1 to 1, else four digits."""
    return f"{score:+.4f}" if bounded else f"{score:+.3e}"


def bytes_text(number: float) -> str:
    """Bytes in the unit that leaves up to three digits before the point."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def time_text(seconds: float) -> str:
    """Seconds as a person says them: 25 ms, 4.5 s, 45 s, 3:20 min, 2:05 h."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"
