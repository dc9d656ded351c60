"""The options that the commands of `rapidin eval` share, as groups: each is declared once, and read as one
value."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from rapidin.cli.options import (
    Device,
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
    from rapidin.evaluate.training import Recipe
    from rapidin.evaluate.variants import Variant

DATA, MODEL, GRADIENTS, STORAGE, RUN, OUTPUT = "Data", "Model", "Gradients", "Storage", "Run", "Output"

eval_app = typer.Typer(
    name="eval",
    help="Measure attribution methods against a known truth: planted, labelled, or found by retraining.\n\n"
    "docs/evaluation.md explains what each evaluation measures and how to read its result.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(eval_app)


def eval_command(name: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of `rapidin eval`, with an example at the end of its help.

    Each parameter whose type is a dataclass stands for the options that are its fields. The fields' defaults
    are those of the parameter's default, if it has one.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        flat = with_flat_options(body)
        flat.__doc__ = f"{inspect.cleandoc(body.__doc__ or '')}\n\n\b\nExample:\n  {example}"
        command(name, eval_app)(flat)
        return body

    return register


def with_flat_options(body: Callable[..., None]) -> Callable[..., None]:
    """`body` with a keyword parameter for every field of its dataclass parameters, as typer reads them."""
    types = get_type_hints(body, include_extras=True)
    groups: dict[str, type] = {}
    options: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(body).parameters.values():
        kind = types[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind  # type: ignore[assignment]
            options |= _options_of(kind, parameter.default)
        else:
            options[parameter.name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind)

    @wraps(body)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        body(**values)

    flat.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
    flat.__annotations__ = {name: option.annotation for name, option in options.items()}
    return flat


def _options_of(group: Any, default: Any) -> dict[str, inspect.Parameter]:
    """A keyword parameter for each field of a dataclass. default: an instance, or
    `inspect.Parameter.empty`."""
    types = get_type_hints(group, include_extras=True)
    options = {}
    for field in fields(group):
        value = inspect.Parameter.empty if field.default is MISSING else field.default
        if default is not inspect.Parameter.empty:
            value = getattr(default, field.name)
        options[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=types[field.name]
        )
    return options


# --------------------------------------------------------------------------------------- single options

Methods = Annotated[
    str | None,
    typer.Option(
        metavar="M:N,...",
        help="Methods to compare, comma-separated METHOD:NORMALIZE[:DAMPING], for example "
        "dot:layer,datainf:none:0.1.  [default: all that apply]",
        show_default=False,
        rich_help_panel=GRADIENTS,
    ),
]
Baselines = Annotated[
    bool,
    typer.Option(
        "--baselines",
        help="Also rank by BM25 of the words and by the model's hidden states.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=2**32 - 1, help="Random seed of data and training.", rich_help_panel=RUN
    ),
]
BaseModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Model to tune: a Hugging Face folder or name, or a folder with one GGUF file."
    ),
]
OutFolder = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help="Folder for models, caches and results; an unfinished run there is resumed.",
        rich_help_panel=OUTPUT,
    ),
]
LoraRank = Annotated[
    int,
    typer.Option(
        "--lora",
        metavar="R",
        min=0,
        help="Rank of the LoRA adapter to tune; 0 tunes all weights.",
        rich_help_panel=MODEL,
    ),
]
CheckpointCount = Annotated[
    int,
    typer.Option(
        "--checkpoints",
        metavar="N",
        min=0,
        help="Checkpoints of the tuning to keep, for --at checkpoints.",
        rich_help_panel=STORAGE,
    ),
]


# ----------------------------------------------------------------------------------- groups of options


@dataclass(frozen=True)
class CacheSource:
    """New locations of what a cache was made from, and how its model is loaded."""

    model: MovedModel = None
    adapter: MovedAdapter = None
    base: MovedBase = None
    train_data: TrainData = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class Output:
    """Where the result and the progress go."""

    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the result as JSON; - writes it to standard output instead of the table.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    quiet: Quiet = False


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is tuned."""

    epochs: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Passes over the training examples.", rich_help_panel=MODEL),
    ]
    batch: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Examples per training step.", rich_help_panel=MODEL
        ),
    ]
    learning_rate: Annotated[
        float,
        typer.Option(metavar="X", help="Peak learning rate of the tuning.", rich_help_panel=MODEL),
    ]
    warm_up: Annotated[
        int,
        typer.Option(
            "--warmup-steps",
            metavar="N",
            min=0,
            help="Steps of linear learning-rate warm-up.",
            rich_help_panel=MODEL,
        ),
    ]

    def recipe(self, seed: int, *, constant: bool = False) -> "Recipe":
        """The recipe of the tuning. constant: keep the learning rate at its peak, else it decays to zero."""
        from rapidin.evaluate.training import Recipe

        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate must be above 0, got {self.learning_rate:g}")
        return Recipe(
            epochs=self.epochs,
            batch=self.batch,
            learning_rate=self.learning_rate,
            warm_up=self.warm_up,
            schedule="constant" if constant else "linear",
            seed=seed,
        )


@dataclass(frozen=True)
class VariantOptions:
    """The caches to compare: every combination of these options is one."""

    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A[,A...]",
            help="Where gradients are taken, as in 'rapidin cache', or 'checkpoints' to sum over those kept; "
            "repeat to compare.  [default: 0.5]",
            show_default=False,
            rich_help_panel=GRADIENTS,
        ),
    ] = None
    preconditioner: Annotated[
        list[str] | None,
        typer.Option(
            "--precondition",
            metavar="kfac|off|sample|optimizer",
            help="Preconditioner, as in 'rapidin cache'; optimizer uses the last checkpoint's state; "
            "repeat to compare.  [default: kfac]",
            show_default=False,
            rich_help_panel=GRADIENTS,
        ),
    ] = None
    bytes: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Bytes per example, as in 'rapidin cache'; 0 keeps the uncompressed sketch; "
            "repeat to compare.  [default: 0]",
            show_default=False,
            rich_help_panel=STORAGE,
        ),
    ] = None

    def variants(self) -> "list[Variant]":
        """Every combination."""
        from rapidin.evaluate.variants import parse_variants

        return parse_variants(self.at or ["0.5"], self.bytes or [], self.preconditioner or [])
