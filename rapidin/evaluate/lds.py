"""Evaluation `lds`: the linear datamodelling score, do scores predict the effect of retraining on other data?

The scores of a test example's rows, added up over a random half of the training data, should rise and fall
with how well a model trained on that half alone does on the test example (Ilyas et al., *Datamodels*, 2022;
Park et al., *TRAK*, 2023, section 4). LDS is Spearman's correlation of the two over many halves, the mean
over the test examples. `rapidin.evaluate.ground_truth` does the retrainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rapidin.attribution import baselines
from rapidin.errors import UserError
from rapidin.evaluate import metrics
from rapidin.evaluate.ground_truth import GroundTruth
from rapidin.evaluate.log import Log, no_log
from rapidin.evaluate.methods import Method, each_score
from rapidin.evaluate.metrics import Estimate, Floats
from rapidin.evaluate.result import Result
from rapidin.evaluate.variants import Variant, VariantCaches


def correlations(masks: npt.ArrayLike, losses: npt.ArrayLike, scores: npt.ArrayLike) -> Floats:
    """LDS of each test example: [T].

    masks: [S, N], the rows of each subset. losses: [S, T], or [S, K, T] to average over K seeds, of the
    models trained on the subsets. scores: [T, N], higher = more helpful; NaN (no sketch) counts as 0. Subsets
    without a loss are left out. Raises UserError if fewer than three are left, ValueError for shapes that do
    not fit.
    """
    kept, loss, value = (np.asarray(x, dtype=np.float64) for x in (masks, losses, scores))
    loss = loss.mean(1) if loss.ndim == 3 else loss
    if value.shape != (loss.shape[1], kept.shape[1]) or len(kept) != len(loss):
        raise ValueError(
            f"scores {value.shape}, masks {kept.shape} and losses {loss.shape} do not fit: "
            "[T, N], [S, N], [S, T] are expected"
        )
    done = ~np.isnan(loss).any(1)
    if done.sum() < 3:
        raise UserError(
            f"LDS needs at least three finished subsets, got {int(done.sum())} subsets",
            "finish the retrainings",
        )
    predicted = kept[done] @ np.nan_to_num(value, nan=0.0).T
    return metrics.spearman(predicted.T, -loss[done].T)


def score(masks: npt.ArrayLike, losses: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[float, float, float]:
    """(LDS, low end, high end of its 95% bootstrap interval over test examples); see `correlations`."""
    lds = metrics.estimate(correlations(masks, losses, scores))
    return lds.mean, lds.low, lds.high


def seed_agreement(losses: npt.NDArray[np.float32]) -> float | None:
    """Mean Spearman's correlation of the losses [S, K, T] after retraining with the first two seeds.

    It shows what the noise of training leaves to predict. None for a single seed or fewer than three subsets.
    """
    if losses.shape[1] < 2:
        return None
    pairs = losses[~np.isnan(losses).any((1, 2)), :2].astype(np.float64)
    return float(metrics.spearman(pairs[:, 0].T, pairs[:, 1].T).mean()) if len(pairs) > 2 else None


def evaluate(
    truth: GroundTruth,
    methods: Sequence[Method],
    variants: Sequence[Variant],
    *,
    width: int | Literal["auto"] = "auto",
    with_baselines: bool = False,
    device: str | None = None,
    log: Log = no_log,
) -> Result:
    """LDS of every method in every variant, from caches that are kept in the ground truth's folder.

    width: sketch dimension per layer, "auto" to choose it from the number of layers. Raises UserError if too
    few subsets are done, or if checkpoints are needed and none were kept.
    """
    columns = {str(variant): str(variant) for variant in variants}
    max_length = truth.description["settings"]["max_length"]
    train, test = truth.examples("train"), list(truth.examples("test"))
    caches = VariantCaches(truth.folder / "caches", train, max_length, width, log)
    tuned = truth.tuned(device)

    def lds(scores: Floats) -> Estimate:
        return metrics.estimate(correlations(truth.masks, truth.losses, scores))

    rows: dict[str, dict[str, Estimate]] = {}
    for variant in variants:
        sketches, generations = caches.query(variant, tuned, test)
        for method, scores, _ in each_score(sketches, generations, methods):
            rows.setdefault(str(method), {})[str(variant)] = value = lds(scores)
            log(f"{method}, {variant}: LDS {value.mean:.3f}")
    if with_baselines:
        texts, queries = ([baselines.plain_text(record) for record in records] for records in (train, test))
        for name, scores in baselines.scores_of_baselines(tuned.load(), texts, queries).items():
            rows[name] = dict.fromkeys(columns, lds(scores))
    result = Result("lds", _setting(truth), columns, rows)
    subsets, seeds, _ = truth.losses.shape
    result.notes.append(
        f"{len(train):,} training and {len(test):,} test examples; {truth.done:,} of {subsets * seeds:,} "
        "retrainings. Intervals: over the test examples."
    )
    if (agreement := result.setting["seeds_agree"]) is not None:
        result.notes.append(
            f"Two seeds of a retraining agree by {agreement:.3f} (Spearman): noise of training limits what "
            "scores can predict."
        )
    return result


def _setting(truth: GroundTruth) -> dict[str, Any]:
    """What a result was measured on."""
    return {
        "folder": str(truth.folder),
        **{key: truth.description[key] for key in ("model", "settings", "train", "test")},
        "retrainings": truth.done,
        "seeds_agree": seed_agreement(truth.losses),
    }
