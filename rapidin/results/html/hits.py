"""The lists of hits as markup."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from rapidin.data.encoding import answer_start
from rapidin.data.fields import other_columns
from rapidin.results.html import drawings, shades
from rapidin.results.html.text import block, isolated, marked, plain, shared, shortened, trimmed_block
from rapidin.results.html.view import Entry, View
from rapidin.results.sinks import without_sinks
from rapidin.results.text import (
    UNSURE,
    error_text,
    is_unsure,
    no_row_text,
    rank_texts,
    score_text,
    share_text,
    title_text,
)
from rapidin.results.types import Hit, Tokens

_STRONGEST = 5  # tokens named in words
_LAYERS_NAMED = 3
_MARKED = 4  # the least step that is shaded without a script: about 15% of the largest contribution
_CHIPS = 8  # columns shown
_CHIP_NAME, _CHIP_VALUE, _CHIP_TITLE = 24, 40, 300  # characters


def lists(view: View, histogram: bool) -> str:
    """The most helpful and the most harmful hits. histogram: whether the page has the histogram of all
    scores."""
    tested = view.result.decoys
    if not view.entries and (tested is None or not any(tested.listed)):
        return '<p class="card none">No example in the cache has a sketch, so there are no hits.</p>'
    sizes = [abs(e.hit.score) for e in view.entries if e.side and math.isfinite(e.hit.score)]
    largest = max(sizes, default=0.0)
    items = {1: "", -1: "", 0: ""}
    for n, entry in enumerate(view.entries):
        items[entry.side] += _hit(view, n, entry, largest, histogram)
    sections = tabs = ""
    for side in (1, -1):
        title = title_text(view.result, helpful=side > 0)
        kind = "helpful" if side > 0 else "harmful"
        count = len(view.result.helpful if side > 0 else view.result.harmful)
        tabs += (
            f'<button type="button" class="tab {kind}" role="tab" id="{view.name}-{kind}-tab" '
            f'aria-controls="{view.name}-{kind}-list" data-side="{side}"><span>{title}</span> '
            f"<b>{count:,}</b></button>"
        )
        none = no_row_text(helpful=side > 0, decoys=tested)
        sections += (
            f'<section class="list" id="{view.name}-{kind}-list" aria-labelledby="{view.name}-{kind}">'
            f'<h3 id="{view.name}-{kind}" class="{kind}">{title}</h3>'
            f'<ol class="hits" data-side="{side}">{items[side]}</ol>'
            f'<p class="none" {"hidden" if items[side] else ""}>{none}</p></section>'
        )
    return (
        f'<div class="tabs only-script" role="tablist" aria-label="Hits">{tabs}</div>'
        f'<div class="lists">{sections}</div><ol class="pool" hidden>{items[0]}</ol>'
    )


def _hit(view: View, n: int, entry: Entry, largest: float, histogram: bool) -> str:
    result, hit = view.result, entry.hit
    bounded, name = result.bounded, f"{view.name}.h{n + 1}"
    score = entry.whole if entry.whole is not None else 0.0
    side = "harmful" if score < 0 else "helpful"
    unsure = " unsure" if entry.side and is_unsure(score, hit.error) else ""
    error = ""
    if hit.error is not None and entry.side:
        error = f' <span class="error">± {error_text(hit.error, bounded)}</span>'
    return f"""
<li class="hit" id="{name}" data-hit="{n}"><article aria-labelledby="{name}-title">
<header><h4 id="{name}-title"><span class="sr">Rank </span><span class="rank">{hit.rank}</span>
<span class="score {side}{unsure}">{score_text(score, bounded)}</span>{error}
<span class="kind {side}{unsure}">{UNSURE if unsure else side}</span></h4>
<a class="index" href="#{name}">index <b>{hit.index}</b></a></header>
{drawings.meter(score, largest)}
{_chips(hit)}
{_text(hit, view.templates[n][0], view.peak)}
{_strongest(hit.tokens, bounded, view.sinks)}
{_figures(view, hit, entry.whole, histogram)}
{_notes(hit, entry, bounded)}
</article></li>"""


def _chips(hit: Hit) -> str:
    """The other columns of the example."""
    columns = other_columns(hit.example or {})
    if not columns:
        return ""
    items = ""
    for name, value in [*columns.items()][:_CHIPS]:
        is_long = len(name) > _CHIP_NAME or len(value) > _CHIP_VALUE
        title = f' title="{shortened(f"{name}: {value}", _CHIP_TITLE)}"' if is_long else ""
        items += (
            f"<li{title}>{isolated(shortened(name, _CHIP_NAME))} "
            f"<b>{isolated(shortened(value, _CHIP_VALUE))}</b></li>"
        )
    more = [f"{name}: {value}" for name, value in [*columns.items()][_CHIPS:]]
    if more:
        items += f'<li title="{shortened("; ".join(more), _CHIP_TITLE)}">+{len(more):,} more</li>'
    return f'<ul class="chips" aria-label="Columns">{items}</ul>'


def _text(hit: Hit, template: int, peak: float) -> str:
    """The example: its tokens shaded by their contributions, or its prompt and completion. template: how many
    characters at its start its template has."""
    if hit.tokens is not None:
        return f'<div class="text tokens">{_tokens(hit.tokens, template, peak)}</div>'
    prompt, completion = hit.parts
    if not prompt.strip() and not completion.strip():
        return f'<p class="missing">Line {hit.index:,} of the training data, whose text is not available.</p>'
    start, rest = prompt[:template], prompt[template:]
    ask = trimmed_block(prompt)
    if start:
        hidden = block(start.lstrip("\r\n"))
        ask = shared(f"<span>{hidden}</span>") + block(rest.rstrip("\r\n"))
    parts = (_part("ask", ask) if prompt.strip() else "", _part("answer", trimmed_block(completion)))
    if not completion.strip():
        parts = (_part("answer", ask), "")
    return f'<div class="text record">{"".join(parts)}</div>'


def _tokens(tokens: Tokens, template: int, peak: float) -> str:
    """The tokens in front of the first that counts, and from there. Those with a large contribution have
    their shades here; the script makes elements of all and shades them."""
    first = answer_start(tokens.counts)
    ends = [*accumulate(map(len, tokens.pieces[:first]))]
    hidden = bisect_right(ends, template) if template else 0
    items = []
    steps = shades.steps(tokens.contributions, peak)
    for n, (text, counts, step) in enumerate(zip(tokens.pieces, tokens.counts, steps, strict=True)):
        shade = shades.shade(int(step)) if abs(step) >= _MARKED and n >= hidden else ""
        items.append(marked(text, f"{shade}{'' if counts or n < first else ' q'}".strip()))
    ask = shared("".join(items[:hidden])) + "".join(items[hidden:first])
    return _part("ask", ask) + _part("answer", "".join(items[first:]))


def _part(kind: str, text: str) -> str:
    return f'<div class="{kind}" dir="auto" data-fold>{text}</div>' if text else ""


def _strongest(tokens: Tokens | None, bounded: bool, sinks: frozenset[int]) -> str:
    """The tokens with the largest contributions in words, for readers who cannot see shades; without
    sinks."""
    if tokens is None:
        return ""
    contributions = without_sinks(tokens, sinks)
    order = sorted(range(len(tokens.pieces)), key=lambda n: (-abs(contributions[n]), n))
    items = "".join(
        f"<li><q>{isolated(_named(tokens.pieces[n]))}</q> {score_text(contributions[n], bounded)}</li>"
        for n in order[:_STRONGEST]
        if contributions[n]
    )
    return f'<div class="strongest"><span>Strongest tokens</span><ul>{items}</ul></div>' if items else ""


def _named(text: str) -> str:
    """A token's text for a list (`named` of `page.js` writes the same)."""
    if not text:
        return "(part of a character)"
    if not text.strip():
        return "line break" if "\n" in text else "space"
    return shortened(text, 30)


def _figures(view: View, hit: Hit, whole: float | None, histogram: bool) -> str:
    """The score among all scores, and the layers' parts of it."""
    result, figures = view.result, ""
    if histogram and result.histogram is not None and whole is not None:
        label = f"{score_text(whole, result.bounded)} among all scores"
        figures += _figure(
            drawings.histogram_with(view.name + "-all", result.histogram, [whole], label), "among all scores"
        )
    if hit.layers:
        chart = drawings.layers_chart(hit.layers, _layers_label(hit.layers, result.layers, result.bounded))
        figures += _figure(chart, "by layer, first to last")
    return f'<div class="evidence">{figures}</div>' if figures else ""


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _layers_label(values: Sequence[float], names: Sequence[str], bounded: bool) -> str:
    order = sorted(range(len(values)), key=lambda n: (-abs(values[n]), n))[:_LAYERS_NAMED]
    largest = [
        f"{names[n] if n < len(names) else f'layer {n}'} {score_text(values[n], bounded)}" for n in order
    ]
    return f"Influence by layer, largest in {', '.join(largest)}"


def _notes(hit: Hit, entry: Entry, bounded: bool) -> str:
    notes = []
    if entry.side and hit.ranks is not None and hit.ranks[0] != hit.ranks[1]:
        notes.append(f"Could rank {hit.ranks[0]:,}-{hit.ranks[1]:,}")
    if entry.side and hit.tied:
        notes.append("Tied with the previous hit, within error")
    if entry.side and hit.p is not None:
        notes.append(f"p {share_text(hit.p)}, q {share_text(hit.q)}")
    if hit.estimate is not None:
        notes.append(f"Estimate in the cache {score_text(hit.estimate, bounded)}")
    if hit.fused is not None and entry.side > 0:
        notes.append(
            f"Fused score {hit.fused.score:.4f}: {isolated(plain(', '.join(rank_texts(hit.fused))))}"
        )
    else:
        standings = hit.standings.items()
        notes += [f"{isolated(plain(name))} rank {standing.rank:,}" for name, standing in standings]
    items = "".join(f"<li>{note}</li>" for note in notes)
    return (f'<ul class="notes">{items}</ul>' if items else "") + _copies(hit)


def _copies(hit: Hit) -> str:
    count = len(hit.copies) + hit.copies_more
    if not count:
        return ""
    indices = ", ".join(f"{index}" for index in hit.copies)
    if hit.copies_more:
        indices += f"{' and ' if indices else ''}{hit.copies_more:,} more"
    noun = "copy" if count == 1 else "copies"
    return (
        f'<details class="copies"><summary>and {count:,} {noun}</summary>'
        f"<p>The same text is at index {indices}.</p></details>"
    )
