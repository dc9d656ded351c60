"""Are planted rows found? Queries are what a poisoned model says; the figures say how the marked rows rank.

The experiment of the RapidIn paper (Lin et al., ACL 2024, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapidin.evaluate import figures
from rapidin.evaluate.methods import Method
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, flags

COLUMNS = {"p10": "precision at 10", "p50": "at 50", "auprc": "auPRC", "auroc": "auROC"}


def evaluate(
    subject: Subject,
    column: str,
    records: Sequence[Any],
    methods: Sequence[Method],
    *,
    with_baselines: bool = False,
    max_new_tokens: int = 64,
) -> Result:
    """How the rows marked by `column` rank for each generation, the mean over the generations.

    records: of which the completion may be missing; the tuned model then writes it. Raises UserError for
    a column that does not mark some rows and not others.
    """
    marked = flags(subject.examples, column)
    result = Result("backdoor", {"column": column, "marked": int(marked.sum())}, COLUMNS)
    made = subject.scores(
        records, methods, result, with_baselines=with_baselines, max_new_tokens=max_new_tokens
    )
    for name, scores in made:
        result.add(
            name,
            {
                "p10": figures.interval(figures.precision_at(scores, marked, 10)),
                "p50": figures.interval(figures.precision_at(scores, marked, 50)),
                "auprc": figures.interval(figures.auprc(scores, marked)),
                "auroc": figures.interval(figures.auroc(scores, marked)),
            },
        )
    share = marked.mean()
    result.notes.append(
        f"{int(marked.sum()):,} of {len(marked):,} rows are marked by '{column}', so chance is {share:.3f} "
        "for precision and auPRC, 0.5 for auROC. Intervals: over the queries."
    )
    return result
