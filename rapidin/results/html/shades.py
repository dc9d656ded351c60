"""In which steps tokens are shaded, and the numbers that the page's script works with, as short texts."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 9  # on each side, as the style sheet has them
_MANY = 1_000_000  # numbers on a page, from which on each has fewer levels


def steps(values: Sequence[float] | NDArray[Any], peak: float | None = None) -> NDArray[np.int64]:
    """The shades of numbers [n]: int64 [n] from -9 (harmful) to 9 (helpful).

    The step grows with the square root, so that what is a hundredth of the largest still shows. peak: the
    largest size, by default that of the numbers themselves. The script does the same (`stepOf`).
    """
    found = np.nan_to_num(np.asarray(values, np.float64))
    size = np.abs(found)
    most = float(size.max(initial=0.0)) if peak is None else peak
    if not most > 0:
        return np.zeros(found.shape, np.int64)
    tall = np.minimum(STEPS, np.floor(STEPS * np.sqrt(size / most) + 0.5))
    return (np.sign(found) * tall).astype(np.int64)


def peak_of(contributions: Sequence[float] | NDArray[Any]) -> float:
    """The largest size of what tokens of an example bring, but for the first of several: every token looks at
    that one (an attention sink), and beside what then gathers there the others would have no shade. The
    script does the same (`peakOf`)."""
    size = np.abs(np.nan_to_num(np.asarray(contributions, np.float64)))
    return float(size[1:].max() if len(size) > 1 and size[1:].any() else size.max(initial=0.0))


def shade(step: int) -> str:
    """The class of a step in the style sheet; none for 0."""
    return f"{'p' if step > 0 else 'n'}{abs(step)}" if step else ""


def floats(values: Sequence[float]) -> str:
    """Numbers as base64 of float32, little end first."""
    bounded = np.clip(np.nan_to_num(np.asarray(values, np.float64)), -3e38, 3e38)
    return base64.b64encode(bounded.astype("<f4").tobytes()).decode()


def levels_for(numbers: int) -> int:
    """How many levels on each side numbers get, where there are so many on the page."""
    return 7 if numbers <= _MANY else 3


def levels(values: NDArray[Any], most: int) -> str:
    """Numbers [targets, tokens] in few levels: base64 of deflated bytes.

    The bytes are a float32 a target, its largest size, and then int8 levels in the shape of the numbers, from
    -most to most: a number is about sign(level) (level / most)^2 of the largest, its root off by at most half
    a level. What adds up to the score is `Hit.targets` and not this, which is for shades alone.
    """
    found = np.nan_to_num(np.asarray(values, np.float64))
    size = np.abs(found)
    peaks = size.max(axis=1, initial=0.0)
    shares = np.divide(size, peaks[:, None], out=np.zeros_like(size), where=peaks[:, None] > 0)
    level = (np.sign(found) * np.floor(most * np.sqrt(shares) + 0.5)).astype(np.int8)
    return base64.b64encode(zlib.compress(peaks.astype("<f4").tobytes() + level.tobytes(), 6)).decode()
