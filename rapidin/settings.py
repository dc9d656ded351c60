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

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

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
        return cls(**by_name) if options is None else options

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` returned. Raises TypeError for an unknown field."""
        return cls(**{name: tuple(each) if isinstance(each, list) else each for name, each in value.items()})


def _json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
