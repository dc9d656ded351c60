"""Do the hits come from the query's own class? The class detection of the DataInf paper.

Kwon et al. (ICLR 2024, section 4.2) tune on data of ten classes, 90 rows each, and take a test point's
training rows of the same class for the influential ones. Their notebooks (repository ykwon0407/DataInf,
Influential_Data_Identification-*, at commit fe9145a) compute, for each test point,

    AUC      the area under the ROC curve of the rows' labels (1: same class) and minus the influence
    recall   the share of the same class among the s rows of smallest influence, s the class's number of rows

where their influence is the change of the test loss when a row is given more weight, so that minus it is what
rapidin calls the score; they report mean and standard deviation over the test points. An earlier notebook
sorted by absolute influence instead; those figures stand beside, as `abs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.evaluate import figures
from rapidin.evaluate.methods import Method
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, column

COLUMNS = {"auc": "AUC", "recall": "recall", "abs_auc": "AUC of |score|", "abs_recall": "recall of |score|"}


def evaluate(
    subject: Subject,
    name: str,
    asked: Examples,
    methods: Sequence[Method],
    *,
    with_baselines: bool = False,
) -> Result:
    """AUC and recall of the training rows whose `name` is the test example's, mean and sd over test examples.

    Raises UserError where a row lacks the column, or a test example has a class that no row has.
    """
    classes = [str(value) for value in column(subject.examples, name)]
    wanted = [str(value) for value in column(asked, name)]
    for row, value in enumerate(wanted):
        if value not in classes:
            raise UserError(f"{asked.where(row)}: no training example has the {name} '{value}'")
    if len(set(classes)) < 2:
        raise UserError(f"all training examples have the {name} '{classes[0]}'", "see --column")
    same = np.array(wanted)[:, None] == np.array(classes)[None]
    sizes = same.sum(1)
    result = Result("classes", {"column": name, "classes": len(set(classes))}, COLUMNS, sd=True)
    made = subject.scores(list(asked), methods, result, with_baselines=with_baselines)
    for method, scores in made:
        found = {}
        for prefix, values in (("", scores), ("abs_", np.abs(scores))):
            recall = [figures.recall_at(values[n], same[n], int(sizes[n]))[0] for n in range(len(values))]
            found[prefix + "auc"] = figures.interval(figures.auroc(values, same))
            found[prefix + "recall"] = figures.interval(recall)
        result.add(method, found)
    result.notes.append(
        f"{len(wanted):,} test examples, {len(set(classes)):,} classes of {min(sizes):,} to "
        f"{max(sizes):,} rows; recall by chance is {np.mean(sizes / len(classes)):.3f}. "
        "±: standard deviation over the test examples, as in the DataInf paper."
    )
    return result
