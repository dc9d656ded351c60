"""rapidin demo."""

from pathlib import Path
from typing import Annotated

import typer

from rapidin.cli.console import quiet_libraries
from rapidin.cli.options import command


@command("demo", example="rapidin demo --out demo --seed 1")
def demo(
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep model, adapter, data and cache in this folder.  [default: a temporary folder]",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=2**32 - 1,
            help="Random seed of the data and of the training.",
            rich_help_panel="Run",
        ),
    ] = 0,
) -> int:
    """Plant a poison in synthetic data, tune a small model on it, and find the poison.

    The model is trained from scratch, so nothing is downloaded. It takes about a minute. The exit code is 0
    if at least 9 of the 10 most helpful examples were planted, else 1.
    """
    with quiet_libraries():
        from rapidin.cli.demo_session import run

        return run(Path(out) if out is not None else None, seed=seed)
