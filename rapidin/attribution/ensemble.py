"""Several caches of the same examples whose scores are added up: checkpoints, seeds, models, dropout masks.

    tracin   checkpoints of one training run, weighted by learning rate (TracInCP, Pruthi et al., NeurIPS
             2020, section 3.3)
    mean     any others, weighted alike (IP ensemble, Yang et al., TMLR 2026: models, or one model thinned by
             several dropout masks)

A folder with `ensemble.json` names the caches inside it; a list of folders does as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.baselines import check as check_baselines
from rapidin.attribution.clock import Clock
from rapidin.attribution.explain import OnStage, explain
from rapidin.attribution.groups import check_column
from rapidin.attribution.options import Scoring, Wanted
from rapidin.attribution.query_sketch import Part, Query, leaders
from rapidin.attribution.query_sketch import scores as all_scores
from rapidin.attribution.scan import check_same_examples
from rapidin.attribution.training_data import training_data
from rapidin.cache import Cache
from rapidin.data.generations import Generation, as_records
from rapidin.data.spans import Targets
from rapidin.distributed import world
from rapidin.errors import UserError, short
from rapidin.files import read_own, reason, replace_file
from rapidin.results.collection import Results

NAME = "ensemble.json"
FORMAT, VERSION = "rapidin-ensemble", 1
_MOST_BYTES = 1 << 20

Kind = Literal["tracin", "mean"]
_KINDS: tuple[Kind, ...] = ("tracin", "mean")


@dataclass(frozen=True)
class Member:
    """One cache of an ensemble. path: its folder; weight: of its scores; attributor: what made it, loaded by
    what its manifest names when it is needed, where it is None; cache: the folder's, where it is open."""

    path: Path
    weight: float = 1.0
    attributor: Attributor | None = None
    cache: Cache | None = None


class _Options(TypedDict, total=False):
    normalize: str
    method: str
    damping: float | None
    together: bool
    max_new_tokens: int


class ScoreOptions(_Options, total=False):
    """What `Ensemble.scores` takes by name."""

    groups: Sequence[Sequence[int]] | None


class QueryOptions(_Options, total=False):
    """What `Ensemble.query` takes by name."""

    top_k: int
    targets: Targets | None
    contributions: bool
    fold: bool
    errors: bool
    layers: bool
    histogram: bool
    by: str | None
    baselines: bool
    examples: Any
    rescore: Cache | Literal["exact"] | None
    candidates: int | None
    on_stage: OnStage | None


class Ensemble:
    """Caches of the same examples, queried as one.

    members: folders, or `Member`s, in the order of training: the last one's model writes missing completions.
    kind: "tracin": weights are learning rates, and with `normalize="none"` scores are their weighted sum;
    "mean", and with the other normalisations: the weighted mean. load: arguments of `Attributor.from_cache`.

    >>> Ensemble(["seed-0", "seed-1"]).query([(prompt, completion)])
    >>> Ensemble.read("checkpoints-cache").query([(prompt, completion)])

    Raises UserError for no members, or weights that do not add up to anything.
    """

    def __init__(
        self,
        members: Sequence[str | Path | Member],
        *,
        kind: Kind = "mean",
        load: dict[str, Any] | None = None,
    ) -> None:
        self.members = [m if isinstance(m, Member) else Member(Path(m)) for m in members]
        self.kind, self.load = kind, dict(load or {})
        if not self.members:
            raise UserError("an ensemble of no caches")
        total = sum(m.weight for m in self.members)
        if any(not 0 <= m.weight < float("inf") for m in self.members) or not total > 0:
            raise UserError("the weights of an ensemble must be 0 or more, and not all 0")
        self.caches = [Cache(m.path) if m.cache is None else m.cache for m in self.members]

    @staticmethod
    def read(folder: str | Path, *, load: dict[str, Any] | None = None) -> Ensemble:
        """The ensemble of a folder: its `ensemble.json`, or the folder itself where it is a cache."""
        kind, members = read_members(Path(folder))
        return Ensemble(members, kind=kind, load=load)

    @staticmethod
    def write(folder: Path, kind: Kind, members: Sequence[tuple[str, float]]) -> None:
        """Write the `ensemble.json` of caches (name inside the folder, weight)."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "members": [{"cache": name, "weight": weight} for name, weight in members],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into '{folder}': {reason(error)}") from None
        replace_file(folder / NAME, (json.dumps(value, indent=1) + "\n").encode())

    def query(
        self,
        generations: Any,
        *,
        top_k: int = 10,
        normalize: str = "layer",
        method: str = "dot",
        damping: float | None = None,
        together: bool = False,
        targets: Targets | None = None,
        contributions: bool = False,
        fold: bool = False,
        errors: bool = True,
        layers: bool = False,
        histogram: bool = False,
        by: str | None = None,
        baselines: bool = False,
        max_new_tokens: int = 64,
        examples: Any = None,
        rescore: Cache | Literal["exact"] | None = None,
        candidates: int | None = None,
        on_stage: OnStage | None = None,
    ) -> Results:
        """The most helpful and most harmful training examples of each generation, over all members at once.

        generations: a list of (prompt, completion) pairs, prompts, or records as in training data; a data
        frame of such records; or a single pair, prompt or record. The tuned model generates missing
        completions. top_k: hits at each end, all where the cache has fewer. normalize, method, damping: see
        `rapidin.attribution.methods`. together: one ranking for all generations as a target set, the mean of
        their scores by the records' field `weight` (1 where it is missing; negative: less of it). targets:
        parts of the generations that have hits of their own: "tokens" for each token, "hotwords" for the
        words in the records' field `hotwords` ("planet|Zorgon"), or for each generation a list of words and
        (start, end) spans of its completion (`rapidin.data.spans`). contributions: what each token of a hit
        brings to its score (`rapidin.attribution.token_contributions`). fold: hits that say the same are one
        (`rapidin.attribution.duplicates`). errors: the standard errors of scores, and the ranks that hits
        could have (`rapidin.attribution.score_errors`); none with exact gradients. layers: what each layer
        brings to a hit's score. histogram, by: of all scores, and their sums by a column of the training data
        (`rapidin.attribution.groups`). baselines: where BM25 and the model's hidden states rank the hits
        (`rapidin.attribution.baselines`), from all training texts and a forward pass over each. examples: the
        training data, to show with the hits, by default from where the cache was made; False for none.
        rescore: by whose scores the best of `candidates` at each end are chosen: a cache of the same examples
        and model that keeps more of each, for a single member (by default of 1,000), or "exact", the
        gradients themselves (of twice top_k). on_stage: called with what is done, how much of it, and of how
        much.

        Of several processes (`rapidin.distributed`) each scans its part, and the leading one gets the hits,
        the others none. Raises UserError where a generation has no token to explain, where caches are not of
        the same examples and models, and where what is asked for is not to be had.
        """
        generations = as_records(generations)
        scoring = Scoring(normalize, method, damping, together)
        scoring.check()
        exact = rescore == "exact"
        if isinstance(rescore, str) and not exact:
            raise UserError(f"cannot rescore by '{rescore}'", "give a cache, or say exact")
        if rescore is None and candidates is not None:
            raise UserError("--candidates are those that --rescore looks at", "say --rescore too")
        if together and targets is not None:
            raise UserError("targets are parts of single generations", "leave out --together")
        default = 0 if rescore is None else 2 * top_k if exact else max(1000, top_k)
        wanted = Wanted(
            top_k=top_k, targets=targets, exact=exact,
            candidates=default if candidates is None else candidates, contributions=contributions, fold=fold,
            errors=errors, layers=layers, histogram=histogram, by=by, baselines=baselines,
        )  # fmt: skip
        wanted.check()
        if exact and method != "dot":
            raise UserError(
                f"exact gradients cannot be scored by '{method}', which knows sketches alone",
                "say --method dot with --rescore exact",
            )
        if baselines:
            check_baselines()
        data = training_data(self.caches[-1], examples) if world().leads else None
        if wanted.texts and data is None and world().leads:
            raise UserError(f"{wanted.texts} needs the training examples", "name them with --train-data")
        if by is not None and data is not None:
            check_column(data, by)
        clock = Clock()
        finer = rescore if isinstance(rescore, Cache) else None
        if finer is not None:
            if len(self.members) > 1:
                raise UserError("--rescore goes with a single cache", "name one of them")
            check_same_examples([self.caches[0], finer])
        query = self.parts(generations, max_new_tokens, normalize, clock, finer, targets)

        def model(number: int) -> Attributor:
            member = self.caches.index(query.parts[number].cache)
            if finer is None:
                return self.attributor(member)
            return Attributor.like(finer.manifest, self.attributor(member).loaded)

        return explain(
            query, scoring, wanted, records=generations, data=data, clock=clock, models=model,
            on_stage=on_stage,
        )  # fmt: skip

    def scores(
        self,
        generations: Any,
        *,
        normalize: str = "layer",
        method: str = "dot",
        damping: float | None = None,
        together: bool = False,
        groups: Sequence[Sequence[int]] | None = None,
        max_new_tokens: int = 64,
    ) -> Tensor:
        """The scores of all training examples: `Attributor.scores` over all members at once.

        groups: places in the list of generations; the scores are then those of groups, [groups, rows], each
        the weighted mean of its own.
        """
        scoring = Scoring(normalize, method, damping, together, groups)
        scoring.check()
        query = self.parts(generations, max_new_tokens, normalize, Clock())
        return all_scores(query.parts, query.texts, scoring)

    def attributor(self, number: int = -1) -> Attributor:
        """The attributor of a member, loaded where it is not in memory."""
        member = self.members[number]
        if member.attributor is not None:
            member.attributor.check(self.caches[number].manifest)
            return member.attributor
        return Attributor.from_cache(member.path, **self.load)

    def parts(
        self,
        generations: Any,
        max_new_tokens: int,
        normalize: str,
        clock: Clock,
        rescore: Cache | None = None,
        targets: Targets | None = None,
    ) -> Query:
        """The generations, and every cache with their sketches and its weight for this normalisation.

        One model in memory at a time, the last first: it writes what is to be explained. Of several processes
        only the leading one loads models, but for those that are spread over all. rescore: a cache of the
        same model."""
        return leaders(
            [*self.caches, *([] if rescore is None else [rescore])],
            lambda: self._parts(generations, max_new_tokens, normalize, clock, rescore, targets),
            device=self.load.get("device"),
            everywhere=bool(self.load.get("shard_model")),
        )

    def _parts(
        self,
        generations: Any,
        max_new_tokens: int,
        normalize: str,
        clock: Clock,
        rescore: Cache | None,
        targets: Targets | None,
    ) -> Query:
        total = sum(m.weight for m in self.members)
        summed = self.kind == "tracin" and normalize == "none"
        texts: list[Generation] = []
        parts: list[Part] = []
        finer: Part | None = None
        for number in reversed(range(len(self.members))):
            member = self.members[number]
            if not member.weight and texts:
                continue
            attributor = self.attributor(number)
            clock.lap("load")
            if not texts:
                texts = attributor.generations(generations, max_new_tokens, targets)
                clock.lap("generate")
            weight = member.weight if summed else member.weight / total
            if member.weight:
                parts.append(_part(self.caches[number], attributor, texts, weight))
            if rescore is not None:
                like = Attributor.like(rescore.manifest, attributor.loaded)
                finer = _part(rescore, like, texts, 1.0)
            clock.lap("sketch")
            del attributor
        return Query(texts, parts[::-1], finer)


def _part(cache: Cache, attributor: Attributor, texts: Sequence[Generation], weight: float) -> Part:
    return Part(cache, attributor.query_sketches(texts), weight, attributor.target_sketches(texts))


def read_members(folder: Path) -> tuple[Kind, list[Member]]:
    """Kind and members in the `ensemble.json` of a folder; the folder itself where it has none. UserError
    where the file is damaged."""
    path = folder / NAME
    if not os.path.lexists(path):
        return "mean", [Member(folder)]
    text = read_own(path, "ensemble", "cache again", most=_MOST_BYTES)
    try:
        value = json.loads(text)
        if value.get("format") != FORMAT:
            raise ValueError("it is not rapidin's")
        if value.get("version") != VERSION:
            raise UserError(
                f"'{path}' has format version {short(value.get('version'))}, this rapidin reads {VERSION}",
                "use the rapidin that wrote it, or cache again",
            )
        kind = value["kind"]
        if kind not in _KINDS:
            raise ValueError(f"unknown kind {short(kind)}")
        members = []
        for entry in value["members"]:
            name = str(entry["cache"])
            if name != Path(name).name or name in ("", ".", "..") or not name.isprintable():
                raise ValueError(f"{short(name)} is not a folder beside it")
            if (folder / name).is_symlink():
                raise ValueError(f"{short(name)} is a link, and links are not followed")
            members.append(Member(folder / name, float(entry["weight"])))
        return kind, members
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise UserError(
            f"'{path}' is damaged: {type(error).__name__} {short(error)}", "cache again"
        ) from None


# ------------------------------------------------------------------------------------------- checkpoints
