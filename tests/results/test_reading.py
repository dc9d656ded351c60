"""Examples as the model reads them, as markup for a notebook."""

from __future__ import annotations

import io
import json

from rich.console import Console

from rapidin.results.reading import Reading, ShownExample, ShownText


def test_no_character_of_the_data_acts_or_hides_in_a_notebook() -> None:
    text = ShownText("na<b>me", [1, 2], ["a\u200b<i>", "b\u202e\n"], [False, True])
    markup = Reading([ShownExample(0, "d\u202e<b>.jsonl", [text])])._repr_html_()
    assert "\u200b" not in markup
    assert "\u202e" not in markup
    assert "<b>me" not in markup
    assert "d\\u202e&lt;b&gt;.jsonl" in markup
    assert 'a<i class="esc">\\u200b</i>&lt;i&gt;<mark' in markup
    assert 'b<i class="esc">\\u202e</i>\n</mark>' in markup


def test_a_terminal_shows_what_has_a_loss_and_no_character_acts() -> None:
    chosen = ShownText("chosen", [1, 2, 3], ["a\u202e", "b\n", "c"], [False, True, True])
    rejected = ShownText("rejected", [], ["not\tread"], [])
    reading = Reading(
        [
            ShownExample(0, "d\x1b.jsonl, line 1", [chosen, rejected], truncated=True),
            ShownExample(1, "d.jsonl, line 2", [ShownText("", [4], ["d"], [True])], "no_target", label="yes"),
        ]
    )
    console = Console(width=100, color_system=None, file=io.StringIO())
    console.print(reading.report())
    assert console.file.getvalue().splitlines() == [
        "d\\x1b.jsonl, line 1: 3 tokens, 2 with a loss, truncated",
        "chosen:",
        "a\\u202eb↵",
        "c",
        "rejected:",
        "not     read",
        "",
        "d.jsonl, line 2: 1 token, 1 with a loss, label: yes, not used: no target",
        "d",
    ]
    assert repr(reading).splitlines()[2] == "a\\u202e[[b"
    found = json.loads(reading.to_json())
    assert [each["tokens"] for each in found] == [3, 1]
    assert found[0]["texts"][0]["loss"] == [False, True, True]
    assert found[0]["texts"][1]["text"] == "not\tread"
