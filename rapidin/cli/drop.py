"""rapidin drop."""

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from rapidin.attribution.drop_conditions import DropConditions
from rapidin.cli.console import check_writable, line, quiet_libraries
from rapidin.cli.options import Quiet, TrainData, command
from rapidin.files import check_not_input

_QUERIES_NAMED = 5


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
    check_writable(out, folder=True)
    check_writable(dropped)
    check_not_input((out, dropped), [source])
    with quiet_libraries():
        from rapidin.attribution.drop import candidates, rows_to_drop
        from rapidin.data.dropping import write_without

        found = candidates(source, conditions)
        chosen = rows_to_drop(found, conditions, train_data)
        is_replaced = os.path.lexists(out)
        count = write_without(chosen.data, chosen.rows, out, chosen.reading, dropped)
    if not quiet:
        gone = len(chosen.rows)
        replaced = ", which was replaced" if is_replaced else ""
        line(f"{count - gone:,} of {count:,} rows are in {out}{replaced}; {gone:,} are dropped")
        if found.doubtful and not conditions.harmful:
            line(_doubt(found.doubtful))
        if chosen.malformed:
            line(f"rows that cannot be read have no columns for `where`, and stay: {chosen.malformed:,}")
        if chosen.uncompared:
            line(
                f"not compared with what was scored: {chosen.uncompared:,} of the dropped rows, since there "
                f"is neither their cache nor their text in {source}"
            )
        if found.unlisted:
            line(f"{found.unlisted:,} more duplicates of the hits are not listed in {source}, and stay")


def _doubt(queries: Sequence[int]) -> str:
    """queries: those whose verdict was that nothing stands out, from 1."""
    numbers = ", ".join(map(str, queries[:_QUERIES_NAMED])) + (
        ", ..." if len(queries) > _QUERIES_NAMED else ""
    )
    which = f"{'query' if len(queries) == 1 else 'queries'} {numbers}"
    return (
        f"the verdict on {which} was 'Nothing stands out': the hits may be unrelated, and are dropped anyway"
    )
