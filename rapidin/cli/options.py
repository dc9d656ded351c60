"""The app that the commands belong to, and how a command's options are made of dataclasses."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, is_dataclass
from functools import lru_cache, partial, wraps
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from rapidin.attribution.options import DEVICE, SHARD_MODEL, TRUST_REMOTE_CODE
from rapidin.errors import UserError
from rapidin.settings import Option, described, dtype_name, option

app = typer.Typer(
    name="rapidin",
    help="Find the training examples behind what a language model says.\n\n"
    "First 'rapidin cache' sketches the gradient of every training example, then 'rapidin query' finds those "
    "behind a generation. A positive score means that training on the example made the generation more "
    "likely (helpful), a negative score that it made it less likely (harmful).",
    add_completion=True,
    rich_markup_mode=None,  # plain help: narrow terminals have room for it, and brackets stay brackets
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Earlier names of flags, which still work and are not shown.
RENAMED_FLAGS = {
    "--batch": "--batch-size",
    "--constant": "--schedule=constant",
    "--geometry": "--precondition",
    "--warm-up": "--warmup-steps",
}


_OF_DTYPES = ("--dtype", "--model-dtype")  # flags whose values have several names


def renamed_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, up to a `--`, with today's names of flags for earlier ones, and one
    name for each number format."""
    renamed = list(arguments)
    end = renamed.index("--") if "--" in renamed else len(renamed)
    before = ""
    for n, argument in enumerate(renamed[:end]):
        name, equals, value = argument.partition("=")
        if name in _OF_DTYPES and equals:
            value = dtype_name(value)
        renamed[n] = RENAMED_FLAGS.get(name, name) + equals + value
        if before in _OF_DTYPES:
            renamed[n] = dtype_name(argument)
        before = argument
    return renamed


# The library names an argument in its messages and helps as Python knows it, between backticks: `top_k`,
# `dtype='sign'`, `check=False`. The command line shows them as its own: --top-k, --dtype sign, --no-check.
_NAMED = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")
# Arguments whose flag has another name, and those that are several flags.
_OTHERS = {
    "examples": ("--train-data", "--no-text"),
    "path": ("--out", ""),
    "targets": ("--tokens, --hotwords", ""),
    "progress": ("", "--quiet"),
}


def with_flags(text: str) -> str:
    """A message with flags in place of the arguments that it names."""

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        used, left_out = _OTHERS.get(name) or _flags().get(name, ("", ""))
        if value == "False":
            return left_out or match[0]
        if not used:
            return match[0]
        return used if value in (None, "True") else f"{used} {value.strip(chr(39))}"

    return _NAMED.sub(flag, text) if "`" in text else text


@lru_cache(maxsize=1)
def _flags() -> dict[str, tuple[str, str]]:
    """The flag of each argument, and the one that switches it off ("" without one)."""
    found: dict[str, tuple[str, str]] = {}
    for parameter in _parameters(typer.main.get_command(app)):
        used, left_out = parameter.opts[-1], (parameter.secondary_opts or [""])[-1]
        if used.startswith("--"):
            found.setdefault(parameter.name, (used, left_out))
    return found


def _parameters(command: Any) -> Iterator[Any]:
    """The parameters of a command and of the commands below it."""
    yield from command.params
    for each in getattr(command, "commands", {}).values():
        yield from _parameters(each)


_Body = TypeVar("_Body", bound=Callable[..., int | None])


PANELS = (
    "Arguments",
    "Generation",
    "Data",
    "Model",
    "Training",
    "Gradients",
    "Scoring",
    "Rows",
    "Storage",
    "Output",
    "Server",
    "Run",
    "Options",
)


ARGUMENTS = "rapidin.arguments"  # in a context's `meta`: the arguments as they were given


class GroupedCommand(typer.core.TyperCommand):
    """A command whose plain help lists options by their panels, in the order of `PANELS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                is_argument = parameter.param_type_name == "argument"
                name, help = record
                groups.setdefault("Arguments" if is_argument else panel, []).append((name, with_flags(help)))
        for name in sorted(groups, key=lambda name: PANELS.index(name) if name in PANELS else -1):
            with formatter.section(name):
                formatter.write_dl(groups[name])


def command(
    name: str, to: typer.Typer = app, *, several: bool = False, example: str = ""
) -> Callable[[_Body], _Body]:
    """Make a function a command. typer only parses: `main` calls what this returns to it, outside of typer's
    own handling of errors.

    A parameter whose annotation is a dataclass of `rapidin.settings.option`s becomes their flags. several:
    the command runs in several processes at once (`rapidin.distributed`); example: a command line that ends
    the help.
    """

    def register(body: _Body) -> _Body:
        groups = {
            parameter.name: _Group.of(parameter.annotation)
            for parameter in inspect.signature(body).parameters.values()
            if _is_group(parameter.annotation)
        }

        @wraps(body)
        def parsed(**values: Any) -> Any:
            def run() -> int | None:
                arguments = {key: group.made(values) for key, group in groups.items()}
                ungrouped = {key: value for key, value in values.items() if key not in taken}
                return body(**ungrouped, **arguments)

            return run if several else partial(_in_one_process, name, run)

        parameters: list[inspect.Parameter] = []
        taken: set[str] = set()
        for parameter in inspect.signature(body).parameters.values():
            if parameter.name in groups:
                made = groups[parameter.name].parameters()
                taken |= {each.name for each in made}
                parameters += made
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        parsed.__annotations__ = {each.name: each.annotation for each in parameters}
        epilog = f"Example: {example}" if example else None
        to.command(name, cls=GroupedCommand, epilog=epilog)(parsed)
        return body

    return register


@dataclass(frozen=True)
class Only:
    """As in `Annotated[ScoringConfig, Only("method", normalize="none")]`: which of a dataclass's fields are
    options of a command, and their defaults if those differ."""

    names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, *names: str, **defaults: Any) -> None:
        object.__setattr__(self, "names", (*names, *defaults))
        object.__setattr__(self, "defaults", defaults)


@dataclass(frozen=True)
class _Group:
    """A dataclass whose fields are options of a command."""

    settings: type[Any]
    only: Only | None

    @staticmethod
    def of(annotation: Any) -> "_Group":
        if get_origin(annotation) is Annotated:
            settings, only = get_args(annotation)
            return _Group(settings, only)
        return _Group(annotation, None)

    @property
    def fields(self) -> dict[str, tuple[Field[Any], Option]]:
        """The fields that have flags, by name."""
        return {
            name: (each, shown)
            for name, (each, shown) in described(self.settings).items()
            if shown.flag is not None and (self.only is None or name in self.only.names)
        }

    def parameters(self) -> list[inspect.Parameter]:
        """The command's parameters, one for each field."""
        defaults = {} if self.only is None else self.only.defaults
        return [
            _parameter(self.settings, each, shown, defaults.get(name, each.default))
            for name, (each, shown) in self.fields.items()
        ]

    def made(self, values: Mapping[str, Any]) -> Any:
        """The dataclass of the values that were parsed. Raises UserError for those that cannot be used."""
        arguments = {}
        for name, (each, shown) in self.fields.items():
            value = values[name]
            if shown.parse and isinstance(value, str):
                value = shown.parse(value)
            elif isinstance(each.default, tuple):  # a flag that may be repeated
                value = tuple(value or each.default)
            arguments[name] = value
        return self.settings(**arguments)


def _is_group(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return any(isinstance(each, Only) for each in get_args(annotation))
    return isinstance(annotation, type) and is_dataclass(annotation)


def _parameter(settings: type[Any], each: Field[Any], shown: Option, default: Any) -> inspect.Parameter:
    kind = str if shown.parse else _type_of(settings, each)
    flag = "--" + (shown.flag or each.name).replace("_", "-")
    if shown.choices:
        kind = Literal[shown.choices]
    if default is None:
        kind = kind | None
    if get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, None  # type: ignore[misc]
    is_switch = kind is bool
    help = shown.help + (f"  [default: {shown.default}]" if shown.default else "")
    made = typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_switch and default else flag,
        metavar=shown.metavar,
        help=help,
        min=shown.minimum,
        max=shown.maximum,
        show_default=default is not None and default is not MISSING and shown.default is None,
        rich_help_panel=shown.panel,
    )
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, made],
    )


def _type_of(settings: type[Any], each: Field[Any]) -> Any:
    if not isinstance(each.type, str):
        return each.type
    kind = eval(each.type, vars(sys.modules[settings.__module__]))
    plain = [member for member in get_args(kind) if member is not type(None)]
    return plain[0] if type(None) in get_args(kind) else kind


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors only.", rich_help_panel="Run")
]
CacheFolder = Annotated[str, typer.Argument(metavar="CACHE", help="Folder made by 'rapidin cache'.")]
CacheFolders = Annotated[
    list[str],
    typer.Argument(
        metavar="CACHE...",
        help="Folders made by 'rapidin cache'; the scores of several, of the same examples, are averaged.",
    ),
]
TrainData = Annotated[
    list[str] | None,
    typer.Option(
        "--train-data",
        metavar="FILE",
        help="New location of the training examples; repeat it for several files, in the same order.",
        show_default=False,
        rich_help_panel="Data",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """The model that gradients are taken of, besides its name."""

    adapter: str | None = option(
        None,
        help="PEFT adapter on MODEL; only its trainable parameters are used.",
        metavar="ADAPTER",
        panel="Model",
    )
    base: str | None = option(
        None,
        help="Base model that MODEL was tuned from, if all of its weights were tuned.",
        metavar="MODEL",
        panel="Model",
    )
    tokenizer: str | None = option(
        None,
        help="Tokenizer with its chat template.",
        metavar="TOKENIZER",
        panel="Model",
        default="the adapter's if it has one, else the model's",
    )
    model_dtype: str | None = option(
        None,
        help="Number format of the weights.",
        panel="Model",
        choices=("float32", "float16", "bfloat16", "auto"),
        default="float32 on a CPU, else as stored",
    )
    device: str | None = DEVICE
    shard_model: bool = SHARD_MODEL
    trust_remote_code: bool = TRUST_REMOTE_CODE


def _in_one_process(name: str, run: Callable[[], int | None]) -> int | None:
    from rapidin.distributed import world

    if not world().alone:
        raise UserError(f"'rapidin {name}' runs in one process", "start it without torchrun")
    return run()
