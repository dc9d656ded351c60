"""What retraining did to a generation: the p-value, the sentences, and JSON and back."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from made_results import made

from rapidin.results.collection import Results
from rapidin.results.confirmation import Confirmation, Effect
from rapidin.results.html import page
from rapidin.results.json import results_json
from rapidin.results.terminal import confirmation_report, hits_report, make_console

CONTROLS = tuple(n / 10 for n in range(19))
EFFECT = Effect((3, 8), -9.0, 6.5, CONTROLS, "No <idea>.", True, 2)
CONFIRMATION = Confirmation(-2.0, (-2.5, -2.4), "Teapots.", True, 10, (EFFECT,), 1, {"recipe": {"batch": 4}})


@pytest.mark.parametrize(("fall", "p"), [(6.5, 0.05), (1.8, 0.1), (1.75, 0.1), (0.9, 0.55), (-1.0, 1.0)])
def test_p_is_the_rank_among_the_controls(fall: float, p: float) -> None:
    assert replace(EFFECT, fall=fall).p == pytest.approx(p)


def test_sentences_say_no_more_than_is_known() -> None:
    assert EFFECT.sentence(True) == "without these 2 rows the model no longer says this: p = 0.05"
    less = "without these 2 rows the model says this less readily: p = 0.05"
    assert EFFECT.sentence(False) == less
    assert replace(EFFECT, changed=False).sentence(True) == less
    unsure = replace(EFFECT, fall=0.9, column="source", value="web").sentence(True)
    assert unsure.startswith("without the 2 rows with source=web the model says this about as readily as")
    few = replace(EFFECT, controls=(0.1, 0.2), rows=(5,)).sentence(True)
    assert few.startswith("without this row the model says this less readily than without random rows, but")
    assert few.endswith("these sets are too few to be sure: p = 0.33")
    assert EFFECT.detail == (
        "the log-probability falls by 6.50, and by 0.00 to 1.80 without as many random rows; the greedy "
        "answer changes here, and in 2 of 19 controls"
    )


def test_a_recipe_that_differs_is_said() -> None:
    assert not CONFIRMATION.is_far
    assert CONFIRMATION.compared == -2.5
    assert CONFIRMATION.recipe_text.endswith("on all rows (-2.50 to -2.40 with 2 seeds)")
    far = replace(CONFIRMATION, tuned=-1.0)
    assert far.is_far
    assert "the recipe differs" in far.recipe_text


def test_json_and_back() -> None:
    grouped = replace(CONFIRMATION, effects=(replace(EFFECT, column="source", value="web"),))
    for confirmation in (CONFIRMATION, grouped):
        assert Confirmation.from_json(json.loads(json.dumps(confirmation.to_json()))) == confirmation
    assert CONFIRMATION.to_json()["left_out"][0]["sentence"] == CONFIRMATION.sentences[0]


def test_the_terminal_and_the_page_show_it() -> None:
    result = replace(made(hits=2, generation=0, length=4), confirmation=CONFIRMATION)
    for report in (confirmation_report(result, 100), hits_report([result])):
        out = StringIO()
        make_console(out).print(report, width=100)
        shown = " ".join(out.getvalue().split())
        assert "Without these 2 rows the model no longer says this: p = 0.05." in shown
        assert "Now says No <idea>." in shown
    text = page([result])
    assert "Without these 2 rows the model no longer says this: p = 0.05." in text
    assert "No &lt;idea&gt;." in text
    again = Results.from_json(json.loads(results_json([result])))
    assert again[0].confirmation == CONFIRMATION
