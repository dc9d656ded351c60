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
    value = {**(made or {}), "queries": [result.to_json() for result in results]}
    return json.dumps(_finite(value), indent=1, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
