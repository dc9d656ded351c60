"""Small pictures as SVG, drawn by attributes alone: the page's policy forbids styles in markup."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rapidin.results.html.text import plain
from rapidin.results.types import Histogram

_WIDE, _HIGH = 100, 24


def _svg(kind: str, inner: str, label: str, high: int = _HIGH) -> str:
    named = f'role="img" aria-label="{plain(label)}"' if label else 'aria-hidden="true"'
    title = f"<title>{plain(label)}</title>" if label else ""
    return (
        f'<svg class="{kind}" viewBox="0 0 {_WIDE} {high}" preserveAspectRatio="none" {named}>'
        f"{title}{inner}</svg>"
    )


def histogram_symbol(name: str, histogram: Histogram) -> str:
    """The bars of a histogram, drawn once for all that use it; heights are logarithms of counts.

    Empty where all scores are the same.
    """
    edges, counts = histogram.edges, histogram.counts
    if not counts or not _span(histogram) > 0:
        return ""
    most = math.log1p(max(*counts, 1))
    path = ""
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count > 0:
            tall = max(1.0, (_HIGH - 1) * math.log1p(count) / most)
            left, right = place(histogram, low), place(histogram, high)
            path += f"M{left:.4g} {_HIGH}v-{tall:.3g}H{right:.4g}V{_HIGH}z"
    inner = f'<path class="bars" d="{path}"/>'
    if edges[0] < 0 < edges[-1]:
        inner += _line("zero", f"M{place(histogram, 0):.4g} 0V{_HIGH}")
    box = f'viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none"'
    return f'<svg class="defs" aria-hidden="true"><symbol id="{name}" {box}>{inner}</symbol></svg>'


def histogram_with(name: str, histogram: Histogram, marks: Sequence[float], label: str) -> str:
    """A histogram of `histogram_symbol` with scores marked in it."""
    path = "".join(f"M{place(histogram, score):.4g} 0V{_HIGH}" for score in marks)
    inner = f'<use href="#{name}" width="{_WIDE}" height="{_HIGH}"/>{_line("mark", path)}'
    return _svg("histogram", inner, label)


def _line(kind: str, path: str) -> str:
    """A line as thin as the style sheet has it, however the picture is stretched."""
    return f'<path class="{kind}" vector-effect="non-scaling-stroke" d="{path}"/>'


def place(histogram: Histogram, score: float) -> float:
    """Where a score lies between the ends of a histogram, from 0 to 100."""
    share = (score - histogram.edges[0]) / _span(histogram)
    return _WIDE * min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0


def _span(histogram: Histogram) -> float:
    return histogram.edges[-1] - histogram.edges[0] if histogram.edges else 0.0


def layers_chart(layers: Sequence[float], label: str) -> str:
    """A bar for each layer, up for helpful and down for harmful, the largest as tall as there is room."""
    peak = max((abs(value) for value in layers if math.isfinite(value)), default=0.0) or 1.0
    middle, step = _HIGH / 2, _WIDE / len(layers)
    up = down = ""
    for n, value in enumerate(layers):
        tall = (middle - 0.5) * abs(value) / peak
        if tall >= 0.05:
            high = -tall if value > 0 else tall
            bar = f"M{(n + 0.1) * step:.4g} {middle:g}v{high:.3g}h{0.8 * step:.3g}V{middle:g}z"
            up, down = (up + bar, down) if value > 0 else (up, down + bar)
    bars = f'<path class="helpful" d="{up}"/>' * bool(up) + f'<path class="harmful" d="{down}"/>' * bool(down)
    return _svg("layers", bars + _line("zero", f"M0 {middle:g}H{_WIDE}"), label)


def meter(value: float, most: float) -> str:
    """A bar as long as a number is large, beside the largest; its side is its colour."""
    share = abs(value) / most if most > 0 and math.isfinite(value) else 0.0
    side = "harmful" if value < 0 else "helpful"
    return _svg("meter", f'<rect class="{side}" width="{_WIDE * min(1.0, share):.4g}" height="1"/>', "", 1)
