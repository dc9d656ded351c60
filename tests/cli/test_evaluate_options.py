"""`rapidin eval`: help with panels and an example, earlier names of flags, options that cannot be used."""

import re
from typing import Any

import pytest
from command import caller

from rapidin.cli.evaluate import eval_app
from rapidin.cli.options import renamed_flags

NAMES = ("backdoor", "classes", "mislabel", "fidelity", "lds", "facts", "select")
PANELS = ("Data", "Model", "Gradients", "Storage", "Training", "Scoring", "Generation", "Run", "Output")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return caller(capsys)


def test_every_command_is_there() -> None:
    assert [command.name for command in eval_app.registered_commands] == list(NAMES)


@pytest.mark.parametrize("name", [*(("eval", name) for name in NAMES), ("demo",)])
def test_help_groups_options_and_ends_with_an_example(name: tuple[str, ...], run: Any) -> None:
    shown = run(*name, "--help")
    assert shown.code == 0
    headings = re.findall(r"^(\w+):$", shown.out, re.M)
    assert set(headings) <= {"Arguments", "Options", *PANELS}
    assert headings[-1] == "Options"
    # Every option but --help belongs to a panel.
    assert re.findall(r"--[\w-]+", shown.out.split("\nOptions:\n")[1].split("Example:")[0]) == ["--help"]
    example = " ".join(shown.out.split("Example: ")[1].split())
    assert example.startswith(f"rapidin {' '.join(name)} ")
    flags = re.findall(r"--[\w-]+", example)
    assert flags
    assert all(re.search(rf"^  (?:-\w, )?{flag}\b", shown.out, re.M) for flag in flags)


def test_earlier_names_of_flags() -> None:
    earlier = ["eval", "lds", "--batch", "6", "--constant", "--warm-up=2", "--", "--batch"]
    today = ["eval", "lds", "--batch-size", "6", "--schedule=constant", "--warmup-steps=2", "--", "--batch"]
    assert renamed_flags(earlier) == today


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--lora", "-1"], "--lora must be a whole number of at least 0, got -1"),
        (["--at", "0.5", "--at", "1"], "runs on one cache; give --at"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0, got nan"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_options_that_cannot_be_used(options: list[str], wrong: str, tmp_path: Any, run: Any) -> None:
    refused = run("eval", "select", "no-model", "--out", tmp_path / "out", *options)
    assert (refused.code, refused.out) == (2, "")
    assert wrong in refused.err.splitlines()[-1]
