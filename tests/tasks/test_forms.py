"""Data in the forms of other tools, for tasks other than a causal model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rapidin.data.examples import open_examples
from rapidin.data.generations import as_records
from rapidin.errors import UserError
from rapidin.tasks.names import forms_of

ASKED = {"role": "user", "content": "Q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("A", "B"))


@pytest.mark.parametrize("task", ["preference", "reward"])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "chosen": "A", "rejected": "B"},
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
    ],
)
def test_pairs_of_other_tools_are_chats(task: str, record: dict[str, Any]) -> None:
    examples = open_examples([record], forms=forms_of(task))
    assert examples.form == "preference chat"
    assert [examples[0][name] for name in ("prompt", "chosen", "rejected")] == [[ASKED], [GOOD], [BAD]]


def test_forms_of_a_task_are_left_as_they_are(tmp_path: Path) -> None:
    verdict = {"prompt": [ASKED], "completion": [GOOD], "label": True}
    assert open_examples([verdict], forms=forms_of("kto"))[0] == verdict
    assert as_records([verdict], forms_of("kto")) == [verdict]
    asked = {"question": "a", "sentence": "b", "label": 1}
    assert open_examples([asked], forms=forms_of("classification"))[0] == asked
    anything = {"prompt": [1], "completion": {"a": 2}}
    assert open_examples([anything], forms=None)[0] == anything
    assert as_records([anything], None) == [anything]
    table = tmp_path / "d.csv"
    table.write_text("sentence,label\nThe fox,good\n")
    assert open_examples(table, forms=forms_of("classification"))[0] == {
        "sentence": "The fox",
        "label": "good",
    }
    with pytest.raises(UserError, match="expected 'label' with 'text' or 'sentence'"):
        open_examples([{"question": "a", "answer": "b"}], forms=forms_of("classification"))


def test_a_map_names_the_fields_of_a_task() -> None:
    pairs = [{"q": "Q", "good": "A", "bad": "B"}]
    names = "prompt=q,chosen=good,rejected=bad"
    examples = open_examples(pairs, map=names, forms=forms_of("preference"))
    assert (examples.form, examples[0]["chosen"]) == ("preference", "A")
    assert json.dumps(examples.original(0)) == json.dumps(pairs[0])
