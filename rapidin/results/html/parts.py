"""A query as markup: the generation, its hits, what groups bring; and the numbers that the script needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rapidin.data.records import record_parts
from rapidin.results.html import drawings, shades
from rapidin.results.html.text import block, piece, plain, shortened
from rapidin.results.text import MEANING, error_text, scale_text, score_text
from rapidin.results.types import Group, Hit, QueryResult, TargetResult, Tokens

_STRONGEST = 5  # tokens named in words
_LAYERS_NAMED = 3
_BREAKS = "\r\n"
_HIT_BYTES, _TOKEN_BYTES = 1600, 32  # about what a page takes for a hit besides its text, and for a token


@dataclass(frozen=True)
class Entry:
    """A hit on the page. side: 1 among the most helpful, -1 among the most harmful, 0 only for parts of the
    generation; same: the place of an earlier entry of the same row; whole: its score for all of it, if known.
    """

    hit: Hit
    side: int
    same: int | None
    whole: float | None


@dataclass(frozen=True)
class View:
    """A query as the page shows it.

    number: its place among the queries; room: bytes for hits that are hits of a part of the generation alone,
    of which those are left out that have no room, the best of each part last.
    """

    result: QueryResult
    number: int
    room: float = math.inf

    @property
    def name(self) -> str:
        """The start of its elements' ids."""
        return f"q{self.number + 1}"

    @cached_property
    def owners(self) -> list[int]:
        """For each token of the generation the smallest target that it is in, or -1."""
        found = [-1] * len(self.result.pieces)
        targets = self.result.targets
        for n in sorted(range(len(targets)), key=lambda n: -len(targets[n].positions)):
            for place in targets[n].positions:
                if 0 <= place < len(found):
                    found[place] = n
        return found

    @cached_property
    def others(self) -> list[int]:
        """Targets that no token selects: those larger than the targets of their tokens, or without tokens."""
        return [n for n in range(len(self.result.targets)) if n not in self.owners]

    @property
    def covered(self) -> bool:
        """Whether what tokens select adds up to the whole generation: each is in one target, none in two."""
        chosen = set(self.owners)
        sizes = sum(len(self.result.targets[n].positions) for n in chosen if n >= 0)
        return bool(chosen) and -1 not in chosen and sizes == len(self.owners)

    @cached_property
    def entries(self) -> list[Entry]:
        """The hits of both ends, then those that are hits of a part of the generation alone."""
        result = self.result
        known: dict[int, list[Hit]] = {}
        ends = [(hit, side) for side, hits in ((1, result.top), (-1, result.bottom)) for hit in hits]
        parts = [hit for target in result.targets for hit in (*target.top, *target.bottom)]
        for hit in (*(hit for hit, _ in ends), *parts):
            known.setdefault(hit.row, []).append(hit)
        found: list[Entry] = []
        first: dict[int, int] = {}
        for hit, side in ends:
            found.append(Entry(_richest(hit, known[hit.row]), side, first.get(hit.row), hit.score))
            first.setdefault(hit.row, len(found) - 1)
        covered, owners, room = self.covered, sorted(set(self.owners)), self.room
        # The best of all parts first, then the second best of all.
        best = {row: min(hit.rank for hit in hits) for row, hits in known.items()}
        for row in sorted(known, key=lambda row: best[row]):
            hits = known[row]
            hit = _richest(hits[0], hits)
            if row not in first and len(hit.targets) == len(result.targets):
                room -= _bytes(result, hit)
                if room < 0:
                    break
                whole = math.fsum(hit.targets[n] for n in owners) if covered else None
                found.append(Entry(hit, 0, None, whole))
        return found

    @property
    def size(self) -> int:
        """About how many bytes the hits of the whole generation take on the page."""
        return sum(_bytes(self.result, hit) for hit in (*self.result.top, *self.result.bottom))

    @cached_property
    def selects(self) -> bool:
        """Whether a part of the generation can be selected: the parts that hits have in targets are known."""
        count = len(self.result.targets)
        return count > 0 and any(len(entry.hit.targets) == count for entry in self.entries)

    @property
    def numbers(self) -> int:
        """How many numbers `Tokens.by_target` has in all hits of the whole generation, each row once."""
        hits = {hit.row: hit for hit in (*self.result.top, *self.result.bottom)}
        return sum(_by_target(self.result, hit).size for hit in hits.values())

    def script(self, most: int) -> dict[str, Any]:
        """What the script reads: see `page.js`. most: levels of `shades.levels`."""
        result = self.result
        return {
            "bounded": result.bounded,
            "ends": [len(result.top), len(result.bottom)],
            "mean": _mean(result),
            "owners": self.owners,
            "influence": [_finite(target.influence) for target in result.targets],
            "baselines": list(_baselines(result)),
            "levels": most,
            "hits": [_entry_data(result, entry, most) for entry in self.entries],
        }


def _bytes(result: QueryResult, hit: Hit) -> int:
    """About what a page takes for a hit."""
    text = sum(map(len, record_parts(hit.example or {})))
    if hit.tokens is not None:
        text = _TOKEN_BYTES * len(hit.tokens.pieces) + _by_target(result, hit).size
    return _HIT_BYTES + 6 * len(hit.targets) + 12 * len(hit.layers) + text


def _richest(hit: Hit, same: Sequence[Hit]) -> Hit:
    """The hit with what others of the same row know besides."""
    return replace(
        hit,
        example=hit.example or next((h.example for h in same if h.example), None),
        targets=hit.targets or next((h.targets for h in same if h.targets), ()),
        tokens=hit.tokens or next((h.tokens for h in same if h.tokens), None),
        copies=hit.copies or next((h.copies for h in same if h.copies), ()),
    )


def _by_target(result: QueryResult, hit: Hit) -> Any:
    import numpy as np

    none = np.zeros((0, 0), np.float32)
    if hit.tokens is None or hit.tokens.by_target is None:
        return none
    fits = hit.tokens.by_target.shape == (len(result.targets), len(hit.tokens.pieces))
    return hit.tokens.by_target if fits else none


def _entry_data(result: QueryResult, entry: Entry, most: int) -> dict[str, Any]:
    hit = entry.hit
    value: dict[str, Any] = {"row": hit.row, "index": hit.index, "side": entry.side}
    if entry.whole is not None:
        value["score"] = _finite(entry.whole)
    if entry.side:
        value["rank"] = hit.rank
    if hit.error is not None and entry.side:
        value["error"] = _finite(hit.error)
    if hit.ranks is not None and entry.side:
        value |= {"ranks": list(hit.ranks), "tied": hit.tied}
    if hit.estimate is not None:
        value["estimate"] = _finite(hit.estimate)
    if hit.copies or hit.copies_more:
        value |= {"copies": list(hit.copies), "more": hit.copies_more}
    if hit.standings:
        value["standings"] = {name: [_finite(s.score), s.rank] for name, s in hit.standings.items()}
    if entry.same is not None:
        return value | {"same": entry.same}
    if hit.targets and len(hit.targets) == len(result.targets):
        value["targets"] = shades.floats(hit.targets)
    if hit.tokens is not None:
        value["tokens"] = shades.floats(hit.tokens.contributions)
        by_target = _by_target(result, hit)
        if by_target.size:
            value["byTarget"] = shades.levels(by_target, most)
    return value


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(result: QueryResult) -> float | None:
    """The mean score of the most helpful hits, of which a target's influence is a part."""
    scores = [hit.score for hit in result.top if math.isfinite(hit.score)]
    return math.fsum(scores) / len(scores) if scores else None


def _baselines(result: QueryResult) -> dict[str, None]:
    """The names of baselines that any hit has a standing in, in order."""
    return {name: None for hit in (*result.top, *result.bottom) for name in hit.standings}


# ---------------------------------------------------------------------------------------------- a query


def query(view: View, several: int) -> str:
    """All of a query, as a section."""
    result, name = view.result, view.name
    title = "The generation" if several == 1 else f"Generation {view.number + 1} of {several}"
    if result.together:
        title = "The target set"
    symbol = "" if result.histogram is None else drawings.histogram_symbol(name + "-all", result.histogram)
    return f"""
<section class="query" id="{name}" data-query="{view.number}" aria-labelledby="{name}-title">
{symbol}
<div class="side">
<div class="card generation">
<h2 id="{name}-title" tabindex="-1">{title}</h2>
{_generation(view)}
</div>
{_all_scores(view, bool(symbol))}
{_meaning(view)}
</div>
<div class="main">
{_bar(view)}
{_overlaps(result)}
{_groups(view)}
{_lists(view, bool(symbol))}
</div>
</section>"""


def _generation(view: View) -> str:
    result = view.result
    if result.together:
        return f'<p class="lead">{result.together:,} generations; scores are the mean of theirs.</p>'
    parts = []
    if result.prompt:
        text = block(result.prompt.strip(_BREAKS))
        parts.append(
            f'<h3 class="label">Prompt</h3><div class="prompt text" dir="auto" data-fold>{text}</div>'
        )
    written = "written by the model just now" if result.generated else "as given"
    parts.append(f'<h3 class="label">Completion <small>{written}</small></h3>')
    if result.targets:
        parts.append(
            '<p class="legend" aria-hidden="true"><span>harmful</span>'
            + "".join(f'<i class="{shades.shade(n)}"></i>' for n in (-9, -6, -3, 0, 3, 6, 9))
            + "<span>helpful</span></p>"
        )
    if view.selects and result.pieces:
        parts.append(
            '<p class="hint only-script">Select a token, or drag over several, to rank the examples for them.'
            "</p>"
        )
    if not result.pieces:
        parts.append(f'<div class="completion text" dir="auto">{block(result.completion)}</div>')
    else:
        parts.append(f'<div class="completion text" dir="auto">{_pieces(view)}</div>')
    if view.others:
        kind = "button" if view.selects else "span"
        buttons = "".join(
            f'<li><{kind} class="part" data-part="{n}">{_part_name(result.targets[n])} '
            f"<small>{score_text(result.targets[n].influence, result.bounded)}</small></{kind}></li>"
            for n in view.others
        )
        parts.append(
            f'<h3 class="label">Parts asked about</h3><ul class="parts" aria-label="Parts">{buttons}</ul>'
        )
    return "\n".join(parts)


def _part_name(target: TargetResult) -> str:
    return f"“{shortened(target.text, 40)}”" if target.text.strip() else "a part without text"


def _pieces(view: View) -> str:
    result, owners = view.result, view.owners
    values = [result.targets[n].influence if n >= 0 else 0.0 for n in owners]
    marks = shades.steps(values)
    return "".join(
        _token(text, shades.shade(int(step)), "" if n < 0 else score_text(value, result.bounded))
        for text, step, n, value in zip(result.pieces, marks, owners, values, strict=True)
    )


def _token(text: str, shade: str, title: str = "") -> str:
    classes = f"{shade} void".strip() if not text else shade
    return (
        "<span"
        + (f' class="{classes}"' if classes else "")
        + (f' title="{title}"' if title else "")
        + f">{piece(text)}</span>"
    )


def _all_scores(view: View, drawn: bool) -> str:
    result = view.result
    histogram = result.histogram
    if histogram is None or not drawn:
        return ""
    bounded = result.bounded
    shown = [e.hit.score for e in view.entries if e.side]
    count = result.examples or sum(histogram.counts)
    label = f"Histogram of {count:,} scores, from {score_text(histogram.edges[0], bounded)} to "
    label += f"{score_text(histogram.edges[-1], bounded)}, with the hits marked"
    return (
        f'<figure class="card all"><figcaption>All {count:,} scores <small>counts on a log scale; '
        f"lines: the hits shown</small></figcaption>"
        + drawings.histogram_with(view.name + "-all", histogram, shown, label)
        + f'<p class="axis"><span>{score_text(histogram.edges[0], bounded)}</span>'
        f"<span>{score_text(histogram.edges[-1], bounded)}</span></p></figure>"
    )


def _meaning(view: View) -> str:
    result = view.result
    lines = [MEANING, f"The score is {scale_text(result)}."]
    if result.exact:
        lines.append("Scores are of exact gradients; the estimate is the score in the cache of sketches.")
    if any(e.hit.error is not None for e in view.entries):
        lines.append("± is one standard error of the score.")
    if any(e.hit.tokens is not None for e in view.entries):
        lines.append(
            "Shades in an example say what its tokens bring to the score, from the strongest down, by the "
            "square root of their size. The first token is left out of that measure: every other looks at "
            "it, so much gathers there in all examples. Tokens in quieter ink were read, but not learnt to "
            "predict."
        )
    if view.selects:
        pool = len({e.hit.row for e in view.entries})
        lines.append(
            f"A selection ranks {pool:,} examples anew: those of the whole cache that are best or worst for "
            "the generation, and for its parts as far as this page has room. Their scores are then the parts "
            "that the selection has in them; its share is the one in the mean score of the most helpful. "
            "What a token brings to it is kept in a few steps only, to keep the page small: ≈ stands before "
            "such a number."
        )
    texts = "".join(f"<p>{plain(line)}</p>" for line in lines)
    keys = ""
    if view.selects and result.pieces:
        keys = (
            '<p class="only-script">Keys: <kbd>←</kbd> <kbd>→</kbd> between tokens, <kbd>Enter</kbd> to '
            "select, <kbd>Shift</kbd> with arrows or a click for a range, <kbd>Esc</kbd> to clear, "
            "<kbd>/</kbd> to search.</p>"
        )
    return f'<details class="card meaning"><summary>How to read this</summary>{texts}{keys}</details>'


def _bar(view: View) -> str:
    name = view.name
    status = (
        f'<div class="selection"><p class="status" id="{name}-status" role="status">Ranked for the whole '
        'generation</p><button type="button" class="clear" hidden>Clear <kbd>Esc</kbd></button></div>'
    )
    return (
        f'<div class="bar only-script">{status if view.selects else ""}'
        f'<label class="search"><span class="sr">Search in the examples</span>'
        '<input type="search" placeholder="Search text or index" autocomplete="off" spellcheck="false">'
        '</label><p class="found" role="status"></p>'
        '<button type="button" class="csv" title="The examples below as a table. Text that begins like a '
        'formula gets an apostrophe in front, so that no spreadsheet runs it.">Export CSV</button></div>'
    )


def _overlaps(result: QueryResult) -> str:
    if not result.overlaps:
        return ""
    k = len(result.top)
    lines = "".join(
        f"<li>{count:,} of the {k:,} most helpful are also in the top {k:,} of <b>{plain(name)}</b></li>"
        for name, count in result.overlaps.items()
    )
    return f'<ul class="overlaps">{lines}</ul>'


def _groups(view: View) -> str:
    result = view.result
    if not result.groups:
        return ""
    column = plain(result.by or "group")
    rows = "".join(_group(group, result.bounded) for group in result.groups)
    return f"""<section class="card groups" aria-labelledby="{view.name}-groups">
<h3 id="{view.name}-groups">By {column}</h3>
<div class="scrolled" tabindex="0" role="region" aria-label="What each {column} brings"><table>
<thead><tr><th scope="col">{column}</th><th scope="col" class="number">examples</th>
<th scope="col" class="number">total</th><th scope="col" class="number">mean</th>
<th scope="col">share of helpful</th><th scope="col">share of harmful</th></tr></thead>
<tbody>{rows}</tbody></table></div></section>"""


def _group(group: Group, bounded: bool) -> str:
    mean = group.total / max(1, group.count)
    bars = "".join(
        f'<td class="share"><span>{100 * abs(share):.1f}%</span>{drawings.meter(sign * share, 1.0)}</td>'
        for share, sign in ((group.helpful, 1), (group.harmful, -1))
    )
    return (
        f'<tr><th scope="row">{shortened(group.value, 200) or "(empty)"}</th>'
        f'<td class="number">{group.count:,}</td>'
        f'<td class="number">{score_text(group.total, bounded)}</td>'
        f'<td class="number">{score_text(mean, bounded)}</td>{bars}</tr>'
    )


# ------------------------------------------------------------------------------------------------- hits


def _lists(view: View, drawn: bool) -> str:
    if not view.entries:
        return '<p class="card none">No example in the cache has a sketch, so there are no hits.</p>'
    sizes = [abs(e.hit.score) for e in view.entries if e.side and math.isfinite(e.hit.score)]
    most = max(sizes, default=0.0)
    shown = {1: "", -1: "", 0: ""}
    for n, entry in enumerate(view.entries):
        shown[entry.side] += _hit(view, n, entry, most, drawn)
    lists = ""
    for side, title in ((1, "Most helpful"), (-1, "Most harmful")):
        kind = "helpful" if side > 0 else "harmful"
        lists += (
            f'<section class="list" aria-labelledby="{view.name}-{kind}">'
            f'<h3 id="{view.name}-{kind}" class="{kind}">{title}</h3>'
            f'<ol class="hits" data-side="{side}">{shown[side]}</ol>'
            f'<p class="none" {"hidden" if shown[side] else ""}>None.</p></section>'
        )
    return f'<div class="lists">{lists}</div><ol class="pool" hidden>{shown[0]}</ol>'


def _hit(view: View, n: int, entry: Entry, most: float, drawn: bool) -> str:
    result, hit = view.result, entry.hit
    bounded, name = result.bounded, f"{view.name}-h{n}"
    score = entry.whole if entry.whole is not None else 0.0
    side = "harmful" if score < 0 else "helpful"
    error = ""
    if hit.error is not None and entry.side:
        error = f' <span class="error">± {error_text(hit.error, bounded)}</span>'
    return f"""
<li class="hit" id="{name}" data-hit="{n}"><article aria-labelledby="{name}-title">
<header><h4 id="{name}-title"><span class="sr">Rank </span><span class="rank">{hit.rank}</span>
<span class="score {side}">{score_text(score, bounded)}</span>{error}
<span class="kind {side}">{side}</span></h4>
<p class="index">index <b>{hit.index}</b></p></header>
{drawings.meter(score, most)}
{_text(hit)}
{_strongest(hit.tokens, bounded)}
{_evidence(view, hit, entry.whole, drawn)}
{_notes(hit, entry, bounded)}
</article></li>"""


def _text(hit: Hit) -> str:
    if hit.tokens is not None:
        contributions = hit.tokens.contributions
        marks = shades.steps(contributions, shades.peak_of(contributions))
        tokens = "".join(
            _token(text, f"{shades.shade(int(step))}{'' if counts else ' q'}".strip())
            for text, counts, step in zip(hit.tokens.pieces, hit.tokens.counts, marks, strict=True)
        )
        return f'<div class="text tokens" dir="auto" data-fold>{tokens}</div>'
    prompt, completion = record_parts(hit.example) if hit.example else ("", "")
    if not prompt.strip() and not completion.strip():
        return f'<p class="missing">Line {hit.index:,} of the training data, whose text is not at hand.</p>'
    quiet = "q" if completion.strip() else ""
    parts = ((prompt, quiet), (completion, ""))
    texts = "".join(
        f'<p dir="auto"{f" class={kind!r}" if kind else ""}>{block(text.strip(_BREAKS))}</p>'
        for text, kind in parts
        if text.strip()
    )
    return f'<div class="text record" data-fold>{texts}</div>'


def _strongest(tokens: Tokens | None, bounded: bool) -> str:
    """The strongest tokens in words, for who cannot see shades."""
    if tokens is None:
        return ""
    order = sorted(range(len(tokens.pieces)), key=lambda n: (-abs(tokens.contributions[n]), n))
    items = "".join(
        f"<li><q>{_named(tokens.pieces[n])}</q> {score_text(tokens.contributions[n], bounded)}</li>"
        for n in order[:_STRONGEST]
        if tokens.contributions[n]
    )
    return f'<div class="strongest"><span>Strongest tokens</span><ul>{items}</ul></div>' if items else ""


def _named(text: str) -> str:
    """A token's text where it stands alone."""
    if not text:
        return "(part of a character)"
    if not text.strip():
        return "line break" if "\n" in text else "space"
    return shortened(text, 30)


def _evidence(view: View, hit: Hit, whole: float | None, drawn: bool) -> str:
    result, figures = view.result, ""
    if drawn and result.histogram is not None and whole is not None:
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
    said = [f"{names[n] if n < len(names) else f'layer {n}'} {score_text(values[n], bounded)}" for n in order]
    return f"Influence by layer, most in {', '.join(said)}"


def _notes(hit: Hit, entry: Entry, bounded: bool) -> str:
    notes = []
    if entry.side and hit.ranks is not None and hit.ranks[0] != hit.ranks[1]:
        notes.append(f"Rank {hit.ranks[0]:,} to {hit.ranks[1]:,} by the errors")
    if entry.side and hit.tied:
        notes.append("The sketch cannot tell this from the one before it")
    if hit.estimate is not None:
        notes.append(f"Estimate in the cache {score_text(hit.estimate, bounded)}")
    notes += [f"{plain(name)} rank {standing.rank:,}" for name, standing in hit.standings.items()]
    items = "".join(f"<li>{note}</li>" for note in notes)
    return (f'<ul class="notes">{items}</ul>' if items else "") + _copies(hit)


def _copies(hit: Hit) -> str:
    count = len(hit.copies) + hit.copies_more
    if not count:
        return ""
    said = ", ".join(f"{index}" for index in hit.copies)
    if hit.copies_more:
        said += f"{' and ' if said else ''}{hit.copies_more:,} more"
    what = "copy" if count == 1 else "copies"
    return (
        f'<details class="copies"><summary>and {count:,} {what}</summary>'
        f"<p>The same text stands at index {said}.</p></details>"
    )


def facts(values: Mapping[str, str]) -> str:
    """Small facts as a list of names and values."""
    items = "".join(
        f"<div><dt>{plain(str(name))}</dt><dd>{plain(str(value))}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="about">{items}</dl>' if items else ""
