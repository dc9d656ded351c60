"""What a query returns, how influence is estimated, and how a cache is stored: options as dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rapidin.data.fields import FieldMap
from rapidin.errors import UserError, short
from rapidin.settings import Settings, documented, dtype_name, option, whole

if TYPE_CHECKING:
    from rapidin.cache import Cache
    from rapidin.data.spans import Targets

NORMALIZE = ("weighted", "layer", "cosine", "none")
METHODS = ("dot", "datainf", "fisher")

_CANDIDATES = 1000  # of a finer cache

_NORMALIZE = option(
    "weighted",
    help="Normalization of the gradients, which sets the scale of the scores. weighted: each layer's "
    "gradient has norm 1, layers are weighted by the norms of the generation's gradient, and examples by "
    "the fourth root of the typical norm of theirs, over its mean; layer: without these weights, as always "
    "with rapidgrad; cosine: the whole gradient has norm 1; none: no normalization.",
    panel="Scoring",
    choices=NORMALIZE,
)
_METHOD = option(
    "dot",
    help="How influence is estimated. dot: inner product (TracIn); datainf: with DataInf's inverse Hessian; "
    "fisher: with the damped inverse of each layer's second moment, as in TRAK and TrackStar.",
    panel="Scoring",
    choices=METHODS,
)
_DAMPING = option(
    None,
    help="Damping of datainf and fisher, relative to the size of the gradients.",
    metavar="D",
    panel="Scoring",
    default="the method's own",
)
_MAX_NEW_TOKENS = option(
    64,
    help="Maximum number of tokens that the model generates for a completion.",
    metavar="N",
    panel="Generation",
    limits=(1, None),
)


# How a model is loaded, here and by commands that name the model themselves.
DEVICE = option(
    None,
    help="Device, such as cpu or cuda:1; auto: layers over all GPUs.",
    metavar="DEVICE",
    panel="Run",
    default="a GPU if there is one",
)
SHARD_MODEL = option(
    False,
    help="Under torchrun: each process holds a part of every weight, for large models.",
    panel="Run",
)
TRUST_REMOTE_CODE = option(
    False, help="Run code that comes with the model; only if you trust it.", panel="Model"
)
MAP = option(
    None,
    help="Names of the fields in the data, as in prompt=question,completion=answer or "
    "system=context,user=question,assistant=answer.",
    metavar="FIELD=NAME,...",
    panel="Data",
    default="known field names are recognized",
    parse=lambda text: FieldMap.of(text),
)
STREAMING = option(
    False,
    help="Fetch rows of a data set on the Hugging Face hub as they are read, instead of all of it.",
    panel="Data",
)


@documented
@dataclass(frozen=True)
class ScoringConfig(Settings):
    """How influence is estimated (`rapidin.attribution.methods`), and over which sets of generations."""

    normalize: str = _NORMALIZE
    method: str = _METHOD
    damping: float | None = _DAMPING
    together: bool = option(
        False,
        help="One ranking for all generations as a target set: the weighted mean of their scores.",
        panel="Scoring",
    )
    groups: Sequence[Sequence[int]] | None = option(
        None, help="Numbers of generations; each group is such a set, with scores of its own.", flag=None
    )


@documented
@dataclass(frozen=True)
class QueryOptions(Settings):
    """What a query returns, and how influence is estimated.

    Raises UserError for options that do not go together.
    """

    top_k: int = option(
        10,
        help="Examples to show at each end of the ranking.",
        metavar="N",
        panel="Output",
        limits=(1, None),
    )
    normalize: str = _NORMALIZE
    method: str = _METHOD
    damping: float | None = _DAMPING
    together: bool = option(
        False,
        help="One ranking for all generations as a target set: the mean of their scores, weighted by the "
        "column 'weight' if there is one (negative: less of it).",
        panel="Scoring",
    )
    rescore: Cache | Literal["exact"] | None = option(
        None,
        help="Reorder the best candidates by another cache of the same examples that stores more of each, or "
        "by exact gradients.",
        metavar="CACHE|exact",
        panel="Scoring",
        parse=lambda text: _rescore_of(text),
    )
    candidates: int | None = option(
        None,
        help="Candidates at each end that are rescored.",
        metavar="N",
        panel="Scoring",
        limits=(1, None),
        default="1000 with a cache, twice `top_k` with exact",
    )
    targets: Targets | None = option(
        None,
        help='Parts of the generations that get hits of their own: "tokens" for each token, "hotwords" for '
        "the words in the records' field `hotwords`, or for each generation a list of words and (start, end) "
        "spans of its completion (`rapidin.data.spans`).",
        flag=None,
    )
    contributions: bool = option(
        False,
        help="Show which tokens of each hit made its score; recomputes the gradients of the hits.",
        panel="Output",
    )
    fold: bool = option(
        False, help="Show hits that say the same, or nearly, once, with a count.", panel="Output"
    )
    by: str | None = option(
        None,
        help="Sum the scores of all examples by a column of the training data, such as their source; 'file' "
        "for the file they are from.",
        metavar="COLUMN",
        panel="Output",
    )
    interactions: bool = option(
        False,
        help="For the groups of `by`, also estimate what leaving one out changes while the others stay: a "
        "group that another repeats counts less.",
        panel="Output",
    )
    baselines: bool = option(
        False,
        help="Show where BM25 and the model's hidden states rank the hits; reads all training texts, and "
        "runs a forward pass over each.",
        panel="Output",
    )
    fuse: bool = option(
        False,
        help="In the place of the most helpful examples, one ranking from gradient scores, BM25 and the "
        "model's hidden states, by reciprocal rank fusion, with what each adds to each hit; as much work as "
        "`baselines`. The most harmful examples stay those of the gradients.",
        panel="Output",
    )
    fuse_weights: tuple[float, float, float] | None = option(
        None,
        help="Weights of gradient scores, BM25 and hidden states in `fuse`, as in 1,0.5,0.",
        metavar="G,B,H",
        panel="Output",
        default="1,1,1",
        parse=lambda text: _weights_of(text),
    )
    fdr: float | None = option(
        None,
        help="Show only hits that pass this false-discovery rate, such as 0.1: the share of them that is "
        "expected to have no higher scores than texts that were never trained on. Needs a cache with decoys.",
        metavar="SHARE",
        panel="Output",
    )
    errors: bool = option(
        True,
        help="Estimate standard errors of scores, and the ranks that hits could have.",
        flag=None,
    )
    layers: bool = option(False, help="Return what each layer contributes to a hit's score.", flag=None)
    histogram: bool = option(False, help="Return the histogram of all scores.", flag=None)
    max_new_tokens: int = _MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        self.check_values()
        if self.candidates is not None:
            if self.rescore is None:
                raise UserError("`candidates` is the number that `rescore` looks at", "use `rescore` too")
            if self.candidates < self.top_k:
                raise UserError(f"`candidates` {self.candidates} is less than `top_k` {self.top_k}")
        if isinstance(self.rescore, str) and not self.exact:
            raise UserError(f"cannot rescore by '{self.rescore}'", "give a cache, or 'exact'")
        if self.fdr is not None and not 0 < self.fdr < 1:
            raise UserError(f"`fdr` must be above 0 and below 1, got {self.fdr:g}", "0.1 is a usual one")
        if self.together and self.targets is not None:
            raise UserError("targets are parts of single generations", "leave out `together`")
        if self.interactions:
            self._check_interactions()
        if self.fuse_weights is not None:
            if not self.fuse:
                raise UserError("`fuse_weights` are the weights of the rankings of `fuse`", "use `fuse` too")
            object.__setattr__(self, "fuse_weights", _checked_weights(self.fuse_weights))
        if self.fuse and self.exact:
            raise UserError(
                "exact gradients reorder the best candidates alone, and `fuse` ranks all examples",
                "leave out one of them, or rescore by another cache",
            )
        if self.fuse and self.fdr is not None:
            raise UserError("a fused ranking has no false-discovery rate", "leave out `fuse` or `fdr`")
        if self.exact and self.method != "dot":
            raise UserError(
                f"exact gradients cannot be scored by '{self.method}', which works on sketches only",
                "use `method='dot'` with `rescore='exact'`",
            )

    def _check_interactions(self) -> None:
        if self.by is None:
            raise UserError("`interactions` are between the groups of a column", "name it with `by`")
        if self.method != "dot" or self.normalize == "none":
            raise UserError(
                f"`interactions` are not known for '{self.method}:{self.normalize}'",
                "use `method='dot'`, and another normalization than 'none'",
            )

    @property
    def scoring(self) -> ScoringConfig:
        """How influence is estimated."""
        return ScoringConfig(self.normalize, self.method, self.damping, self.together)

    @property
    def exact(self) -> bool:
        """Whether hits are rescored by their exact gradients."""
        return self.rescore == "exact"

    @property
    def finer(self) -> Cache | None:
        """The cache by which hits are rescored."""
        return None if self.rescore is None or isinstance(self.rescore, str) else self.rescore

    @property
    def rescored(self) -> int:
        """Candidates at each end that are rescored, 0 for none."""
        if self.rescore is None:
            return 0
        if self.candidates is not None:
            return self.candidates
        return 2 * self.top_k if self.exact else max(_CANDIDATES, self.top_k)

    @property
    def needs_all_scores(self) -> bool:
        """Whether the scores of all examples are needed, not the best alone."""
        return self.histogram or self.by is not None

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of training examples are computed again."""
        return self.exact or self.contributions

    @property
    def needs_texts(self) -> str:
        """What of this needs the training examples, in words; "" for nothing."""
        if self.needs_gradients:
            return "`contributions` or `rescore='exact'`"
        if self.by is not None:
            return "`by`"
        return self.reads_texts

    @property
    def reads_texts(self) -> str:
        """What of this compares the texts of all training examples, in words; "" for nothing."""
        return "`fuse`" if self.fuse else "`baselines`" if self.baselines else ""

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values; a cache to rescore by is its path."""
        finer = self.finer
        return super().to_json() | ({} if finer is None else {"rescore": str(finer.path)})


@documented
@dataclass(frozen=True)
class ModelLocation(Settings):
    """Where the model of a cache is, as far as its manifest's names are out of date, and how to load it."""

    model: str | None = option(None, help="New location of the model.", metavar="MODEL", panel="Model")
    adapter: str | None = option(None, help="New location of the adapter.", metavar="ADAPTER", panel="Model")
    base: str | None = option(None, help="New location of the base model.", metavar="MODEL", panel="Model")
    tokenizer: str | None = option(
        None, help="New location of the tokenizer.", metavar="TOKENIZER", panel="Model"
    )
    device: str | None = DEVICE
    shard_model: bool = SHARD_MODEL
    trust_remote_code: bool = TRUST_REMOTE_CODE


@documented
@dataclass(frozen=True)
class CacheOptions(Settings):
    """How sketches are stored, and which of the examples are cached."""

    dtype: str | None = option(
        None,
        help="Number format of stored sketches; sign stores one bit per number.",
        panel="Storage",
        choices=("float16", "float32", "int8", "int4", "sign"),
        default="float16, or sign with `bytes`",
    )
    bytes: int | None = option(
        None,
        help="Total bytes per example, to which the codec is fitted: 2048 is a good start.",
        metavar="N",
        panel="Storage",
        limits=(1, None),
        default="every number of the sketch is kept",
    )
    sample: int | None = option(
        None,
        help="Examples from which the codec learns a basis; 0: it learns none.",
        metavar="N",
        panel="Storage",
        limits=(0, None),
        default="1024 with `bytes`, else 0",
    )
    shard_rows: int | None = option(
        None,
        help="Examples per shard file.",
        metavar="N",
        panel="Storage",
        limits=(1, None),
        default="as many as fill 16 MiB",
    )
    check: bool = option(
        True,
        help="Before caching, compare the gradients of one or two examples with plain autograd's. Gradients "
        "that differ are computed by autograd, one example at a time.",
        panel="Gradients",
    )
    null: bool = option(
        True,
        help="Score everyday questions and some of the examples against the finished cache, so that a query "
        "can say whether its best score stands out.",
        panel="Storage",
    )
    decoys: Any = option(
        None,
        help="Texts of the same kind that were never trained on. They are sketched like the examples, and "
        "are never hits: a query says which share of them scores as high as a hit. Run the command of an "
        "existing cache again with them to add them.",
        metavar="FILE",
        panel="Data",
        parse=lambda text: text,
    )
    limit: int | None = option(
        None, help="Use only the first N examples.", metavar="N", panel="Data", limits=(1, None)
    )
    map: FieldMap | Mapping[str, str] | str | None = MAP
    streaming: bool = STREAMING
    append: bool = option(
        False,
        help="Add examples to a cache that has the first of them: the data has grown, or more data follows "
        "it.",
        panel="Data",
    )
    part: tuple[int, int] | None = option(
        None,
        help="Cache only the I-th of N parts, for machines without a common folder: 'rapidin merge' puts "
        "them together. 0/N: only what all parts share.",
        metavar="I/N",
        panel="Run",
        parse=lambda text: _part_of(text),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        self.check_values()
        number, parts = self.part or (1, 1)
        if not 0 <= number <= parts or parts < 1:
            raise UserError(f"`part` {number}/{parts} is none of {parts} parts", "count them from 1")
        if self.append and parts > 1:
            raise UserError("`append` and `part` do not go together", "add to the merged cache")
        if self.decoys is not None and self.part is not None:
            raise UserError("`decoys` and `part` do not go together", "add them to the merged cache")


def _rescore_of(text: str) -> Any:
    from rapidin.cache import Cache

    return text if text == "exact" else Cache(text)


def _weights_of(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"`fuse_weights` {short(text)} are not numbers", "as in 1,0.5,0") from None


def _checked_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights as numbers. Raises UserError unless they are three, none negative, and not all 0."""
    try:
        numbers = tuple(map(float, weights))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(0 <= each < math.inf for each in numbers) or not any(numbers):
        raise UserError(
            "`fuse_weights` must be three numbers of 0 or more for gradient scores, BM25 and hidden states, "
            f"and not all 0, got {short(str(weights))}",
            "as in 1,0.5,0",
        )
    return numbers


def _part_of(text: str) -> tuple[int, int]:
    number, parts = (whole(each) for each in text.partition("/")[::2])
    if number is None or parts is None:
        raise UserError(f"`part` must be two numbers, got {short(text)}", "as in 1/4")
    return number, parts
