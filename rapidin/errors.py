"""The one error that is the user's to mend, and the one warning."""

from importlib import import_module
from typing import Any


class UserError(Exception):
    """A mistake that the user can mend: what is wrong, and how to mend it, on one line.

    The command line prints it as ``rapidin: <line>`` and exits with code 2.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = " ".join(what.split())
        self.remedy = " ".join(remedy.split())
        super().__init__(f"{self.what}; {self.remedy}" if self.remedy else self.what)


class CoverageWarning(UserWarning):
    """Much of a model does not count, and nobody asked for that."""


_PACKAGES = {"sklearn": "scikit-learn", "rank_bm25": "rank-bm25"}


def needs(module: str, what: str, extra: str) -> Any:
    """A module of an optional package; UserError, which names the extra of rapidin that brings it, where it
    is not installed. what: that needs it."""
    try:
        return import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(
            f"{what} needs the package {_PACKAGES.get(package, package)}", f"pip install 'rapidin[{extra}]'"
        ) from None


def short(value: object) -> str:
    """A value on one line of at most 40 characters, to name it in an error."""
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the CPU or a GPU, did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch is not imported
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def reason_of(error: Exception) -> str:
    """An error's message on one line: its first line, and the next ones if the first only introduces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"there is no {lines[0]}"
    message = lines[0]
    for line in lines[1:]:
        if len(message) > 300 or not (message.endswith(":") or len(message) < 20):
            break
        message = f"{message} {line}"
    return message
