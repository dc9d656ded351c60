"""The pages of the server: the question and the history, an answer, two answers beside each other, a row.

Answers are shown by the page of `rapidin.results.html`, with the server's own bar above it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rapidin.results.html import Live, document, page, page_style
from rapidin.results.html.text import block, isolated, plain, shortened
from rapidin.results.json import plain_json
from rapidin.results.text import capital, score_text
from rapidin.results.types import Hit, QueryResult
from rapidin.serve.service import Answer, Service

_HEAD = '<link rel="stylesheet" href="/static/live.css"><script src="/static/live.js" defer></script>'
_TITLE = 60  # characters
_COMPARED = 100  # rows of the table of two answers
_SNIPPET = 120


def safe_json(value: Any) -> str:
    """JSON in ASCII on one line; a number that is not finite becomes null."""
    return json.dumps(plain_json(value), default=str, allow_nan=False)


def home_page(service: Service) -> str:
    """Where questions are asked, and the last answers."""
    facts = "".join(
        f"<div><dt>{plain(name)}</dt><dd>{isolated(plain(text))}</dd></div>"
        for name, text in service.about.items()
    )
    body = f"""{_bar(service)}
<header class="top"><h1>Training examples behind the model’s answers</h1>
<dl class="about">{facts}</dl></header>
<main id="content" tabindex="-1">{_history(service.history.latest())}</main>"""
    return document("rapidin", body, page_style(), live=Live(_HEAD))


def answer_page(answer: Answer, service: Service) -> str:
    """An answer with the examples behind it."""
    return page(answer.results, about=service.about, live=Live(_HEAD, _bar(service, answer)))


def compare_page(a: Answer, b: Answer, service: Service) -> str:
    """Two answers: which examples are behind both, then each of them."""
    both = [*a.results[:1], *b.results[:1]]
    return page(both, about=service.about, live=Live(_HEAD, _bar(service) + _comparison(a, b)))


def row_page(row: Mapping[str, Any]) -> str:
    """A training example: its columns, and the text that the model reads."""
    index = f"{row['index']:,}"
    parts = [f'<p class="tools"><a href="/">All answers</a></p><h1>Training example {index}</h1>']
    if row["record"] is None:
        parts.append('<p class="card none">It cannot be read, or is not what was cached.</p>')
    else:
        parts += [] if row["read"] is None else [_as_read(row["read"])]
        columns = "".join(
            f'<tr><th scope="row">{isolated(plain(str(name)))}</th><td class="text" dir="auto">'
            f"{block(value if isinstance(value, str) else safe_json(value))}</td></tr>"
            for name, value in row["record"].items()
        )
        parts.append(
            f'<section class="card"><h2>Columns</h2><table class="columns"><tbody>{columns}</tbody></table>'
            "</section>"
        )
    body = f'<main id="content" class="single" tabindex="-1">{"".join(parts)}</main>'
    return document(f"rapidin: example {index}", body, page_style(), live=Live(_HEAD))


def _as_read(read: Mapping[str, Any]) -> str:
    facts = [f"{read['tokens']:,} tokens, {read['targets']:,} with a loss"]
    facts += ["its end was cut off"] if read["truncated"] else []
    facts += [f"not used: {read['status'].replace('_', ' ')}"] if read["status"] != "ok" else []
    texts = "".join(map(_read_text, read["texts"]))
    return (
        f'<section class="card"><h2>As the model reads it</h2><p class="hint">{plain("; ".join(facts))}. '
        f"Grey tokens are prompt (no loss).</p>{texts}</section>"
    )


def message_page(text: str) -> str:
    """Something to say instead of the page that was asked for."""
    body = (
        f'<main id="content" class="single" tabindex="-1"><p class="tools"><a href="/">All answers</a></p>'
        f'<p class="card none">{plain(capital(text))}.</p></main>'
    )
    return document("rapidin", body, page_style(), live=Live(_HEAD))


def _read_text(text: Mapping[str, Any]) -> str:
    name = f'<h3 class="label">{plain(text["name"])}</h3>' if text["name"] else ""
    if not text["ids"]:
        return f'{name}<div class="text" dir="auto">{block("".join(text["pieces"]))}</div>'
    runs: list[tuple[bool, str]] = []
    for piece, counts in zip(text["pieces"], text["loss"], strict=True):
        if runs and runs[-1][0] == counts:
            runs[-1] = (counts, runs[-1][1] + piece)
        else:
            runs.append((counts, piece))
    markup = "".join(block(run) if counts else f'<span class="q">{block(run)}</span>' for counts, run in runs)
    return f'{name}<div class="text" dir="auto">{markup}</div>'


# ------------------------------------------------------------------------------------------------ the bar


def _bar(service: Service, answer: Answer | None = None) -> str:
    """The question, what becomes of it, and what can be done with the answer that is shown."""
    columns = _options(service.columns)
    by = (
        f'<label>Sum by <select name="by"><option value="">(none)</option>{columns}</select></label>'
        '<label title="A group that another repeats counts less">'
        '<input type="checkbox" name="interactions"> What only a group has</label>'
    )
    fdr = (
        '<label title="Only hits that stand out from texts that were never trained on; at most this share of '
        'the hits is expected to be there by chance">False discoveries at most '
        '<input type="number" name="fdr" min="0.01" max="0.99" step="0.01" placeholder="any"></label>'
    )
    words = (
        '<label title="Takes longer: a pass for each token of the answer and for each hit">'
        '<input type="checkbox" name="words"> Rank for each word</label>'
    )
    return f"""<section class="live" aria-label="Questions"{" data-rows" if service.has_rows else ""}>
<form class="asking only-live" action="/query" method="post">
<label class="sr" for="ask">Question</label>
<textarea id="ask" name="ask" rows="2" dir="auto" required maxlength="100000"
placeholder="Ask the model, and see which examples led to its answer"></textarea>
<div class="options"><select name="kind" aria-label="How the text is read">
<option value="ask">In the form of the training data</option>
<option value="prompt">As it is, with nothing around it</option></select>
<label>Hits <input type="number" name="top_k" value="10" min="1" max="200"></label>
{words if service.by_token else ""}{by if columns else ""}{fdr if service.has_decoys else ""}
<details><summary>Explain a given answer</summary><label class="sr" for="completion">Answer</label>
<textarea id="completion" name="completion" rows="2" dir="auto" maxlength="100000"
placeholder="Empty: the model answers"></textarea></details>
<button type="submit">Ask</button><button type="button" class="cancel" hidden>Cancel</button></div>
<div class="written text" dir="auto" aria-live="polite" hidden></div>
<p class="stage" role="status"></p><p class="problem" role="alert" hidden></p>
</form>
<noscript><p class="noscript">Asking needs JavaScript.</p></noscript>
{"" if answer is None else _tools(answer, service)}
</section>"""


def _tools(answer: Answer, service: Service) -> str:
    """What can be done with an answer."""
    tools = '<a href="/">All answers</a>'
    question = escape(safe_json(_asked(answer)))
    name = escape(answer.id)
    if service.by_token and not answer.question.words:
        tools += (
            f'<button type="button" class="again only-live" data-question="{question}" data-words="true" '
            'title="Takes longer: a pass for each token of the answer and for each hit">Rank for each '
            "word</button>"
        )
    if service.columns and answer.question.by is None:
        tools += (
            f'<span class="only-live"><label>Sum by <select class="by">{_options(service.columns)}</select>'
            "</label> "
            f'<button type="button" class="again" data-question="{question}">Sum</button></span>'
        )
    others = [other for other in service.history.latest() if other.id != answer.id]
    if others:
        options = "".join(
            f'<option value="{escape(other.id)}">{other.when:%H:%M} {_kind(other)}'
            f"{shortened(other.question.text, _TITLE)}</option>"
            for other in others
        )
        tools += (
            f'<form action="/compare"><input type="hidden" name="a" value="{name}">'
            f'<label>Compare with <select name="b">{options}</select></label>'
            '<button type="submit">Compare</button></form>'
        )
    tools += (
        f'<a href="/answers/{name}/report.html" download>Download page</a>'
        f'<a href="/answers/{name}/hits.json" download>Download JSON</a>'
        '<button type="button" class="copy only-live">Copy link</button>'
    )
    return f'<div class="tools">{tools}</div>'


def _options(columns: Sequence[str]) -> str:
    return "".join(f'<option value="{escape(name)}">{shortened(name, 40)}</option>' for name in columns)


def _kind(answer: Answer) -> str:
    return "(for each word) " if answer.question.words else ""


def _asked(answer: Answer) -> dict[str, Any]:
    """The question as it is asked again."""
    question = answer.question
    names = ("ask", "prompt", "completion", "top_k", "words", "by", "interactions", "fdr", "max_new_tokens")
    values = {name: getattr(question, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _history(answers: Sequence[Answer]) -> str:
    if not answers:
        return '<p class="card none">No questions yet.</p>'
    items = ""
    for answer in answers:
        verdict = answer.result.verdict
        strength = (
            ""
            if verdict is None
            else f'<small class="{plain(verdict.strength)}">{plain(verdict.title)}</small>'
        )
        items += (
            f'<li><a href="/answers/{escape(answer.id)}">'
            f"<b>{isolated(shortened(answer.question.text, 120))}</b> {_kind(answer)}"
            f"<span>{isolated(shortened(answer.result.completion, 160) or '(no text)')}</span></a>{strength}"
            f'<time datetime="{answer.when.isoformat(timespec="seconds")}">{answer.when:%H:%M}</time>'
            f'<button type="button" class="forget only-live" data-id="{escape(answer.id)}" '
            f'aria-label="Forget this answer">×</button></li>'
        )
    return f'<section class="card"><h2>Last answers</h2><ol class="history">{items}</ol></section>'


# ------------------------------------------------------------------------------------------- two answers


def _comparison(a: Answer, b: Answer) -> str:
    """Which hits two answers share."""
    parts = []
    for kind, sign in (("helpful", 1), ("harmful", -1)):
        first, second = (_hits(each.result, sign) for each in (a, b))
        shared = [row for row in first if row in second]
        rows = list(dict.fromkeys([*shared, *first, *second]))[:_COMPARED]
        if not rows:
            continue
        lines = "".join(_compared(row, first.get(row), second.get(row), a.result, b.result) for row in rows)
        parts.append(
            f"<h3>Most {kind}: {len(shared):,} of the {min(len(first), len(second)):,} are shared</h3>"
            f'<div class="scrolled" tabindex="0" role="region" aria-label="Most {kind} examples of both">'
            '<table><thead><tr><th scope="col">index</th><th scope="col" class="number">first</th>'
            '<th scope="col" class="number">second</th><th scope="col">example</th></tr></thead>'
            f"<tbody>{lines}</tbody></table></div>"
        )
    titles = "".join(
        f'<li>{which}: <a href="/answers/{escape(each.id)}">'
        f"<b>{isolated(shortened(each.question.text, 120))}</b></a> "
        f"{isolated(shortened(each.result.completion, 200))}</li>"
        for which, each in (("first", a), ("second", b))
    )
    return (
        f'<section class="card comparison"><h2>Two answers</h2><ol class="titles">{titles}</ol>'
        f"{''.join(parts) or '<p class=none>Neither has hits.</p>'}</section>"
    )


def _hits(result: QueryResult, sign: int) -> dict[int, Hit]:
    return {hit.row: hit for hit in (result.helpful if sign > 0 else result.harmful)}


def _compared(row: int, a: Hit | None, b: Hit | None, first: QueryResult, second: QueryResult) -> str:
    hit = a or b
    assert hit is not None
    cells = "".join(
        f'<td class="number">{_rank(each, result.bounded)}</td>' for each, result in ((a, first), (b, second))
    )
    text = isolated(shortened(" ".join(part for part in hit.parts if part), _SNIPPET))
    return (
        f"<tr{'' if a is None or b is None else ' class=both'}>"
        f'<th scope="row"><a href="/rows/{row}">{hit.index}</a></th>{cells}<td dir="auto">{text}</td></tr>'
    )


def _rank(hit: Hit | None, bounded: bool) -> str:
    return "" if hit is None else f"{hit.rank} <small>{score_text(hit.score, bounded)}</small>"
