"""rapidin drop."""

from typing import Annotated

import typer

from rapidin.attribution.options import DropConditions
from rapidin.cli.console import check_writable, line, quiet_libraries, write_text
from rapidin.cli.options import Quiet, TrainData, command


@command("drop", example="rapidin drop hits.json --top-k 10 --out cleaned.jsonl")
def drop(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CACHE|HITS|TABLE",
            help="What names the rows: the hits that 'rapidin query --json' wrote, the table of "
            "'rapidin self --out' or 'rapidin select --scores', or a cache with --where.",
        ),
    ],
    conditions: DropConditions,
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Where the remaining rows are written, in the form of the data: a file of its kind "
            "(compressed if the name says so), or a folder for several files or a HF dataset. A name in "
            ".jsonl gives jsonl of any data.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ],
    dropped: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also write the dropped rows, as jsonl.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    train_data: TrainData = None,
    quiet: Quiet = False,
) -> None:
    """Write the training data without chosen rows: hits of a query, rows by their scores, or by a column.

    Without conditions all most helpful hits of all queries are dropped, with their duplicates. A row is
    dropped if it meets all conditions.
    """
    if dropped is not None:
        check_writable(dropped)
    with quiet_libraries():
        from rapidin.attribution.drop import candidates, rows_to_drop
        from rapidin.data.dropping import write_without
        from rapidin.data.records import jsonl

        found = candidates(source, conditions)
        rows, examples, data = rows_to_drop(found, conditions, train_data)
        count = write_without(data, rows, out, examples.reading)
    if dropped is not None:
        write_text(dropped, jsonl([examples.original(row) for row in rows]))
    if not quiet:
        line(f"{count - len(rows):,} of {count:,} rows are in {out}; {len(rows):,} are dropped")
        if found.unlisted:
            line(f"{found.unlisted:,} more duplicates of the hits are not listed in {source}, and stay")
