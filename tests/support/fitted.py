"""An attributor with the preconditioner of a cache that it made, as a query uses it."""

from __future__ import annotations

from rapidin import Attributor, Cache
from rapidin.attribution.provenance import checked


def fitted(attributor: Attributor, cache: Cache) -> Attributor:
    """The attributor whose own sketches are those of the cache."""
    return Attributor(checked(attributor.source, cache.manifest))
