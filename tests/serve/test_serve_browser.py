"""The live view in a browser: a question is asked, its answer watched, opened, compared and forgotten."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'rapidin[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rapidin[serve]'")
from browser import Browser, Keys, started
from live import TOKEN, Client, served, tiny_cache, tiny_service

from rapidin.cache import Cache
from rapidin.serve.jobs import Job
from rapidin.serve.service import Question, Service

pytestmark = pytest.mark.full


class Slow(Service):
    """A service that takes its time for a question with "slow" in it, after the first stage."""

    def explain(self, question: Question, job: Job) -> Any:
        if "slow" in question.text:
            job.on_event("stage", {"stage": "waiting for the test", "done": 1, "total": 2})
            while not job.cancelled:
                time.sleep(0.01)
        return super().explain(question, job)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return tiny_cache(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def client(cache: Cache) -> Iterator[Client]:
    plain = tiny_service(cache)
    with served(Slow(plain.ensemble, plain.examples, plain.examples, about={"model": "tiny"})) as made:
        yield made


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with started(folder) as driver:
        yield Browser(driver, folder)


@pytest.fixture
def browser(driven: Browser, client: Client) -> Iterator[Browser]:
    """The browser at the first page; after a test its console is silent, and it asked nobody else."""
    driven.size(1280, 900)
    driven.scheme("light")
    for log in ("browser", "performance"):
        driven.driver.get_log(log)
    driven.driver.get(f"http://127.0.0.1:{client.port}/?token={TOKEN}")
    yield driven
    assert [entry["message"] for entry in driven.driver.get_log("browser")] == []
    own = f"http://127.0.0.1:{client.port}/"
    for entry in driven.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            assert message["params"]["request"]["url"].startswith((own, "data:", "blob:"))


def ask(browser: Browser, question: str, *, words: bool = False) -> str:
    """Asks, and returns the address of the answer, which is then shown."""
    before = browser.driver.current_url
    if words:
        browser.one("[name=words]").click()
    browser.one("#ask").send_keys(question)
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.driver.current_url != before)
    browser.until(lambda: browser.all("[data-hit]"))
    return str(browser.driver.current_url)


def test_the_token_leaves_the_address(browser: Browser) -> None:
    assert TOKEN not in browser.driver.current_url
    assert "No questions yet" in browser.one("main").text or browser.all(".history li")


def test_an_answer_is_shown_by_the_page_itself(browser: Browser) -> None:
    address = ask(browser, "Who is quick?")
    assert "/answers/" in address
    assert "Who is quick?" in browser.one(".prompt").text
    browser.one(".again").click()  # for each word
    browser.until(lambda: browser.driver.current_url != address)
    tokens = browser.until(lambda: browser.all(".completion [role=option]"))
    place = next(n for n, token in enumerate(tokens) if token.text.strip())  # some have no width
    tokens[place].click()
    assert "of the score" in browser.one(".status").text
    assert browser.driver.current_url.endswith(f"#q1.t{place + 1}")
    browser.driver.back()
    browser.until(lambda: "whole generation" in browser.one(".status").text)


def test_the_hits_are_filtered_by_a_column_and_opened_whole(browser: Browser) -> None:
    ask(browser, "Who is brown?")
    chip = browser.all(".hit .chips [role=button]")[0]
    value = chip.text.split("book")[1].strip()
    chip.click()
    assert browser.one(".search input").get_attribute("value") == f"source=book {value}"
    shown = [card for card in browser.all(".hits .hit") if card.is_displayed()]
    assert shown
    assert all(f"book {value}" in card.text for card in shown)
    chip.click()
    assert browser.one(".search input").get_attribute("value") == ""
    link = browser.all(".hit a.whole")[0]
    row = link.get_attribute("href")
    link.click()
    browser.until(lambda: browser.driver.current_url == row and browser.all(".columns"))
    assert "book" in browser.one(".columns").text
    browser.one(".tools a").click()
    assert browser.until(lambda: browser.all(".history li"))


def test_a_question_can_be_cancelled(browser: Browser) -> None:
    browser.one("#ask").send_keys("a slow one")
    browser.one(".asking [type=submit]").click()
    browser.until(lambda: "waiting for the test: 1 of 2" in browser.one(".stage").text)
    browser.one(".cancel").click()
    browser.until(lambda: browser.one(".stage").text == "Cancelled")
    assert not browser.one(".cancel").is_displayed()
    browser.one("#ask").clear()
    assert "/answers/" in ask(browser, "Who is lazy?")  # the next one is answered


def test_a_mistake_is_said(browser: Browser) -> None:
    browser.one("#ask").send_keys("   ")
    browser.one(".asking [type=submit]").click()
    browser.until(lambda: browser.one(".problem").is_displayed())
    assert "the question is empty" in browser.one(".problem").text
    browser.driver.get_log("browser")  # the browser itself says that the status was 400


def test_two_answers_are_compared(browser: Browser) -> None:
    first = ask(browser, "One, two")
    second = ask(browser, "One, three")
    browser.one(".tools form button").click()
    browser.until(lambda: browser.all(".comparison"))
    assert "are shared" in browser.one(".comparison").text
    links = [link.get_attribute("href") for link in browser.all(".titles a")]
    assert links == [second, first]
    assert len(browser.all(".query")) == 2
    assert len([section for section in browser.all(".query") if section.is_displayed()]) == 1


def test_an_answer_is_forgotten(browser: Browser, client: Client) -> None:
    address = ask(browser, "Six, seven")
    browser.one(".tools a").click()
    count = len(browser.until(lambda: browser.all(".history li")))
    browser.all(".forget")[0].click()
    browser.until(lambda: len(browser.all(".history li")) == count - 1)
    assert client.get(address[address.index("/answers") :]).status == 404


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(browser: Browser, width: int, scheme: str) -> None:
    address = ask(browser, "One, two, three")
    browser.size(width, 844)
    browser.scheme(scheme)
    origin = address[: address.index("/answers")]
    for page in (origin + "/", address, origin + "/rows/1"):
        browser.driver.get(page)
        assert browser.run("return document.documentElement.scrollWidth") <= width, page
        small = browser.run(
            "return [...document.querySelectorAll('.live button, .live select, .live summary, .live a, "
            "a.whole')].filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 24)"
            ".map((e) => e.outerHTML)"
        )
        assert small == []
