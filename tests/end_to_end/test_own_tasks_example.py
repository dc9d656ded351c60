"""The scripts of examples/own_tasks run, and find what they were made to find."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "own_tasks"


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[tuple[int, int]]:
    """The (found, of all) that each line of a script's output says."""
    runpy.run_path(str(FOLDER / name))["main"](list(arguments))
    return [
        (int(found), int(count))
        for found, count in re.findall(r"(\d+) of the (\d+)", capsys.readouterr().out)
    ]


def test_the_vision_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    same, suspects, hurting = run("vision.py", capsys, "--images", "120")
    assert same[0] >= 8
    for found, count in (suspects, hurting):
        assert count >= 8
        assert found >= 0.7 * count


@pytest.mark.full
def test_the_denoising_loss(capsys: pytest.CaptureFixture[str]) -> None:
    ((same, count),) = run("diffusion.py", capsys, "--pictures", "40", "--epochs", "10")
    assert count == 100
    assert same > 60  # 50 by chance
