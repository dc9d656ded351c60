"""Histograms and bars as SVG, without style attributes, which the page's security policy forbids."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rapidin.results.html.text import plain
from rapidin.results.types import Histogram

_WIDTH, _HEIGHT = 100, 24
_BAR_STEP, _BAR_HEIGHT = 10, 60  # of a layer: the width with the gap, and the most height to either side


def _svg(kind: str, inner: str, label: str, height: int = _HEIGHT, width: int = _WIDTH) -> str:
    role = 'role="img"' if label else 'aria-hidden="true"'
    title = f"<title>{plain(label)}</title>" if label else ""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" preserveAspectRatio="none" {role}>'
        f"{title}{inner}</svg>"
    )


def histogram_symbol(name: str, histogram: Histogram) -> str:
    """The bars of a histogram, drawn once for all uses. Heights are logarithms of counts.

    Returns "" if all scores are equal.
    """
    edges, counts = histogram.edges, histogram.counts
    if not counts or not _span(histogram) > 0:
        return ""
    most = math.log1p(max(*counts, 1))
    path = ""
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count > 0:
            height = max(1.0, (_HEIGHT - 1) * math.log1p(count) / most)
            left, right = x_of(histogram, low), x_of(histogram, high)
            path += f"M{left:.4g} {_HEIGHT}v-{height:.3g}H{right:.4g}V{_HEIGHT}z"
    inner = f'<path class="bars" d="{path}"/>'
    if edges[0] < 0 < edges[-1]:
        inner += _line("zero", f"M{x_of(histogram, 0):.4g} 0V{_HEIGHT}")
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none"'
    return f'<svg class="defs" aria-hidden="true"><symbol id="{name}" {box}>{inner}</symbol></svg>'


def histogram_with(name: str, histogram: Histogram, marks: Sequence[float], label: str) -> str:
    """The histogram of `histogram_symbol` with some scores marked."""
    path = "".join(f"M{x_of(histogram, score):.4g} 0V{_HEIGHT}" for score in marks)
    inner = f'<use href="#{name}" width="{_WIDTH}" height="{_HEIGHT}"/>{_line("mark", path)}'
    return _svg("histogram", inner, label)


def _line(kind: str, path: str) -> str:
    """A line of the width in the style sheet, however the picture is stretched."""
    return f'<path class="{kind}" d="{path}"/>'


def x_of(histogram: Histogram, score: float) -> float:
    """The horizontal position of a score in a histogram, from 0 to 100."""
    share = (score - histogram.edges[0]) / _span(histogram)
    return _WIDTH * min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0


def _span(histogram: Histogram) -> float:
    return histogram.edges[-1] - histogram.edges[0] if histogram.edges else 0.0


def strip(scores: Sequence[float], mark: float, label: str) -> str:
    """Scores as ticks on a line, with one score marked."""
    ends = [*scores, mark]
    low, high = min(0.0, *ends), max(ends)
    span = (high - low) or 1.0
    at = [_WIDTH * (score - low) / span for score in ends]
    ticks = "".join(f"M{x:.4g} 8V{_HEIGHT}" for x in at[:-1])
    inner = _line("tick", ticks) + _line("mark", f"M{at[-1]:.4g} 0V{_HEIGHT}")
    return _svg("strip", _line("zero", f"M0 {_HEIGHT}H{_WIDTH}") + inner, label)


def layers_chart(layers: Sequence[float], label: str) -> str:
    """A bar for each layer, up for helpful and down for harmful; the largest has the full height."""
    peak = max((abs(value) for value in layers if math.isfinite(value)), default=0.0) or 1.0
    heights = [round(_BAR_HEIGHT * value / peak) if math.isfinite(value) else 0 for value in layers]
    paths = ""
    for side, kind in ((1, "helpful"), (-1, "harmful")):
        # One line along all bars, in steps: a page has this picture for each hit.
        path, gap = "", 0
        for height in heights:
            if height * side <= 0:
                gap += _BAR_STEP
                continue
            path += (f"h{gap}" if gap else "") + f"v{-height}h{_BAR_STEP - 2}v{height}"
            gap = 2
        if path:
            paths += f'<path class="{kind}" d="M1 {_BAR_HEIGHT}{path}z"/>'
    width = _BAR_STEP * max(1, len(layers))
    inner = paths + _line("zero", f"M0 {_BAR_HEIGHT}H{width}")
    return _svg("layers", inner, label, 2 * _BAR_HEIGHT, width)


def meter(value: float, most: float) -> str:
    """A bar of a length proportional to the size of a number, colored by its sign. most: the largest size."""
    share = abs(value) / most if most > 0 and math.isfinite(value) else 0.0
    side = "harmful" if value < 0 else "helpful"
    return _svg("meter", f'<rect class="{side}" width="{_WIDTH * min(1.0, share):.4g}" height="1"/>', "", 1)
