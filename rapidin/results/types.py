"""Hits: training examples with their scores, in order, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Tokens:
    """What each token of a training example contributes to a score.

    pieces: the tokens' texts, which together are the text that the model read; counts: whether the loss of
    predicting a token counts; contributions: [T], of the position where the model reads a token: what its
    layers' gradients there bring, whichever tokens' losses they come from; they sum to the score.
    by_target: [targets, T] float32, the same for each target of the query, where there are targets.
    """

    pieces: tuple[str, ...]
    counts: tuple[bool, ...]
    contributions: tuple[float, ...]
    by_target: NDArray[np.float32] | None = None

    def words(self) -> list[tuple[str, float]]:
        """Words between white space, with what their tokens contribute together, in the order of the text."""
        return join_words(self.pieces, self.contributions)

    def to_json(self) -> dict[str, Any]:
        """Texts and contributions; `by_target`, which is large, is left out."""
        return {
            "text": list(self.pieces),
            "counts": list(self.counts),
            "contribution": list(self.contributions),
        }


def join_words(pieces: Sequence[str], values: Sequence[float]) -> list[tuple[str, float]]:
    """Pieces [T] of a text as words, with the sums of their values [T]; white space alone belongs to the word
    after it."""
    words: list[tuple[str, float]] = []
    text, total = "", 0.0
    for piece, value in zip(pieces, values, strict=True):
        if text.strip() and (piece[:1].isspace() or text[-1:].isspace()):
            words.append((text.strip(), total))
            text, total = "", 0.0
        text, total = text + piece, total + value
    return [*words, (text.strip(), total)] if text else words


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a hit stands in another ranking of all training examples. score: there; rank: from 1."""

    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Hit:
    """A training example with its score.

    rank: from 1; index: its line number in the training data, from 0; row: its row in the cache; score: its
    influence on the generation, positive for helpful and negative for harmful; example: the record, where
    the data is at hand.

    Where they are known: error: the score's standard error (`rapidin.attribution.score_errors`); ranks: the
    first and the last rank that it could have by the errors; tied: the sketch cannot tell it from the hit
    before it; estimate: the score in the cache, where `score` is of exact gradients; copies: line numbers of
    examples that say the same and are folded into this hit, and copies_more: how many more there are;
    targets: the parts of the query's targets in the score; layers: what each layer brings to it; tokens: what
    each of the example's tokens brings; standings: by name, where a baseline ranks it.
    """

    rank: int
    index: int
    row: int
    score: float
    example: Mapping[str, Any] | None = None
    error: float | None = None
    ranks: tuple[int, int] | None = None
    tied: bool = False
    estimate: float | None = None
    copies: tuple[int, ...] = ()
    copies_more: int = 0
    targets: tuple[float, ...] = ()
    layers: tuple[float, ...] = ()
    tokens: Tokens | None = None
    standings: Mapping[str, Standing] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """rank, index, score, and what else is known."""
        value: dict[str, Any] = {"rank": self.rank, "index": self.index, "score": self.score}
        if self.error is not None:
            value["error"] = self.error
        if self.ranks is not None:
            value |= {"ranks": list(self.ranks), "tied": self.tied}
        if self.estimate is not None:
            value["estimate"] = self.estimate
        if self.copies:
            value["copies"] = {"indices": list(self.copies), "more": self.copies_more}
        if self.targets:
            value["targets"] = list(self.targets)
        if self.layers:
            value["layers"] = list(self.layers)
        if self.standings:
            value["baselines"] = {
                name: {"score": s.score, "rank": s.rank} for name, s in self.standings.items()
            }
        if self.tokens is not None:
            value["tokens"] = self.tokens.to_json()
        if self.example is not None:
            value["example"] = dict(self.example)
        return value


@dataclass(frozen=True, slots=True)
class TargetResult:
    """A part of a generation that was asked about by itself: a token, a hot word, a span.

    text: what it says; positions: indices of its tokens in `QueryResult.pieces`; influence: its part in the
    scores of the generation's own most helpful hits, their mean; top, bottom: the hits of this part alone.
    Scores are parts of the generation's: those of all its tokens sum to the generation's score.
    """

    text: str
    positions: tuple[int, ...]
    influence: float
    top: list[Hit]
    bottom: list[Hit]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the JSON of a query; of its hits the places and scores alone, since there may be
        very many."""

        def brief(hits: list[Hit]) -> list[dict[str, Any]]:
            return [{"rank": hit.rank, "index": hit.index, "score": hit.score} for hit in hits]

        return {
            "text": self.text,
            "places": list(self.positions),
            "influence": self.influence,
            "top": brief(self.top),
            "bottom": brief(self.bottom),
        }


@dataclass(frozen=True, slots=True)
class Histogram:
    """How the scores of all training examples lie. edges: [bins + 1], ascending; counts: [bins]."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Edges and counts."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


@dataclass(frozen=True, slots=True)
class Group:
    """The training examples that have one value in a column.

    value: as text; count: how many have it; total: the sum of their scores; helpful, harmful: their share in
    the sum of all positive scores, and of all negative ones, from 0 to 1.
    """

    value: str
    count: int
    total: float
    helpful: float
    harmful: float

    def to_json(self) -> dict[str, Any]:
        """With the mean score besides."""
        return {
            "value": self.value,
            "count": self.count,
            "total": self.total,
            "mean": self.total / max(1, self.count),
            "helpful": self.helpful,
            "harmful": self.harmful,
        }


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The hits of one generation.

    prompt, completion: its text; generated: whether the model wrote the completion just now; top: most
    helpful first; bottom: most harmful first; normalize, method: what the scores are
    (`rapidin.attribution.methods`); seconds: time by stage, of the whole call; together: how many generations
    these are the hits of, as one target set, else 0.

    Where they were asked for: exact: scores are of exact gradients; pieces: texts of the tokens that count;
    targets: parts of the generation, each with hits of its own; layers: names of the layers that
    `Hit.layers` speaks of; histogram: of all scores; by: a column of the training data, and groups: what each
    of its values brings, largest total first; examples: how many training examples were scored; overlaps: by
    the name of a baseline, how many of the top hits are in its own top as well; missing: hot words that the
    completion does not say.
    """

    prompt: str
    completion: str
    generated: bool
    top: list[Hit]
    bottom: list[Hit]
    normalize: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    method: str = "dot"
    together: int = 0
    exact: bool = False
    pieces: tuple[str, ...] = ()
    targets: list[TargetResult] = field(default_factory=list)
    layers: tuple[str, ...] = ()
    histogram: Histogram | None = None
    by: str | None = None
    groups: list[Group] = field(default_factory=list)
    examples: int = 0
    overlaps: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    # Set by `rapidin.results.collection`, which knows the page; this module does not.
    notebook: ClassVar[Callable[[Sequence[QueryResult]], str] | None] = None

    @property
    def bounded(self) -> bool:
        """Whether scores lie between -1 and 1."""
        return self.method == "dot" and self.normalize != "none"

    def _repr_html_(self) -> str | None:
        """The view in notebooks; None, for the plain text, where nothing has set `notebook`."""
        return None if QueryResult.notebook is None else QueryResult.notebook([self])

    def to_json(self) -> dict[str, Any]:
        """The query as `rapidin query --json` prints it."""
        value: dict[str, Any] = {
            "prompt": self.prompt,
            "completion": self.completion,
            "generated": self.generated,
            "normalize": self.normalize,
            "method": self.method,
        }
        if self.together:
            value["together"] = self.together
        if self.exact:
            value["exact"] = True
        if self.overlaps:
            value["overlaps"] = dict(self.overlaps)
        if self.layers:
            value["layers"] = list(self.layers)
        value["top"] = [hit.to_json() for hit in self.top]
        value["bottom"] = [hit.to_json() for hit in self.bottom]
        if self.pieces:
            value["tokens"] = list(self.pieces)
        if self.targets:
            value["targets"] = [target.to_json() for target in self.targets]
        if self.missing:
            value["missing"] = list(self.missing)
        if self.by is not None:
            value["by"] = {"column": self.by, "groups": [group.to_json() for group in self.groups]}
        if self.histogram is not None:
            value["histogram"] = self.histogram.to_json()
        return value
