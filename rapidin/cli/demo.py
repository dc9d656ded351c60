"""rapidin demo."""

from pathlib import Path
from typing import Annotated

import typer

from rapidin.cli.console import quiet_libraries
from rapidin.cli.options import command


@command("demo")
def demo(
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep model, adapter, data and cache here.  [default: a temporary folder]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of data and training.")] = 0,
) -> int:
    """Poison made-up data, tune a small model on it, find it.

    A small model is trained from scratch, so nothing is downloaded. Exit code 0 where at least 9 of the 10
    most helpful examples were planted, else 1.
    """
    with quiet_libraries():
        from rapidin.cli.demo_session import run

        return run(Path(out) if out is not None else None, seed=seed)
