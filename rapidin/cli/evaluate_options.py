"""The options that several commands of `rapidin eval` share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from rapidin.attribution.options import MAP, ModelLocation, QueryOptions
from rapidin.cli.options import Only, app
from rapidin.data.fields import FieldMap
from rapidin.errors import UserError
from rapidin.settings import option

if TYPE_CHECKING:
    from rapidin.evaluate.settings import Recipe
    from rapidin.evaluate.variants import Variant

eval_app = typer.Typer(
    name="eval",
    help="Measure attribution methods against a known truth: planted, labelled, or found by retraining.\n\n"
    "docs/guide/evaluation.md explains what each evaluation measures and how to read its result.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(eval_app)

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
        rich_help_panel="Output",
    ),
]
Queries = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Queries: generations to explain, or prompts for the model to answer.",
        show_default=False,
        rich_help_panel="Data",
    ),
]


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields in the data that is named besides the cache, or in both files of 'eval lds'."""

    map: FieldMap | None = MAP


Methods = Annotated[
    str | None,
    typer.Option(
        metavar="M:N,...",
        help="Methods to compare, comma-separated METHOD:NORMALIZE[:DAMPING], for example "
        "dot:weighted,datainf:none:0.1.  [default: all that apply]",
        show_default=False,
        rich_help_panel="Scoring",
    ),
]
Baselines = Annotated[
    bool,
    typer.Option(
        "--baselines",
        help="Also rank by BM25 of the words and by the model's hidden states.",
        rich_help_panel="Scoring",
    ),
]
Json = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Write the result as JSON; - writes to standard output, without a table.",
        rich_help_panel="Output",
    ),
]
Device = Annotated[ModelLocation, Only("device")]
Location = Annotated[
    ModelLocation, Only("model", "adapter", "base", "tokenizer", "device", "trust_remote_code")
]
Generation = Annotated[QueryOptions, Only("max_new_tokens")]


@dataclass(frozen=True)
class VariantOptions:
    """The caches to compare: one for every combination of these options."""

    at: tuple[str, ...] = option(
        (),
        help="Where gradients are taken, as in 'rapidin cache', or 'checkpoints' to sum over those kept; "
        "repeat to compare.",
        metavar="A[,A...]",
        panel="Gradients",
        default="0.5",
    )
    preconditioner: tuple[str, ...] = option(
        (),
        help="Preconditioner, as in 'rapidin cache'; optimizer uses the last checkpoint's state; repeat to "
        "compare.",
        flag="precondition",
        metavar="kfac|off|sample|optimizer",
        panel="Gradients",
        default="kfac",
    )
    bytes: tuple[int, ...] = option(
        (),
        help="Bytes per example, as in 'rapidin cache'; 0 keeps the uncompressed sketch; repeat to compare.",
        metavar="N",
        panel="Storage",
        limits=(0, None),
        default="0",
    )

    def all(self) -> "list[Variant]":
        """Every combination. Raises UserError for values that cannot be used."""
        from rapidin.evaluate.variants import parse_variants

        return parse_variants(self.at or ["0.5"], self.bytes or [], self.preconditioner or [])

    def single(self) -> "Variant":
        """The only combination. Raises UserError if there are several."""
        variants = self.all()
        if len(variants) > 1:
            raise UserError(
                "this evaluation runs on one cache", "give --at, --bytes and --precondition only once"
            )
        return variants[0]


def check_recipe(recipe: "Recipe") -> None:
    """Raise UserError for a learning rate that trains nothing, or cannot be used."""
    if not 0 < recipe.learning_rate < float("inf"):
        raise UserError(f"--learning-rate must be above 0, got {recipe.learning_rate:g}")
