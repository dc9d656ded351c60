"""What options of several commands have in common, and the app that the commands belong to."""

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial, wraps
from typing import Annotated, Any, TypeVar

import typer

from rapidin.errors import UserError

app = typer.Typer(
    name="rapidin",
    help="Find the training examples behind what a language model says.\n\n"
    "First 'rapidin cache' sketches the gradient of every training example, then 'rapidin query' finds those "
    "behind a generation. A positive score means that training on the example made the generation more "
    "likely (helpful), a negative score that it made it less likely (harmful).",
    add_completion=False,
    rich_markup_mode=None,  # plain help: narrow terminals have room for it, and brackets stay brackets
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Earlier names of flags, which still work and are not shown.
RENAMED_FLAGS = {"--batch": "--batch-size", "--geometry": "--precondition", "--warm-up": "--warmup-steps"}


def renamed_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, earlier names of flags replaced by today's, up to a `--`."""
    found = list(arguments)
    end = found.index("--") if "--" in found else len(found)
    for n, argument in enumerate(found[:end]):
        name, equals, value = argument.partition("=")
        found[n] = RENAMED_FLAGS.get(name, name) + equals + value
    return found


_Body = TypeVar("_Body", bound=Callable[..., int | None])


def command(name: str, to: typer.Typer = app, *, several: bool = False) -> Callable[[_Body], _Body]:
    """Make a function a command. typer only parses: `main` calls what this returns to it, outside of typer's
    own handling of errors. several: it runs in several processes at once (`rapidin.distributed`)."""

    def register(body: _Body) -> _Body:
        @wraps(body)
        def parsed(**options: Any) -> Any:
            return partial(body if several else partial(_in_one_process, name, body), **options)

        to.command(name)(parsed)
        return body

    return register


class Dtype(str, Enum):
    float16 = "float16"
    float32 = "float32"
    int8 = "int8"
    int4 = "int4"
    sign = "sign"


class ModelDtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    auto = "auto"


class Loss(str, Enum):
    mean = "mean"
    sum = "sum"


class TooLong(str, Enum):
    truncate = "truncate"
    skip = "skip"


class OnError(str, Enum):
    stop = "stop"
    skip = "skip"


class Normalize(str, Enum):
    layer = "layer"
    none = "none"
    cosine = "cosine"


class Method(str, Enum):
    dot = "dot"
    datainf = "datainf"
    fisher = "fisher"


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Such as cpu or cuda:1; auto: layers over all GPUs.  [default: a GPU where there is one]",
        show_default=False,
    ),
]
ShardModel = Annotated[
    bool,
    typer.Option(
        "--shard-model", help="Under torchrun: each process holds a part of every weight, for large models."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model. Only if you trust it."),
]
CacheFolder = Annotated[str, typer.Argument(metavar="CACHE", help="Folder made by 'rapidin cache'.")]
CacheFolders = Annotated[
    list[str],
    typer.Argument(
        metavar="CACHE...",
        help="Folders made by 'rapidin cache'; of several, of the same examples, the scores' mean counts.",
    ),
]
NormalizeOption = Annotated[
    Normalize,
    typer.Option(
        "--normalize",
        help="What is compared, and the scale of the scores. layer: each layer's gradient at length 1; "
        "cosine: the whole gradient at length 1; none: gradients as they are.",
    ),
]
MethodOption = Annotated[
    Method,
    typer.Option(
        "--method",
        help="How influence is estimated. dot: inner product (TracIn); datainf: with DataInf's inverse "
        "Hessian; fisher: with the damped inverse of each layer's second moment, as TRAK and TrackStar.",
    ),
]
Damping = Annotated[
    float | None,
    typer.Option(
        "--damping",
        metavar="D",
        help="Of datainf and fisher, relative to the gradients' size.  [default: the method's own]",
        show_default=False,
    ),
]
Preconditioner = Annotated[
    str,
    typer.Option(
        "--precondition",
        metavar="kfac|off|sample|FILE",
        help="Turn gradients by a root of their inverse second moment: K-FAC's, from a sample of the "
        "data, or Adam's, from a sample or the optimizer's state (optimizer.pt or its folder).",
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Of a completion that the model writes.")
]
MovedModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Where the model has moved.", show_default=False),
]
MovedAdapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="ADAPTER", help="Where the adapter has moved.", show_default=False),
]
MovedBase = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Where the base model has moved.", show_default=False),
]
TrainData = Annotated[
    list[str] | None,
    typer.Option(
        "--train-data",
        metavar="FILE",
        help="Where the training examples have moved; several in their order.",
        show_default=False,
    ),
]


def _in_one_process(name: str, body: Callable[..., int | None], **options: Any) -> int | None:
    from rapidin.distributed import world

    if not world().alone:
        raise UserError(f"'rapidin {name}' runs in one process", "start it without torchrun")
    return body(**options)


def points(at: str | None) -> list[float] | None:
    """The numbers of --at; UserError where they are none."""
    if at is None:
        return None
    try:
        return [float(part) for part in at.split(",")]
    except ValueError:
        raise UserError(f"--at {at} is not a number or numbers between commas", "as in --at 0.5") from None
