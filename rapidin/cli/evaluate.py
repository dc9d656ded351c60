"""rapidin eval."""

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapidin.attribution.options import ModelLocation
from rapidin.cli.caches import open_caches, with_models
from rapidin.cli.console import check_writable, line, messages, quiet_libraries, write_text
from rapidin.cli.options import (
    CacheFolder,
    Device,
    MaxNewTokens,
    MovedAdapter,
    MovedBase,
    MovedModel,
    Quiet,
    TrainData,
    TrustRemoteCode,
    app,
    command,
)
from rapidin.errors import UserError

if TYPE_CHECKING:
    from rapidin.evaluate.result import Result, Say
    from rapidin.evaluate.subject import Subject
    from rapidin.evaluate.training import Recipe

group = typer.Typer(
    name="eval",
    help="Measure methods against a known truth: what was planted, labelled, or retrained.\n\n"
    "docs/evaluation.md says what each measures and how to read it.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(group)

Methods = Annotated[
    str | None,
    typer.Option(
        metavar="M:N,...",
        help="METHOD:NORMALIZE[:DAMPING] between commas, as dot:layer,fisher:layer,datainf:none:0.1.  "
        "[default: all that make sense]",
        show_default=False,
    ),
]
Json = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write all figures as JSON; with - to standard output, and no table."),
]
Baselines = Annotated[
    bool, typer.Option("--baselines", help="BM25 of the words and the model's hidden states besides.")
]
At = Annotated[
    list[str] | None,
    typer.Option(
        metavar="A[,A...]",
        help="Where gradients are taken, as in 'rapidin cache', or 'checkpoints' for the sum over those that "
        "were kept; may be repeated, to compare.  [default: 0.5]",
        show_default=False,
    ),
]
Bytes = Annotated[
    list[int] | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Bytes of a row, as in 'rapidin cache'; 0 for every number of the sketch; may be repeated.  "
        "[default: 0]",
        show_default=False,
    ),
]
Preconditioner = Annotated[
    list[str] | None,
    typer.Option(
        "--precondition",
        metavar="kfac|off|sample|optimizer",
        help="How gradients are turned, as in 'rapidin cache'; optimizer: by the last checkpoint's state; "
        "may be repeated.  [default: kfac]",
        show_default=False,
    ),
]
Lora = Annotated[
    int | None,
    typer.Option(
        metavar="R",
        min=1,
        help="Tune a LoRA adapter of this rank.  [default: all weights]",
        show_default=False,
    ),
]
Rank = Annotated[
    int,
    typer.Option("--lora", metavar="R", min=0, help="Rank of the LoRA adapter; 0: all weights are tuned."),
]
BaseModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="The base to tune: a folder, a name, or a folder with one GGUF."),
]
Out = Annotated[
    str, typer.Option(metavar="DIR", help="Folder for all that is made; what is there is gone on with.")
]
Epochs = Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the training examples.")]
BatchSize = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Examples a step.")]
Rate = Annotated[float, typer.Option(metavar="X", help="The highest learning rate.")]
WarmUp = Annotated[int, typer.Option(metavar="N", min=0, help="Steps in which the learning rate rises.")]
Checkpoints = Annotated[
    int, typer.Option(metavar="N", min=0, help="Checkpoints of the tuning to keep, for --at checkpoints.")
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of data and training.")]


# ------------------------------------------------------------------------------------------- on a cache


@command("backdoor", group)
def backdoor(
    cache: CacheFolder,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="What the model says, or prompts to which it is to answer: the queries.",
            show_default=False,
        ),
    ],
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Field of the training data that marks what was planted.")
    ] = "poisoned",
    methods: Methods = None,
    baselines: Baselines = False,
    max_new_tokens: MaxNewTokens = 64,
    json: Json = None,
    model: MovedModel = None,
    adapter: MovedAdapter = None,
    base: MovedBase = None,
    train_data: TrainData = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Are planted examples found? Precision, auPRC and auROC of the marked ones.

    For each query of --data all training examples are ranked by helpfulness.
    """
    with _evaluation(json, quiet) as (say, show):
        from rapidin.data.examples import open_examples
        from rapidin.evaluate import backdoor as room
        from rapidin.evaluate.methods import parse_methods

        chosen = parse_methods(methods)
        records = list(open_examples(data, generations=True))
        subject = _subject(
            cache, column, model, adapter, base, train_data, device, trust_remote_code, quiet, say
        )
        show(
            room.evaluate(
                subject,
                column,
                records,
                chosen,
                with_baselines=baselines,
                max_new_tokens=max_new_tokens,
            )
        )


@command("classes", group)
def classes(
    cache: CacheFolder,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Test examples, with the same field.", show_default=False)
    ],
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Field of training and test data that holds the class.")
    ] = "label",
    methods: Methods = None,
    baselines: Baselines = False,
    json: Json = None,
    model: MovedModel = None,
    adapter: MovedAdapter = None,
    base: MovedBase = None,
    train_data: TrainData = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Do hits come from the query's own class? AUC and recall as in the DataInf paper.

    Kwon et al., ICLR 2024, section 4.2: mean and standard deviation over the test examples.
    """
    with _evaluation(json, quiet) as (say, show):
        from rapidin.data.examples import open_examples
        from rapidin.evaluate import classes as room
        from rapidin.evaluate.methods import parse_methods

        chosen, asked = parse_methods(methods), open_examples(data)
        subject = _subject(
            cache, column, model, adapter, base, train_data, device, trust_remote_code, quiet, say
        )
        show(room.evaluate(subject, column, asked, chosen, with_baselines=baselines))


@command("mislabel", group)
def mislabel(
    cache: CacheFolder,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Field of the training data that marks wrong labels.")
    ] = "flipped",
    methods: Methods = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="The loss of each example besides; loads the model.")
    ] = False,
    json: Json = None,
    model: MovedModel = None,
    adapter: MovedAdapter = None,
    base: MovedBase = None,
    train_data: TrainData = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Does self-influence find wrong labels? auROC and auPRC of the marked examples."""
    with _evaluation(json, quiet) as (say, show):
        from rapidin.evaluate import mislabel as room
        from rapidin.evaluate.methods import parse_methods

        chosen = parse_methods(methods, room.DEFAULT)
        subject = _subject(
            cache, column, model, adapter, base, train_data, device, trust_remote_code, quiet, say, baselines
        )
        show(room.evaluate(subject, column, chosen, with_loss=baselines))


@command("fidelity", group)
def fidelity(
    cache: CacheFolder,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Generations to explain: the queries.", show_default=False)
    ],
    rows: Annotated[
        int, typer.Option(metavar="N", min=3, help="Training examples to compare with, chosen at random.")
    ] = 100,
    seed: Seed = 0,
    json: Json = None,
    model: MovedModel = None,
    adapter: MovedAdapter = None,
    base: MovedBase = None,
    train_data: TrainData = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Do scores from the cache rank as exact gradients do? Spearman's correlation, and the top 10."""
    with _evaluation(json, quiet) as (say, show):
        from rapidin.data.examples import open_examples
        from rapidin.evaluate import fidelity as room

        records = list(open_examples(data, generations=True))
        subject = _subject(
            cache, None, model, adapter, base, train_data, device, trust_remote_code, quiet, say
        )
        show(room.evaluate(subject, records, rows, seed=seed))


# -------------------------------------------------------------------------------------------- from a model


@command("lds", group)
def lds(
    model: BaseModel,
    out: Out,
    data: Annotated[str, typer.Option(metavar="FILE", help="Training examples.", show_default=False)],
    test: Annotated[
        str,
        typer.Option(metavar="FILE", help="Test examples, whose losses are foretold.", show_default=False),
    ],
    lora: Lora = None,
    subsets: Annotated[int, typer.Option(metavar="S", min=3, help="Random subsets to retrain on.")] = 100,
    fraction: Annotated[float, typer.Option(metavar="X", help="Share of the examples in a subset.")] = 0.5,
    seeds: Annotated[int, typer.Option(metavar="K", min=1, help="Retrainings of a subset, averaged.")] = 1,
    epochs: Epochs = 3,
    batch: BatchSize = 16,
    learning_rate: Rate = 5e-4,
    warm_up: WarmUp = 10,
    constant: Annotated[
        bool, typer.Option("--constant", help="Keep the learning rate; else it falls to zero.")
    ] = False,
    checkpoints: Checkpoints = 4,
    seed: Seed = 0,
    max_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of an example.")] = 256,
    at: At = None,
    bytes: Bytes = None,
    preconditioner: Preconditioner = None,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Bins of a layer's sketch.  [default: as many as pay]",
            show_default=False,
        ),
    ] = None,
    methods: Methods = None,
    baselines: Baselines = False,
    only_truth: Annotated[
        bool, typer.Option("--only-truth", help="Tune and retrain, and score nothing.")
    ] = False,
    json: Json = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Do scores foretell retraining? The linear datamodelling score, with intervals.

    MODEL is tuned on all examples, and again on random subsets of them; stopped at any moment, the same
    command goes on with the retraining that was in hand.
    """
    with _evaluation(json, quiet) as (say, show):
        from rapidin.evaluate import lds as room
        from rapidin.evaluate.methods import parse_methods, parse_places

        chosen, places = (
            parse_methods(methods),
            parse_places(at or ["0.5"], bytes or [], preconditioner or []),
        )
        settings = room.Settings(
            _recipe(epochs, batch, learning_rate, warm_up, constant, seed),
            lora=lora,
            subsets=subsets,
            fraction=fraction,
            seeds=seeds,
            checkpoints=checkpoints,
            max_length=max_length,
        )
        truth = room.make(out, model, data, test, settings, device=device, say=say)
        if only_truth:
            say(f"{truth.done:,} retrainings are in {out}")
            return
        show(
            room.evaluate(
                truth,
                chosen,
                places,
                width=width or "auto",
                with_baselines=baselines,
                device=device,
                say=say,
            )
        )


@command("facts", group)
def facts(
    model: BaseModel,
    out: Out,
    count: Annotated[int, typer.Option("--facts", metavar="N", min=2, help="Facts to make up.")] = 60,
    lora: Rank = 8,
    epochs: Epochs = 10,
    batch: BatchSize = 8,
    learning_rate: Rate = 2e-3,
    warm_up: WarmUp = 20,
    checkpoints: Checkpoints = 0,
    seed: Seed = 0,
    at: At = None,
    bytes: Bytes = None,
    preconditioner: Preconditioner = None,
    methods: Methods = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="The model's hidden states besides BM25.")
    ] = False,
    json: Json = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Is the sentence found that taught a fact, asked for in other words? MRR and recall at 10.

    Made-up facts among examples that share more words with the question than the sentence does; BM25 stands
    beside.
    """
    with _evaluation(json, quiet) as (say, show):
        from rapidin.evaluate import facts as room
        from rapidin.evaluate.methods import parse_methods, parse_places

        chosen, places = (
            parse_methods(methods),
            parse_places(at or ["0.5"], bytes or [], preconditioner or []),
        )
        show(
            room.evaluate(
                model,
                out,
                chosen,
                places,
                count=count,
                lora=lora or None,
                recipe=_recipe(epochs, batch, learning_rate, warm_up, False, seed),
                checkpoints=checkpoints,
                with_baselines=baselines,
                device=device,
                say=say,
            )
        )


@command("select", group)
def select(
    model: BaseModel,
    out: Out,
    rows: Annotated[int, typer.Option(metavar="N", min=8, help="Training rows to make up.")] = 400,
    flipped: Annotated[float, typer.Option(metavar="X", help="Share of them with a wrong label.")] = 0.2,
    share: Annotated[float, typer.Option(metavar="X", help="Share of them to choose.")] = 0.5,
    seeds: Annotated[int, typer.Option(metavar="K", min=1, help="Trainings of each choice.")] = 3,
    lora: Rank = 8,
    epochs: Epochs = 3,
    batch: BatchSize = 8,
    learning_rate: Rate = 1e-3,
    warm_up: WarmUp = 10,
    seed: Seed = 0,
    at: Annotated[
        str, typer.Option(metavar="A[,A...]", help="Where gradients are taken, as in 'rapidin cache'.")
    ] = "0.5",
    bytes: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Bytes of a row, as in 'rapidin cache'; 0: all of the sketch."),
    ] = 0,
    preconditioner: Annotated[
        str,
        typer.Option(
            "--precondition",
            metavar="kfac|off|sample",
            help="How gradients are turned, as in 'rapidin cache'.",
        ),
    ] = "kfac",
    methods: Methods = None,
    json: Json = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Does choosing training data leave wrong labels out, and a better model behind?

    A made-up task with flipped labels: the rows that 'rapidin select' chooses, beside random ones and all.
    """
    with _evaluation(json, quiet) as (say, show):
        from rapidin.evaluate import selection as room
        from rapidin.evaluate.methods import parse_methods, parse_places

        chosen = parse_methods(methods, "dot:layer,fisher:layer")
        (place,) = parse_places([at], [bytes], [preconditioner])
        show(
            room.evaluate(
                model,
                out,
                chosen,
                place,
                rows=rows,
                flipped=flipped,
                share=share,
                seeds=seeds,
                lora=lora or None,
                recipe=_recipe(epochs, batch, learning_rate, warm_up, False, seed),
                device=device,
                say=say,
            )
        )


# ------------------------------------------------------------------------------------------------ helpers


def _recipe(
    epochs: int, batch: int, learning_rate: float, warm_up: int, constant: bool, seed: int
) -> "Recipe":
    from rapidin.evaluate.training import Recipe

    if not 0 < learning_rate < float("inf"):
        raise UserError(f"--learning-rate {learning_rate:g} is not above 0")
    return Recipe(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        warm_up=warm_up,
        schedule="constant" if constant else "linear",
        seed=seed,
    )


def _subject(
    cache: str,
    column: str | None,
    model: str | None,
    adapter: str | None,
    base: str | None,
    train_data: list[str] | None,
    device: str | None,
    trust_remote_code: bool,
    quiet: bool,
    say: "Say",
    with_model: bool = True,
) -> "Subject":
    """The cache with its data and model; the column is looked for before the model is loaded."""
    from rapidin.data.examples import files
    from rapidin.evaluate import subject as room

    ensemble = open_caches([cache])
    examples = room.open_data(ensemble, files(train_data))
    if column is not None:
        room.column(examples, column)
    if with_model:
        location = ModelLocation(model, adapter, base, device, trust_remote_code=trust_remote_code)
        ensemble = with_models(messages(quiet), ensemble, location)
    return room.Subject(ensemble, examples, say)


@contextmanager
def _evaluation(json: str | None, quiet: bool) -> "Iterator[tuple[Say, Any]]":
    """(what says a line, what shows a result), with quiet libraries; checks first that JSON can be
    written."""
    if json is not None and json != "-":
        check_writable(json)
    with quiet_libraries():
        from rapidin.evaluate import figures
        from rapidin.evaluate.result import silent
        from rapidin.results.terminal import make_console

        for package in ("sklearn", "scipy", "rank_bm25"):  # before hours of work
            figures.needs(package)

        def show(result: "Result") -> None:
            text = json_module.dumps(result.to_json(), indent=1)
            if json == "-":
                print(text)
                return
            if json is not None:
                write_text(json, text + "\n")
            out = make_console(sys.stdout)
            out.print(result.table(out.width))

        yield (silent if quiet else line), show
