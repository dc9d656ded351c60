"""The rows that `rapidin confirm` leaves out: the hits of queries, or groups that hits belong to, and random
ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidin.attribution.drop import hit_candidates, hits_in, read_text, rows_to_drop
from rapidin.attribution.drop_conditions import DropConditions
from rapidin.attribution.groups import FILE, check_column, value_of
from rapidin.cache import Manifest
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.evaluate.log import Log, no_log
from rapidin.evaluate.settings import ConfirmSettings
from rapidin.tasks.names import CAUSAL, forms_of

_KEYS = ("version", "model", "adapter", "base", "train_data", "task", "settings")  # of the file of hits


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that are left out together for one query; of a group its column and value."""

    query: int
    rows: tuple[int, ...]
    column: str | None = None
    value: str | None = None


class Data:
    """The training data of the hits, the queries that are confirmed, and what is left out for each.

    Raises UserError if the file is not what `rapidin query --json` writes, if it has no hits, or if the data
    is not what was cached.
    """

    def __init__(
        self, hits: str, settings: ConfirmSettings, train_data: str | Sequence[str] | None, log: Log = no_log
    ) -> None:
        self.value = _read(hits)
        task = str(self.value["task"])
        if task != CAUSAL:
            raise UserError(
                f"the hits are of the task '{task}', whose generations have no log-probability to compare",
                "only hits of causal language models can be confirmed",
            )
        self.chosen = _chosen(self.value["queries"], settings.query, hits)
        conditions = DropConditions(top_k=settings.top_k)
        of_query = [
            hit_candidates({**self.value, "queries": [self.value["queries"][n]]}, hits, conditions)
            for n in self.chosen
        ]
        found = hit_candidates(
            {**self.value, "queries": [self.value["queries"][n] for n in self.chosen]}, hits, conditions
        )
        if not found.lines:
            raise UserError(f"the queries in '{hits}' have no helpful hits, so there is nothing to leave out")
        rows = rows_to_drop(found, DropConditions(), train_data)
        if rows.uncompared:
            log(f"not compared with what was scored: {rows.uncompared:,} of the hits, which have no text")
        self.source, self.reading = rows.data, rows.reading
        self.manifest = _manifest(found.caches)
        self.examples = open_examples(rows.data, forms=forms_of(task), skip=True, **rows.reading.to_json())
        self._check_identity()
        index = {self.examples.index(row): row for row in range(len(self.examples))}
        self._hits = {
            n: sorted(index[line] for line in each.lines or ())
            for n, each in zip(self.chosen, of_query, strict=True)
        }

    def _check_identity(self) -> None:
        if self.manifest is None:
            return
        cached = self.manifest.data.get("identity")
        if cached is not None and self.examples.identity_of(self.manifest.rows) != cached:
            raise UserError(
                "the training data has changed since it was cached", "name the right file with `train_data`"
            )

    def left_out(self, by: str | None, usable: Sequence[int], log: Log = no_log) -> list[Rows]:
        """What is left out for each query: its hits, or one group after the other of those in `by`.

        usable: rows that are trained on. Raises UserError if a group is all of them, or there is no such
        column.
        """
        trained = set(usable)
        found = []
        for query, hits in self._hits.items():
            rows = tuple(row for row in hits if row in trained)
            if not rows:
                log(f"query {query + 1} has no helpful hits, so nothing is left out for it")
            elif by is None:
                found.append(Rows(query, rows))
            else:
                found += self._groups(query, rows, by, usable)
        for each in found:
            if len(each.rows) == len(usable):
                what = "the hits" if each.column is None else f"the rows with {each.column}={each.value}"
                raise UserError(f"{what} are all rows that are trained on, so none would be left")
        return found

    def _groups(self, query: int, hits: Sequence[int], by: str, usable: Sequence[int]) -> Iterator[Rows]:
        check_column(self.examples, by)
        members: dict[str, list[int]] = {self._value(row, by): [] for row in hits}
        for row in usable:
            value = self._value(row, by)
            if value in members:
                members[value].append(row)
        for value, rows in members.items():
            yield Rows(query, tuple(rows), by, value)

    def _value(self, row: int, by: str) -> str:
        record = self.examples[row]
        if by == FILE and by not in record:
            return self.examples.file(row) or ""
        return value_of(record, by)


def _read(hits: str) -> dict[str, Any]:
    value = hits_in(read_text(hits, "file of hits not found"))
    if value is None:
        raise UserError(f"'{hits}' is not what 'rapidin query --json' writes")
    missing = [key for key in _KEYS if key not in value]
    if missing:
        raise UserError(
            f"'{hits}' does not say {missing[0]}, as 'rapidin query --json' does today",
            "it is of another version of rapidin: run the query again",
        )
    return dict(value)


def _chosen(queries: Sequence[Any], number: int | None, hits: str) -> list[int]:
    """The numbers of the queries that are confirmed, from 0."""
    if number is not None and number > len(queries):
        raise UserError(f"there is no query {number} in '{hits}'", f"it has {len(queries):,}")
    chosen = list(range(len(queries))) if number is None else [number - 1]
    for n in chosen:
        query = queries[n]
        if not isinstance(query, dict) or not {"prompt", "completion", "top"} <= query.keys():
            raise UserError(f"query {n + 1} of '{hits}' is not what 'rapidin query --json' writes")
        if query.get("together"):
            raise UserError(
                f"query {n + 1} of '{hits}' is of {query['together']} generations together",
                "only single generations can be confirmed: run the query without `together`",
            )
    return chosen


def _manifest(caches: Sequence[Path]) -> Manifest | None:
    """The manifest of the first cache that is still there."""
    for path in caches:
        try:
            return Manifest.read(path)
        except UserError:
            continue
    return None


def random_rows(usable: Sequence[int], count: int, number: int, seed: int) -> tuple[int, ...]:
    """The rows of a control, ascending; number: of the control."""
    rng = random.Random(f"rapidin confirm {seed} {count} {number}")
    return tuple(sorted(rng.sample(list(usable), count)))
