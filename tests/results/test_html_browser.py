"""The page in a browser: by clicks, keys and a screen reader; light, dark, narrow and without a script."""

from __future__ import annotations

import base64
import csv
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from browser import ActionChains, Browser, By, Keys, WebElement, started
from made_results import HOSTILE, fused, hostile, made, several, visible

from rapidin.results.decoys import DecoyTest
from rapidin.results.html import notebook, page, shades
from rapidin.results.html.view import View
from rapidin.results.text import score_text
from rapidin.results.types import Hit, QueryResult, TargetResult, Tokens

pytestmark = pytest.mark.full


class Shown(Browser):
    """A browser with a page in it."""

    def open(
        self, results: Sequence[QueryResult], markup: str | None = None, *, words: bool = False, at: str = ""
    ) -> None:
        """Shows a page of these results in a window of 1280 by 900, light, with shades by token unless
        `words`, at an address on the page."""
        self.size(1280, 900)
        self.scheme("light")
        path = self.folder / "page.html"
        path.write_text(page(results) if markup is None else markup, encoding="utf-8", newline="")
        self.driver.get("about:blank")  # so that another address on the same page is a new page
        self.driver.get(path.as_uri() + at)
        if not words:
            for button in self.all(".query:not([hidden]) [data-by=tokens]")[:1]:
                if button.is_displayed():
                    button.click()
        assert self.driver.title.startswith("rapidin") or markup is not None

    def tokens(self) -> list[WebElement]:
        return self.all(".query:not([hidden]) .completion > span")

    def status(self) -> str:
        return self.one(".query:not([hidden]) .status").text

    def hits(self) -> list[list[tuple[int, int, str]]]:
        """(rank, index, score) of what is shown at both ends."""
        return [
            [(int(rank), int(index), score) for rank, index, score in end]
            for end in self.run(
                "return [1, -1].map((side) => [...document.querySelectorAll("
                "`.query:not([hidden]) .hits[data-side='${side}'] > .hit`)].map((hit) => "
                "['.rank', '.index b', '.score'].map((part) => hit.querySelector(part).textContent)))"
            )
        ]

    def classes(self, hit: int) -> list[str]:
        """Classes of the tokens of a hit, by its place in the data."""
        script = "return [...document.querySelectorAll(`[data-hit='${arguments[0]}'] .tokens b`)]"
        return list(self.run(script + ".map((token) => token.className)", hit))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("browser")
    with started(folder) as driver:
        yield Shown(driver, folder)


@pytest.fixture
def shown(browser: Shown) -> Iterator[Shown]:
    """The browser; after a test the console must be silent, and nothing was asked of a network."""
    for log in ("browser", "performance"):
        browser.driver.get_log(log)
    yield browser
    browser.driver.switch_to.default_content()
    assert [entry["message"] for entry in browser.driver.get_log("browser")] == []
    asked = []
    for entry in browser.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    own = (browser.folder / "page.html").as_uri()
    assert [url for url in asked if url.split("#")[0] != own and not url.startswith("blob:")] == []


RESULT = made(hits=9, length=40, generation=24, pool=25, seed=5)


def pool_of(result: QueryResult) -> dict[int, Hit]:
    """All hits on the page by row, each with the parts of its score."""
    parts = [hit for target in result.targets for hit in (*target.top, *target.bottom)]
    return {hit.row: hit for hit in (*parts, *result.top, *result.bottom)}


def ranked(result: QueryResult, chosen: Sequence[int]) -> list[list[tuple[int, int, str]]]:
    """What a selection of tokens must show, computed here."""
    sums = {
        row: float(np.float32(hit.targets)[list(chosen)].astype(float).sum())
        for row, hit in pool_of(result).items()
    }
    k = max(len(result.top), len(result.bottom))
    ends = []
    for sign in (1, -1):
        rows = sorted((row for row in sums if sign * sums[row] > 0), key=lambda row: (-sign * sums[row], row))
        ends.append(
            [
                (rank, pool_of(result)[row].index, score_text(sums[row], result.bounded))
                for rank, row in enumerate(rows[:k], 1)
            ]
        )
    return ends


def whole(result: QueryResult) -> list[list[tuple[int, int, str]]]:
    return [
        [(hit.rank, hit.index, score_text(hit.score, result.bounded)) for hit in end]
        for end in (result.top, result.bottom)
    ]


def selected(shown: Shown) -> list[int]:
    return [n for n, token in enumerate(shown.tokens()) if token.get_attribute("aria-selected") == "true"]


def test_a_click_ranks_the_hits_for_a_token(shown: Shown) -> None:
    shown.open([RESULT])
    assert shown.hits() == whole(RESULT)
    for place in (7, 12):
        shown.tokens()[place].click()
        assert shown.hits() == ranked(RESULT, [place])
        assert selected(shown) == [place]
        mean = np.mean([hit.score for hit in RESULT.top])
        influence = RESULT.targets[place].influence
        assert f"“{RESULT.pieces[place].strip()}”" in shown.status()
        assert f"{100 * influence / mean:.1f}% of the score" in shown.status()
        assert score_text(influence, True) in shown.status()
    shown.tokens()[12].click()  # again: no more
    assert shown.hits() == whole(RESULT)
    assert selected(shown) == []
    assert shown.status() == "Ranked for the whole generation"


def test_a_selection_shows_the_best_of_the_whole_cache_for_its_token(shown: Shown) -> None:
    """Those are the hits of the target itself, as far as they have its sign."""
    shown.open([RESULT])
    shown.tokens()[3].click()
    for end, hits, sign in zip(
        shown.hits(), (RESULT.targets[3].top, RESULT.targets[3].bottom), (1, -1), strict=True
    ):
        expected = [hit.index for hit in hits if sign * hit.score > 0]
        assert [index for _, index, _ in end][: len(expected)] == expected


def test_ranges_by_shift_click_and_by_dragging(shown: Shown) -> None:
    shown.open([RESULT])
    tokens = shown.tokens()
    tokens[4].click()
    ActionChains(shown.driver).key_down(Keys.SHIFT).click(tokens[8]).key_up(Keys.SHIFT).perform()
    assert selected(shown) == [4, 5, 6, 7, 8]
    assert shown.hits() == ranked(RESULT, range(4, 9))
    assert "(5 tokens)" in shown.status()
    ActionChains(shown.driver).key_down(Keys.SHIFT).click(tokens[2]).key_up(Keys.SHIFT).perform()
    assert selected(shown) == [2, 3, 4]
    shown.one(".clear").click()
    assert shown.hits() == whole(RESULT)
    actions = ActionChains(shown.driver).click_and_hold(tokens[10])
    actions.move_to_element(tokens[11]).move_to_element(tokens[13]).release().perform()
    assert selected(shown) == [10, 11, 12, 13]
    assert shown.hits() == ranked(RESULT, range(10, 14))
    ActionChains(shown.driver).move_to_element(tokens[20]).perform()  # the button is up
    assert selected(shown) == [10, 11, 12, 13]


def test_everything_can_be_done_by_keys(shown: Shown) -> None:
    shown.open([RESULT])
    for _ in range(30):
        shown.press(Keys.TAB)
        if shown.run("return document.activeElement.getAttribute('role')") == "option":
            break
    here = "return [...document.querySelectorAll('.completion > span')].indexOf(document.activeElement)"
    assert shown.run(here) == 0
    for _ in range(5):
        shown.press(Keys.ARROW_RIGHT)
    shown.press(Keys.ARROW_LEFT)
    assert shown.run(here) == 4
    assert selected(shown) == []
    shown.press(Keys.ENTER)
    assert selected(shown) == [4]
    assert shown.hits() == ranked(RESULT, [4])
    for _ in range(3):
        shown.press(Keys.SHIFT, Keys.ARROW_RIGHT)
    assert selected(shown) == [4, 5, 6, 7]
    assert shown.hits() == ranked(RESULT, range(4, 8))
    shown.press(Keys.SHIFT, Keys.HOME)
    assert selected(shown) == [0, 1, 2, 3, 4]
    shown.press(Keys.ESCAPE)
    assert shown.hits() == whole(RESULT)
    shown.press(Keys.END)
    assert shown.run(here) == 23
    shown.press(Keys.ARROW_UP)
    above = shown.run(here)
    assert above < 23
    shown.press(Keys.ARROW_DOWN)
    assert shown.run(here) > above
    shown.press(" ")
    assert len(selected(shown)) == 1
    shown.press("/")
    assert shown.run("return document.activeElement.type") == "search"
    shown.press("r")
    shown.press(Keys.TAB)
    assert "csv" in shown.run("return document.activeElement.className")
    shown.press(Keys.SHIFT, Keys.TAB)
    assert shown.run("return document.activeElement.value") == "r"


def decoded(hit: Hit, most: int = 7) -> Any:
    """What the script reads of `Tokens.by_target`."""
    assert hit.tokens is not None
    assert hit.tokens.by_target is not None
    targets, tokens = hit.tokens.by_target.shape
    raw = zlib.decompress(base64.b64decode(shades.levels(hit.tokens.by_target, most)))
    peaks = np.frombuffer(raw[: 4 * targets], "<f4").astype(float)
    levels = np.frombuffer(raw[4 * targets :], np.int8).reshape(targets, tokens) / most
    return peaks[:, None] * levels * np.abs(levels)


def expected_classes(hit: Hit, values: Any, peak: float) -> list[str]:
    assert hit.tokens is not None
    first = hit.tokens.counts.index(True)
    return [
        f"{shades.shade(int(step))}{' q' if n > first and not counts else ''}".strip()
        for n, (step, counts) in enumerate(zip(shades.steps(values, peak), hit.tokens.counts, strict=True))
    ]


def whole_classes(result: QueryResult, hit: Hit) -> list[str]:
    """The classes of a hit's tokens for the whole generation, on the scale of all hits."""
    assert hit.tokens is not None
    return expected_classes(hit, hit.tokens.contributions, View(result, 0).peak)


def chosen_classes(result: QueryResult, hit: Hit, places: Sequence[int]) -> list[str]:
    """The classes for a selection, on the scale of the hits that it shows."""
    by_index = {each.index: each for each in pool_of(result).values()}
    shown = [by_index[index] for end in ranked(result, places) for _, index, _ in end]
    summed = [decoded(each)[list(places)].sum(0) for each in shown]
    peak = max(shades.peak_of(values) for values in summed)
    return expected_classes(hit, decoded(hit)[list(places)].sum(0), peak)


def test_tokens_of_hits_are_shaded_for_the_selection(shown: Shown) -> None:
    shown.open([RESULT])
    hit = RESULT.top[0]
    assert hit.tokens is not None
    assert hit.tokens.by_target is not None
    assert shown.classes(0) == whole_classes(RESULT, hit)
    # A place where this hit is shown near the top, so that it is on the screen and is shaded.
    order = [[index for _, index, _ in ranked(RESULT, [n])[0]] for n in range(24)]
    place = next(n for n in range(24) if hit.index in order[n][:2])
    shown.tokens()[place].click()
    values = decoded(hit)[place]
    shown.until(lambda: shown.classes(0) == chosen_classes(RESULT, hit, [place]))
    exact = hit.tokens.by_target[place]
    true, rounded = (shades.steps(each, shades.peak_of(each)) for each in (exact, values))
    assert np.abs(true - rounded).max() <= 1
    best = int(np.argmax(np.abs(values)))
    card = shown.one("[data-hit='0']")
    listed = card.find_element(By.CSS_SELECTOR, ".strongest li").text
    assert listed.endswith(f"≈ {float(f'{values[best]:.0e}'):+}")
    shown.press(Keys.ESCAPE)
    shown.until(lambda: shown.classes(0) == whole_classes(RESULT, hit))


def test_the_shades_of_a_range_are_of_its_sum(shown: Shown) -> None:
    shown.open([RESULT])
    hit = RESULT.top[0]
    low = next(n for n in range(20) if hit.index in [i for _, i, _ in ranked(RESULT, range(n, n + 4))[0][:2]])
    shown.tokens()[low].click()
    for _ in range(3):
        shown.press(Keys.SHIFT, Keys.ARROW_RIGHT)
    shown.until(lambda: shown.classes(0) == chosen_classes(RESULT, hit, range(low, low + 4)))


def test_without_inflating_the_ranking_works_and_shades_stay(shown: Shown) -> None:
    script = {"source": "delete window.DecompressionStream"}
    added = shown.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    try:
        shown.open([RESULT])
        assert shown.run("return typeof DecompressionStream") == "undefined"
        hit = RESULT.top[0]
        assert hit.tokens is not None
        shown.tokens()[6].click()
        assert shown.hits() == ranked(RESULT, [6])
        assert shown.classes(0) == whole_classes(RESULT, hit)
        labels = shown.until(lambda: [e for e in shown.all(".strongest > span") if "for the whole" in e.text])
        assert labels
    finally:
        shown.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_parts_that_no_token_selects_have_buttons(shown: Shown) -> None:
    targets = [
        replace(RESULT.targets[0], text="all of it", positions=tuple(range(24)), influence=0.4),
        *RESULT.targets[1:],
    ]
    shown.open(
        [replace(RESULT, targets=[*targets[1:], replace(targets[0], positions=())], pieces=RESULT.pieces)]
    )
    (button,) = shown.all(".part")
    assert "all of it" in button.text
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    # Targets were turned by one: the last target's parts are those of the last place.
    assert [row[1] for row in shown.hits()[0]] == [row[1] for row in ranked(RESULT, [23])[0]]
    assert "all of it" in shown.status()
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert shown.hits() == whole(RESULT)


def test_where_parts_of_hits_are_not_known_nothing_can_be_selected(shown: Shown) -> None:
    bare = [[replace(hit, targets=()) for hit in end] for end in (RESULT.top, RESULT.bottom)]
    targets = [replace(target, top=[], bottom=[]) for target in RESULT.targets]
    targets.append(replace(targets[0], text="all of it", positions=tuple(range(24))))
    shown.open([replace(RESULT, top=bare[0], bottom=bare[1], targets=targets)])
    assert {token.get_attribute("role") for token in shown.tokens()} == {None}
    assert shown.all(".status, .hint, button.part") == []
    assert "all of it" in shown.one(".parts").text
    shown.tokens()[2].click()
    shown.press(Keys.ESCAPE)
    assert shown.hits() == whole(RESULT)


def test_search_finds_texts_and_indices(shown: Shown) -> None:
    shown.open([RESULT])
    box = shown.one(".search input")
    listed = [*RESULT.top, *RESULT.bottom]

    def having(words: str) -> list[int]:
        return [hit.index for hit in listed if words in "".join(hit.tokens.pieces).lower()]  # type: ignore[union-attr]

    for words in ("twelve", "PARIS", "the tea", "instruction:\n"):
        if not words.endswith("\n"):
            box.send_keys(words)
        else:
            box.send_keys(words.strip())
        expected = having(words.strip().lower())
        assert [index for end in shown.hits() for _, index, _ in end] == expected
        assert shown.one(".found").text == f"{len(expected)} of {len(listed)}"
        if expected and shown.run("return CSS.highlights !== undefined"):
            marked = shown.run("return [...CSS.highlights.get('found')].map((range) => range.toString())")
            assert len(marked) >= len(expected)
            assert {mark.lower() for mark in marked} == {words.strip().lower()}
        box.clear()
    box.send_keys(f"#{listed[3].index}")
    assert listed[3].index in [index for end in shown.hits() for _, index, _ in end]
    box.clear()
    box.send_keys("no such words anywhere")
    assert shown.hits() == [[], []]
    for tab in shown.all(".tab"):
        tab.click()
        assert [e.text for e in shown.all(".list .none") if e.is_displayed()] == [
            "No matches for no such words anywhere. Clear the filter"
        ]
    next(button for button in shown.all(".unfilter") if button.is_displayed()).click()
    assert box.get_attribute("value") == ""
    assert shown.hits() == whole(RESULT)
    assert shown.one(".found").text == ""


def saved(shown: Shown, name: str) -> list[dict[str, str]]:
    path = shown.saved / name
    path.unlink(missing_ok=True)
    shown.one(".query:not([hidden]) .csv").click()
    shown.until(lambda: path.exists() and path.stat().st_size > 0)
    raw = path.read_bytes()
    assert raw.count(b"\r\n") >= 1
    text = raw.decode("utf-8")
    rows = list(csv.DictReader(text.splitlines(keepends=True), strict=True))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def test_a_fused_ranking_keeps_its_order_and_a_selection_is_of_gradients_alone(shown: Shown) -> None:
    result = fused()
    result = replace(result, bottom=[replace(result.top[1], rank=1, fused=None), *result.bottom[1:]])
    shown.open([result])
    title = shown.one(".lists .list h3.helpful")
    assert title.text == "Fused ranking"
    top, bottom = ([(hit.rank, hit.index) for hit in end] for end in (result.top, result.bottom))
    assert [[entry[:2] for entry in end] for end in shown.hits()] == [top, bottom]
    shown.tokens()[1].click()
    assert title.text == "Most helpful"
    listed = [index for end in shown.hits() for _, index, _ in end]
    assert len(listed) == len(set(listed))  # a row at both ends of the whole is at one
    assert "of the fused ranking" in shown.one(".lists").text
    shown.tokens()[1].click()
    assert title.text == "Fused ranking"
    assert [[entry[:2] for entry in end] for end in shown.hits()] == [top, bottom]


def test_the_table_is_saved_as_csv(shown: Shown) -> None:
    shown.open([RESULT])
    rows = saved(shown, "hits.csv")
    listed = [*RESULT.top, *RESULT.bottom]
    assert len(rows) == len(listed)
    for row, hit in zip(rows, listed, strict=True):
        assert row["side"] == ("helpful" if hit.score > 0 else "harmful")
        assert (int(row["rank"]), int(row["index"])) == (hit.rank, hit.index)
        assert float(row["score"]) == hit.score
        assert float(row["error"]) == hit.error
        assert [int(row["rank_low"]), int(row["rank_high"])] == list(hit.ranks or ())
        assert row["tied"] == str(hit.tied).lower()
        assert row["estimate"] == "" if hit.estimate is None else float(row["estimate"]) == hit.estimate
        assert int(row["copies"]) == len(hit.copies) + hit.copies_more
        assert row["copies_indices"].split() == [str(index) for index in hit.copies]
        assert int(row["BM25 rank"]) == hit.standings["BM25"].rank
        assert hit.tokens is not None
        assert row["text"] == "".join(hit.tokens.pieces)
        assert row["selection"] == ""
    shown.tokens()[5].click()
    chosen = saved(shown, "hits.csv")
    expected = [entry for end in ranked(RESULT, [5]) for entry in end]
    assert [
        (int(r["rank"]), int(r["index"]), score_text(float(r["score"]), True)) for r in chosen
    ] == expected
    assert {row["selection"] for row in chosen} == {f"“{RESULT.pieces[5].strip()}”"}
    assert {row["error"] for row in chosen} == {""}


def test_p_and_q_are_in_the_csv_of_a_cache_with_decoys(shown: Shown) -> None:
    top = [replace(hit, p=0.005, q=0.05) for hit in RESULT.top]
    shown.open([replace(RESULT, top=top, decoys=DecoyTest(200, 400, (3, 0)))])
    rows = saved(shown, "hits.csv")
    assert [(row["p"], row["q"]) for row in rows] == [("0.005", "0.05")] * len(RESULT.helpful) + [
        ("", "")
    ] * len(RESULT.harmful)
    assert "p 0.005, q 0.05" in shown.one(".hit .notes").text
    shown.tokens()[5].click()
    assert {row["p"] for row in saved(shown, "hits.csv")} == {""}
    shown.open([RESULT])
    assert "p" not in saved(shown, "hits.csv")[0]


def test_no_cell_of_the_csv_is_a_formula(shown: Shown) -> None:
    shown.open([hostile()])
    rows = saved(shown, "hits.csv")
    assert len(rows) == 5
    by_index = {int(row["index"]): row for row in rows}
    assert by_index[2]["text"] == "'" + HOSTILE[12]
    assert by_index[4]["text"] == '\'@SUM(A1)\n"quoted", with commas'
    everywhere = visible("".join(HOSTILE)).strip("\n")
    assert by_index[1]["text"] == f"{everywhere}\n{everywhere}"
    for row in rows:
        for name, cell in row.items():
            assert not re.match(r"\s*[=+@\t\r]", cell), (name, cell)
            assert not cell.startswith("-") or name in {"score", "whole_score"}
            assert not re.match(r"\s*[=+@-]", name)


def test_hostile_texts_are_texts(shown: Shown) -> None:
    shown.open([hostile()])
    assert (
        shown.run(
            "return document.querySelectorAll('img, iframe, object, embed, [onload], [onerror]').length"
        )
        == 0
    )
    assert shown.run("return document.scripts.length") == 2
    assert shown.run("return document.querySelector('.completion').textContent") == visible("".join(HOSTILE))
    texts = shown.run("return [...document.querySelectorAll('.completion > span')].map((t) => t.textContent)")
    assert texts == [visible(text) for text in HOSTILE]
    shown.tokens()[0].click()
    shown.one(".search input").send_keys("<script>")
    assert "“</script><img" in shown.status()  # as text
    assert shown.driver.title.startswith("rapidin: </script>")
    assert shown.run("return typeof window.owned") == "undefined"


def test_scripts_in_the_page_cannot_run(shown: Shown) -> None:
    """Were markup to get in after all, the policy would stop it."""
    markup = page([RESULT]).replace("</main>", "<script>document.title = 'owned'</script></main>")
    markup = markup.replace("</main>", "<img src='x' onerror=\"document.title='owned'\"></main>")
    shown.open([], markup)
    assert "owned" not in shown.driver.title
    said: list[str] = []
    # Of the script, the image and its handler.
    shown.until(lambda: said.extend(e["message"] for e in shown.driver.get_log("browser")) or len(said) >= 3)
    assert all("Content Security Policy" in message for message in said)
    assert "owned" not in shown.driver.title
    events = [json.loads(entry["message"])["message"] for entry in shown.driver.get_log("performance")]
    failed = [e["params"] for e in events if e["method"] == "Network.loadingFailed"]
    assert [params.get("blockedReason") for params in failed] == ["csp"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_without_a_script_the_essentials_are_there(shown: Shown, scheme: str) -> None:
    result = made(hits=6, length=30, generation=12, pool=6, seed=2)
    shown.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        shown.open([result])
        shown.scheme(scheme)
        assert "js" not in (shown.one("html").get_attribute("class") or "").split()
        assert shown.hits() == whole(result)
        seen = shown.one("body").text
        for hit in (*result.top, *result.bottom):
            assert hit.tokens is not None
            assert "".join(hit.tokens.pieces).split()[-1] in seen
            assert score_text(hit.score, True) in seen
        for words in (
            "Most helpful",
            "Most harmful",
            "By column: source",
            "Scripts are off",
            "How to read this",
        ):
            assert words in seen
        tokens = shown.tokens()
        assert [token.get_attribute("class") or "" for token in tokens] == [
            shades.shade(int(step)) for step in shades.steps([target.influence for target in result.targets])
        ]
        assert not any(element.is_displayed() for element in shown.all("button, input"))
        assert low_contrast(shown) == []
    finally:
        shown.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_several_queries_are_moved_between(shown: Shown) -> None:
    results = several()
    shown.open(results)
    links = shown.all("nav a")
    assert len(links) == 3
    assert shown.hits() == whole(results[0])
    for n in (1, 2, 0):
        links[n].click()
        assert shown.hits() == whole(results[n])
        assert [link.get_attribute("aria-current") == "true" for link in links] == [k == n for k in range(3)]
        assert [s.is_displayed() for s in shown.all(".query")] == [k == n for k in range(3)]
        assert shown.run("return document.activeElement.id") == f"q{n + 1}-title"
    shown.tokens()[1].click()
    assert shown.hits() == ranked(results[0], [1])
    links[2].click()
    rows = saved(shown, "hits-3.csv")
    assert [row["index"] for row in rows] == [str(h.index) for h in (*results[2].top, *results[2].bottom)]


def test_long_texts_are_folded_and_open(shown: Shown) -> None:
    """Prompt and answer each at their start; for a selection where their strongest token is."""
    result = made(hits=4, length=300, generation=5)
    shown.open([result])
    ask, answer = shown.all("[data-hit='0'] .ask, [data-hit='0'] .answer")
    shown.until(lambda: "folded" in (answer.get_attribute("class") or "").split())
    button = shown.one("[data-hit='0'] .answer + .more")
    low = answer.size["height"]
    assert shown.run("return arguments[0].scrollHeight > arguments[0].clientHeight", answer)
    assert shown.run("return arguments[0].scrollTop", answer) == 0
    assert 2.5 < low / shown.run("return parseFloat(getComputedStyle(arguments[0]).lineHeight)", answer) < 5.5
    assert ask.size["height"] < low
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert answer.size["height"] > 2 * low
    button.click()
    assert answer.size["height"] == low
    # The strongest token of a selection is in sight, also where it is far down.
    hit = result.top[0]
    place = next(n for n in range(5) if hit.index in [i for _, i, _ in ranked(result, [n])[0][:2]])
    values = decoded(hit)[place]
    shown.tokens()[place].click()
    shown.until(lambda: shown.classes(0) == chosen_classes(result, hit, [place]))
    head = hit.tokens.counts.index(True) if hit.tokens else 0
    strongest = sorted(range(1, len(values)), key=lambda n: -abs(values[n]))[:5]
    far = [n for n in strongest if n >= head]
    assert far
    seen = shown.run(
        "const [text, n] = arguments; const box = text.getBoundingClientRect();"
        "const r = text.closest('.hit').querySelectorAll('.tokens b')[n].getBoundingClientRect();"
        "return r.top >= box.top - 1 && r.bottom <= box.bottom + 1;",
        answer,
        far[0],
    )
    assert seen


def test_the_template_is_folded_and_in_no_row(shown: Shown) -> None:
    head, tail = (
        ("Below is an instruction that describes a task.\n\n", "### Instruction:\n"),
        "\n\n### Response:\n",
    )
    hits = []
    for n, word in enumerate(("sings", "walks", "knows")):
        pieces = (*head, "Who", " " + word, "?", tail, "The", " teapots", ".")
        tokens = Tokens(pieces, (False,) * 6 + (True,) * 3, (0.1,) * 9)
        hits.append(Hit(n + 1, n, n, 0.5, tokens=tokens))
    prompt = "".join(head) + "Who jumps?" + tail
    shown.open([QueryResult(prompt, "The moon.", True, hits, [], "layer")])
    tokens = shown.all("[data-hit='0'] .tokens b")
    assert [token.is_displayed() for token in tokens] == [False] * 2 + [True] * 7
    assert shown.one(".ask").text.replace("\n", "").startswith("Who sings?")
    assert shown.one(".prompt").text.replace("\n", "").startswith("Who jumps?")
    assert not shown.all(".prompt.folded")
    place = shown.run("return getComputedStyle(document.querySelector('.shared'), '::before').content")
    assert "⋯" in place
    toggle = shown.one(".template")
    assert toggle.text == "Show the template"
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "true"
    assert tokens[0].is_displayed()
    assert shown.one(".prompt").text.startswith("Below is")
    toggle.click()
    assert not tokens[0].is_displayed()
    shown.one("[data-as=rows]").click()
    assert [row.text for row in shown.all(".row .from")] == ["Who sings?", "Who walks?", "Who knows?"]


def text_result(pieces: Sequence[str], values: Sequence[float], counts: Sequence[bool] = ()) -> QueryResult:
    """A query with one hit of these tokens."""
    tokens = Tokens(tuple(pieces), tuple(counts) or (True,) * len(pieces), tuple(values))
    targets = [TargetResult(piece, (n,), values[n], [], []) for n, piece in enumerate(pieces)]
    hit = Hit(1, 0, 0, 0.5, {"text": "".join(pieces)}, tokens=tokens)
    text = "".join(pieces)
    return QueryResult("p", text, True, [hit], [], "layer", pieces=tuple(pieces), targets=targets)


# Texts of tokens, and which of them are a word or a character together.
CUT = {
    "English": (("First", ",", " tea", "p", "ots", " sing", "."), [[0], [1], [2, 3, 4], [5], [6]]),
    "Chinese": (("好", "：", "首", "都", "是", "巴", "黎", "。"), [[0], [1], [2, 3], [4], [5, 6], [7]]),
    "Arabic": (("لا", " عا", "صمة", " فرن", "سا"), [[0], [1, 2], [3, 4]]),
    "Thai": (("ก", " ", "ภา", "ษา", "ไท", "ย"), [[0], [1], [2, 3], [4, 5]]),
    "characters of several tokens": (
        ("a", " ", "", "", "👩‍", "👩‍", "👧", " b"),
        [[0], [1], [2, 3, 4, 5, 6], [7]],
    ),
}


@pytest.mark.parametrize("language", CUT)
def test_shades_are_of_words_by_default(shown: Shown, language: str) -> None:
    pieces, words = CUT[language]
    values = [0.3, *(0.01 * (-1) ** n * (n + 1) for n in range(1, len(pieces)))]
    result = text_result(pieces, values)
    shown.open([result], words=True)
    sums = [sum(values[n] for n in word) for word in words]
    steps = dict(zip(map(tuple, words), shades.steps(sums, max(map(abs, sums[1:]))), strict=True))
    expected = {n: shades.shade(int(step)) for word, step in steps.items() for n in word}

    def found() -> list[str]:
        return [name.replace("void", "").strip() for name in shown.classes(0)]

    shown.until(lambda: found() == [expected[n] for n in range(len(pieces))])
    for word, total in zip(words, sums, strict=True):
        place = next(n for n in word if pieces[n])
        token = shown.all("[data-hit='0'] .tokens b")[place]
        ActionChains(shown.driver).move_to_element(token).perform()
        assert token.get_attribute("title") == score_text(total, True)
        assert shown.tokens()[place].get_attribute("title") == score_text(total, True)
    assert shown.one(".strongest > span").text == "Strongest words"
    shown.one("[data-by=tokens]").click()
    shown.until(lambda: shown.one(".strongest > span").text == "Strongest tokens")
    alone = shades.steps(values, max(map(abs, values[1:])))
    assert found() == [shades.shade(int(step)) for step in alone]
    assert shown.tokens()[0].get_attribute("title") == score_text(values[0], True)


def test_a_word_ends_where_the_answer_begins(shown: Shown) -> None:
    shown.open(
        [text_result(("x", " a", "b", "c"), (9.0, 0.2, 0.1, 0.4), (False, False, True, True))], words=True
    )
    shown.until(
        lambda: shown.classes(0)[1:] == [shades.shade(int(s)) for s in shades.steps([0.2, 0.5, 0.5], 0.5)]
    )


def address(shown: Shown) -> str:
    return str(shown.run("return location.hash"))


def test_the_address_follows_query_selection_and_hit(shown: Shown) -> None:
    results = [RESULT, replace(RESULT, prompt="another")]
    shown.open(results)
    assert address(shown) == ""
    shown.tokens()[4].click()
    assert address(shown) == "#q1.t5"
    ActionChains(shown.driver).key_down(Keys.SHIFT).click(shown.tokens()[6]).key_up(Keys.SHIFT).perform()
    assert address(shown) == "#q1.t5-7"
    chosen = shown.hits()
    link = shown.all(".query:not([hidden]) .hits[data-side='1'] a.index")[1]
    hit = shown.run("return Number(arguments[0].closest('.hit').dataset.hit)", link)
    assert (link.get_attribute("href") or "").endswith(f"#q1.t5-7.h{hit + 1}")
    link.click()
    assert address(shown) == f"#q1.t5-7.h{hit + 1}"
    shown.all("nav a")[1].click()
    assert address(shown) == "#q2"
    shown.driver.back()
    shown.until(lambda: address(shown) == f"#q1.t5-7.h{hit + 1}")
    shown.until(lambda: shown.one("#q1").is_displayed())
    assert shown.hits() == chosen
    shown.driver.back()
    shown.driver.back()
    shown.until(lambda: shown.hits() == whole(RESULT))
    assert address(shown) == ""
    shown.driver.forward()
    shown.until(lambda: selected(shown) == [4, 5, 6])


def test_an_address_is_restored(shown: Shown) -> None:
    results = [RESULT, replace(RESULT, prompt="another")]
    harmful = len(RESULT.top)
    shown.open(results, at=f"#q2.h{harmful + 1}")
    assert [s.is_displayed() for s in shown.all(".query")] == [False, True]
    card = shown.one(f"[id='q2.h{harmful + 1}']")
    assert card.is_displayed()  # its tab is in front
    bar = shown.one("#q2 .bar")
    places = "return [arguments[0].getBoundingClientRect().bottom, arguments[1].getBoundingClientRect().top]"
    shown.until(lambda: (found := shown.run(places, bar, card)) and found[0] - 1 <= found[1] < 500)
    shown.open(results, at="#q1.t3-5")
    assert selected(shown) == [2, 3, 4]
    assert shown.hits() == ranked(RESULT, [2, 3, 4])
    for wrong in ("#q9.t1", "#q1.t99", "#q1.h999", "#nonsense", "#q1.p7", "#q0"):
        shown.open(results, at=wrong)
        assert shown.hits() == whole(RESULT)


def test_tokens_with_the_same_best_hit_are_underlined(shown: Shown) -> None:
    best = RESULT.top[1]
    targets = [
        replace(target, top=[replace(best, score=0.1)] if 2 <= n <= 4 else [])
        for n, target in enumerate(RESULT.targets)
    ]
    shown.open([replace(RESULT, targets=targets)])
    tokens = shown.tokens()
    assert [n for n, token in enumerate(tokens) if token.get_attribute("data-run")] == [2, 3, 4]
    assert [token.get_attribute("data-rank") for token in tokens[2:5]] == [None, None, "2"]
    said = f"index {best.index}, rank 2 of the most helpful"
    assert said in (tokens[3].get_attribute("title") or "")
    assert said not in (tokens[5].get_attribute("title") or "")
    tokens[3].click()
    assert f"best example of 3 tokens in a row: {said}" in shown.status()
    tokens[5].click()
    assert "in a row" not in shown.status()


def test_harmful_hits_are_in_a_tab(shown: Shown) -> None:
    shown.open([RESULT])
    helpful, harmful = shown.all(".tab")
    assert [tab.text for tab in (helpful, harmful)] == ["Most helpful 5", "Most harmful 4"]

    def in_front() -> list[bool]:
        return [shown.one(f".hits[data-side='{side}']").is_displayed() for side in (1, -1)]

    assert in_front() == [True, False]
    harmful.click()
    assert in_front() == [False, True]
    assert [tab.get_attribute("aria-selected") for tab in (helpful, harmful)] == ["false", "true"]
    shown.press(Keys.ARROW_LEFT)
    assert in_front() == [True, False]
    assert shown.run("return document.activeElement === arguments[0]", helpful)
    shown.press(Keys.END)
    assert in_front() == [False, True]
    shown.tokens()[3].click()
    assert [tab.text.split()[-1] for tab in (helpful, harmful)] == [
        str(len(end)) for end in ranked(RESULT, [3])
    ]
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert in_front() == [True, True]
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_rows_show_a_line_per_hit(shown: Shown) -> None:
    shown.open([RESULT])
    shown.one("[data-as=rows]").click()
    rows = shown.all(".hits[data-side='1'] .row")
    assert len(rows) == len(RESULT.top)
    for row, hit in zip(rows, RESULT.top, strict=True):
        assert row.size["height"] < 40
        rank, score, index = row.text.split()[:3]
        assert (int(rank), score, int(index)) == (hit.rank, score_text(hit.score, True), hit.index)
        assert hit.tokens is not None
        answer = "".join(hit.tokens.pieces[hit.tokens.counts.index(True) :])
        assert " ".join(answer.split())[:60] in " ".join(row.text.split())
        assert "Below is an instruction" not in row.text
    article = shown.one("[data-hit='1'] article")
    assert not article.is_displayed()
    rows[1].click()
    assert article.is_displayed()
    assert rows[1].get_attribute("aria-expanded") == "true"
    assert address(shown) == "#q1.h2"
    rows[1].click()
    assert not article.is_displayed()
    shown.tokens()[3].click()
    found = [
        (int(rank), int(index), score)
        for rank, score, index in (row.text.split()[:3] for row in shown.all(".hits[data-side='1'] .row"))
    ]
    assert found == ranked(RESULT, [3])[0]
    shown.one("[data-as=cards]").click()
    assert shown.one(".hits[data-side='1'] .hit article").is_displayed()


def test_on_a_phone_hits_come_into_view_and_targets_are_large(shown: Shown) -> None:
    prompts = ["Howdy! Which river is long?", "Which library is quiet?"]
    shown.open([replace(RESULT, prompt=prompt) for prompt in prompts])
    shown.size(390, 800)
    shown.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 1})
    try:
        assert shown.all("nav .of")[0].text == "Howdy! Which river is long?"
        assert shown.all("nav .of")[0].is_displayed()
        shown.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        small = shown.run(
            "return [...document.querySelectorAll('a, button, input, summary, [role=option], [tabindex]')]"
            ".filter((e) => e.checkVisibility() && !e.matches('.skip, main, h2') && "
            "e.getBoundingClientRect().height < 23.9)"
            ".map((e) => e.tagName + '.' + e.className + ' ' + e.getBoundingClientRect().height)"
        )
        assert small == []
        shown.run("document.querySelector('.completion').scrollIntoView()")
        box = shown.run(
            "const r = document.querySelectorAll('.completion > span')[2].getClientRects()[0];"
            "return [r.x + r.width / 2, r.y + r.height / 2]"
        )
        point = [{"x": box[0], "y": box[1]}]
        for kind, points in (("touchStart", point), ("touchEnd", [])):
            event = {"type": kind, "touchPoints": points}
            shown.driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)
        shown.until(lambda: selected(shown) == [2])
        top = "return document.querySelector('.query:not([hidden]) .tabs').getBoundingClientRect().top"
        shown.until(lambda: 0 <= shown.run(top) < 600)
    finally:
        shown.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_on_paper_all_is_open_and_shaded(shown: Shown) -> None:
    shown.open([made(hits=6, length=300, generation=30)])
    shown.one("[data-as=rows]").click()
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        cut = shown.run(
            "return [...document.querySelectorAll('.ask, .answer, .prompt')].filter((e) => "
            "e.checkVisibility() && e.scrollHeight > e.clientHeight + 1).length"
        )
        assert cut == 0
        assert shown.one("[data-hit='0'] .shared > b").is_displayed()
        assert all(card.is_displayed() for card in shown.all(".hits article"))
        assert not any(button.is_displayed() for button in shown.all("button"))
        style = "const s = getComputedStyle(document.querySelector(arguments[0])); return s[arguments[1]]"
        assert shown.run(style, ".tokens b", "printColorAdjust") == "exact"
        assert shown.run(style, ".hit", "breakInside") == "avoid"
        shown.run("dispatchEvent(new Event('beforeprint'))")
        assert all(shown.run("return [...document.querySelectorAll('details')].map((one) => one.open)"))
        shown.run("dispatchEvent(new Event('afterprint'))")
        assert not any(shown.run("return [...document.querySelectorAll('details')].map((one) => one.open)"))
    finally:
        shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


CONTRASTS = """
const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
const context = canvas.getContext("2d", { willReadFrequently: true });
const known = new Map();
function rgba(color) {
  if (!known.has(color)) {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    known.set(color, [...context.getImageData(0, 0, 1, 1).data]);
  }
  return known.get(color);
}
function light(color) {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = color.map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(element) {
  for (; element; element = element.parentElement) {
    const color = rgba(getComputedStyle(element).backgroundColor);
    if (color[3] === 255) return color;
    if (color[3] !== 0) throw new Error("half transparent");
  }
  return [255, 255, 255, 255];
}
function ratio(one, other) {
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
const poor = [];
let texts = 0;
function check(element, color, least, what) {
  texts += 1;
  const found = ratio(rgba(color), ground(element));
  const name = `${what ?? ""} ${element.tagName}.${element.className} ${element.textContent.slice(0, 20)}`;
  if (found < least) poor.push(`${name}: ${found.toFixed(2)}`);
}
for (const element of document.body.querySelectorAll("*")) {
  if (!element.checkVisibility() || element.closest("svg")) continue;
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (own) check(element, getComputedStyle(element).color, 4.5);
  const before = getComputedStyle(element, "::before");
  if (before.content.startsWith('"')) check(element, before.color, 4.5, "::before");
  const placeholder = getComputedStyle(element, "::placeholder");
  if (element.tagName === "INPUT") check(element, placeholder.color, 4.5, "placeholder");
  if (["INPUT", "BUTTON"].includes(element.tagName) && !element.matches(".more")) {
    check(element.parentElement, getComputedStyle(element).borderTopColor, 3, "border");
  }
}
for (const mark of document.querySelectorAll(".hit .meter rect, .hit .mark, .hit .layers path")) {
  if (!mark.checkVisibility()) continue;
  const style = getComputedStyle(mark);
  check(mark.closest(".hit"), style.fill === "none" ? style.stroke : style.fill, 3, "drawing");
}
const probe = document.createElement("span");
probe.style.backgroundColor = "var(--found)";
document.body.append(probe);
check(probe, getComputedStyle(document.body).color, 4.5, "found");
probe.remove();
return [texts, poor];
"""


def low_contrast(shown: Shown) -> list[str]:
    """Texts with a contrast below 4.5 to their ground, and borders and drawings below 3 (WCAG 2.2, AA)."""
    texts, poor = shown.run(CONTRASTS)
    assert texts > 40
    return list(poor)


def shaded_result() -> QueryResult:
    """A result with every shade, of tokens that count and of those that do not."""
    steps = list(range(-9, 10))
    values = [float(np.sign(n) * (n / 9) ** 2) for n in steps]
    pieces = tuple(f" w{n}\n" for n in range(2 * len(steps)))
    tokens = Tokens(
        (*pieces, ""), tuple(n % 2 == 0 for n in range(2 * len(steps) + 1)), (*values, *values[::-1], 0.1)
    )
    result = made(hits=6, length=30, generation=12, seed=2)
    targets = [
        replace(target, influence=value) for target, value in zip(result.targets, values[::2], strict=False)
    ]
    top = [replace(result.top[0], tokens=tokens, targets=()), *result.top[1:]]
    return replace(result, top=top, targets=[*targets, *result.targets[len(targets) :]])


@pytest.mark.parametrize("how", ["light", "dark", "toggled dark", "toggled light"])
def test_contrast_in_all_shades_and_themes(shown: Shown, how: str) -> None:
    shown.open([shaded_result(), hostile()])
    start = {"light": "light", "dark": "dark", "toggled dark": "light", "toggled light": "dark"}[how]
    shown.scheme(start)
    toggle = shown.one(".theme")
    shown.until(lambda: toggle.text == ("Dark" if start == "light" else "Light"))
    if how.startswith("toggled"):
        toggle.click()
    dark = how.endswith("dark")
    assert toggle.text == ("Light" if dark else "Dark")
    red = int(shown.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]"))
    assert (red < 60) == dark
    classes = {" ".join(name.split()) for name in shown.classes(0)}
    assert {f"{side}{n}{q}" for side in "pn" for n in range(1, 10) for q in ("", " q")} <= classes
    shown.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert low_contrast(shown) == []
    grounds = shown.run(
        "return Object.fromEntries([...document.querySelectorAll(`[data-hit='0'] .tokens b`)].map("
        "(t) => [t.className.split(' ')[0], getComputedStyle(t).backgroundColor]))"
    )
    shade_names = [f"{side}{n}" for side in "pn" for n in range(1, 10)]
    assert len({grounds[name] for name in shade_names}) == 18
    shown.tokens()[3].click()
    assert low_contrast(shown) == []
    shown.all("nav a")[1].click()
    assert low_contrast(shown) == []


@pytest.mark.parametrize("width", [320, 360, 768, 1160, 1920])
def test_nothing_is_wider_than_the_window(shown: Shown, width: int) -> None:
    shown.open([*several(), made(hits=4, length=6, generation=0, scale=1e-9, normalize="none")])
    shown.size(width, 800)
    for n, link in enumerate(shown.all("nav a")):
        shown.run("arguments[0].click()", link)
        if n == 0:
            shown.run("document.querySelectorAll('.completion > span')[2].scrollIntoView()")
            shown.tokens()[2].click()
        beyond = shown.run(
            "return [...document.querySelectorAll('main *')].filter((e) => e.checkVisibility() && "
            "!e.closest('.scrolled, .sr') && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map((e) => e.className)"
        )
        assert beyond == []
        assert shown.run("return document.documentElement.scrollWidth") <= width


def test_a_screen_reader_finds_names_for_all(shown: Shown) -> None:
    shown.open([RESULT, hostile()])
    shown.tokens()[5].click()
    first = f"Rank 1 {ranked(RESULT, [5])[0][0][2]}"

    def with_first_hit() -> list[dict[str, Any]] | None:
        """The tree, once it has the hits of the chosen token: it is made some time after the page."""
        nodes = shown.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        names = [
            node.get("name", {}).get("value", "")
            for node in nodes
            if not node.get("ignored") and node["role"]["value"] == "article"
        ]
        return nodes if any(re.sub(r"\s+", " ", name).startswith(first) for name in names) else None

    tree = shown.until(with_first_hit)
    roles: dict[str, list[str]] = {}
    live = []
    for node in tree:
        if node.get("ignored"):
            continue
        role, name = node["role"]["value"], node.get("name", {}).get("value", "")
        roles.setdefault(role, []).append(name)
        if role == "status":
            live.append({p["name"]: p["value"].get("value") for p in node["properties"]}.get("live"))
    for role in (
        "button",
        "link",
        "searchbox",
        "option",
        "listbox",
        "article",
        "navigation",
        "image",
        "heading",
    ):
        assert roles.get(role), role
        assert all(name.strip() for name in roles[role]), (role, roles[role])
    assert len(roles["option"]) == 24
    assert live.count("polite") == 2
    levels = shown.run(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].filter((e) => e.checkVisibility())"
        ".map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_in_a_notebook_the_page_works_in_its_frame(shown: Shown) -> None:
    shown.open([], f"<!DOCTYPE html><title>notebook</title>{notebook([RESULT])}")
    shown.driver.switch_to.frame(shown.one("iframe"))
    assert shown.run("return window.origin") == "null"
    shown.tokens()[2].click()
    assert shown.hits() == ranked(RESULT, [2])
    rows = saved(shown, "hits.csv")
    assert len(rows) == sum(len(end) for end in ranked(RESULT, [2]))
    assert shown.one("iframe, html").tag_name == "html"
