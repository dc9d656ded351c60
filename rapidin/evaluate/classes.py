"""Evaluation `classes`: are the helpful rows of the query's own class, as in the DataInf paper?

Kwon et al. (ICLR 2024, section 4.2) tune on data of ten classes with 90 rows each, and take a test example's
training rows of the same class to be the influential ones. Their notebooks (repository ykwon0407/DataInf,
Influential_Data_Identification-*, at commit fe9145a) compute, for each test example,

    AUC      the area under the ROC curve of the rows' labels (1: same class) and minus the influence
    recall   the share of the same class among the s rows of smallest influence, s being the size of the class

Their influence is the change of the test loss when a row gets more weight, so that minus it is what rapidin
calls the score. They report mean and standard deviation over the test examples. An earlier notebook sorted by
absolute influence instead; its metrics are reported too, as `abs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.evaluate import metrics
from rapidin.evaluate.methods import Method
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, column_values

COLUMNS = {"auc": "AUC", "recall": "recall", "abs_auc": "AUC of |score|", "abs_recall": "recall of |score|"}


def evaluate(
    subject: Subject,
    column: str,
    queries: Examples,
    methods: Sequence[Method],
    *,
    with_baselines: bool = False,
) -> Result:
    """AUC and recall of the training rows of each test example's class: mean and sd over the test examples.

    column: holds the class. Raises UserError if a row lacks the column, if a test example has a class that no
    training row has, or if all rows have the same class.
    """
    classes = [str(value) for value in column_values(subject.examples, column)]
    query_classes = [str(value) for value in column_values(queries, column)]
    for number, value in enumerate(query_classes):
        if value not in classes:
            raise UserError(
                f"{queries.where(number)}: no training example has the {column} '{value}'",
                "remove the line, or name another column with `column`",
            )
    if len(set(classes)) < 2:
        raise UserError(
            f"all training examples have the {column} '{classes[0]}'", "name another column with `column`"
        )
    same = np.array(query_classes)[:, None] == np.array(classes)[None]
    sizes = same.sum(1)
    result = Result("classes", {"column": column, "classes": len(set(classes))}, COLUMNS, sd=True)
    for name, scores in subject.scores(list(queries), methods, result, with_baselines=with_baselines):
        estimates = {}
        for prefix, values in (("", scores), ("abs_", np.abs(scores))):
            recall = [metrics.recall_at(values[n], same[n], int(sizes[n]))[0] for n in range(len(values))]
            estimates[prefix + "auc"] = metrics.estimate(metrics.auroc(values, same))
            estimates[prefix + "recall"] = metrics.estimate(recall)
        result.add(name, estimates)
    result.notes.append(
        f"{len(query_classes):,} test examples, {len(set(classes)):,} classes of {min(sizes):,} to "
        f"{max(sizes):,} rows; recall by chance is {np.mean(sizes / len(classes)):.3f}. "
        "±: standard deviation over the test examples, as in the DataInf paper."
    )
    return result
