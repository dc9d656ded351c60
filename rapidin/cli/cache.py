"""rapidin cache and rapidin plan."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rapidin.attribution.options import CacheOptions
from rapidin.cli.console import line, load, messages, quiet_libraries
from rapidin.cli.options import ModelOptions, Only, Quiet, command, with_flags
from rapidin.cli.rapidin_config import RapidInConfig
from rapidin.errors import UserError
from rapidin.gradients.settings import GradientSettings
from rapidin.settings import option
from rapidin.tasks.names import forms_of, task_of_folder

if TYPE_CHECKING:
    from rich.console import Console

    from rapidin.attribution.attributor import Attributor
    from rapidin.attribution.progress import CachingBar
    from rapidin.cache import Cache
    from rapidin.data.examples import Examples
    from rapidin.gradients.dropout import DropoutMask


@dataclass(frozen=True)
class SeveralCaches:
    """Several caches of the same examples, whose scores are added up by a query."""

    checkpoints: str | None = option(
        None,
        help="A trainer's folder of checkpoint-<step>, of adapters on MODEL or of whole models: makes a "
        "cache of each, whose scores are weighted by the learning rates in the trainer's state (TracIn).",
        metavar="FOLDER",
        panel="Model",
    )
    masks: int | None = option(
        None,
        help="Make K caches, each of the model with a fixed dropout mask; queries average their scores (IP "
        "ensemble).",
        metavar="K",
        panel="Model",
        limits=(1, None),
    )
    dropout: float = option(
        0.1, help="Share of features that a mask of --masks drops.", metavar="P", panel="Model"
    )


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hugging Face model: a folder, a name, or a folder with one GGUF file."
    ),
]
DataFiles = Annotated[
    list[str],
    typer.Option(
        metavar="FILE",
        help="Training examples: a file (jsonl, json, csv, tsv, parquet, arrow), a folder or pattern of "
        "files, a HF dataset on disk or by name on the hub, or - for standard input; with prompt and "
        "completion, instruction, input and output, messages, text, or other known fields. Several are read "
        "one after another.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
CacheOut = Annotated[
    str,
    typer.Option(
        metavar="CACHE",
        help="Folder to write; resumes an unfinished cache there.",
        rich_help_panel="Storage",
    ),
]


@command(
    "cache",
    several=True,
    example="rapidin cache MODEL --adapter ADAPTER --data train.jsonl --out CACHE",
)
def cache(
    model: ModelName,
    data: DataFiles,
    out: CacheOut,
    options: CacheOptions,
    loading: ModelOptions,
    several: SeveralCaches,
    settings: GradientSettings,
    rapidin_config: RapidInConfig = None,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(
            help="What to do with a malformed example: stop before any work, or count and skip it.",
            rich_help_panel="Data",
        ),
    ] = "stop",
    quiet: Quiet = False,
) -> None:
    """Sketch the gradient of every training example into a cache.

    If it is stopped, rerun the same command to resume.
    """
    from rapidin.attribution.progress import caching_text
    from rapidin.data.examples import open_examples
    from rapidin.data.sources import join_paths
    from rapidin.distributed import world
    from rapidin.results.text import one_line

    console = messages(quiet)
    jobs = _jobs(model, loading, several, out)
    with console.status("reading the data"):
        # Before the model: mistakes in the data show at once.
        task = task_to_load(settings, model, loading, data)
        read = partial(
            open_examples,
            skip=on_error == "skip",
            forms=forms_of(task),
            map=options.map,
            streaming=options.streaming,
        )
        examples = read(join_paths(data), limit=options.limit)
        decoys = None if options.decoys is None else read(join_paths([options.decoys]))
    options = replace(options, limit=None, map=None, streaming=False, decoys=decoys)
    if several.checkpoints is not None and settings.at is None:
        settings = replace(settings, at=1.0)
    if console.is_terminal:
        console.print(f"{len(examples):,} examples in {one_line(', '.join(data))}")
    loaded, names = None, None
    for job in jobs:
        with quiet_libraries():
            from rapidin.attribution.attributor import Attributor

            _check_preconditioner(settings)
            if names != job.names:
                loaded = None  # before the next one: two models may not fit
                loaded, names = load(console, *job.names, loading, task), job.names
            attributor = Attributor(
                loaded,
                settings=replace(settings, dropout=job.dropout, task=task),
                bytes_per_example=options.bytes,
            )
            _say_what_counts(console, attributor, job.label)
            with console.status("checking the examples"):  # better now than after hours
                texts = [examples] if decoys is None else [examples, decoys]
                notes = [note for each in texts for note in attributor.source.check_records(each)]
            if job is jobs[0] and world().leads:
                for each in texts:
                    _tell_malformed(each)
                for note in dict.fromkeys(notes):
                    line(note)
            made, bar = _cached(console, attributor, examples, job.out, options)
        if quiet or bar.watch.last is None:
            continue
        if options.part and not options.part[0]:
            line(
                f"what all parts share is in {job.out}; copy it to each machine, and continue there with "
                "--part 1/N"
            )
            continue
        line(caching_text(bar.watch, made))


def task_to_load(settings: GradientSettings, model: str, loading: ModelOptions, data: Sequence[str]) -> str:
    """The task that is named, or that the model was saved for, or its adapter."""
    if settings.task_name:
        return settings.task_name
    task = None if loading.adapter else task_of_folder(model)
    if task is None:
        from rapidin.data.opening import check_found
        from rapidin.gradients.load import saved_task

        # The hub may be asked what the model is, which takes long without a network.
        check_found(data)
        task = saved_task(model, loading.adapter, loading.trust_remote_code)
    return task


def _check_preconditioner(settings: GradientSettings) -> None:
    """Raise UserError for a file that is no optimizer's state, before the model is loaded."""
    from rapidin.gradients.optimizer_files import state_file

    if settings.preconditioner not in ("auto", "off", "sample", "kfac"):
        state_file(Path(str(settings.preconditioner)))


def _say_what_counts(console: "Console", attributor: "Attributor", label: str) -> None:
    """What counts on a terminal; that too little counts in any case, even when quiet."""
    from rapidin.distributed import world

    source = attributor.source
    if source.coverage.is_low and world().leads:
        line(f"{label}{source.coverage.warning}")
    if not console.is_terminal:
        return
    console.print(
        f"{label}{source.blocks:,} layers x {source.width:,} dimensions: {source.blocks * source.width:,} "
        f"numbers per example; gradients at {', '.join(f'{point:g}' for point in source.points)} on "
        f"{source.loaded.device}; {source.coverage.text}"
    )


def _cached(
    console: "Console", attributor: "Attributor", examples: "Examples", out: str, options: CacheOptions
) -> "tuple[Cache, CachingBar]":
    from rapidin.attribution.progress import CachingBar

    with CachingBar(console, words=with_flags) as bar:
        try:
            return attributor.cache(examples, out, options, on_progress=bar), bar
        except KeyboardInterrupt as stop:
            raise type(stop)(_how_to_resume(out, len(examples))) from None


@dataclass(frozen=True)
class _Job:
    """One cache to make. names: of model, adapter and base; label: what it is, if there are several."""

    out: str
    names: tuple[str, str | None, str | None]
    dropout: "DropoutMask | None" = None
    label: str = ""


def _jobs(model: str, options: ModelOptions, several: SeveralCaches, out: str) -> list[_Job]:
    """The caches that a command makes; of several, `out` says what they are."""
    checkpoints, masks = several.checkpoints, several.masks
    adapter, base = options.adapter, options.base
    if checkpoints is None and masks is None:
        return [_Job(out, (model, adapter, base))]
    from rapidin.attribution.checkpoints import find_checkpoints
    from rapidin.attribution.ensemble import Ensemble
    from rapidin.distributed import world
    from rapidin.gradients.dropout import DropoutMask

    folder = Path(out)
    if os.path.exists(folder / "manifest.json"):
        raise UserError(f"'{out}' is a single cache", "name another folder with --out")
    if masks is not None:
        if checkpoints is not None:
            raise UserError("--checkpoints and --masks do not go together", "use one of them")
        dropouts = [DropoutMask(several.dropout, number) for number in range(masks)]
        names = [f"mask-{number}" for number in range(masks)]
        if world().leads:
            Ensemble.write(folder, "mean", [(name, 1.0) for name in names])
        return [
            _Job(str(folder / name), (model, adapter, base), mask, f"{name}: ")
            for name, mask in zip(names, dropouts, strict=True)
        ]
    assert checkpoints is not None
    if adapter is not None:
        raise UserError(
            "--checkpoints and --adapter do not go together", "checkpoints of an adapter hold their own"
        )
    points, rated = find_checkpoints(checkpoints)
    leads = world().leads
    if not rated and leads:
        line(f"no learning rates in {checkpoints}: steps weigh alike")
    if leads:
        Ensemble.write(folder, "tracin", [(each.path.name, each.weight) for each in points])
    jobs = []
    for each in points:
        of = (model, str(each.path), None) if each.is_adapter else (str(each.path), None, base)
        jobs.append(_Job(str(folder / each.path.name), of, label=f"{each.path.name}: "))
    return jobs


def _tell_malformed(examples: "Examples") -> None:
    """A line for each of the first examples that are skipped, said even when quiet: they are lost."""
    for problem in examples.problems:
        line(f"skipped: {problem}")
    more = len(examples.malformed) - len(examples.problems)
    if more:
        line(f"skipped: {more:,} more malformed examples")


def _how_to_resume(out: str, total: int) -> str:
    from rapidin.cache import Manifest

    try:
        done = Manifest.read(Path(out)).rows_done
    except UserError:
        done = 0
    return f"stopped with {done:,} of {total:,} examples in {out}; rerun the same command to resume"


@command("plan", example="rapidin plan MODEL --data train.jsonl")
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'rapidin cache'.")],
    loading: Annotated[
        ModelOptions, Only("adapter", "base", "tokenizer", "model_dtype", "device", "trust_remote_code")
    ],
    settings: Annotated[
        GradientSettings,
        Only("at", "task", "include", "exclude", "preconditioner", "width", "max_length", "batch_tokens"),
    ],
    reading: Annotated[CacheOptions, Only("map", "streaming")],
    examples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of examples.  [default: as in --data]",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Training examples; their mean length is used.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens per example.  [default: as in --data, or 256]",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Estimate what a cache takes: bytes, time and memory for each format, from a short measurement."""
    from rapidin.cli.tables import plan_report
    from rapidin.data.examples import open_examples
    from rapidin.results.terminal import make_console

    if examples is None and data is None:
        raise UserError("nothing to plan for", "give --examples, or name the --data")
    console = messages(quiet)
    task = task_to_load(settings, model, loading, [] if data is None else [data])
    opened = None
    if data is not None:
        opened = open_examples(data, forms=forms_of(task), map=reading.map, streaming=reading.streaming)
    with quiet_libraries():
        from rapidin.attribution.plan import make_plan
        from rapidin.gradients.source import GradientSource

        loaded = load(console, model, loading.adapter, loading.base, loading, task)
        with console.status("measuring a batch"):
            count = examples if examples is not None else len(opened or ())
            plan = make_plan(GradientSource(loaded, replace(settings, task=task)), count, opened, tokens)
    make_console(sys.stdout).print(plan_report(plan))
