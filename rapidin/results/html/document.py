"""The whole page: its head, content security policy, list of generations, style and script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import resources
from itertools import accumulate, zip_longest
from types import MappingProxyType
from typing import Any

from rapidin.results.html import shades, templates
from rapidin.results.html.query import query
from rapidin.results.html.text import isolated, plain, shortened
from rapidin.results.html.view import View
from rapidin.results.types import QueryResult

# For hits: a page of one query is below a megabyte with style and script, one of several below 1.5 megabytes.
_PAGE_BYTES, _SEVERAL_BYTES = 900_000, 1_380_000
_MIN_ROOM = 60_000  # bytes of all queries for hits of single tokens
_TITLE = 80  # characters of a question or a completion in it
_NOTEBOOK_HEIGHT = 720  # pixels: a generation and the first hits


def page(
    results: Sequence[QueryResult],
    *,
    about: Mapping[str, str] = MappingProxyType({}),
    live: Live | None = None,
) -> str:
    """All queries as one HTML page, to be saved as UTF-8, that needs no other file and no network.

    about: facts by name, such as the cache, the model, the number of examples. Texts of data and models are
    escaped, and a content security policy allows only the page's own script and style, by their hashes. If
    scripts are off, the page shows everything except selections. live: what a server adds to the page; its
    scripts, styles and addresses are then allowed too.
    """
    ends = templates.shared_ends([result.prompt for result in results])
    views = [View(result, number, others_asked=ends[number]) for number, result in enumerate(results)]
    views, most = _fitted(views)
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    subject = "this generation" if len(views) == 1 else f"these {len(views):,} generations"
    asked = shortened(views[0].question, _TITLE) if len(views) == 1 else ""
    if asked:
        subject = f"the completion of “{isolated(asked)}”"
    body = "".join(query(view, len(views)) for view in views)
    if not views:
        body = '<p class="card none">No query, so there are no hits.</p>'
    inside = f"""<a class="skip" href="#content">Skip to the hits</a>
{"" if live is None else live.before}
<header class="top">
<p class="name">rapidin</p>
<h1>What led to {subject}</h1>
<button type="button" class="theme only-script" aria-label="Dark colours">Dark</button>
{_facts(about)}
{_queries(results)}
<noscript><p class="noscript">Scripts are off: hits are ranked for the whole generation, without filter and
export.</p></noscript>
</header>
<main id="content" tabindex="-1">{body}</main>
<script type="application/json" id="data">{_json([view.script(most) for view in views])}</script>
<script>{script}</script>"""
    return document(_title(results, asked), inside, style, scripts=(script,), live=live)


@dataclass(frozen=True)
class Live:
    """What a server adds to a page: markup of its head, and markup before all else."""

    head: str = ""
    before: str = ""


def document(
    title: str, body: str, style: str, *, scripts: Sequence[str] = (), live: Live | None = None
) -> str:
    """An HTML document. title: as markup; scripts: those in its body, which its content security policy
    allows by their hashes; live: a server's, whose files and addresses it allows too."""
    own = [] if live is None else ["'self'"]
    rules = {
        "default-src": ["'none'"],
        "script-src": [f"'{_hash(script)}'" for script in scripts] + own,
        "style-src": [f"'{_hash(style)}'", *own],
        "connect-src": own,
        "base-uri": ["'none'"],
        "form-action": own or ["'none'"],
    }
    policy = "; ".join(f"{name} {' '.join(sources)}" for name, sources in rules.items() if sources)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>{"" if live is None else live.head}
</head>
<body>
{body}
</body>
</html>
"""


def page_style() -> str:
    """The style sheet of the page."""
    return _asset("page.css")


def _fitted(views: list[View]) -> tuple[list[View], int]:
    """The views with as much as there is room for, and the levels of their `Tokens.by_target`.

    First come the hits of the whole generations, then for as many of them as possible, the best first, what
    their tokens contribute to parts of the generation, then the hits of parts.
    """
    left = (_PAGE_BYTES if len(views) == 1 else _SEVERAL_BYTES) - sum(view.size for view in views)
    numbers = sum(view.numbers for view in views)
    most, parted = shades.levels_for(numbers, left), None
    if shades.levels_bytes(numbers, most) > left:
        ranks = zip_longest(*(view.numbers_of for view in views), fillvalue=0)
        sizes = accumulate(shades.levels_bytes(sum(each), most) for each in ranks)
        parted = sum(size <= left for size in sizes)
    room = max(_MIN_ROOM, left - shades.levels_bytes(numbers, most)) / max(1, len(views))
    return [replace(view, room=room, parted=parted) for view in views], most


def notebook(results: Sequence[QueryResult]) -> str:
    """The page in a frame, for `_repr_html_`. It can run its script and save files, but access nothing
    else."""
    return (
        f'<iframe title="rapidin: hits" sandbox="allow-scripts allow-downloads" width="100%" '
        f'height="{_NOTEBOOK_HEIGHT}" style="border: 0" srcdoc="{escape(page(results))}"></iframe>'
    )


def _asset(name: str) -> str:
    return (resources.files("rapidin.results.html") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash of an inline script or style for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON in ASCII without characters that are markup in HTML."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _title(results: Sequence[QueryResult], asked: str) -> str:
    text = asked or (_completion(results[0], _TITLE) if results else "")
    return f"rapidin: {text}" if text else "rapidin: hits"


def _facts(about: Mapping[str, str]) -> str:
    """Facts as a list of names and values."""
    items = "".join(
        f"<div><dt>{isolated(plain(str(name)))}</dt><dd>{isolated(plain(str(value)))}</dd></div>"
        for name, value in about.items()
    )
    return f'<dl class="about">{items}</dl>' if items else ""


def _completion(result: QueryResult, characters: int) -> str:
    if result.together:
        return f"{result.together:,} generations together"
    return shortened(result.completion or "".join(result.pieces), characters)


def _queries(results: Sequence[QueryResult]) -> str:
    """A list of links to the queries, if there are several."""
    if len(results) < 2:
        return ""
    texts = [result.prompt for result in results]
    ends = templates.shared_ends(texts)
    prompts = [text[head : len(text) - tail] for text, (head, tail) in zip(texts, ends, strict=True)]
    if len(set(texts)) < 2:
        prompts = [""] * len(texts)
    items = "".join(
        f'<li><a href="#q{n}"><span class="of">{isolated(shortened(prompt, 80))}</span> '
        f"<b>{isolated(_completion(result, 80) or '(no text)')}</b></a></li>"
        for n, (result, prompt) in enumerate(zip(results, prompts, strict=True), 1)
    )
    return f'<nav aria-label="Generations"><ol>{items}</ol></nav>'
