"""rapidin select and rapidin self."""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from rapidin.attribution.options import ModelLocation, QueryOptions, ScoringConfig
from rapidin.cli.caches import open_caches, with_models
from rapidin.cli.console import check_writable, line, messages, quiet_libraries, write_text
from rapidin.cli.options import CacheFolder, CacheFolders, Only, Quiet, TrainData, command
from rapidin.distributed import world
from rapidin.errors import UserError


@command("select", several=True, example="rapidin select CACHE --target target.jsonl --out chosen.jsonl")
def select(
    cache: CacheFolders,
    target: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The target set: generations that training shall make more likely, in the forms of 'rapidin "
            "cache'; a column 'weight' weights them (negative: less likely).",
            show_default=False,
            rich_help_panel="Data",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="The chosen examples, as jsonl in their order.", rich_help_panel="Output"
        ),
    ],
    scoring: Annotated[ScoringConfig, Only("normalize", "method", "damping")],
    generation: Annotated[QueryOptions, Only("max_new_tokens")],
    location: ModelLocation,
    top: Annotated[
        str, typer.Option(metavar="N|N%", help="How many of the training examples to choose.")
    ] = "5%",
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Groups of the target set: an example is worth its best group's mean (LESS).  [default: one "
            "mean over all]",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The scores of all examples too: a table as CSV, or as jsonl by its name.",
            show_default=False,
        ),
    ] = None,
    train_data: TrainData = None,
    quiet: Quiet = False,
) -> None:
    """Choose the training examples that help a target set most."""
    from rapidin.attribution.selection import best_rows, groups_of, jsonl, share_of, table
    from rapidin.data.examples import open_examples
    from rapidin.data.sources import join_paths

    for path in (out, scores):
        if path is not None:
            check_writable(path)
    console = messages(quiet)
    with quiet_libraries():
        import torch

        from rapidin.attribution.training_data import training_data

        ensemble = open_caches(cache)
        opened = ensemble.caches[-1]
        wanted = share_of(top, opened.manifest.rows)
        targets = list(open_examples(target, generations=True))
        groups = {"": list(range(len(targets)))} if by is None else groups_of(targets, by)
        examples = training_data(opened, join_paths(train_data))
        if examples is None:
            raise UserError("the cache was not made from a file", "name the examples with --train-data")
        ready = with_models(console, ensemble, location)
        with console.status(f"scoring {len(opened):,} examples for {len(targets):,} of the target set"):
            of_groups = ready.scores(
                targets,
                replace(scoring, groups=list(groups.values())),
                max_new_tokens=generation.max_new_tokens,
            )
        if not world().leads:
            return
        rows = best_rows(of_groups, wanted)
    write_text(out, jsonl([examples[row] for row in rows]))
    if scores is not None:
        chosen = torch.zeros(of_groups.shape[1], dtype=torch.bool)
        chosen[rows] = True
        names = ["score"] if by is None else [f"score {name}" for name in groups]
        columns = {"index": [examples.index(row) for row in range(of_groups.shape[1])]}
        columns |= {name: values.tolist() for name, values in zip(names, of_groups, strict=True)}
        write_text(scores, table(columns | {"chosen": chosen.tolist()}, scores))
    if not quiet:
        line(f"{len(rows):,} of {opened.manifest.rows:,} examples are in {out}")


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

    if out is not None and out != "-":
        check_writable(out)
    console = messages(quiet)
    with quiet_libraries():
        import torch

        from rapidin.attribution.methods import self_influence
        from rapidin.attribution.scan import hits_of
        from rapidin.attribution.training_data import training_data
        from rapidin.cache import Cache
        from rapidin.data.sources import join_paths

        opened = Cache(cache)
        examples = training_data(opened, False if no_text else join_paths(train_data))
        with console.status(f"reading {len(opened):,} examples"):
            found = self_influence(
                opened, method=scoring.method, normalize=scoring.normalize, damping=scoring.damping
            )
        order = torch.sort(
            torch.where(found.isnan(), -torch.inf, found), descending=True, stable=True
        ).indices
        order = order[: int((~found.isnan()).sum())]
        hits = hits_of(opened, examples, found[order[:top_k]], order[:top_k])
    if out is not None:
        rows = [row for first, part in opened.shards() for row in range(first, first + len(part.index))]
        columns = {"index": opened.index().tolist(), "self_influence": found[rows].tolist()}
        text = table(columns, out)
        if out == "-":
            print(text, end="")
            return
        write_text(out, text)
    shown = make_console(sys.stdout)
    shown.print(hits_table("Largest self-influence", hits, bounded=False))
