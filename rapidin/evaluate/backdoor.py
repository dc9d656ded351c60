"""Evaluation `backdoor`: does attribution find planted rows behind what a poisoned model says?

The experiment of the RapidIn paper (Lin et al., ACL 2024, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapidin.evaluate import metrics
from rapidin.evaluate.methods import Method
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, boolean_column

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
    """Rank the rows marked by `column` for each query; the mean over the queries.

    records: the queries; the tuned model writes missing completions. Raises UserError for a column that marks
    no row or every row.
    """
    marked = boolean_column(subject.examples, column)
    result = Result("backdoor", {"column": column, "marked": int(marked.sum())}, COLUMNS)
    for name, scores in subject.scores(
        records, methods, result, with_baselines=with_baselines, max_new_tokens=max_new_tokens
    ):
        result.add(
            name,
            {
                "p10": metrics.estimate(metrics.precision_at(scores, marked, 10)),
                "p50": metrics.estimate(metrics.precision_at(scores, marked, 50)),
                "auprc": metrics.estimate(metrics.auprc(scores, marked)),
                "auroc": metrics.estimate(metrics.auroc(scores, marked)),
            },
        )
    result.notes.append(
        f"{int(marked.sum()):,} of {len(marked):,} rows are marked by '{column}', so chance is "
        f"{marked.mean():.3f} for precision and auPRC, 0.5 for auROC. Intervals: over the queries."
    )
    return result
