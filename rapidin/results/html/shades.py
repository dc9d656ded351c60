"""The shades of tokens, and numbers for the page's script as short texts."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 9  # shades of either sign, as in the style sheet
_LEVEL_BYTES = {7: 0.7, 3: 0.54, 2: 0.43}  # of a number, by how many levels of either sign it has


def steps(values: Sequence[float] | NDArray[Any], peak: float | None = None) -> NDArray[np.int64]:
    """The shades of numbers [n]: int64 [n] from -9 (harmful) to 9 (helpful).

    The step is proportional to the square root, so that a hundredth of the largest is still visible. peak:
    the size that has the last step, by default that of the largest number. The script does the same
    (`stepOf`).
    """
    finite = np.nan_to_num(np.asarray(values, np.float64))
    size = np.abs(finite)
    most = float(size.max(initial=0.0)) if peak is None else peak
    if not most > 0:
        return np.zeros(finite.shape, np.int64)
    step = np.minimum(STEPS, np.floor(STEPS * np.sqrt(size / most) + 0.5))
    return (np.sign(finite) * step).astype(np.int64)


def peak_of(contributions: Sequence[float] | NDArray[Any], sinks: frozenset[int] = frozenset({0})) -> float:
    """The largest size of the contributions of an example's tokens, except those of attention sinks if there
    are others: beside them the others would have no shade. The script does the same (`peakOf`)."""
    size = np.abs(np.nan_to_num(np.asarray(contributions, np.float64)))
    others = size[[n not in sinks for n in range(len(size))]]
    return float(others.max() if others.any() else size.max(initial=0.0))


def shade(step: int) -> str:
    """The class of a step in the style sheet; "" for 0."""
    return f"{'p' if step > 0 else 'n'}{abs(step)}" if step else ""


def floats(values: Sequence[float]) -> str:
    """Numbers as base64 of float32, little-endian."""
    bounded = np.clip(np.nan_to_num(np.asarray(values, np.float64)), -3e38, 3e38)
    return base64.b64encode(bounded.astype("<f4").tobytes()).decode()


def levels_for(numbers: int, room: float) -> int:
    """How many levels of either sign numbers get: as many as fit into `room` bytes, at least the fewest."""
    return next((most for most in _LEVEL_BYTES if levels_bytes(numbers, most) <= room), min(_LEVEL_BYTES))


def levels_bytes(numbers: int, most: int = 7) -> int:
    """About how large `levels` of so many numbers are, at the most levels if `most` is not given."""
    return int(numbers * _LEVEL_BYTES[most])


def levels(values: NDArray[Any], most: int) -> str:
    """Numbers [targets, tokens] quantized to a few levels: base64 of deflated bytes.

    The bytes are one float32 per target, its largest size, and then int8 levels in the shape of the numbers,
    from -most to most: a number is about sign(level) (level / most)^2 of the largest, and its square root is
    off by at most half a level. It is for shades alone; what sums to the score is `Hit.targets`.
    """
    finite = np.nan_to_num(np.asarray(values, np.float64))
    size = np.abs(finite)
    peaks = size.max(axis=1, initial=0.0)
    shares = np.divide(size, peaks[:, None], out=np.zeros_like(size), where=peaks[:, None] > 0)
    level = (np.sign(finite) * np.floor(most * np.sqrt(shares) + 0.5)).astype(np.int8)
    return base64.b64encode(zlib.compress(peaks.astype("<f4").tobytes() + level.tobytes(), 6)).decode()
