"""Are wrong labels found? A row that the others do not explain influences itself most.

Self-influence for mislabelled data: Koh & Liang (ICML 2017, section 5.4), TracIn (Pruthi et al., 2020,
section 4.1). Needs the cache alone; the baseline, the row's own loss, needs the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rapidin.attribution.methods import self_influence
from rapidin.data.encoding import Status
from rapidin.evaluate import figures
from rapidin.evaluate.methods import Method
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, about, flags
from rapidin.evaluate.training import losses

COLUMNS = {"auroc": "auROC", "auprc": "auPRC"}
# With `dot`, all rows of length 1 have the same self-influence.
DEFAULT = "dot:none,datainf:none,datainf:layer,fisher:none,fisher:layer,fisher:cosine"


def evaluate(subject: Subject, name: str, methods: Sequence[Method], *, with_loss: bool = False) -> Result:
    """How the rows whose column `name` is true rank by self-influence, highest first.

    with_loss: the loss of each row as a baseline, at the tuned model and where the cache's gradients were
    taken; only that loads the model. Of several caches the self-influences are added up by their weights.
    Intervals are over resamples of the rows. Raises UserError for a column that does not mark some rows and
    not others, and for `dot:layer` and `dot:cosine`.
    """
    examples, ensemble = subject.examples, subject.ensemble
    marked = flags(examples, name)
    result = Result("mislabel", about(ensemble) | {"column": name, "marked": int(marked.sum())}, COLUMNS)

    def add(method: str, values: figures.Floats) -> None:
        auroc, auprc = figures.over_rows(values, marked)
        result.add(method, {"auroc": auroc, "auprc": auprc})

    for method in methods:
        subject.say(f"self-influence by {method}")
        values = np.zeros(len(marked))
        for cache, member in zip(ensemble.caches, ensemble.members, strict=True):
            made = self_influence(
                cache, method=method.method, normalize=method.normalize, damping=method.damping
            )
            values += member.weight * made.double().numpy()
        add(str(method), values)
    if with_loss:
        source = subject.source
        encoded = [source.encoder(record) for record in examples]
        good = [n for n, text in enumerate(encoded) if text.status == Status.OK]
        for point in sorted({1.0, *source.points}, reverse=True):
            subject.say(f"loss of each row at {point:g}")
            values = np.full(len(encoded), np.nan)
            with source.loaded.path.at(point):
                values[good] = losses(source.loaded.model, [encoded[n] for n in good]).numpy()
            add(f"loss at {point:g}", values)
    result.notes.append(
        f"{int(marked.sum()):,} of {len(marked):,} rows are marked by '{name}', so chance is 0.5 for auROC, "
        f"{marked.mean():.3f} for auPRC. Intervals: over the rows."
    )
    return result
