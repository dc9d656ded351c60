"""Examples as the model reads them, as markup for a notebook."""

from __future__ import annotations

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
