"""The results of a query: hits (training examples with scores, in order) and what is known about each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rapidin.data.records import shown_parts
from rapidin.errors import short
from rapidin.results.confirmation import Confirmation
from rapidin.results.decoys import DecoyTest
from rapidin.results.fusion import Fused, Fusion
from rapidin.results.verdict import Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHOWN = 3  # hits of each end in a result's repr


def _texts(prompt: str, completion: str) -> str:
    """A prompt and a completion, both shortened, as Python writes texts."""
    return " -> ".join(repr(short(text)) for text in (prompt, completion) if text)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What each token of a training example contributes to a score.

    pieces: the tokens' texts, which concatenated are the text that the model read; counts: whether the loss
    of predicting a token counts; contributions: [T], of the position where the model reads a token: the part
    of the score from the gradients of its layers at this position, whichever tokens' losses they come from.
    They sum to the score. by_target: [targets, T] float32, the same for each target of the query, if it has
    any.
    """

    pieces: tuple[str, ...]
    counts: tuple[bool, ...]
    contributions: tuple[float, ...]
    by_target: NDArray[np.float32] | None = None

    def words(self) -> list[tuple[str, float]]:
        """Words separated by white space, each with the sum of its tokens' contributions, in text order."""
        return join_words(self.pieces, self.contributions)

    def to_json(self) -> dict[str, Any]:
        """Texts and contributions, without `by_target`, which is large."""
        return {
            "text": list(self.pieces),
            "counts": list(self.counts),
            "contribution": list(self.contributions),
        }


def join_words(pieces: Sequence[str], values: Sequence[float]) -> list[tuple[str, float]]:
    """Joins the pieces [T] of a text to words, each with the sum of its values [T]. A piece of white space
    alone
    belongs to the word after it."""
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
    """A hit's score and rank (from 1) in another ranking of all training examples, that of a baseline."""

    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Hit:
    """A training example with its score.

    rank: from 1; index: its line number in the training data, from 0; row: its row in the cache; score: its
    influence on the generation, positive for helpful and negative for harmful; example: the record, if the
    data is available.

    If known: error: the score's standard error (`rapidin.attribution.score_errors`); ranks: the lowest and
    the highest rank that the hit could have, given the errors; tied: the score equals that of the previous
    hit within error; estimate: the score from the cache, if `score` is from exact gradients; copies: line
    numbers of duplicates that are folded into this hit, and copies_more: how many more there are; targets:
    the parts of the score that come from the query's targets; layers: the part of each layer; tokens: the
    contribution of each of the example's tokens; standings: score and rank by the name of a baseline; fused:
    of a hit of a fused ranking, its ranks and what they add; decoded: the texts of an example that is given
    as token ids, before and after its first target token; p: the share of decoys that score at least as far
    out; q: the least false-discovery rate at which the hit passes (`rapidin.attribution.decoys`).
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
    fused: Fused | None = None
    decoded: tuple[str, str] | None = None
    p: float | None = None
    q: float | None = None

    @property
    def parts(self) -> tuple[str, str]:
        """The example's prompt and completion as they are shown; empty if its data is not available."""
        if self.decoded is not None:
            return self.decoded
        return ("", "") if self.example is None else shown_parts(self.example)

    def __repr__(self) -> str:
        text = "" if self.example is None else f": {_texts(*self.parts)}"
        error = "" if self.error is None else f" ± {self.error:.2g}"
        return f"Hit({self.rank}, score {self.score:+.4g}{error}, index {self.index}{text})"

    def to_json(self) -> dict[str, Any]:
        """Rank, index and score, and whatever else is known."""
        value: dict[str, Any] = {"rank": self.rank, "index": self.index, "score": self.score}
        if self.error is not None:
            value["error"] = self.error
        if self.ranks is not None:
            value |= {"ranks": list(self.ranks), "tied": self.tied}
        if self.estimate is not None:
            value["estimate"] = self.estimate
        if self.p is not None:
            value |= {"p": self.p, "q": self.q}
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
        if self.fused is not None:
            value["fused"] = self.fused.to_json()
        if self.tokens is not None:
            value["tokens"] = self.tokens.to_json()
        if self.decoded is not None:
            value["decoded"] = {"prompt": self.decoded[0], "completion": self.decoded[1]}
        if self.example is not None:
            value["example"] = dict(self.example)
        return value


@dataclass(frozen=True, slots=True)
class TargetResult:
    """A part of a generation with scores of its own: a token, a hot word, a span.

    text: the text of its tokens; positions: indices of its tokens in `QueryResult.pieces`; influence: its
    part of the scores of the generation's most helpful hits, their mean; top, bottom: the hits of this part
    alone. Scores are parts of the generation's: those of all its tokens sum to the generation's score.
    """

    text: str
    positions: tuple[int, ...]
    influence: float
    top: list[Hit]
    bottom: list[Hit]

    def to_json(self) -> dict[str, Any]:
        """The target in the JSON of a query. Its hits have rank, index and score only, since there may be
        very
        many."""

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
    """Histogram of the scores of all training examples. edges: [bins + 1], ascending; counts: [bins]."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Its edges and counts."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


@dataclass(frozen=True, slots=True)
class Group:
    """The training examples with the same value in a column.

    value: as text; count: how many examples have it; total: the sum of their scores; helpful, harmful: their
    share of the sum of all positive scores, and of all negative ones, from 0 to 1; net: what of the sum the
    other groups do not say as well, None if that was not asked for.
    """

    value: str
    count: int
    total: float
    helpful: float
    harmful: float
    net: float | None = None

    @property
    def effect(self) -> float:
        """The best estimate of what leaving the group out takes away, as a sum of scores."""
        return self.total if self.net is None else self.net

    def to_json(self) -> dict[str, Any]:
        """Its fields and the mean score; `net` if it is known."""
        net = {} if self.net is None else {"net": self.net}
        return net | {
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

    prompt, completion: its text; generated: whether the model wrote the completion for this query; top: the
    highest scores, highest first; bottom: the lowest, lowest first; normalize, method: the scale of the
    scores (`rapidin.attribution.methods`); seconds: time by stage, of the whole call; together: the number of
    generations if the hits are those of several as one target set, otherwise 0; verdict: whether the best
    score stands out, None if the cache has no null distribution; decoys: how the scores compare with those of
    decoys, None without.

    If requested: exact: whether scores are from exact gradients; pieces: texts of the tokens that count;
    targets: parts of the generation, each with hits of its own; layers: names of the layers in `Hit.layers`;
    histogram: of all scores; by: a column of the training data, and groups: its values with the sums of their
    scores, largest total first; examples: how many training examples were scored; overlaps: by the name of a
    baseline, how many of the top hits are in its top of the same length; missing: hot words that the
    completion does not contain; confirmation: what retraining without hits did (`rapidin confirm`); fusion:
    what `top` was fused from. It then has the highest fused scores first, whatever the sign of a row's score.
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
    verdict: Verdict | None = None
    confirmation: Confirmation | None = None
    fusion: Fusion | None = None
    decoys: DecoyTest | None = None

    # Set by `rapidin.results.collection`, since this module cannot import the page, which imports it.
    notebook: ClassVar[Callable[[Sequence[QueryResult]], str] | None] = None

    def __repr__(self) -> str:
        kind = "helpful" if self.fusion is None else "of the fused ranking"
        lines = [f"QueryResult({_texts(self.prompt, self.completion)}: {len(self.helpful):,} {kind}, then "]
        lines[0] += f"{len(self.harmful):,} harmful of {self.examples:,} examples)"
        for hits in (self.helpful, self.harmful):
            lines += [f"  {hit!r}" for hit in hits[:_SHOWN]]
            lines += [f"  and {len(hits) - _SHOWN:,} more"] if len(hits) > _SHOWN else []
        return "\n".join(lines)

    @property
    def helpful(self) -> list[Hit]:
        """The hits of the top that are helpful: a ranking's top may have others if few rows are helpful. Of a
        fused ranking all, since its rankings by words and hidden states have no sign."""
        if self.fusion is not None:
            return list(self.top)
        return [hit for hit in self.top if not hit.score <= 0]

    @property
    def harmful(self) -> list[Hit]:
        """The hits of the bottom that are harmful."""
        return [hit for hit in self.bottom if not hit.score >= 0]

    @property
    def bounded(self) -> bool:
        """Whether scores are of normalized gradients, and so of a size that four decimals show."""
        return self.method == "dot" and self.normalize != "none"

    def _repr_html_(self) -> str | None:
        """The view in notebooks; None (plain text) if `notebook` is not set."""
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
        if self.fusion is not None:
            value["fusion"] = self.fusion.to_json()
        if self.layers:
            value["layers"] = list(self.layers)
        if self.verdict is not None:
            value["verdict"] = self.verdict.to_json()
        if self.confirmation is not None:
            value["confirmation"] = self.confirmation.to_json()
        if self.decoys is not None:
            value["decoys"] = self.decoys.to_json()
        value["top"] = [hit.to_json() for hit in self.helpful]
        value["bottom"] = [hit.to_json() for hit in self.harmful]
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
