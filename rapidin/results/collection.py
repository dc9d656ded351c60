"""`Results`: the results of a query as a list, with rows for a table and a view in notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rapidin.errors import UserError, needs
from rapidin.results.saved import query_of
from rapidin.results.types import Hit, QueryResult

_SHOWN = 10  # results in a repr


class Results(list[QueryResult]):
    """The results of a query, one per generation: a list that notebooks show as the HTML page."""

    def __init__(self, results: Sequence[QueryResult] = ()) -> None:
        super().__init__(results)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Results:
        """The results in what `rapidin query --json` wrote. Raises UserError for anything else.

        `Hit.row` is the line number, and what JSON lacks is not known (`rapidin.results.saved`).
        """
        try:
            return Results([query_of(query) for query in value["queries"]])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise UserError("this is not what 'rapidin query --json' writes") from None

    @property
    def top(self) -> list[Hit]:
        """The hits with the highest scores of the only generation. Raises UserError if there are several."""
        return self._only.top

    @property
    def bottom(self) -> list[Hit]:
        """The hits with the lowest scores of the only generation. Raises UserError if there are several."""
        return self._only.bottom

    @property
    def helpful(self) -> list[Hit]:
        """The helpful ones of `top`. Raises UserError as `top` does."""
        return self._only.helpful

    @property
    def harmful(self) -> list[Hit]:
        """The harmful ones of `bottom`. Raises UserError as `bottom` does."""
        return self._only.harmful

    @property
    def _only(self) -> QueryResult:
        if len(self) != 1:
            raise UserError(
                f"these are the results of {len(self):,} generations", "choose one: results[0].top"
            )
        return self[0]

    def __repr__(self) -> str:
        if len(self) == 1:
            return repr(self[0])
        several = [f"  {repr(result).splitlines()[0]}" for result in self[:_SHOWN]]
        more = [f"  and {len(self) - _SHOWN:,} more"] if len(self) > _SHOWN else []
        return "\n".join([f"Results of {len(self):,} generations", *several, *more])

    def _repr_html_(self) -> str:
        """The view in notebooks: the page of `rapidin.results.html` in a frame."""
        return _notebook(self)

    def to_list(self) -> list[dict[str, Any]]:
        """All hits as flat dicts with the same keys.

        query: number of the generation, from 0; side: "helpful" for a positive score, "harmful" for a
        negative one, "fused" in a fused ranking; rank, index, row, score, error, first_rank, last_rank, tied,
        estimate, p, q, copies (how many others are folded into it) as in `Hit`; for each baseline its "<name>
        score" and "<name> rank"; in a fused ranking its score as fused, and of each of its rankings "fused
        <name> rank" and "<name> adds";
        asked, answered: the generation; and the example's fields, as "example.<field>". A value that is not
        known is None.
        """
        hits = [
            (number, result, side, hit)
            for number, result in enumerate(self)
            for side, ranking in (
                ("helpful" if result.fusion is None else "fused", result.helpful),
                ("harmful", result.harmful),
            )
            for hit in ranking
        ]
        baselines = dict.fromkeys(name for *_, hit in hits for name in hit.standings)
        rankings = dict.fromkeys(name for *_, hit in hits if hit.fused for name in hit.fused.ranks)
        fields = dict.fromkeys(name for *_, hit in hits for name in hit.example or {})
        return [
            {
                "query": number,
                "side": side,
                "rank": hit.rank,
                "index": hit.index,
                "row": hit.row,
                "score": hit.score,
                "error": hit.error,
                "first_rank": None if hit.ranks is None else hit.ranks[0],
                "last_rank": None if hit.ranks is None else hit.ranks[1],
                "tied": None if hit.ranks is None else hit.tied,
                "estimate": hit.estimate,
                "p": hit.p,
                "q": hit.q,
                "copies": len(hit.copies) + hit.copies_more,
                **{
                    f"{name} {what}": getattr(hit.standings[name], what) if name in hit.standings else None
                    for name in baselines
                    for what in ("score", "rank")
                },
                **({"fused": hit.fused and hit.fused.score} if rankings else {}),
                **{f"fused {name} rank": hit.fused and hit.fused.ranks[name] for name in rankings},
                **{f"{name} adds": hit.fused and hit.fused.adds[name] for name in rankings},
                "asked": result.prompt,
                "answered": result.completion,
                **{f"example.{name}": (hit.example or {}).get(name) for name in fields},
            }
            for number, result, side, hit in hits
        ]

    def to_pandas(self) -> Any:
        """`to_list` as a pandas DataFrame, one row per hit. Raises UserError if pandas is not installed."""
        return needs("pandas", "to_pandas()", "notebook").DataFrame(self.to_list())


def _notebook(results: Sequence[QueryResult]) -> str:
    from rapidin.results.html import notebook

    return notebook(results)


QueryResult.notebook = _notebook
