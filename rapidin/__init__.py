"""rapidin: find the training examples behind what a language model said.

The flow, and the module of each step: examples (`data`), gradients and their sketches (`gradients`, `ops`),
the cache (`cache`), queries (`attribution`), and how hits are shown (`results`). Public names are imported
when they are first used, so ``import rapidin`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapidin import ops as ops
    from rapidin.attribution.attributor import Attributor as Attributor
    from rapidin.attribution.ensemble import Ensemble as Ensemble
    from rapidin.attribution.methods import self_influence as self_influence
    from rapidin.attribution.one_call import explain as explain
    from rapidin.cache import Cache as Cache
    from rapidin.distributed import patient_threads as patient_threads
    from rapidin.errors import CoverageWarning as CoverageWarning
    from rapidin.errors import UserError as UserError
    from rapidin.gradients.load import load_model as load_model

__version__ = "0.1.0"

_HOMES = {
    "Attributor": "rapidin.attribution.attributor",
    "Cache": "rapidin.cache",
    "CoverageWarning": "rapidin.errors",
    "Ensemble": "rapidin.attribution.ensemble",
    "UserError": "rapidin.errors",
    "self_influence": "rapidin.attribution.methods",
    "explain": "rapidin.attribution.one_call",
    "load_model": "rapidin.gradients.load",
    "patient_threads": "rapidin.distributed",
}
__all__ = [
    "Attributor",
    "Cache",
    "CoverageWarning",
    "Ensemble",
    "UserError",
    "__version__",
    "explain",
    "load_model",
    "ops",
    "patient_threads",
    "self_influence",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("rapidin.ops")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rapidin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
