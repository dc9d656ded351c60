"""Frozen dataclasses of options: each field is described once, for the command line and for Python.

    @documented
    @dataclass(frozen=True)
    class QueryOptions(Settings):
        '''What a query returns.'''

        top_k: int = option(10, help="Examples to show at each end of the ranking.", metavar="N", limits=(1,
        None))

`documented` appends the fields' help to the docstring of the class; `rapidin.cli.options` makes flags of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar

from rapidin.errors import UserError, short

if TYPE_CHECKING:
    from typing_extensions import Self

_KEY = "option"
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is shown and read on the command line.

    help: one or two sentences; flag: its name there, by default the field's, None if it has no flag; metavar:
    stands for the value in help texts; panel: the group of options that it belongs to; choices: all values of
    a text; minimum, maximum: of numbers; default: what applies when the field is None, in words; parse: makes
    the value from the flag's text, and raises UserError if that is impossible.
    """

    help: str
    flag: str | None
    metavar: str | None
    panel: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    default: str | None
    parse: Callable[[str], Any] | None


def option(
    value: Any = MISSING,
    *,
    help: str,
    flag: str | None = "",
    metavar: str | None = None,
    panel: str = "Options",
    choices: tuple[str, ...] = (),
    limits: tuple[float | None, float | None] = (None, None),
    default: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field with the default `value`; the other arguments are those of `Option` (limits: minimum
    and maximum)."""
    described = Option(help, flag, metavar, panel, choices, *limits, default, parse)
    return field(default=value, metadata={_KEY: described})


def described(settings: type[Any]) -> dict[str, tuple[Field[Any], Option]]:
    """The fields that were made by `option`, by name."""
    return {each.name: (each, each.metadata[_KEY]) for each in fields(settings) if _KEY in each.metadata}


def documented(settings: _Class) -> _Class:
    """The class with its fields' help in the docstring."""
    lines = []
    for name, (_, described_as) in described(settings).items():
        default = f" Default: {described_as.default}." if described_as.default else ""
        lines.append(f"    {name}: {described_as.help}{default}")
    settings.__doc__ = "\n".join([(settings.__doc__ or "").rstrip(), "", *lines, ""])
    return settings


class Settings:
    """What dataclasses of options have in common."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; tuples become lists."""
        return {each.name: _json(getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def given(cls, options: Self | None, by_name: Mapping[str, Any]) -> Self:
        """The options of a call that takes an object or single fields by name. Raises TypeError for both, and
        for an unknown name."""
        if options is not None and by_name:
            raise TypeError(f"give either options or single ones by name, got both ({', '.join(by_name)})")
        check_names(by_name, cls)
        return cls(**by_name) if options is None else options

    def check_values(self) -> None:
        """Raises UserError for a value that is not of its field's kind, below or above its limits, or none of
        its choices. None is left to the field."""
        for name, (each, described_as) in described(type(self)).items():
            value = getattr(self, name)
            if value is not None and described_as.parse is None:
                _check_value(name, value, str(each.type), described_as)
                if isinstance(value, Integral) and not isinstance(value, int):  # such as numpy's
                    object.__setattr__(self, name, int(value))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` returned. Raises TypeError for an unknown field."""
        return cls(**{name: tuple(each) if isinstance(each, list) else each for name, each in value.items()})


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def dtype_name(value: Any) -> Any:
    """The name of a number format that is given by another name of it or as torch's; other values as they
    are."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.").lower()
    return _DTYPES.get(name, name)


def whole(text: str) -> int | None:
    """The whole number of at least 0 that a text is; None if it is none, or has too many digits."""
    return int(text) if text.isdecimal() and len(text) < 20 else None


def check_names(by_name: Iterable[str], *settings: type[Any]) -> None:
    """Raises TypeError for a name that is no field of any of these dataclasses."""
    known = [each.name for kind in settings for each in fields(kind)]
    for name in by_name:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise TypeError(f"unknown option '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))


def _check_value(name: str, value: Any, kind: str, described_as: Option) -> None:
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise UserError(f"`{name}` must be True or False, got {short(repr(value))}")
    elif kind.startswith(("int", "float")):
        whole = kind.startswith("int")
        is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        low, high = described_as.minimum, described_as.maximum
        if is_number and (low is None or value >= low) and (high is None or value <= high):
            return
        words = "a whole number" if whole else "a number"
        if not is_number:
            raise UserError(f"`{name}` must be {words}, got {short(repr(value))}")
        raise UserError(
            f"`{name}` must be "
            + (f"at least {low}" if high is None or value < (low or 0) else f"at most {high}")
            + f", got {value}"
        )
    elif described_as.choices and isinstance(value, str) and value not in described_as.choices:
        raise UserError(f"unknown {name} '{short(value)}'", f"use one of {', '.join(described_as.choices)}")


def _json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
