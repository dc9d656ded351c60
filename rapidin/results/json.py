"""Query results as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapidin.results.types import QueryResult


def results_json(results: Iterable[QueryResult], made: Mapping[str, Any] | None = None) -> str:
    """All queries as one JSON object, in ASCII; a number that is not finite becomes null.

    made: what the hits were found with, put before the queries.
    """
    return json.dumps(plain_json(results_value(results, made)), indent=1, default=str)


def results_value(results: Iterable[QueryResult], made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `results_json` writes, as values."""
    return {**(made or {}), "queries": [result.to_json() for result in results]}


def plain_json(value: Any) -> Any:
    """A value without numbers that JSON does not know: what is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    return [plain_json(item) for item in value] if isinstance(value, list | tuple) else value
