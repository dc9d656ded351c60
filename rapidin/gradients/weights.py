"""Whether the weights of a file are those that a model expects."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rapidin.errors import UserError

_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_RENAME = "the names have the prefix of a wrapper: save the unwrapped model, or rename its weights"


def check_weights(model: Any, info: Any, name: str, what: str) -> None:
    """Raises UserError unless a model's file holds the weights that its config describes, and no others.

    info: what transformers reports of loading it.
    """
    shapes = [
        f"'{key}' as {list(in_file)}, not {list(expected)}"
        for key, in_file, expected in info["mismatched_keys"]
    ]
    wrong = describe_weights(info["missing_keys"], info["unexpected_keys"], shapes)
    if not wrong:
        return
    saved_as = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    other = f"; it was saved as {saved_as}, not as {type(model).__name__}"
    raise UserError(
        f"the weights of the {what} '{name}' do not fit its config: {wrong}"
        + (other if saved_as != type(model).__name__ else ""),
        _RENAME if any(prefix in key for key in info["unexpected_keys"] for prefix in _WRAPPED) else "",
    )


def describe_weights(
    missing: Collection[str], unexpected: Collection[str], shapes: Collection[str] = ()
) -> str:
    """Describes weights that a file lacks (they would be random), holds in excess, or holds in another shape
    than the config says; "" if there are none. shapes: descriptions of the last kind."""
    lacked, in_excess = ([f"'{name}'" for name in names] for names in (missing, unexpected))
    sentences = []
    for names, verb in ((shapes, "holds"), (lacked, "lacks"), (in_excess, "also holds")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            sentences.append(f"the file {verb} {', '.join(sorted(names)[:3])}{more}")
    return "; ".join(sentences)
