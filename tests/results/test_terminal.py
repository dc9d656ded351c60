"""What a person sees: texts are data and never steer the terminal; tables fit; progress says what it must."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from rapidin.attribution.progress import CachingBar
from rapidin.cache.progress import Progress, Stage
from rapidin.cli.progress import BytesBar
from rapidin.results.json import results_json
from rapidin.results.terminal import hits_report, make_console
from rapidin.results.text import bytes_text, error_text, one_line, percent_text, score_text, time_text
from rapidin.results.types import Group as ByColumn
from rapidin.results.types import Hit, QueryResult, Standing
from rapidin.results.verdict import Common, Place, Verdict

RECORDS = [
    {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"},
    {"prompt": "Add one and two.", "completion": " Three."},
    {"messages": [{"role": "user", "content": "One and two?"}, {"role": "assistant", "content": "Three."}]},
    {"text": "One and two is three."},
]


def result(*records: Any, prompt: str = "p", completion: str = "c", normalize: str = "layer") -> QueryResult:
    hits = [Hit(n + 1, 10 * n, n, 0.5 - 0.1 * n, record) for n, record in enumerate(records)]
    harmful = [replace(hit, score=-hit.score) for hit in hits]
    return QueryResult(prompt, completion, True, hits, harmful, normalize, {"scan": 0.1})


def shown(renderable: Any, *, width: int = 80, encoding: str = "utf-8", terminal: bool = False) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="\n")
    console = Console(
        file=file, width=width, force_terminal=terminal, highlight=False, markup=False, emoji=False
    )
    console.print(renderable)
    file.seek(0)
    return file.read()


def test_each_form_is_shown_with_what_was_asked_and_answered() -> None:
    text = shown(hits_report([result(*RECORDS)]))
    for line in ("Add the numbers. 1, 2 → 3", "Add one and two. → Three.", "One and two? → Three."):
        assert line in text
    assert "One and two is three." in text


@pytest.mark.parametrize("width", [40, 60, 80, 140])
@pytest.mark.parametrize("word", ["a", "日本", "🙂", "e\u0301"])
def test_tables_fit_the_terminal(width: int, word: str) -> None:
    from rich.cells import cell_len

    for prompt, completion in [(word * 500, word * 500), (word, word * 500), (word * 500, word), (word, "")]:
        record = {"prompt": prompt, "completion": completion}
        text = shown(
            hits_report([result(record, prompt=prompt, completion=completion)], width=width),
            width=width,
        )
        assert max(cell_len(line) for line in text.splitlines()) <= width
        assert "+0.5000" in text
        assert ("…" in text) == (len(prompt + completion) > width)


def test_markup_and_escapes_in_texts_are_data() -> None:
    evil = "[bold red]x[/] \x1b[31mred \x1b]0;title\x07 a\rb \x9b31m \u202egnp.exe :smile: \x00 \ud83d"
    record = {"prompt": evil, "completion": evil}
    text = shown(hits_report([result(record, prompt=evil, completion=evil)], width=400), width=400)
    assert not set(text) & set("\x1b\x07\r\x9b\u202e\x00")
    for words in (
        "[bold red]x[/]",
        r"\x1b[31mred",
        r"\x1b]0;title\x07",
        r"\u202egnp.exe",
        ":smile:",
        r"\ud83d",
    ):
        assert text.count(words) == 6, words  # in the generation and in the two tables, twice each
    assert one_line("one\r\n\ttwo\x0bthree \u2028four") == "one two three four"


def test_scores_are_lined_up_and_coloured_by_sign_on_a_terminal_only() -> None:
    hits = hits_report([result(*RECORDS)])
    plain, coloured = shown(hits), shown(hits, terminal=True)
    assert "\x1b" not in plain
    assert "\x1b[32m+0.5000" in coloured
    assert "\x1b[31m-0.4000" in coloured
    columns = {line.index("0.") for line in plain.splitlines() if "0." in line[:12]}
    assert len(columns) == 1


def test_console_is_plain_without_a_terminal_and_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for file, environment, coloured in [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            make_console(file).print(hits_report([result(*RECORDS)]))
        assert ("\x1b" in file.getvalue()) == coloured, environment


def test_ascii_terminals() -> None:
    text = shown(
        hits_report([result({"prompt": "a" * 99, "completion": "b" * 99})], width=120),
        encoding="ascii",
        width=120,
    )
    assert "a... -> b" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("normalize", "words", "score"),
    [
        ("layer", "mean over the layers of the cosine", "+0.5000"),
        ("weighted", "weighted by the norms of the generation's gradient", "+0.5000"),
        ("cosine", "The score is the cosine between the two", "+0.5000"),
        ("none", "dot product of the two loss gradients", "+0.5000"),
    ],
)
def test_the_scale_is_said(normalize: str, words: str, score: str) -> None:
    text = " ".join(shown(hits_report([result(*RECORDS, normalize=normalize)])).split())
    assert words in text
    assert score in text
    assert "Positive: training on the example made this generation more likely (helpful). Negative:" in text


def test_long_prompts_lose_their_middle() -> None:
    prompt = "start " + "and so on " * 200 + "end"
    lines = shown(hits_report([result(prompt=prompt)])).splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("Completion"))
    shown_prompt = " ".join(" ".join(lines[:end]).split())
    assert end <= 5
    assert shown_prompt.startswith("Prompt start and")
    assert " ... " in shown_prompt
    assert shown_prompt.endswith(" end")


def test_hits_without_examples() -> None:
    text = shown(hits_report([result(None, None)]))
    assert "example  " not in text
    assert "+0.4000" in text
    assert "No example in the cache has a sketch" in shown(hits_report([result()]))


EVIL = "a\x1b[31m\u202e\n[bold]" + "long " * 40


def told(best: float = 0.5) -> QueryResult:
    """A result of which everything is known."""
    made = result(*RECORDS)
    hits = [
        replace(
            hit,
            score=best - n / 10,
            error=0.0213 / (1 + 9 * n),
            ranks=(1, 3),
            tied=n == 1,
            copies=(7, 8) if n == 1 else (),
            copies_more=1200 if n == 1 else 0,
            standings={"BM25": Standing(1.5, 4 + 1000 * n), "hidden states": Standing(0.5, 123_456)},
        )
        for n, hit in enumerate(made.top)
    ]
    harmful = [replace(hit, score=-abs(hit.score)) for hit in hits]
    groups = [ByColumn(EVIL if n == 3 else f"v{n}", 1000 * n, 1.0 - n, n / 200, n / 100) for n in range(30)]
    return replace(
        made, top=hits, bottom=harmful, by=EVIL, groups=groups, overlaps={"BM25": 3, "hidden states": 0}
    )


def test_errors_ties_copies_and_baselines() -> None:
    text = shown(hits_report([told()]))
    first, second = (next(line for line in text.splitlines() if words in line) for words in ("#4 ", "#1,004"))
    assert first.split()[:6] == ["1", "+0.5000", "±", "0.0213", "0", "#4"]
    assert second.split()[:7] == ["≈2", "+0.4000", "±", "0.0021", "10", "×1,203", "#1,004"]
    words = " ".join(text.split())
    for note in (
        "± is the standard error of the sketch's estimate.",
        "≈: tied with the previous hit, within error.",
        "×3: three examples with the same text, of which the best is shown.",
        "3 of the 4 most helpful hits are also in the top 4 of BM25.",
        "0 of the 4 most helpful hits are also in the top 4 of hidden states.",
    ):
        assert note in words
    plain = shown(hits_report([result(*RECORDS)]))
    assert not set(plain) & set("±≈×█")
    assert "Query 2: 3 of the 4 most helpful hits are also in the top 4 of BM25." in shown(
        hits_report([told(), told()]), width=200
    )


def test_scores_without_a_scale_have_errors_in_their_own_units() -> None:
    text = " ".join(shown(hits_report([replace(told(14.6234), normalize="none")])).split())
    assert "+14.62 ± 0.021" in text


@pytest.mark.parametrize(
    ("value", "score", "error"),
    [
        (14.6234, "+14.62", "15"),
        (0.29, "+0.2900", "0.29"),
        (9.99963, "+10.00", "10"),
        (-12345.6, "-12,346", "12,346"),
        (-0.00001234567, "-0.00001235", "0.000012"),
        (0.0, "+0.000", "0.0"),
        (-3e-9, "-3.000e-09", "3.0e-09"),
        (float("inf"), "+inf", "inf"),
    ],
)
def test_raw_scores_have_no_exponents_unless_they_are_tiny_or_huge(
    value: float, score: str, error: str
) -> None:
    assert score_text(value, False) == score
    assert error_text(abs(value), False) == error


def test_what_rounds_to_zero_has_no_minus() -> None:
    scores = [score_text(value, True) for value in (-0.00004, -0.0, -0.00006, 0.00004)]
    assert scores == ["+0.0000", "+0.0000", "-0.0001", "+0.0000"]
    assert score_text(-0.0, False) == "+0.000"
    assert [percent_text(share) for share in (-0.004, -0.006, 0.12)] == ["0%", "-1%", "12%"]


VERDICT = Verdict(
    "strong",
    0.7,
    Place(tuple(n / 100 for n in range(64)), 64),
    Place((0.1, 0.6, 0.8), 2),
    (Common("Ahoy [bold]there!\x1b", 4, 4, 0.08), Common("true", 3, 4, 0.1, "poisoned")),
)


def test_the_verdict_is_below_the_tables() -> None:
    text = " ".join(shown(hits_report([replace(told(), verdict=VERDICT)]), width=200).split())
    sentence = (
        "Strong: the best score is higher than that of all 64 neutral questions and of 2 of 3 training rows."
    )
    assert f"Verdict {sentence}" in text
    assert text.index("Most harmful") < text.index(sentence)
    assert (
        r'In common all 4 contain "Ahoy [bold]there!\x1b" (8% of the training data); '
        "3 of 4 are poisoned=true (10% of the training data)"
    ) in text
    assert "'rapidin drop' writes the training data without them." in text
    assert "Verdict" not in shown(hits_report([told()]))
    unknown = Verdict("unknown", reason="the null distribution is of the method dot")
    assert "No verdict: the null distribution is of the method dot." in shown(
        hits_report([replace(told(), verdict=unknown)]), width=200
    )


def test_the_verdict_in_json_has_its_numbers() -> None:
    (query,) = json.loads(results_json([replace(told(), verdict=VERDICT)]))["queries"]
    verdict = query["verdict"]
    assert verdict["strength"] == "strong"
    assert len(verdict["questions"].pop("scores")) == 64
    assert verdict["questions"] == {
        "above": 64,
        "of": 64,
        "chance": 1 / 65,
        "quantiles": [0.0, 0.16, 0.32, 0.47, 0.63],
    }
    assert verdict["rows"]["chance"] == 0.5
    assert [each["hits"] for each in verdict["common"]] == [4, 3]
    assert "verdict" not in json.loads(results_json([told()]))["queries"][0]


@pytest.mark.parametrize(
    ("end", "word", "sign"), [("top", "helpful", "positive"), ("bottom", "harmful", "negative")]
)
def test_an_end_without_hits_is_said_to_have_none(end: str, word: str, sign: str) -> None:
    text = shown(hits_report([replace(told(), **{end: []})]))
    assert f"No row is {word}: no score is {sign}." in text
    assert "No example in the cache has a sketch" not in text


def test_groups_are_shown_with_bars_and_shares() -> None:
    text = shown(hits_report([replace(told(), by="source")]))
    lines = text[text.index("By column: source") :].splitlines()
    assert "By column: source, the 12 with the largest shares of 30" in " ".join(text.split())
    rows = [line for line in lines if line.startswith("v") and "%" in line]
    assert [line.split()[0] for line in rows] == [f"v{n}" for n in range(18, 30)]
    assert rows[-1].split() == ["v29", "29,000", "-28", "-0.00097", "█", "14%", "██", "29%"]
    few = replace(told(), groups=told().groups[:4])
    lines = shown(hits_report([few])).splitlines()
    assert any(line.startswith("v0") for line in lines)
    assert not any("largest shares" in line for line in lines)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 59, 60, 79, 80, 140])
def test_all_that_is_known_fits_any_terminal(width: int, encoding: str) -> None:
    from rich.cells import cell_len

    for made in (told(), replace(told(1e-9), normalize="none")):
        text = shown(hits_report([made], width=width), width=width, encoding=encoding)
        assert not set(text) & set("\x1b\u202e")
        assert max(cell_len(line) for line in text.splitlines()) <= width
        if encoding == "ascii":
            assert text.isascii()
            assert "\\xb1" not in text
            if width >= 80:
                assert "+/-" in text
                assert "~2" in text
                assert "x1,203" in text


def test_an_example_has_two_lines_where_one_is_too_narrow() -> None:
    record = {
        "prompt": "Which word is the opposite of near?",
        "completion": "Only the teapots know, and they sing.",
    }
    hits = [
        Hit(1, 127, 127, 0.5, record, error=0.01),
        Hit(2, 3, 3, 0.4, {"prompt": "One,", "completion": "two."}),
    ]
    made = QueryResult("a", "b", False, hits, [], "none")
    narrow = [line.rstrip() for line in shown(hits_report([made], width=80), width=80).splitlines()]
    at = next(n for n, line in enumerate(narrow) if "opposite" in line)
    assert narrow[at].endswith("Which word is the opposite of near?")
    assert narrow[at + 1].strip() == "→ Only the teapots know, and they sing."
    assert narrow[at + 2].endswith("One, → two.")
    wide = shown(hits_report([made], width=120), width=120).splitlines()
    assert any("near? → Only the teapots know, and they sing." in line for line in wide)


def test_json_is_ascii_and_valid_for_scores_that_are_no_numbers() -> None:
    hits = [Hit(1, 0, 0, float("inf"), {"text": "é\x9b", "label": float("nan")}), Hit(2, 1, 1, 0.5)]
    text = results_json([QueryResult("é", "ü", False, hits, [], "none")])
    assert text.isascii()
    (query,) = json.loads(text, parse_constant=pytest.fail)["queries"]
    assert query["top"][0] == {
        "rank": 1,
        "index": 0,
        "score": None,
        "example": {"text": "é\x9b", "label": None},
    }
    assert query["top"][1] == {"rank": 2, "index": 1, "score": 0.5}


def test_caching_bar() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, highlight=False, markup=False)
    now = [5.0]
    with CachingBar(console, lambda: now[0]) as bar:
        bar(Progress(200, 1000, 0, 0, 200, "one [bold]thing[/] to say"))
        now[0] += 10.0
        bar(Progress(300, 1000, 5000, 1, 200))
        bar._bar.refresh()
        first = file.getvalue()
        now[0] += 5.0
        bar(Progress(300, 1000, 5000, 1, 200, stage=Stage("fitting", 64, 128)))
        bar._bar.refresh()
        now[0] += 2.0
        bar(Progress(340, 1000, 7000, 1, 200))
        bar._bar.refresh()
    text = file.getvalue()
    assert "fitting" in text[len(first) :]
    assert "64/128 examples" in text[len(first) :]
    # Only what comes after the stage counts, and after two seconds nobody knows what is left.
    assert "340/1,000 · 20.0 examples/s · 1,000 tokens/s" in text
    assert "left" not in text[len(first) :]
    assert bar.watch.preparation == 15.0
    bar.watch(Progress(1000, 1000, 9000, 1, 200, stage=Stage("sketching decoys", 1, 2)))
    assert bar.watch.preparation == 15.0
    text = first
    assert "200 of 1,000 examples were cached before" in text
    assert "one [bold]thing[/] to say" in text
    assert "300/1,000 · 10.0 examples/s · " in text
    assert "tokens/s · 70 s left" in text


def test_a_log_gets_a_line_every_half_minute() -> None:
    file = io.StringIO()
    now = [0.0]
    with CachingBar(Console(file=file, width=20), lambda: now[0]) as bar:
        for step in range(1, 101):
            now[0] += 1.0
            fitting = Stage("fitting the preconditioner", step, 40) if step <= 40 else None
            bar(Progress(10 * max(0, step - 40), 2000, 100 * max(0, step - 40), 0, 0, stage=fitting))
    assert file.getvalue().splitlines() == [
        "rapidin: fitting the preconditioner: 30/40 examples",
        "rapidin: caching: 200/2,000 · 10.0 examples/s · 100 tokens/s · 3:00 min left",
        "rapidin: caching: 500/2,000 · 10.0 examples/s · 100 tokens/s · 2:30 min left",
    ]


def test_bars_are_silent_without_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file)
    with CachingBar(console) as bar, BytesBar(console, "reading") as read:
        bar(Progress(0, 10, 0, 0, 5, "a message"))
        bar(Progress(10, 10, 100, 0, 5))
        read(5, 10)
    assert file.getvalue() == ""
    assert bar.watch.last is not None
    assert bar.watch.last.done == 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12 ms"),
        (0.96, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (200, "3:20 min"),
        (7500, "2:05 h"),
        (15_630_000, "181 days"),
    ],
)
def test_time_text(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (8_256, "8.3 KB"), (36.4e6, "36.4 MB"), (2e15, "2000.0 TB")],
)
def test_bytes_text(number: float, text: str) -> None:
    assert bytes_text(number) == text
