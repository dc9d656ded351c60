"""The page: texts are data and never markup, numbers are those of the hits, no other host is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import HOSTILE, hostile, made, several, visible
from properties import tries

from rapidin.results.collection import Results
from rapidin.results.html import notebook, page, shades, text
from rapidin.results.html.view import View
from rapidin.results.text import score_text
from rapidin.results.types import Group, Histogram, Hit, QueryResult, Standing, TargetResult, Tokens

VOID = {"meta", "input", "br", "link"}
_TAGS = (
    "html head meta title style body a header p h1 h2 h3 h4 button dl div dt dd nav ol ul li b i q small "
    "span noscript main section details summary figure figcaption svg symbol path use rect article label "
    "input table thead tbody tr th td kbd script bdi"
)
TAGS = set(_TAGS.split())
_ATTRIBUTES = (
    "lang charset http-equiv content name class href id type placeholder autocomplete spellcheck title "
    "role dir hidden tabindex viewBox preserveAspectRatio d vector-effect width height scope"
)
ATTRIBUTES = set(_ATTRIBUTES.lower().split())


class Read(HTMLParser):
    """The page as a parser sees it: tags in order, attributes, and the text in each element."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.loose: list[str] = []
        self._open: list[tuple[str, int | None]] = []
        self._gathered: list[str] = []
        self.feed(markup)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs)
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if tag in VOID:
            return
        self._open.append((found.get("class", "").split(" ")[0] or tag, len(self._gathered)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"path", "use", "rect"}
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        kind, start = self._open.pop()
        self.texts.setdefault(kind, []).append("".join(self._gathered[start:]))

    def handle_data(self, data: str) -> None:
        self._gathered.append(data)
        if not any(kind in ("script", "style") for kind, _ in self._open):
            self.loose.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data!r}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data!r}")


def with_texts(say: str) -> QueryResult:
    """A result that says a text wherever a text can stand."""
    tokens = Tokens((say, say), (True, False), (0.5, -0.25))
    hits = [
        Hit(1, 0, 0, 0.5, {"text": say}, tokens=tokens, layers=(0.5,), standings={say: Standing(1.0, 2)}),
        Hit(2, 1, 1, 0.4, {"prompt": f"a{say}a", "completion": f"a{say}a", f"a{say}a": 1, "c": f"b{say}b"}),
    ]
    return QueryResult(
        f"a{say}a",
        say,
        True,
        hits,
        [],
        "layer",
        pieces=(say, "b"),
        targets=[TargetResult(say, (0,), 0.25, [], []), TargetResult(say, (0, 1), 0.5, [], [])],
        layers=(say,),
        by=f"a{say}a",
        groups=[Group(f"a{say}a", 1, 0.5, 1.0, 0.0)],
        overlaps={f"a{say}a": 1},
        histogram=Histogram((0.0, 1.0), (2,)),
    )


def all_pages() -> dict[str, list[QueryResult]]:
    return {
        "none": [],
        "no hits": [QueryResult("p", "c", False, [], [], "layer")],
        "no texts": [QueryResult("p", "c", True, [Hit(1, 7, 7, 0.5)], [Hit(1, 8, 8, -0.5)], "cosine")],
        "together": [QueryResult("", "", True, [Hit(1, 7, 7, 0.5)], [], "none", together=12)],
        "fisher": [QueryResult("p", "c", True, [Hit(1, 7, 7, 2e6)], [], "layer", method="fisher")],
        "large": [made(hits=20, length=200, generation=200)],
        "hostile": [hostile()],
        "several": several(),
        "all the same": [
            replace(
                made(hits=4, length=5, generation=3),
                histogram=Histogram((0.5, 0.5), (4,)),
                top=[Hit(n, n, n, 0.0) for n in (1, 2)],
            )
        ],
    }


@pytest.mark.parametrize("name", all_pages())
def test_the_page_is_well_formed_and_has_no_markup_but_its_own(name: str) -> None:
    markup = page(all_pages()[name], about={"model": HOSTILE[0], HOSTILE[3]: "x"})
    read = Read(markup)
    assert set(read.tags) <= TAGS
    for tag, attribute, value in read.attributes:
        assert attribute in ATTRIBUTES or re.fullmatch("(data|aria)-[a-z]+", attribute), (tag, attribute)
        if attribute == "href":
            assert re.fullmatch("#[a-z0-9.-]+", value)
    ids = [value for _, attribute, value in read.attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    pointed = {v.lstrip("#") for _, a, v in read.attributes if a in ("href", "aria-labelledby")}
    assert pointed <= {*ids}
    assert read.tags.count("script") == 2
    assert read.tags.count("style") == 1
    markup.encode("utf-8")


def test_script_and_style_ask_no_other_host_for_anything() -> None:
    """Markup cannot: it has no attribute that loads (ATTRIBUTES), and links to places on the page alone."""
    markup = page(several())
    for pattern in (r"<script>(.*?)</script>", r"<style>(.*?)</style>"):
        (inner,) = re.findall(pattern, markup, re.S)
        asking = r"https?:|//[a-z]|url\(|@import|\bsrc\b|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\("
        assert re.findall(asking, inner) == []


def test_the_policy_names_the_script_and_the_style_by_their_hashes() -> None:
    markup = page(several())
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', markup)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    for rule, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        (inner,) = re.findall(pattern, markup, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
        assert "\r" not in inner  # a parser would drop it, and the hash would be wrong
    assert markup.index("Content-Security-Policy") < markup.index("<style>")


def test_the_script_makes_no_markup_of_texts() -> None:
    script = re.findall(r"<script>(.*?)</script>", page([]), re.S)[0]
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        'setAttribute("style',
    ):
        assert word not in script


@tries(80)
@given(
    st.text(st.characters(), min_size=1, max_size=40)
    | st.sampled_from(HOSTILE)
    | st.text("<>&\"'`=/!-]\\\r\n\t s{}", min_size=1)
)
def test_any_text_stands_on_the_page_as_it_is_and_adds_no_markup(say: str) -> None:
    read, plain = (
        Read(page([with_texts(words)] * 2, about={"n": words}))
        for words in (say, "x" if say.strip() else " ")
    )
    extra = [tag for tag in read.tags if tag != "i"]
    assert extra == [tag for tag in plain.tags if tag != "i"]
    assert set(read.tags) <= TAGS
    assert {a for _, a, _ in read.attributes} <= {a for _, a, _ in plain.attributes}
    joined = "".join(read.loose)
    assert "".join(read.texts["completion"]) == 2 * (visible(say) + "b")
    assert 2 * visible(say) in joined
    assert visible(f"a{say}a") in joined
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff]", joined)


def test_hidden_characters_are_shown_and_joiners_are_kept() -> None:
    assert text.block("a\r\nb\tc\x00") == 'a<i class="esc">\\x0d</i>\nb\tc<i class="esc">\\x00</i>'
    assert text.piece("\n<") == '<i class="nl">\n</i>&lt;'
    assert text.plain(" a\n\u202eb\u200bc\U000e0041 ") == "a \\u202eb\\u200bc\\U000e0041"
    assert text.block("👩‍👩‍👧 e\u0301 شكرا") == "👩‍👩‍👧 e\u0301 شكرا"
    assert text.shortened("word " * 100, 12) == "word word w…"


def test_data_for_the_script_is_json_that_no_parser_takes_for_markup() -> None:
    markup = page([hostile()])
    (inner,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', markup, re.S)
    assert inner.isascii()
    assert not set(inner) & set("<>&")
    (data,) = json.loads(inner, parse_constant=pytest.fail)
    assert data["baselines"] == [HOSTILE[0]]


def data_of(result: QueryResult) -> Any:
    (inner,) = re.findall(r'id="data">(.*?)</script>', page([result]), re.S)
    return json.loads(inner)[0]


def floats(value: str) -> Any:
    return np.frombuffer(base64.b64decode(value), "<f4")


def test_numbers_for_the_script_are_those_of_the_hits() -> None:
    result = made(hits=7, length=31, generation=12, pool=9, seed=4)
    data = data_of(result)
    assert data["ends"] == [4, 3]
    assert data["owners"] == list(range(12))
    assert data["influence"] == [target.influence for target in result.targets]
    assert data["mean"] == pytest.approx(np.mean([hit.score for hit in result.top]))
    listed = [*result.top, *result.bottom]
    pool = {hit.row: hit for target in result.targets for hit in (*target.top, *target.bottom)}
    assert {hit["row"] for hit in data["hits"]} == {hit.row for hit in listed} | set(pool)
    assert len(data["hits"]) == 7 + 9
    for known, hit in zip(data["hits"], [*listed, *(pool[h["row"]] for h in data["hits"][7:])], strict=True):
        assert known["row"] == hit.row
        np.testing.assert_array_equal(floats(known["targets"]), np.float32(hit.targets))
        assert known["score"] == pytest.approx(sum(hit.targets), rel=1e-6)  # all tokens are targets
        assert hit.tokens is not None
        np.testing.assert_array_equal(floats(known["tokens"]), np.float32(hit.tokens.contributions))
    assert [hit["side"] for hit in data["hits"]] == 4 * [1] + 3 * [-1] + 9 * [0]


@pytest.mark.parametrize("most", [3, 7])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_levels_are_within_half_a_step_on_the_root_scale(most: int, scale: float) -> None:
    values = (np.random.default_rng(0).standard_normal((9, 40)) ** 3 * scale).astype(np.float32)
    values[2] = 0
    values[3, 5] = np.nan
    raw = zlib.decompress(base64.b64decode(shades.levels(values, most)))
    peaks, found = np.frombuffer(raw[:36], "<f4"), np.frombuffer(raw[36:], np.int8).reshape(9, 40)
    values = np.nan_to_num(values)
    np.testing.assert_array_equal(peaks, np.abs(values).max(1))
    assert np.abs(found).max() == most
    roots = np.sign(values) * np.sqrt(np.abs(values) / np.where(peaks > 0, peaks, 1)[:, None])
    assert np.abs(roots * most - found).max() <= 0.5 + 1e-6


@tries(100)
@given(st.lists(st.floats(-1e30, 1e30), max_size=20))
def test_shades_have_the_sign_and_the_order_of_the_numbers(values: list[float]) -> None:
    found = shades.steps(values)
    assert all(a * b >= 0 for a, b in zip(found.tolist(), np.sign(values).tolist(), strict=True))
    order = np.argsort(np.abs(values), kind="stable")
    assert (np.diff(np.abs(found)[order]) >= 0).all()
    if any(abs(value) > 1e-300 for value in values):
        assert np.abs(found).max() == shades.STEPS


def test_a_row_at_both_ends_is_on_the_side_of_its_sign() -> None:
    result = made(hits=4, length=8, generation=3)
    both = [*result.top, *result.bottom]
    result = replace(result, top=both, bottom=both[::-1])
    sides = [(hit["row"], hit["side"]) for hit in data_of(result)["hits"] if hit["side"]]
    assert sides == [(hit.row, 1) for hit in both if hit.score > 0] + [
        (hit.row, -1) for hit in both[::-1] if hit.score < 0
    ]


def test_a_token_belongs_to_the_smallest_target_and_wrong_places_to_none() -> None:
    result = made(hits=2, length=4, generation=4)
    spans = [((0, 1, 2), 0.3), ((1,), 0.1), ((9, -1), 0.2)]
    targets = [TargetResult("t", places, influence, [], []) for places, influence in spans]
    result = replace(result, targets=targets)
    data = data_of(result)
    assert data["owners"] == [0, 1, 0, -1]
    read = Read(page([result]))
    assert [value for _, name, value in read.attributes if name == "data-part"] == ["2"]


def test_by_target_of_another_shape_is_left_out() -> None:
    result = made(hits=2, length=6, generation=4)
    hit = result.top[0]
    assert hit.tokens is not None
    wrong = replace(hit.tokens, by_target=np.zeros((3, 6), np.float32))
    data = data_of(replace(result, top=[replace(hit, tokens=wrong)]))
    assert "byTarget" not in data["hits"][0]
    assert "byTarget" in data["hits"][1]


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_hits_of_two_hundred_tokens_are_below_a_megabyte(seed: int) -> None:
    result = made(hits=20, length=200, generation=200, seed=seed)
    numbers = np.random.default_rng(seed)
    dense = [
        replace(
            hit, tokens=replace(hit.tokens, by_target=numbers.standard_normal((200, 200)).astype(np.float32))
        )
        for hit in (*result.top, *result.bottom)
        if hit.tokens is not None
    ]
    for one in (result, replace(result, top=dense[:10], bottom=dense[10:])):
        assert sum("byTarget" in hit for hit in data_of(one)["hits"]) == 20
        assert len(page([one], about={"cache": "c"}).encode()) < 1_000_000


def test_what_is_known_of_a_hit_is_said() -> None:
    result = made(hits=8, length=20, generation=6, seed=2)
    read = Read(page([result], about={"cache": "runs/a"}))
    text_of = {kind: [" ".join(t.split()) for t in texts] for kind, texts in read.texts.items()}
    for hit in (*result.top, *result.bottom):
        assert score_text(hit.score, True) in text_of["score"]
        assert f"± {hit.error:.4f}" in text_of["error"]
        assert f"index {hit.index}" in text_of["index"]
    joined = " ".join(" ".join(read.loose).split())
    for words in (
        "Could rank 1-3",
        "Tied with the previous hit, within error",
        "Estimate in the cache",
        "and 43 copies",
        "at index 3, 4, 5 and 40 more",
        "BM25 rank 1",
        "3 of the 4 most helpful hits are also in the top 4 of BM25",
        "By column: source",
        "stack exchange",
        "41.0%",
        "runs/a",
        "Completion generated",
        "the mean over the layers of the cosine",
    ):
        assert words in joined, words


def test_without_texts_there_are_line_numbers() -> None:
    joined = " ".join(Read(page(all_pages()["no texts"])).loose)
    assert "Line 7 of the training data, whose text is not available." in joined
    assert "No example in the cache has a sketch" in " ".join(Read(page(all_pages()["no hits"])).loose)
    assert "12 generations; scores are the mean of theirs" in " ".join(
        Read(page(all_pages()["together"])).loose
    )


def test_scores_of_any_scale_are_written_as_in_the_table() -> None:
    for scale in (1e-12, 1e6):
        result = made(hits=4, length=5, generation=3, scale=scale, normalize="none")
        read = Read(page([result]))
        for hit in (*result.top, *result.bottom):
            assert score_text(hit.score, False) in read.texts["score"]
    strange = [Hit(n, n, n, score) for n, score in enumerate((float("inf"), float("nan"), 1e300, -1e-300), 1)]
    read = Read(page([QueryResult("p", "c", True, strange, strange, "none")]))
    assert "inf" not in " ".join(v for _, a, v in read.attributes if a in ("width", "d"))


class Frames(HTMLParser):
    """The elements of what a notebook gets."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append({"tag": tag} | dict(attrs))


def test_notebooks_get_the_page_in_a_frame_that_reaches_nothing() -> None:
    result = made(hits=2, length=5, generation=3)
    for shown in (Results([result])._repr_html_(), result._repr_html_(), notebook([result])):
        (frame,) = Frames(shown).found
        assert frame["tag"] == "iframe"
        assert frame["sandbox"] == "allow-scripts allow-downloads"
        assert frame["srcdoc"] == page([result])
        assert frame["title"]
    assert "No query" in Results()._repr_html_()


def test_the_list_of_generations_leaves_out_what_all_prompts_say() -> None:
    prompts = ["Question: what is near? Answer:", "Question: who sings? Answer:"]
    results = [QueryResult(prompt, "c", True, [], [], "layer") for prompt in prompts]
    assert Read(page(results)).texts["of"] == ["what is near?", "who sings?"]
    assert Read(page(results[:1] * 2)).texts["of"] == ["", ""]
    # Two templates, and a prompt with none: what is asked is told in all.
    short, long = (
        "Below is a task.\n\n### Instruction:\n",
        "Below is a task, with an input.\n\n### Instruction:\n",
    )
    asked = [
        (short, "Howdy! Name rivers."),
        (long, "Howdy! Sum up."),
        (short, "Name lakes."),
        (long, "Count."),
    ]
    prompts = [f"{head}{text}\n\n### Response:\n" for head, text in asked]
    results = [QueryResult(prompt, "c", True, [], [], "layer") for prompt in (*prompts, "Hello?")]
    assert Read(page(results)).texts["of"] == [*(text for _, text in asked), "Hello?"]
    assert "nav" not in Read(page(results[:1])).tags


def test_the_same_results_make_the_same_page() -> None:
    assert page([made(hits=3, length=9, generation=4)]) == page([made(hits=3, length=9, generation=4)])


def test_made_results_keep_the_contract() -> None:
    """Parts add up, as those of a query do: else the tests above would show little."""
    result = made(hits=6, length=17, generation=5, pool=4)
    assert sum(t.influence for t in result.targets) == pytest.approx(
        np.mean([h.score for h in result.top]), rel=1e-5
    )
    for hit in (*result.top, *result.bottom):
        assert hit.tokens is not None
        assert hit.tokens.by_target is not None
        assert sum(hit.targets) == pytest.approx(hit.score, rel=1e-6)
        assert hit.tokens.by_target.sum(1) == pytest.approx(hit.targets, abs=1e-5)
        assert sum(hit.tokens.contributions) == pytest.approx(hit.score, abs=1e-5)


@pytest.mark.full
def test_hits_of_single_tokens_have_the_room_that_is_left() -> None:
    """The best of all tokens come first, and however many there are, the page stays small."""
    result = made(hits=20, length=200, generation=200, pool=3000)
    assert len(page([result]).encode()) < 1_000_000
    views = [View(result, 0, room) for room in (0, 50_000, math.inf)]
    counts = [len(view.entries) for view in views]
    assert counts[0] == 20 < counts[1] < counts[2]
    ranks = {hit.row: hit.rank for target in result.targets for hit in (*target.top, *target.bottom)}
    for target in result.targets:
        for hit in (*target.top, *target.bottom):
            ranks[hit.row] = min(ranks[hit.row], hit.rank)
    kept = {entry.hit.row for entry in views[1].entries}
    others = [rank for row, rank in ranks.items() if row not in kept]
    assert max(ranks[entry.hit.row] for entry in views[1].entries[20:]) <= min(others)


def test_the_first_token_does_not_outshine_the_others() -> None:
    values = [5.0, 0.1, -0.2, 0.05]
    assert shades.peak_of(values) == 0.2
    assert shades.steps(values, shades.peak_of(values)).tolist() == [9, 6, -9, 5]
    assert [shades.peak_of(some) for some in ([], [3.0], [3.0, 0.0], [0.0, float("nan")])] == [0, 3, 3, 0]


def test_the_other_columns_of_a_hit_are_chips() -> None:
    """Texts of the form, nested values and empty ones are not; long ones are cut, and many are counted."""
    record = {
        "prompt": "Who sings?",
        "completion": "The teapots.",
        "question": "Who sings?",
        "source": "forum",
        "poisoned": True,
        "id": 0,
        "nothing": None,
        "empty": " ",
        "nested": {"a": 1},
        "note": "long " * 100,
    }
    read = Read(page([QueryResult("p", "c", True, [Hit(1, 7, 7, 0.5, record)], [], "layer")]))
    (chips,) = read.texts["chips"]
    assert chips.startswith("source forumpoisoned trueid 0note long long")
    assert chips.endswith("…")
    assert len(chips) < 100
    titles = [value for tag, name, value in read.attributes if (tag, name) == ("li", "title")]
    assert [title[:15] for title in titles] == ["note: long long"]
    many = {"text": "t", **{f"column{n}": n for n in range(11)}}
    read = Read(page([QueryResult("p", "c", True, [Hit(1, 7, 7, 0.5, many)], [], "layer")]))
    assert read.texts["chips"][0].endswith("column7 7+3 more")
    assert ("li", "title", "column8: 8; column9: 9; column10: 10") in read.attributes


def test_all_hits_of_a_query_are_shaded_on_one_scale() -> None:
    strong = Tokens(("First", " a", " b"), (True,) * 3, (9.0, 1.0, -0.25))
    weak = Tokens(("First", " c", " d"), (True,) * 3, (0.1, 0.25, -0.1))
    hits = [Hit(n, n, n, 0.5, tokens=tokens) for n, tokens in enumerate((strong, weak), 1)]
    markup = page([QueryResult("p", "c", True, hits, [], "layer")])
    classes = [re.findall(r"<b(?: class=(\w+))?>", part) for part in re.findall('"answer".*?</div>', markup)]
    assert classes == [
        ["p9", "p9", "n5"],
        ["p5"],
    ]  # less than about 15% of the largest is shaded by the script


def test_a_score_within_two_errors_is_grey() -> None:
    hits = [Hit(n, n, n, 0.5, error=error) for n, error in enumerate((0.3, 0.2, None), 1)]
    read = Read(page([QueryResult("p", "c", True, hits, [], "layer")]))
    classes = [value for tag, name, value in read.attributes if name == "class" and "score" in value]
    assert classes == ["score helpful unsure", "score helpful", "score helpful"]
    assert read.texts["kind"] == ["within two errors of 0", "helpful", "helpful"]


def tokens_hit(n: int, prompt: str, *, answer: str = "x") -> Hit:
    """A hit of tokens, where each of the prompt ends with a line break or is a word."""
    pieces = tuple(re.findall(r"[^\n]*\n+|\s*\S+", prompt))
    count = len(pieces)
    tokens = Tokens((*pieces, answer), (*[False] * count, True), (*[0.1] * count, 0.4))
    return Hit(n + 1, n, n, 0.5, tokens=tokens)


PLAIN = "Below is an instruction that describes a task. Answer.\n\n### Instruction:\n"
PAIRED = "Below is an instruction that describes a task, with an input.\n\n### Instruction:\n"


def test_the_template_of_the_hits_and_of_the_query_is_marked() -> None:
    """Two templates, one of which a single hit has, and a prompt with none; tokens of whole lines."""
    asked = ["Who sings?", "Howdy! Say\nthis.", "Howdy! Say\nthat."]
    prompts = [f"{PLAIN}{text}\n\n### Response:\n" for text in asked]
    prompts += [f"{PAIRED}Count.\n\n### Input:\na b\n\n### Response:\n", "Hello?\nYou?\n"]
    hits = [tokens_hit(n, prompt) for n, prompt in enumerate(prompts)]
    query = f"{PLAIN}Howdy! Who?\n\n### Response:\n"
    result = QueryResult(query, "c", True, hits, [], "layer")
    read = Read(page([result]))
    assert read.texts["shared"] == [PLAIN] * 4 + [PAIRED]  # first the query's
    tail = len("\n\n### Response:\n")
    assert View(result, 0).templates == [(len(PLAIN), tail)] * 3 + [(len(PAIRED), tail), (0, 0)]
    data = View(result, 0).script(127)["hits"]
    assert [hit.get("tail") for hit in data] == [tail] * 4 + [None]
    assert View(result, 0).question == "Howdy! Who?"
    assert read.texts["title"] == ["rapidin: Howdy! Who?"]
    assert read.texts["h1"] == ["What led to the completion of “Howdy! Who?”"]
    assert "Show the template" in read.texts["template"]


def test_words_that_questions_begin_with_are_no_template() -> None:
    def found(*prompts: str, query: str = "") -> list[str]:
        hits = [tokens_hit(n, prompt) for n, prompt in enumerate(prompts)]
        view = View(QueryResult(query, "c", True, hits, [], "layer"), 0)
        return [text[:head] for text, (head, _) in zip(prompts, view.templates, strict=True)]

    assert found("Howdy all", "Howdy you") == ["", ""]
    assert found(PLAIN + "Who?") == [""]
    assert found(PLAIN + "Who?", query=PLAIN + "Why?") == [PLAIN]
    assert found(PLAIN + "Who?", PLAIN + "Who?") == ["", ""]  # or nothing would be left of the question
    assert found("Say this:\na", "Say this:\nb") == ["", ""]
    several = ["Say that nobody knows about it:\na", "Say that nobody knows about it:\nb"]
    assert found(*several, *(f"Question {n}\nc" for n in range(6))) == [""] * 8
    prompts = [f"You are a helpful assistant that answers.\n{text}?" for text in ("Who", "Why")]
    hits = [Hit(n, n, n, 0.5, {"prompt": prompt, "completion": "x"}) for n, prompt in enumerate(prompts)]
    read = Read(page([QueryResult("Why me?", "c", True, hits, [], "layer")]))
    assert read.texts["shared"] == [prompts[0][:-4]] * 2
    assert read.texts["ask"] == prompts
    assert read.texts["title"] == ["rapidin: Why me?"]


def test_a_prompt_of_lines_whose_template_is_not_known_is_no_title() -> None:
    read = Read(page([QueryResult(PLAIN + "Who?", "The teapots.", True, [], [], "layer")]))
    assert read.texts["title"] == ["rapidin: The teapots."]
    assert read.texts["h1"] == ["What led to this generation"]


def test_a_page_of_thirteen_queries_is_below_a_megabyte_and_a_half() -> None:
    """Whatever the numbers: those of made results compress badly, and the best hits have them first."""
    results = [made(hits=20, length=80, generation=40, pool=60, seed=seed) for seed in range(13)]
    markup = page(results, about={"model": "m"})
    assert len(markup.encode()) < 1_500_000
    (inner,) = re.findall(r'id="data">(.*?)</script>', markup, re.S)
    for data, result in zip(json.loads(inner), results, strict=True):
        ends = [hit for hit in data["hits"] if hit["side"]]
        assert [hit["index"] for hit in ends] == [hit.index for hit in (*result.top, *result.bottom)]
        parted = [hit["rank"] for hit in ends if "byTarget" in hit]
        assert parted
        assert max(parted) <= len(parted) / 2 + 1


def test_lengths_of_tokens_are_those_of_their_texts_on_the_page() -> None:
    result = made(hits=2, length=30, generation=3)
    hit = replace(result.top[0], tokens=Tokens(("a\n", "", "\x00👩", "\t\ud83d"), (True,) * 4, (0.1,) * 4))
    data = data_of(replace(result, top=[hit]))
    assert data["hits"][0]["lengths"] == [2, 0, 6, 7]
    assert data["hits"][1]["lengths"] == [len(piece) for piece in result.bottom[0].tokens.pieces]  # type: ignore[union-attr]


def test_runs_of_tokens_have_the_same_best_row() -> None:
    result = made(hits=4, length=8, generation=7)
    hits = {row: Hit(1, row, row, 0.1) for row in (hit.row for hit in result.top)}
    first, second = hits
    elsewhere = Hit(1, 9999, 9999, 0.1)  # a row that the page lacks
    against = Hit(1, first, first, -0.1)
    best = [hits[first], hits[first], hits[second], hits[second], hits[second], elsewhere, against]
    targets = [
        replace(target, top=[hit], bottom=[]) for target, hit in zip(result.targets, best, strict=True)
    ]
    result = replace(result, targets=targets)
    assert data_of(result)["runs"] == [[0, 1, 0], [2, 4, 1]]
    assert data_of(replace(result, targets=[]))["runs"] == []
