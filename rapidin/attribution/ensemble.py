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
from typing import Any, Literal

from torch import Tensor

from rapidin.attribution.baselines import check as check_baselines
from rapidin.attribution.baselines import check_texts
from rapidin.attribution.clock import Clock
from rapidin.attribution.decoys import has_decoys
from rapidin.attribution.explain import explain
from rapidin.attribution.generate import generations_of
from rapidin.attribution.groups import check_column
from rapidin.attribution.methods import check as check_method
from rapidin.attribution.options import ModelLocation, QueryOptions, ScoringConfig
from rapidin.attribution.progress import LOG, query_progress, query_text
from rapidin.attribution.provenance import checked, load_model_of, source_of, task_name
from rapidin.attribution.query_sketch import OnStage, Query, QuerySketch, shared_by_leader, sketch_query
from rapidin.attribution.query_sketch import scores as all_scores
from rapidin.attribution.questions import all_asked
from rapidin.attribution.scan_pieces import check_same_examples
from rapidin.attribution.training_data import training_data, with_texts
from rapidin.cache import Cache
from rapidin.data.generations import Generation, as_records
from rapidin.distributed import world
from rapidin.errors import UserError, short
from rapidin.files import read_regular_file, reason, replace_file
from rapidin.gradients.source import GradientSource
from rapidin.results.collection import Results
from rapidin.tasks.names import forms_of

NAME = "ensemble.json"
FORMAT, VERSION = "rapidin-ensemble", 1
_MOST_BYTES = 1 << 20

Kind = Literal["tracin", "mean"]
_KINDS: tuple[Kind, ...] = ("tracin", "mean")


@dataclass(frozen=True)
class Member:
    """One cache of an ensemble.

    path: its folder; weight: of its scores; source: the source that made it, or None to load it by the
    manifest when it is needed; cache: the opened cache of the folder, if there is one.
    """

    path: Path
    weight: float = 1.0
    source: GradientSource | None = None
    cache: Cache | None = None


class Ensemble:
    """Caches of the same examples, queried as one.

    members: folders, or `Member`s, in the order of training: the last one's model writes missing completions.
    kind: "tracin": weights are learning rates, and with `normalize="none"` scores are their weighted sum;
    "mean", and with the other normalizations: the weighted mean. location: where the models are and how to
    load them, if not as the manifests say.

    >>> Ensemble(["seed-0", "seed-1"]).query([(prompt, completion)])
    >>> Ensemble.read("checkpoints-cache").query([(prompt, completion)])

    Raises UserError for no members, or weights that do not add up to anything.
    """

    def __init__(
        self,
        members: Sequence[str | Path | Member],
        *,
        kind: Kind = "mean",
        location: ModelLocation | None = None,
    ) -> None:
        self.members = [m if isinstance(m, Member) else Member(Path(m)) for m in members]
        self.kind, self.location = kind, location or ModelLocation()
        self._tokenizer: Any = None  # of the model that was loaded last
        if not self.members:
            raise UserError("an ensemble of no caches")
        total = sum(m.weight for m in self.members)
        if any(not 0 <= m.weight < float("inf") for m in self.members) or not total > 0:
            raise UserError("the weights of an ensemble must be 0 or more, and not all 0")
        self.caches = [Cache(m.path) if m.cache is None else m.cache for m in self.members]

    def __repr__(self) -> str:
        return f"Ensemble({self.kind} of {len(self.caches):,}: {', '.join(map(repr, self.caches))})"

    @staticmethod
    def read(folder: str | Path, *, location: ModelLocation | None = None) -> Ensemble:
        """The ensemble in a folder: of its `ensemble.json`, or of the folder itself if it is a cache."""
        kind, members = read_members(Path(folder))
        return Ensemble(members, kind=kind, location=location)

    @staticmethod
    def write(folder: Path, kind: Kind, members: Sequence[tuple[str, float]]) -> None:
        """Writes the `ensemble.json` of caches (name inside the folder, weight)."""
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
        options: QueryOptions | None = None,
        *,
        examples: Any = None,
        on_stage: OnStage | None = None,
        progress: bool | None = None,
        **by_name: Any,
    ) -> Results:
        """The most helpful and most harmful training examples of each generation, over all members at once.

        generations: a list of (prompt, completion) pairs, prompts, or records as in training data; a data
        frame of such records; or a single pair, prompt or record. The tuned model writes missing completions.
        options: what is returned and how influence is estimated; fields of
        `rapidin.attribution.options.QueryOptions` can also be given by name, such as `top_k=20`. examples:
        the training data, to show with the hits, by default from where the cache was made; False for none.
        on_stage: called with a stage's name, the number of steps that are done, and of all its steps.
        progress: without on_stage, whether the stages are shown; by default on a terminal and in a notebook.

        Of several processes (`rapidin.distributed`) each scans its share, and the leading one gets the hits,
        the others none. Raises UserError if a generation has no token to explain, if caches are not of the
        same examples and models, or if the requested output is unavailable; TypeError for unknown names.
        """
        options = QueryOptions.given(options, by_name)
        generations = as_records(generations, forms_of(task_name(self.caches[-1].manifest)))
        check_method(options.method, options.normalize, options.damping)
        decoys = has_decoys(self.caches, options)
        if options.reads_texts:
            check_baselines()
        data = training_data(self.caches[-1], examples) if world().leads else None
        if options.needs_texts and data is None and world().leads:
            raise UserError(
                f"{options.needs_texts} needs the training examples",
                "give them with `examples`",
            )
        if options.by is not None and data is not None:
            check_column(data, options.by)
        if options.interactions and len(self.members) > 1:
            raise UserError("`interactions` work with a single cache", "name one of them")
        clock = Clock()
        finer = options.finer
        if finer is not None:
            if len(self.members) > 1:
                raise UserError("`rescore` works with a single cache", "name one of them")
            check_same_examples([self.caches[0], finer])
        what = f"explaining {len(generations):,} among {len(self.caches[-1]):,} examples"
        shown = progress if on_stage is None and world().leads else False
        with query_progress(shown, what) as stages:
            query = self.sketched(generations, options, clock, on_stage or stages)

            def source(number: int) -> GradientSource:
                member = self.caches.index(query.sketches[number].cache)
                if finer is None:
                    return self.source(member)
                source = self.source(member)
                return source_of(finer.manifest, source.loaded, source.own_task)

            results = explain(
                query,
                options,
                records=generations,
                data=data,
                clock=clock,
                sources=source,
                decoys=decoys,
                on_stage=on_stage or stages,
            )
        if results and options.top_k > len(self.caches[-1]):
            LOG.warning(
                "`top_k` %s is more than the %s examples of the cache: all are shown",
                options.top_k,
                len(self.caches[-1]),
            )
        results = with_texts(results, self._tokenizer)
        if results:
            LOG.info(query_text(results[0], len(generations), self.caches[-1]))
        return results

    def ask(self, question: Any, options: QueryOptions | None = None, **by_name: Any) -> Results:
        """The training examples behind the tuned model's answer to a question: see `Attributor.ask`."""
        return self.query(all_asked(self.caches[-1].manifest, question), options, **by_name)

    def scores(
        self,
        generations: Any,
        scoring: ScoringConfig | None = None,
        *,
        max_new_tokens: int = 64,
        **by_name: Any,
    ) -> Tensor:
        """The scores of all training examples: [Q, rows] float32 on the CPU, NaN for rows without a sketch.

        With `together` or `groups` the scores of sets of generations, [1 or groups, rows], each the weighted
        mean of its own. generations: as for `query`. scoring: fields of
        `rapidin.attribution.options.ScoringConfig` can also be given by name. Raises as `query` does.
        """
        scoring = ScoringConfig.given(scoring, by_name)
        check_method(scoring.method, scoring.normalize, scoring.damping)
        options = QueryOptions(normalize=scoring.normalize, max_new_tokens=max_new_tokens)
        query = self.sketched(generations, options, Clock())
        return all_scores(query.sketches, query.texts, scoring)

    def source(self, number: int = -1) -> GradientSource:
        """The source of a member's gradients, loaded if it is not in memory."""
        member, manifest = self.members[number], self.caches[number].manifest
        if member.source is not None:
            return checked(member.source, manifest)
        return source_of(manifest, load_model_of(member.path, self.location))

    def sketched(
        self, generations: Any, options: QueryOptions, clock: Clock, on_stage: OnStage | None = None
    ) -> Query:
        """The generations with their sketches for every cache, weighted for this normalization.

        One model is in memory at a time, the last one first: it writes missing completions. Of several
        processes only the leading one loads models, except models that are spread over all.
        """
        finer = options.finer
        return shared_by_leader(
            [*self.caches, *([] if finer is None else [finer])],
            lambda: self._sketched(generations, options, clock, on_stage),
            device=self.location.device,
            everywhere=self.location.shard_model,
        )

    def _sketched(
        self, generations: Any, options: QueryOptions, clock: Clock, on_stage: OnStage | None
    ) -> Query:
        total = sum(m.weight for m in self.members)
        summed = self.kind == "tracin" and options.normalize == "none"
        texts: list[Generation] = []
        sketches: list[QuerySketch] = []
        finer: QuerySketch | None = None
        for number in reversed(range(len(self.members))):
            member = self.members[number]
            if not member.weight and texts:
                continue
            source = self.source(number)
            clock.lap("load")
            if options.targets is not None or options.contributions:
                source.task.check_tokens()
            if options.reads_texts:
                check_texts(source.loaded, options.reads_texts)
            if not texts:
                self._tokenizer = source.loaded.tokenizer
                texts = generations_of(source, generations, options.max_new_tokens, options.targets)
                clock.lap("generate")
            weight = member.weight if summed else member.weight / total
            if member.weight:
                sketches.append(sketch_query(self.caches[number], source, texts, weight, on_stage))
            if options.finer is not None:
                source_of_finer = source_of(options.finer.manifest, source.loaded, source.own_task)
                finer = sketch_query(options.finer, source_of_finer, texts)
            clock.lap("sketch")
            del source
        return Query(texts, sketches[::-1], finer)


def read_members(folder: Path) -> tuple[Kind, list[Member]]:
    """Kind and members from the `ensemble.json` of a folder; the folder itself if it has none. Raises
    UserError if the file is damaged."""
    path = folder / NAME
    if not os.path.lexists(path):
        return "mean", [Member(folder)]
    text = read_regular_file(path, "ensemble", "cache again", most=_MOST_BYTES)
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
