"""rapidin select and rapidin self."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from rapidin.attribution.options import MAP, ModelLocation, QueryOptions, ScoringConfig
from rapidin.cli.caches import open_caches, open_queries, with_models
from rapidin.cli.console import check_writable, line, messages, quiet_libraries, write_text
from rapidin.cli.options import CacheFolder, CacheFolders, Only, Quiet, TrainData, command
from rapidin.data.fields import FieldMap
from rapidin.distributed import world
from rapidin.errors import UserError
from rapidin.files import check_not_input
from rapidin.settings import option

if TYPE_CHECKING:
    from torch import Tensor

    from rapidin.data.examples import Examples


@dataclass(frozen=True)
class Selection:
    """What is chosen for which target set, and where it is written."""

    target: str = option(
        help="The target set: generations that training should make more likely, in the forms of 'rapidin "
        "cache'; a column 'weight' weights them (negative: less likely).",
        metavar="FILE",
        panel="Data",
    )
    out: str = option(
        help="Where the chosen examples are written, as jsonl in their order.", metavar="FILE", panel="Output"
    )
    map: FieldMap | None = MAP
    top: str = option(
        "5%", help="How many of the training examples to choose.", metavar="N|N%", panel="Output"
    )
    by: str | None = option(
        None,
        help="Column with groups of the target set: an example's score is the highest of its mean scores for "
        "the groups (LESS).",
        metavar="COLUMN",
        panel="Scoring",
        default="one mean over all",
    )
    scores: str | None = option(
        None,
        help="Also write the scores of all examples: as CSV, or as JSON lines if the name ends in .jsonl.",
        metavar="FILE",
        panel="Output",
    )


@command("select", several=True, example="rapidin select CACHE --target target.jsonl --out chosen.jsonl")
def select(
    cache: CacheFolders,
    selection: Selection,
    scoring: Annotated[ScoringConfig, Only("normalize", "method", "damping")],
    generation: Annotated[QueryOptions, Only("max_new_tokens")],
    location: ModelLocation,
    train_data: TrainData = None,
    quiet: Quiet = False,
) -> None:
    """Choose the training examples that help a target set most."""
    from rapidin.attribution.selection import best_rows, count_of, group_by
    from rapidin.data.records import jsonl
    from rapidin.data.sources import join_paths

    for path in (selection.out, selection.scores):
        check_writable(path)
    console = messages(quiet)
    with quiet_libraries():
        from rapidin.attribution.training_data import training_data

        ensemble = open_caches(cache)
        opened = ensemble.caches[-1]
        count = count_of(selection.top, opened.manifest.rows)
        targets = list(open_queries(cache[-1], selection.target, map=selection.map))
        groups = {"": list(range(len(targets)))}
        if selection.by is not None:
            groups = group_by(targets, selection.by)
        examples = training_data(opened, join_paths(train_data))
        if examples is None:
            raise UserError("the cache was not made from a file", "name the examples with --train-data")
        check_not_input((selection.out, selection.scores), [selection.target, *examples.files])
        ready = with_models(console, ensemble, location)
        with console.status(f"scoring {len(opened):,} examples for {len(targets):,} of the target set"):
            scores = ready.scores(
                targets,
                replace(scoring, groups=list(groups.values())),
                max_new_tokens=generation.max_new_tokens,
            )
        if not world().leads:
            return
        rows = best_rows(scores, count)
    write_text(selection.out, jsonl([examples.original(row) for row in rows]))
    if selection.scores is not None:
        names = ["score"] if selection.by is None else [f"score {name}" for name in groups]
        write_text(selection.scores, _score_table(names, scores, rows, examples, selection.scores))
    if not quiet:
        line(f"{len(rows):,} of {opened.manifest.rows:,} examples are in {selection.out}")


def _score_table(
    names: Sequence[str], scores: "Tensor", rows: Sequence[int], examples: "Examples", path: str
) -> str:
    """The scores of all examples, and which of them are chosen; in the format of the path's name."""
    import torch

    from rapidin.attribution.selection import table

    chosen = torch.zeros(scores.shape[1], dtype=torch.bool)
    chosen[rows] = True
    columns = {"index": [examples.index(row) for row in range(scores.shape[1])]}
    columns |= {name: values.tolist() for name, values in zip(names, scores, strict=True)}
    return table(columns | {"chosen": chosen.tolist()}, path)


@command("self", example="rapidin self CACHE --top-k 20")
def self_(
    cache: CacheFolder,
    scoring: Annotated[ScoringConfig, Only("method", "damping", normalize="none")],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The table of all examples: CSV, or jsonl by its name; - for standard output, and no other "
            "table.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(metavar="N", min=1, help="Examples to show.")] = 10,
    train_data: TrainData = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Line numbers and scores only; needs no training examples.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Say how much each training example moves its own loss: large for mislabelled, rare and odd ones.

    Needs the cache alone, no model.
    """
    from rapidin.attribution.selection import table
    from rapidin.results.terminal import hits_table, make_console

    check_writable(out, standard=True)
    console = messages(quiet)
    with quiet_libraries():
        import torch

        from rapidin.attribution.methods import self_influence
        from rapidin.attribution.training_data import hits_of, training_data
        from rapidin.cache import Cache
        from rapidin.data.sources import join_paths

        opened = Cache(cache)
        examples = training_data(opened, False if no_text else join_paths(train_data))
        with console.status(f"reading {len(opened):,} examples"):
            influence = self_influence(
                opened, method=scoring.method, normalize=scoring.normalize, damping=scoring.damping
            )
        order = torch.sort(
            torch.where(influence.isnan(), -torch.inf, influence), descending=True, stable=True
        ).indices
        order = order[: int((~influence.isnan()).sum())]
        hits = hits_of(opened, examples, influence[order[:top_k]], order[:top_k])
    if out is not None:
        rows = [row for first, shard in opened.shards() for row in range(first, first + len(shard.index))]
        columns = {"index": opened.index().tolist(), "self_influence": influence[rows].tolist()}
        text = table(columns, out)
        if out == "-":
            print(text, end="")
            return
        write_text(out, text)
    shown = make_console(sys.stdout)
    shown.print(hits_table("Largest self-influence", hits, bounded=False))
