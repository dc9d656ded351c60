"""Options are spelled once, as fields of dataclasses, and become flags, help texts and Python arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from rapidin.attribution.drop_conditions import DropConditions
from rapidin.attribution.options import CacheOptions, ModelLocation, QueryOptions, ScoringConfig
from rapidin.cli import main
from rapidin.cli.options import PANELS, RENAMED_FLAGS, Only, app, command, renamed_flags
from rapidin.errors import UserError
from rapidin.gradients.settings import GradientSettings, points_of
from rapidin.settings import Settings, described, documented, option

OPTIONS = [CacheOptions, DropConditions, GradientSettings, ModelLocation, QueryOptions, ScoringConfig]


@documented
@dataclass(frozen=True)
class Example(Settings):
    """An example."""

    count: int = option(3, help="How many.", metavar="N", panel="Run", limits=(1, 9))
    names: tuple[str, ...] = option((), help="Whose.")
    at: tuple[float, ...] | None = option(None, help="Where.", default="at home", parse=points_of)
    kind: str = option("a", help="Which.", choices=("a", "b"))
    loud: bool = option(True, help="How.")
    hidden: int = option(5, help="Not a flag.", flag=None)


def parsed(*arguments: str, annotation: Any = Example) -> Any:
    """What a command with these options is called with."""
    seen: list[Any] = []

    def body(example: Any) -> None:
        seen.append(example)

    body.__annotations__["example"] = annotation
    own = typer.Typer(rich_markup_mode=None)
    own.callback()(lambda: None)
    command("try", own)(body)
    made: Any = own(["try", *arguments], standalone_mode=False)
    made()
    return seen[0]


def test_fields_become_flags_and_come_back_as_the_dataclass() -> None:
    assert parsed() == Example()
    got = parsed("--count", "7", "--names", "x", "--names", "y", "--at", "0.5,1", "--kind", "b", "--no-loud")
    assert got == Example(7, ("x", "y"), (0.5, 1.0), "b", False)
    assert parsed(annotation=Annotated[Example, Only("kind", count=2)]) == Example(count=2)
    for wrong in (["--count", "0"], ["--kind", "c"], ["--hidden", "1"]):
        with pytest.raises(typer.BadParameter.__mro__[2]):
            parsed(*wrong)
    with pytest.raises(UserError, match="`at` must be numbers"):
        parsed("--at", "here")


def test_fields_are_described_in_the_docstring_and_come_back_from_json() -> None:
    assert "    at: Where. Default: at home." in (Example.__doc__ or "").splitlines()
    value = Example(7, ("x",), (0.5,), "b", False)
    assert Example.from_json(json.loads(json.dumps(value.to_json()))) == value
    with pytest.raises(TypeError, match="cuont"):
        Example.from_json({"cuont": 1})


@pytest.mark.parametrize("settings", OPTIONS)
def test_each_option_has_a_sentence_a_panel_that_is_known_and_a_default_that_is_accepted(
    settings: type[Any],
) -> None:
    for name, (_, shown) in described(settings).items():
        assert shown.help[0].isupper() or shown.help.startswith("tensor"), name
        assert shown.help.endswith("."), name
        assert shown.flag is None or shown.panel in PANELS, name
        assert f"    {name}: {shown.help}" in settings.__doc__, name
    made = settings()
    assert settings.from_json(json.loads(json.dumps(made.to_json()))) == made


COMMANDS = [each.name or "" for each in app.registered_commands]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("rapidin qu", ["query"]),
        ("rapidin drop --mi", ["--min-score"]),
        ("rapidin query cache --method ", ["dot", "datainf", "fisher"]),
    ],
)
def test_shells_complete_commands_flags_and_values(words: str, found: list[str]) -> None:
    position = str(len(words.split(" ")) - 1)
    asks = {"_RAPIDIN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
    ran = subprocess.run(
        [sys.executable, "-m", "rapidin"], env=os.environ | asks, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, found, "")


def test_help_groups_options_and_ends_in_an_example() -> None:
    for name in COMMANDS:
        text = CliRunner().invoke(app, [name, "--help"]).output
        headings = [line.rstrip(":") for line in text.splitlines() if line.rstrip(":") in PANELS]
        assert headings == [panel for panel in PANELS if panel in headings]
        assert f"Example: rapidin {name} " in text


def test_earlier_names_of_flags_still_work_and_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert renamed_flags(["cache", "--geometry=off", "--geometry", "kfac", "--", "--geometry"]) == [
        "cache", "--precondition=off", "--precondition", "kfac", "--", "--geometry",
    ]  # fmt: skip
    assert main(["cache", "none", "--data", "none.jsonl", "--out", "c", "--geometry", "off"]) == 2
    assert "data not found" in capsys.readouterr().err
    for name in ("cache", "plan"):
        shown = CliRunner().invoke(app, [name, "--help"]).output
        assert not any(f"{old} " in shown for old in RENAMED_FLAGS)
