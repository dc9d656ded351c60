"""How many inputs a property test tries: some that are the same in each run, or many that are random.

RAPIDIN_EXAMPLES multiplies all of these numbers: `make test-full` sets it to 2, with the same inputs in each
run, so that a change is not judged by luck; `make properties`, which the nightly job runs, sets it to 100, at
random.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rapidin.errors import UserError

_Made = TypeVar("_Made")
FACTOR = int(os.environ.get("RAPIDIN_EXAMPLES", "1"))


def tries(count: int) -> settings:
    """The settings of a property test that tries `count` inputs in `make test`.

    No input has a deadline and none is reported as slow, since a test may share its processor with others.
    """
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR < 100,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def made_or_refused(make: Callable[[], _Made]) -> tuple[_Made | None, UserError | None]:
    """What a call returns, or the UserError that it raises; any other exception is a failure of the test."""
    try:
        return make(), None
    except UserError as error:
        return None, error


def words(**limits: Any) -> st.SearchStrategy[str]:
    """Texts that UTF-8 can write: without half a character (a lone surrogate)."""
    return st.text(st.characters(exclude_categories=["Cs"]), **limits)


SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)
)
# Any JSON value, also those that UTF-8 cannot write, NaN and Infinity.
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)

# Names of fields that tools use, so that many records are nearly of some form.
NAMES = st.sampled_from(
    [
        *("prompt", "completion", "instruction", "input", "output", "text", "messages", "conversations"),
        *("input_ids", "labels", "attention_mask", "question", "answer", "response", "system", "context"),
        *("weight", "chosen", "rejected", "original", "label", "tools"),
    ]
)
MESSAGES: st.SearchStrategy[Any] = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON,
            "content": st.text(max_size=4) | JSON,
            "from": st.sampled_from(["human", "gpt"]) | JSON,
            "value": st.text(max_size=4) | JSON,
            "weight": st.sampled_from([0, 1]),
        },
    ),
    max_size=3,
)
# JSON objects of which some are records, and the others have something wrong.
RECORDS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    NAMES | st.text(max_size=3),
    st.text(max_size=4) | MESSAGES | st.lists(st.integers(-101, 30), max_size=4) | JSON,
    max_size=5,
)
