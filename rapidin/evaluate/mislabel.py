"""Evaluation `mislabel`: does self-influence find wrong labels?

A row that no other row explains influences itself most: Koh & Liang (ICML 2017, section 5.4), TracIn (Pruthi
et al., 2020, section 4.1). This needs the cache alone; the baseline, the row's own loss, needs the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rapidin.attribution.methods import self_influence
from rapidin.data.encoding import Status
from rapidin.evaluate import metrics
from rapidin.evaluate.methods import Method
from rapidin.evaluate.metrics import Floats
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, boolean_column, cache_settings
from rapidin.evaluate.training import losses

COLUMNS = {"auroc": "auROC", "auprc": "auPRC"}
# `dot` of normalized gradients is left out: rows of length 1 all have the same self-influence.
DEFAULT = "dot:none,datainf:none,datainf:layer,fisher:none,fisher:layer,fisher:cosine"


def evaluate(subject: Subject, column: str, methods: Sequence[Method], *, with_loss: bool = False) -> Result:
    """Rank the rows whose `column` is true by self-influence, highest first.

    with_loss: also rank by the loss of each row; only that loads the model. The self-influences of several
    caches are added up by their weights. Intervals are over resampled rows. Raises UserError for a column
    that marks no row or every row, and for `dot` with another normalization than `none`.
    """
    marked = boolean_column(subject.examples, column)
    setting = cache_settings(subject.ensemble) | {"column": column, "marked": int(marked.sum())}
    result = Result("mislabel", setting, COLUMNS)

    def add(name: str, values: Floats) -> None:
        auroc, auprc = metrics.estimate_over_rows(values, marked)
        result.add(name, {"auroc": auroc, "auprc": auprc})

    for method in methods:
        subject.log(f"self-influence by {method}")
        add(str(method), _self_influence(subject, method))
    if with_loss:
        for point, values in _losses(subject):
            add(f"loss at {point:g}", values)
    result.notes.append(
        f"{int(marked.sum()):,} of {len(marked):,} rows are marked by '{column}', so chance is 0.5 for "
        f"auROC, {marked.mean():.3f} for auPRC. Intervals: over the rows."
    )
    return result


def _self_influence(subject: Subject, method: Method) -> Floats:
    """The self-influence of every row, added up over the caches by their weights: [N]."""
    total = np.zeros(len(subject.examples))
    for cache, member in zip(subject.ensemble.caches, subject.ensemble.members, strict=True):
        values = self_influence(
            cache, method=method.method, normalize=method.normalize, damping=method.damping
        )
        total += member.weight * values.double().numpy()
    return total


def _losses(subject: Subject) -> Iterator[tuple[float, Floats]]:
    """(point, loss of every row [N]) at the tuned model and where the cache's gradients were taken."""
    source = subject.source
    encoded = source.prepared([source.example(record) for record in subject.examples])
    usable = [n for n, example in enumerate(encoded) if example.status == Status.OK]
    for point in sorted({1.0, *source.points}, reverse=True):
        subject.log(f"loss of each row at {point:g}")
        values = np.full(len(encoded), np.nan)
        with source.loaded.path.at(point):
            values[usable] = losses(
                source.loaded.model, [encoded[n] for n in usable], task=source.task
            ).numpy()
        yield point, values
