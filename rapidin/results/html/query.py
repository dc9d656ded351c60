"""A query as markup: the generation, all scores, how to read them, the groups, and the lists of hits."""

from __future__ import annotations

from rapidin.results.confirmation import SURE
from rapidin.results.html import drawings, shades
from rapidin.results.html.hits import lists
from rapidin.results.html.text import block, isolated, plain, shared, shortened, token, trimmed_block
from rapidin.results.html.view import View
from rapidin.results.text import (
    FUSED_MEANING,
    MEANING,
    NET,
    UNSURE,
    capital,
    decoys_note,
    overlap_text,
    ranks_meaning,
    scale_text,
    score_text,
)
from rapidin.results.types import Group, QueryResult, TargetResult
from rapidin.results.verdict import Place, common_text

_ANSWER = 400  # characters of an answer that are shown


def query(view: View, queries: int) -> str:
    """All of a query as a section. queries: how many the page has."""
    result, name = view.result, view.name
    title = "The generation" if queries == 1 else f"Generation {view.number + 1} of {queries}"
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
{_verdict(view)}
{_decoys(view)}
{_confirmation(view)}
{_overlaps(result)}
{_groups(view)}
{_bar(view)}
{lists(view, bool(symbol))}
</div>
</section>"""


# -------------------------------------------------------------------------------------- the generation


def _generation(view: View) -> str:
    result = view.result
    if result.together:
        return f'<p class="lead">{result.together:,} generations; scores are the mean of theirs.</p>'
    elements = []
    if result.prompt:
        text = _prompt(view)
        elements.append(
            f'<h3 class="label">Prompt</h3><div class="prompt text" dir="auto" data-fold>{text}</div>'
        )
    origin = "generated" if result.generated else "as given"
    elements.append(f'<h3 class="label">Completion <small>{origin}</small></h3>')
    if result.targets:
        elements.append(
            '<p class="legend" aria-hidden="true"><span>harmful</span>'
            + "".join(f'<i class="{shades.shade(n)}"></i>' for n in (-9, -6, -3, 0, 3, 6, 9))
            + "<span>helpful</span></p>"
        )
    if view.selects and result.pieces:
        elements.append(
            '<p class="hint only-script">Select a token, or drag over several, to rank the examples for them.'
            "</p>"
        )
    if view.runs:
        elements.append(
            '<p class="hint only-script">An underline joins tokens with the same best example; the small '
            "number is its rank.</p>"
        )
    completion = _pieces(view) if result.pieces else block(result.completion)
    elements.append(f'<div class="completion text" dir="auto">{completion}</div>')
    if view.others:
        elements.append(_other_parts(view))
    return "\n".join(elements)


def _prompt(view: View) -> str:
    """The prompt, whose template the script hides as it does those of the hits."""
    text, head = view.result.prompt, view.asked[0]
    if not head or not text[head:].strip():
        return trimmed_block(text)
    start = block(text[:head].lstrip("\r\n"))
    return shared(f"<span>{start}</span>") + block(text[head:].rstrip("\r\n"))


def _pieces(view: View) -> str:
    """The tokens of the generation, shaded by their influence."""
    result, owners = view.result, view.owners
    values = [result.targets[n].influence if n >= 0 else 0.0 for n in owners]
    steps = shades.steps(values)
    return "".join(
        token(text, shades.shade(int(step)), "" if n < 0 else score_text(value, result.bounded))
        for text, step, n, value in zip(result.pieces, steps, owners, values, strict=True)
    )


def _other_parts(view: View) -> str:
    """The targets that no token selects, as buttons."""
    result, kind = view.result, "button" if view.selects else "span"
    items = "".join(
        f'<li><{kind} class="part" data-part="{n}">{_part_name(result.targets[n])} '
        f"<small>{score_text(result.targets[n].influence, result.bounded)}</small></{kind}></li>"
        for n in view.others
    )
    return f'<h3 class="label">Other parts</h3><ul class="parts" aria-label="Parts">{items}</ul>'


def _part_name(target: TargetResult) -> str:
    return f"“{isolated(shortened(target.text, 40))}”" if target.text.strip() else "a part without text"


# --------------------------------------------------------------------------------- beside the generation


def _all_scores(view: View, histogram: bool) -> str:
    """The histogram of all scores with the hits marked. histogram: whether its symbol is on the page."""
    result = view.result
    if result.histogram is None or not histogram:
        return ""
    marks = [e.hit.score for e in view.entries if e.side]
    count = result.examples or sum(result.histogram.counts)
    low, high = (score_text(result.histogram.edges[n], result.bounded) for n in (0, -1))
    label = f"Histogram of {count:,} scores, from {low} to {high}, with the hits marked"
    return (
        f'<figure class="card all"><figcaption>All {count:,} scores <small>log scale; dark lines mark '
        f"the hits listed</small></figcaption>"
        + drawings.histogram_with(view.name + "-all", result.histogram, marks, label)
        + f'<p class="axis"><span>{low}</span><span>{high}</span></p></figure>'
    )


def _meaning(view: View) -> str:
    result = view.result
    lines = [MEANING, f"The score is {scale_text(result)}."]
    if result.fusion is not None:
        lines.append(f"{FUSED_MEANING} {ranks_meaning(result.fusion.depth)}")
    if result.exact:
        lines.append("Scores are from exact gradients; the estimate is the score from the cached sketches.")
    if any(e.hit.error is not None for e in view.entries):
        lines.append(f"± is one standard error of the score. A score {UNSURE} is grey.")
    if result.decoys is not None:
        lines.append(capital(decoys_note(result.decoys)))
    if any(e.hit.tokens is not None for e in view.entries):
        sinks, left_out = (
            len(view.sinks),
            "The first token is left out of that scale: all others attend to it",
        )
        if sinks > 1:
            left_out = f"The first {sinks} tokens are left out of that scale: all later ones attend to them"
        lines.append(
            "Shades in an example show the contributions of its words or tokens to the score, by the square "
            f"root of their size, on one scale for all examples. {left_out}, so "
            f"{'its contribution is' if sinks == 1 else 'their contributions are'} large in all examples. "
            "Grey tokens are prompt (no loss)."
        )
    if view.selects:
        pool = len({e.hit.row for e in view.entries})
        lines.append(
            f"Selecting tokens ranks again the {pool:,} examples that this page has, not the whole cache. "
            "Scores then count the selection only; the percentage is its part of the mean score of the top "
            "hits. "
            "Token contributions to a selection are stored in a few levels to keep the page small: such "
            "numbers are approximate and marked with ≈."
        )
    texts = "".join(f"<p>{plain(line)}</p>" for line in lines)
    keys = ""
    if view.selects and result.pieces:
        keys = (
            '<p class="only-script">Keys: <kbd>←</kbd> <kbd>→</kbd> between tokens, <kbd>Enter</kbd> to '
            "select, <kbd>Shift</kbd> with arrows or a click for a range, <kbd>Esc</kbd> to clear, "
            "<kbd>/</kbd> to filter.</p>"
        )
    return f'<details class="card meaning"><summary>How to read this</summary>{texts}{keys}</details>'


# --------------------------------------------------------------------------------------- above the hits


def _bar(view: View) -> str:
    """The selection, how hits are shown, the filter and the export."""
    name = view.name
    status = (
        f'<div class="selection"><p class="status" id="{name}-status" role="status">Ranked for the whole '
        'generation</p><button type="button" class="clear" hidden>Clear <kbd>Esc</kbd></button></div>'
    )
    choices = _choice("as", "Layout", ("Cards", "Rows"))
    if any(entry.hit.tokens is not None for entry in view.entries):
        choices = _choice("by", "Shades", ("Words", "Tokens")) + choices
    if view.has_templates or view.asked[0]:
        choices += '<button type="button" class="template" aria-pressed="false">Show the template</button>'
    return (
        f'<div class="bar only-script">{status if view.selects else ""}<div class="choices">{choices}</div>'
        f'<label class="search"><span class="sr">Filter examples by text or index</span>'
        '<input type="search" placeholder="Filter examples" autocomplete="off" spellcheck="false">'
        '</label><p class="found" role="status"></p>'
        '<button type="button" class="csv" title="The examples below as a table. Text that begins like a '
        'formula gets an apostrophe in front, so that no spreadsheet runs it.">Export CSV</button></div>'
    )


def _choice(name: str, label: str, choices: tuple[str, ...]) -> str:
    """Buttons of which one is pressed, first the first."""
    buttons = "".join(
        f'<button type="button" data-{name}="{choice.lower()}" aria-pressed="{"false" if n else "true"}">'
        f"{choice}</button>"
        for n, choice in enumerate(choices)
    )
    return f'<div class="choice" role="group" aria-label="{label}">{buttons}</div>'


def _verdict(view: View) -> str:
    """Whether the best score stands out, what the hits have in common and what to do next."""
    verdict = view.result.verdict
    if verdict is None:
        return ""
    lines = [f"<p>{plain(capital(verdict.detail))}</p>"]
    figures = "".join(_place(place, what, verdict.score or 0.0) for place, what in verdict.places)
    if figures:
        lines.append(f'<div class="evidence">{figures}</div>')
    if verdict.common:
        common = "; ".join(common_text(each, lambda text: isolated(plain(text))) for each in verdict.common)
        lines.append(f"<p><b>In common</b> {common}</p>")
    if verdict.next_step:
        lines.append(f"<p><b>Next</b> {plain(verdict.next_step)}</p>")
    return (
        f'<section class="card verdict {verdict.strength}" aria-labelledby="{view.name}-verdict">'
        f'<h3 id="{view.name}-verdict">{verdict.title}</h3>{"".join(lines)}</section>'
    )


def _decoys(view: View) -> str:
    """How many hits pass the false-discovery rate."""
    tested = view.result.decoys
    if tested is None or not tested.sentence:
        return ""
    strength = "strong" if any(tested.passed) else "nothing"
    return (
        f'<section class="card verdict {strength}" aria-labelledby="{view.name}-decoys">'
        f'<h3 id="{view.name}-decoys">False discoveries</h3><p>{plain(tested.sentence)}</p></section>'
    )


def _confirmation(view: View) -> str:
    """What retraining without rows did to the generation."""
    found = view.result.confirmation
    if found is None:
        return ""
    lines = []
    for effect in found.effects:
        sentence = effect.sentence(found.said)
        lines.append(f"<p><b>{isolated(plain(capital(sentence) + '.'))}</b></p>")
        lines.append(f"<p>{plain(capital(effect.detail))}.</p>")
        if effect.changed:
            answer = isolated(shortened(effect.answer, _ANSWER)) or "(nothing)"
            lines.append(f"<p><b>Now says</b> {answer}</p>")
    lines.append(f"<p><small>{plain(capital(found.recipe_text))}.</small></p>")
    strength = "strong" if any(effect.p <= SURE for effect in found.effects) else "nothing"
    return (
        f'<section class="card verdict {strength}" aria-labelledby="{view.name}-confirmation">'
        f'<h3 id="{view.name}-confirmation">Retrained</h3>{"".join(lines)}</section>'
    )


def _place(place: Place, what: str, score: float) -> str:
    """A score among the best scores of other texts."""
    picture = drawings.strip(place.scores, score, f"The best score among those of {what}")
    lower = f"{place.above:,} of {len(place.scores):,} lower"
    return f"<figure>{picture}<figcaption>{what} <small>{lower}</small></figcaption></figure>"


def _overlaps(result: QueryResult) -> str:
    if not result.overlaps:
        return ""
    lines = "" if result.fusion is None else f"<li>{plain(capital(result.fusion.sentence))}</li>"
    lines += "".join(
        f"<li>{overlap_text(f'<b>{isolated(plain(name))}</b>', count, result)}</li>"
        for name, count in result.overlaps.items()
    )
    return f'<ul class="overlaps">{lines}</ul>'


def _groups(view: View) -> str:
    result = view.result
    if not result.groups:
        return ""
    column = plain(result.by or "group")
    rows = "".join(_group(group, result.bounded) for group in result.groups)
    net = any(group.net is not None for group in result.groups)
    heading = '<th scope="col" class="number">net</th>' if net else ""
    note = f"<p>{NET}.</p>" if net else ""
    return f"""<section class="card groups" aria-labelledby="{view.name}-groups">
<h3 id="{view.name}-groups">By column: {isolated(column)}</h3>
<div class="scrolled" tabindex="0" role="region" aria-label="Totals by {column}"><table>
<thead><tr><th scope="col">{isolated(column)}</th><th scope="col" class="number">examples</th>
<th scope="col" class="number">total</th>{heading}<th scope="col" class="number">mean</th>
<th scope="col">share of positive influence</th><th scope="col">share of negative influence</th></tr></thead>
<tbody>{rows}</tbody></table></div>{note}</section>"""


def _group(group: Group, bounded: bool) -> str:
    mean = group.total / max(1, group.count)
    net = "" if group.net is None else f'<td class="number">{score_text(group.net, bounded)}</td>'
    bars = "".join(
        f'<td class="share"><span>{100 * abs(share):.1f}%</span>{drawings.meter(sign * share, 1.0)}</td>'
        for share, sign in ((group.helpful, 1), (group.harmful, -1))
    )
    return (
        f'<tr><th scope="row">{isolated(shortened(group.value, 200) or "(empty)")}</th>'
        f'<td class="number">{group.count:,}</td>'
        f'<td class="number">{score_text(group.total, bounded)}</td>{net}'
        f'<td class="number">{score_text(mean, bounded)}</td>{bars}</tr>'
    )
