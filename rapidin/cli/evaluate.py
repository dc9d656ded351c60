"""The commands of `rapidin eval`, one for each module of `rapidin.evaluate` that is an evaluation."""

import json as json_module
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from rapidin.attribution.options import ModelLocation
from rapidin.cli.caches import open_caches, open_queries, with_models
from rapidin.cli.console import check_writable, line, messages, quiet_libraries, write_text
from rapidin.cli.evaluate_options import (
    Baselines,
    BaseModel,
    Device,
    FieldNames,
    Generation,
    Json,
    Location,
    Methods,
    OutFolder,
    Queries,
    VariantOptions,
    check_recipe,
    eval_app,
)
from rapidin.cli.options import CacheFolder, Only, Quiet, TrainData, command
from rapidin.evaluate.settings import FactsSettings, GroundTruthSettings, Recipe, SelectSettings

if TYPE_CHECKING:
    from rapidin.evaluate.log import Log
    from rapidin.evaluate.result import Result
    from rapidin.evaluate.subject import Subject


# ------------------------------------------------------------------------------------------- on a cache


@command(
    "backdoor",
    eval_app,
    example="rapidin eval backdoor CACHE --column poisoned --data asked.jsonl --baselines",
)
def backdoor(
    cache: CacheFolder,
    data: Queries,
    names: FieldNames,
    generation: Generation,
    location: Location,
    column: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Column of the training data that marks planted rows.",
            rich_help_panel="Data",
        ),
    ] = "poisoned",
    methods: Methods = None,
    baselines: Baselines = False,
    train_data: TrainData = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Does attribution find planted examples?

    Ranks all training examples by helpfulness for each query, and reports precision, auPRC and auROC of the
    examples that --column marks.
    """
    with _evaluation(json, quiet) as (log, show):
        from rapidin.evaluate import backdoor as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen = parse_methods(methods)
        records = list(open_queries(cache, data, map=names.map))
        subject = _subject(cache, column, train_data, log, location, quiet)
        limit = generation.max_new_tokens
        show(
            evaluation.evaluate(
                subject, column, records, chosen, with_baselines=baselines, max_new_tokens=limit
            )
        )


@command("classes", eval_app, example="rapidin eval classes CACHE --column label --data test.jsonl")
def classes(
    cache: CacheFolder,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Test examples, with the same column.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ],
    names: FieldNames,
    location: Location,
    column: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Column of the training and test data that holds the class.",
            rich_help_panel="Data",
        ),
    ] = "label",
    methods: Methods = None,
    baselines: Baselines = False,
    train_data: TrainData = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Are the helpful examples of the query's own class?

    Reports AUC and recall as the DataInf paper does (Kwon et al., ICLR 2024, section 4.2): mean and standard
    deviation over the test examples.
    """
    with _evaluation(json, quiet) as (log, show):
        from rapidin.evaluate import classes as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen, queries = parse_methods(methods), open_queries(cache, data, generations=False, map=names.map)
        subject = _subject(cache, column, train_data, log, location, quiet)
        show(evaluation.evaluate(subject, column, queries, chosen, with_baselines=baselines))


@command("mislabel", eval_app, example="rapidin eval mislabel CACHE --column flipped --baselines")
def mislabel(
    cache: CacheFolder,
    location: Location,
    column: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Column of the training data that marks wrong labels.",
            rich_help_panel="Data",
        ),
    ] = "flipped",
    methods: Methods = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also rank by the loss of each example; this loads the model.",
            rich_help_panel="Scoring",
        ),
    ] = False,
    train_data: TrainData = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Does self-influence find wrong labels?

    Ranks all training examples by self-influence, and reports auROC and auPRC of the examples that --column
    marks.
    """
    with _evaluation(json, quiet) as (log, show):
        from rapidin.evaluate import mislabel as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen = parse_methods(methods, evaluation.DEFAULT)
        subject = _subject(cache, column, train_data, log, location if baselines else None, quiet)
        show(evaluation.evaluate(subject, column, chosen, with_loss=baselines))


@command("fidelity", eval_app, example="rapidin eval fidelity CACHE --data asked.jsonl --rows 100")
def fidelity(
    cache: CacheFolder,
    data: Queries,
    names: FieldNames,
    location: Location,
    rows: Annotated[
        int,
        typer.Option(
            metavar="N", min=3, help="Random training examples to compare with.", rich_help_panel="Data"
        ),
    ] = 100,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, max=2**32 - 1, help="Random seed of that choice.", rich_help_panel="Data"
        ),
    ] = 0,
    train_data: TrainData = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Do scores from the cache rank examples as exact gradients do?

    Reports Spearman's correlation, and the share of the top 10 that the cache finds.
    """
    with _evaluation(json, quiet) as (log, show):
        from rapidin.evaluate import fidelity as evaluation

        records = list(open_queries(cache, data, map=names.map))
        subject = _subject(cache, None, train_data, log, location, quiet)
        show(evaluation.evaluate(subject, records, rows, seed=seed))


# -------------------------------------------------------------------------------------------- from a model


@command(
    "lds",
    eval_app,
    example="rapidin eval lds MODEL --data train.jsonl --test test.jsonl --out truth --at 0.5 --at 1",
)
def lds(
    model: BaseModel,
    out: OutFolder,
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help="Training examples.", show_default=False, rich_help_panel="Data"),
    ],
    test: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Test examples, whose losses are predicted.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ],
    names: FieldNames,
    settings: GroundTruthSettings,
    recipe: Annotated[Recipe, Only("schedule", "seed", epochs=3, batch=16, learning_rate=5e-4, warm_up=10)],
    variants: VariantOptions,
    location: Device,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Sketch dimension per layer.  [default: chosen from the number of layers]",
            show_default=False,
            rich_help_panel="Gradients",
        ),
    ] = None,
    methods: Methods = None,
    baselines: Baselines = False,
    only_truth: Annotated[
        bool,
        typer.Option(
            "--only-truth", help="Tune and retrain without scoring any method.", rich_help_panel="Run"
        ),
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Do scores predict the effect of retraining on other data? The linear datamodelling score (LDS).

    Tunes MODEL on all examples, and again on random subsets of them; LDS is Spearman's correlation, over the
    subsets, of summed scores and measured losses. Rerun the same command to resume after an interruption.
    """
    check_recipe(recipe)
    with _evaluation(json, quiet) as (log, show):
        from rapidin.data.examples import open_examples
        from rapidin.evaluate import lds as evaluation
        from rapidin.evaluate.ground_truth import make
        from rapidin.evaluate.methods import parse_methods

        chosen, compared = parse_methods(methods), variants.all()
        settings = replace(settings, recipe=recipe)
        train, tests = (open_examples(each, map=names.map) for each in (data, test))
        truth = make(out, model, train, tests, settings, device=location.device, log=log)
        if only_truth:
            log(f"{truth.done:,} retrainings are in {out}")
            return
        show(
            evaluation.evaluate(
                truth,
                chosen,
                compared,
                width=width or "auto",
                with_baselines=baselines,
                device=location.device,
                log=log,
            )
        )


@command("facts", eval_app, example="rapidin eval facts MODEL --out facts --epochs 8 --at 0.5 --at 1")
def facts(
    model: BaseModel,
    out: OutFolder,
    settings: FactsSettings,
    recipe: Annotated[Recipe, Only("seed", epochs=10, batch=8, learning_rate=2e-3, warm_up=20)],
    variants: VariantOptions,
    location: Device,
    methods: Methods = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also rank by the model's hidden states; BM25 is always compared.",
            rich_help_panel="Scoring",
        ),
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Does attribution find the sentence that taught a fact, asked for in other words?

    Tunes MODEL on invented facts, among examples that share more words with the question than the sentence
    does, and reports MRR and recall at 10. Rerun the same command to resume after an interruption.
    """
    check_recipe(recipe)
    with _evaluation(json, quiet) as (log, show):
        from rapidin.evaluate import facts as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen, compared = parse_methods(methods), variants.all()
        show(
            evaluation.evaluate(
                model,
                out,
                chosen,
                compared,
                replace(settings, recipe=recipe),
                with_baselines=baselines,
                device=location.device,
                log=log,
            )
        )


@command("select", eval_app, example="rapidin eval select MODEL --out select --lora 0 --epochs 6")
def select(
    model: BaseModel,
    out: OutFolder,
    settings: SelectSettings,
    recipe: Annotated[Recipe, Only("seed", epochs=3, batch=8, learning_rate=1e-3, warm_up=10)],
    variants: VariantOptions,
    location: Device,
    methods: Methods = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Does choosing training data leave wrong labels out and give a better model?

    Makes a task with wrong labels, trains MODEL on the rows that 'rapidin select' chooses, on random rows and
    on all, and compares accuracy and loss. Rerun the same command to resume after an interruption.
    """
    check_recipe(recipe)
    with _evaluation(json, quiet) as (log, show):
        from rapidin.evaluate import select as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen, variant = parse_methods(methods, evaluation.DEFAULT), variants.single()
        settings = replace(settings, recipe=recipe)
        show(evaluation.evaluate(model, out, chosen, variant, settings, device=location.device, log=log))


# ------------------------------------------------------------------------------------------------ helpers


def _subject(
    cache: str,
    column: str | None,
    train_data: list[str] | None,
    log: "Log",
    location: ModelLocation | None,
    quiet: bool,
) -> "Subject":
    """The cache with its data, and with its model if `location` is given.

    A missing column is reported before the model is loaded.
    """
    from rapidin.data.sources import join_paths
    from rapidin.evaluate.subject import Subject, column_values, open_training_data

    ensemble = open_caches([cache])
    examples = open_training_data(ensemble, join_paths(train_data))
    if column is not None:
        column_values(examples, column)
    if location is not None:
        ensemble = with_models(messages(quiet), ensemble, location)
    return Subject(ensemble, examples, log)


@contextmanager
def _evaluation(json: str | None, quiet: bool) -> "Iterator[tuple[Log, Callable[[Result], None]]]":
    """(function that logs a line, function that shows a result), with quiet libraries.

    Raises UserError for missing packages or an unwritable --json before any work is done.
    """
    check_writable(json, standard=True)
    with quiet_libraries():
        from rapidin.evaluate import metrics
        from rapidin.evaluate.log import no_log

        for package in metrics.REQUIRED_PACKAGES:
            metrics.needs(package)
        yield (no_log if quiet else line), lambda result: _show(result, json)


def _show(result: "Result", json: str | None) -> None:
    from rapidin.results.terminal import make_console

    text = json_module.dumps(result.to_json(), indent=1)
    if json == "-":
        print(text)
        return
    if json is not None:
        write_text(json, text + "\n")
    console = make_console(sys.stdout)
    console.print(result.table(console.width))
