"""The commands of `rapidin eval`, one for each module of `rapidin.evaluate` that is an evaluation."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from rapidin.cli.caches import open_caches, with_models
from rapidin.cli.console import check_writable, line, messages, quiet_libraries, write_text
from rapidin.cli.evaluate_options import (
    DATA,
    GRADIENTS,
    MODEL,
    RUN,
    STORAGE,
    Baselines,
    BaseModel,
    CacheSource,
    CheckpointCount,
    LoraRank,
    Methods,
    OutFolder,
    Output,
    Seed,
    TrainingOptions,
    VariantOptions,
    eval_command,
)
from rapidin.cli.options import CacheFolder, Device, MaxNewTokens

if TYPE_CHECKING:
    from rapidin.evaluate.log import Log
    from rapidin.evaluate.result import Result
    from rapidin.evaluate.subject import Subject

LDS_TRAINING = TrainingOptions(epochs=3, batch=16, learning_rate=5e-4, warm_up=10)
FACTS_TRAINING = TrainingOptions(epochs=10, batch=8, learning_rate=2e-3, warm_up=20)
SELECT_TRAINING = TrainingOptions(epochs=3, batch=8, learning_rate=1e-3, warm_up=10)

# ------------------------------------------------------------------------------------------- on a cache


@eval_command("backdoor", "rapidin eval backdoor cache --column poisoned --data asked.jsonl --baselines")
def backdoor(
    *,
    cache: CacheFolder,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Queries: what the model says, or prompts for it to answer.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    column: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Column of the training data that marks planted rows.", rich_help_panel=DATA
        ),
    ] = "poisoned",
    methods: Methods = None,
    baselines: Baselines = False,
    max_new_tokens: MaxNewTokens = 64,
    source: CacheSource,
    output: Output,
) -> None:
    """Does attribution find planted examples?

    Ranks all training examples by helpfulness for each query, and reports precision, auPRC and auROC of the
    examples that --column marks.
    """
    with _evaluation(output) as (log, show):
        from rapidin.data.examples import open_examples
        from rapidin.evaluate import backdoor as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen = parse_methods(methods)
        records = list(open_examples(data, generations=True))
        subject = _subject(cache, column, source, output, log)
        show(
            evaluation.evaluate(
                subject, column, records, chosen, with_baselines=baselines, max_new_tokens=max_new_tokens
            )
        )


@eval_command("classes", "rapidin eval classes cache --column label --data test.jsonl")
def classes(
    *,
    cache: CacheFolder,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Test examples, with the same column.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    column: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Column of the training and test data that holds the class.",
            rich_help_panel=DATA,
        ),
    ] = "label",
    methods: Methods = None,
    baselines: Baselines = False,
    source: CacheSource,
    output: Output,
) -> None:
    """Are the helpful examples of the query's own class?

    Reports AUC and recall as the DataInf paper does (Kwon et al., ICLR 2024, section 4.2): mean and standard
    deviation over the test examples.
    """
    with _evaluation(output) as (log, show):
        from rapidin.data.examples import open_examples
        from rapidin.evaluate import classes as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen, queries = parse_methods(methods), open_examples(data)
        subject = _subject(cache, column, source, output, log)
        show(evaluation.evaluate(subject, column, queries, chosen, with_baselines=baselines))


@eval_command("mislabel", "rapidin eval mislabel cache --column flipped --baselines")
def mislabel(
    *,
    cache: CacheFolder,
    column: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Column of the training data that marks wrong labels.", rich_help_panel=DATA
        ),
    ] = "flipped",
    methods: Methods = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also rank by the loss of each example; this loads the model.",
            rich_help_panel=RUN,
        ),
    ] = False,
    source: CacheSource,
    output: Output,
) -> None:
    """Does self-influence find wrong labels?

    Ranks all training examples by self-influence, and reports auROC and auPRC of the examples that --column
    marks.
    """
    with _evaluation(output) as (log, show):
        from rapidin.evaluate import mislabel as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen = parse_methods(methods, evaluation.DEFAULT)
        subject = _subject(cache, column, source, output, log, with_model=baselines)
        show(evaluation.evaluate(subject, column, chosen, with_loss=baselines))


@eval_command("fidelity", "rapidin eval fidelity cache --data asked.jsonl --rows 100")
def fidelity(
    *,
    cache: CacheFolder,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Queries: generations to explain.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    rows: Annotated[
        int,
        typer.Option(
            metavar="N", min=3, help="Random training examples to compare with.", rich_help_panel=DATA
        ),
    ] = 100,
    seed: Seed = 0,
    source: CacheSource,
    output: Output,
) -> None:
    """Do scores from the cache rank examples as exact gradients do?

    Reports Spearman's correlation, and the share of the top 10 that the cache finds.
    """
    with _evaluation(output) as (log, show):
        from rapidin.data.examples import open_examples
        from rapidin.evaluate import fidelity as evaluation

        records = list(open_examples(data, generations=True))
        show(evaluation.evaluate(_subject(cache, None, source, output, log), records, rows, seed=seed))


# -------------------------------------------------------------------------------------------- from a model


@eval_command(
    "lds", "rapidin eval lds MODEL --data train.jsonl --test test.jsonl --out truth --lora 8 --at 0.5 --at 1"
)
def lds(
    *,
    model: BaseModel,
    out: OutFolder,
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help="Training examples.", show_default=False, rich_help_panel=DATA),
    ],
    test: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Test examples, whose losses are predicted.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    subsets: Annotated[
        int, typer.Option(metavar="S", min=3, help="Random subsets to retrain on.", rich_help_panel=DATA)
    ] = 100,
    fraction: Annotated[
        float, typer.Option(metavar="X", help="Share of the examples in a subset.", rich_help_panel=DATA)
    ] = 0.5,
    max_length: Annotated[
        int, typer.Option(metavar="N", min=2, help="Maximum tokens per example.", rich_help_panel=DATA)
    ] = 256,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=1,
            help="Rank of the LoRA adapter to tune.  [default: tune all weights]",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    training: TrainingOptions = LDS_TRAINING,
    constant: Annotated[
        bool,
        typer.Option(
            "--constant",
            help="Keep the learning rate at its peak instead of decaying it linearly to zero.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            metavar="K", min=1, help="Retrainings per subset, whose losses are averaged.", rich_help_panel=RUN
        ),
    ] = 1,
    seed: Seed = 0,
    variants: VariantOptions,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Sketch dimension per layer.  [default: chosen from the number of layers]",
            show_default=False,
            rich_help_panel=STORAGE,
        ),
    ] = None,
    checkpoints: CheckpointCount = 4,
    methods: Methods = None,
    baselines: Baselines = False,
    only_truth: Annotated[
        bool,
        typer.Option(
            "--only-truth", help="Tune and retrain without scoring any method.", rich_help_panel=RUN
        ),
    ] = False,
    device: Device = None,
    output: Output,
) -> None:
    """Do scores predict the effect of retraining on other data? The linear datamodelling score (LDS).

    Tunes MODEL on all examples, and again on random subsets of them; LDS is Spearman's correlation, over the
    subsets, of summed scores and measured losses. Rerun the same command to resume after an interruption.
    """
    with _evaluation(output) as (log, show):
        from rapidin.evaluate import ground_truth
        from rapidin.evaluate import lds as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen, compared = parse_methods(methods), variants.variants()
        settings = ground_truth.Settings(
            training.recipe(seed, constant=constant),
            lora=lora,
            subsets=subsets,
            fraction=fraction,
            seeds=seeds,
            checkpoints=checkpoints,
            max_length=max_length,
        )
        truth = ground_truth.make(out, model, data, test, settings, device=device, log=log)
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
                device=device,
                log=log,
            )
        )


@eval_command("facts", "rapidin eval facts MODEL --out facts --epochs 8 --at 0.5 --at 1")
def facts(
    *,
    model: BaseModel,
    out: OutFolder,
    count: Annotated[
        int, typer.Option("--facts", metavar="N", min=2, help="Facts to invent.", rich_help_panel=DATA)
    ] = 60,
    lora: LoraRank = 8,
    training: TrainingOptions = FACTS_TRAINING,
    checkpoints: CheckpointCount = 0,
    seed: Seed = 0,
    variants: VariantOptions,
    methods: Methods = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also rank by the model's hidden states; BM25 is always compared.",
            rich_help_panel=RUN,
        ),
    ] = False,
    device: Device = None,
    output: Output,
) -> None:
    """Does attribution find the sentence that taught a fact, asked for in other words?

    Tunes MODEL on invented facts, among examples that share more words with the question than the sentence
    does, and reports MRR and recall at 10. Rerun the same command to resume after an interruption.
    """
    with _evaluation(output) as (log, show):
        from rapidin.evaluate import facts as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen, compared = parse_methods(methods), variants.variants()
        settings = evaluation.FactsSettings(
            training.recipe(seed), count=count, lora=lora or None, checkpoints=checkpoints
        )
        show(
            evaluation.evaluate(
                model, out, chosen, compared, settings, with_baselines=baselines, device=device, log=log
            )
        )


@eval_command("select", "rapidin eval select MODEL --out select --lora 0 --epochs 6")
def select(
    *,
    model: BaseModel,
    out: OutFolder,
    rows: Annotated[
        int, typer.Option(metavar="N", min=8, help="Training rows to make up.", rich_help_panel=DATA)
    ] = 400,
    flipped: Annotated[
        float, typer.Option(metavar="X", help="Share of the rows with a wrong label.", rich_help_panel=DATA)
    ] = 0.2,
    share: Annotated[
        float, typer.Option(metavar="X", help="Share of the rows to choose.", rich_help_panel=DATA)
    ] = 0.5,
    lora: LoraRank = 8,
    training: TrainingOptions = SELECT_TRAINING,
    seeds: Annotated[
        int, typer.Option(metavar="K", min=1, help="Trainings for each choice.", rich_help_panel=RUN)
    ] = 3,
    seed: Seed = 0,
    at: Annotated[
        str,
        typer.Option(
            metavar="A[,A...]",
            help="Where gradients are taken, as in 'rapidin cache'.",
            rich_help_panel=GRADIENTS,
        ),
    ] = "0.5",
    preconditioner: Annotated[
        str,
        typer.Option(
            "--precondition",
            metavar="kfac|off|sample",
            help="Preconditioner, as in 'rapidin cache'.",
            rich_help_panel=GRADIENTS,
        ),
    ] = "kfac",
    bytes: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Bytes per example, as in 'rapidin cache'; 0 keeps the uncompressed sketch.",
            rich_help_panel=STORAGE,
        ),
    ] = 0,
    methods: Methods = None,
    device: Device = None,
    output: Output,
) -> None:
    """Does choosing training data leave wrong labels out and give a better model?

    Makes a task with wrong labels, trains MODEL on the rows that 'rapidin select' chooses, on random rows and
    on all, and compares accuracy and loss. Rerun the same command to resume after an interruption.
    """
    with _evaluation(output) as (log, show):
        from rapidin.evaluate import select as evaluation
        from rapidin.evaluate.methods import parse_methods

        chosen = parse_methods(methods, evaluation.DEFAULT)
        (variant,) = VariantOptions([at], [preconditioner], [bytes]).variants()
        settings = evaluation.SelectSettings(
            training.recipe(seed),
            rows=rows,
            flipped=flipped,
            share=share,
            seeds=seeds,
            lora=lora or None,
        )
        show(evaluation.evaluate(model, out, chosen, variant, settings, device=device, log=log))


# ------------------------------------------------------------------------------------------------ helpers


def _subject(
    cache: str,
    column: str | None,
    source: CacheSource,
    output: Output,
    log: "Log",
    *,
    with_model: bool = True,
) -> "Subject":
    """The cache with its data and model; a missing column is reported before the model is loaded."""
    from rapidin.data.examples import files
    from rapidin.evaluate.subject import Subject, column_values, open_training_data

    ensemble = open_caches([cache])
    examples = open_training_data(ensemble, files(source.train_data))
    if column is not None:
        column_values(examples, column)
    if with_model:
        ensemble = with_models(
            messages(output.quiet),
            ensemble,
            source.model,
            source.adapter,
            source.base,
            source.device,
            source.trust_remote_code,
        )
    return Subject(ensemble, examples, log)


@contextmanager
def _evaluation(output: Output) -> "Iterator[tuple[Log, Callable[[Result], None]]]":
    """(function that logs a line, function that shows a result), with quiet libraries.

    Raises UserError for missing packages or an unwritable --json before any work is done.
    """
    if output.json is not None and output.json != "-":
        check_writable(output.json)
    with quiet_libraries():
        from rapidin.evaluate import metrics
        from rapidin.evaluate.log import no_log

        for package in metrics.REQUIRED_PACKAGES:
            metrics.needs(package)
        yield (no_log if output.quiet else line), lambda result: _show(result, output)


def _show(result: "Result", output: Output) -> None:
    from rapidin.results.terminal import make_console

    text = json.dumps(result.to_json(), indent=1)
    if output.json == "-":
        print(text)
        return
    if output.json is not None:
        write_text(output.json, text + "\n")
    console = make_console(sys.stdout)
    console.print(result.table(console.width))
