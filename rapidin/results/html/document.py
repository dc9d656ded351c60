"""The page as a whole: head, policy, navigation, assets."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib import resources
from types import MappingProxyType
from typing import Any

from rapidin.results.html import parts, shades
from rapidin.results.html.text import shortened
from rapidin.results.types import QueryResult

_BYTES, _LEAST_BYTES = 900_000, 100_000
_NOTEBOOK_HEIGHT = 720  # pixels: a generation and the first hits


def page(results: Sequence[QueryResult], *, about: Mapping[str, str] = MappingProxyType({})) -> str:
    """All queries as one HTML page that needs no other file and no network: to be saved as UTF-8.

    about: small facts by their names, such as the cache, the model, the number of examples. Texts of data and
    models are escaped, and a content security policy allows the page's own script and style alone, by their
    hashes. Without a script the page shows everything but what a selection would change.
    """
    views = [parts.View(result, number) for number, result in enumerate(results)]
    # A page that can be mailed: what is left of a megabyte is for hits of single tokens, a little at least.
    left = (_BYTES - sum(view.size for view in views)) / max(1, len(views))
    views = [replace(view, room=max(_LEAST_BYTES, left)) for view in views]
    most = shades.levels_for(sum(view.numbers for view in views))
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    what = "this generation" if len(views) == 1 else f"these {len(views):,} generations"
    body = "".join(parts.query(view, len(views)) for view in views)
    if not views:
        body = '<p class="card none">No query, so there are no hits.</p>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{_title(results)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the hits</a>
<header class="top">
<p class="name">rapidin</p>
<h1>What led to {what}</h1>
<button type="button" class="theme only-script" aria-label="Dark colours">Dark</button>
{parts.facts(about)}
{_queries(results)}
<noscript><p class="noscript">Scripts are off: the ranking is that of the whole generation, without search and
export.</p></noscript>
</header>
<main id="content" tabindex="-1">{body}</main>
<script type="application/json" id="data">{_json([view.script(most) for view in views])}</script>
<script>{script}</script>
</body>
</html>
"""


def notebook(results: Sequence[QueryResult]) -> str:
    """The page in a frame, for `_repr_html_`: it can run its script and save files, and reaches nothing."""
    return (
        f'<iframe title="rapidin: hits" sandbox="allow-scripts allow-downloads" width="100%" '
        f'height="{_NOTEBOOK_HEIGHT}" style="border: 0" srcdoc="{escape(page(results))}"></iframe>'
    )


def _asset(name: str) -> str:
    return (resources.files("rapidin.results.html") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON in ASCII that no parser of HTML takes for markup."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _title(results: Sequence[QueryResult]) -> str:
    said = _said(results[0], 60) if results else ""
    return f"rapidin: {said}" if said else "rapidin: hits"


def _said(result: QueryResult, characters: int) -> str:
    if result.together:
        return f"{result.together:,} generations together"
    return shortened(result.completion or "".join(result.pieces), characters)


def _queries(results: Sequence[QueryResult]) -> str:
    """A list to move between queries, where there are several."""
    if len(results) < 2:
        return ""
    items = "".join(
        f'<li><a href="#q{n}"><b>{_said(result, 80) or "(no text)"}</b> '
        f'<span class="of">{shortened(own, 80)}</span></a></li>'
        for n, (result, own) in enumerate(zip(results, _own([r.prompt for r in results]), strict=True), 1)
    )
    return f'<nav aria-label="Generations"><ol>{items}</ol></nav>'


def _own(texts: Sequence[str]) -> list[str]:
    """The texts without the words that all of them begin and end with, such as those of a template."""
    if len(set(texts)) < 2:
        return [""] * len(texts)
    head = _shared(texts)
    tail = _shared([text[head:][::-1] for text in texts])
    return [text[head : len(text) - tail] for text in texts]


def _shared(texts: Sequence[str]) -> int:
    """How many characters all texts begin with, up to a white space."""
    low, high = min(texts), max(texts)  # all others begin as both of these do
    same = 0
    for n, (one, other) in enumerate(zip(low, high, strict=False), 1):
        if one != other:
            break
        same = n if one.isspace() else same
    return same
