"""kronfluence: EK-FAC, diagonal, and no Hessian at all. Runs in its own environment.

It keeps nothing of single examples: every query takes the training gradients again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from setting import NOT_A_TARGET, Case, Setting, losses, main
from torch import Tensor


def language_task(layers: list[str]) -> Any:
    from kronfluence.task import Task

    class LanguageTask(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            ids, mask, labels = batch
            logits = model(input_ids=ids, attention_mask=mask).logits
            if sample:
                with torch.no_grad():
                    drawn = torch.distributions.Categorical(logits=logits[:, :-1]).sample()
                counted = labels[:, 1:] != NOT_A_TARGET
                labels = torch.cat((labels[:, :1], drawn.masked_fill(~counted, NOT_A_TARGET)), 1)
            return losses(logits, labels).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch[1]

    return LanguageTask()


def scores(setting: Setting, strategy: str, damping: float | None, folder: Path) -> tuple[Tensor, None]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    model = setting.model(attn_implementation="eager")
    task = language_task(setting.linear_layers(model))
    model = prepare_model(model, task)
    analyzer = Analyzer("lds", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
    train, test = (texts.loader().dataset for texts in (setting.train, setting.test))
    analyzer.fit_all_factors(
        factors_name="factors",
        dataset=train,
        per_device_batch_size=16,
        factor_args=FactorArguments(strategy=strategy),
    )
    analyzer.compute_pairwise_scores(
        scores_name="scores",
        factors_name="factors",
        query_dataset=test,
        train_dataset=train,
        per_device_query_batch_size=len(setting.test),
        per_device_train_batch_size=48,
        score_args=ScoreArguments(damping_factor=damping),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"], None


def cases(setting: Setting) -> Iterator[Case]:
    yield Case("identity", {}, partial(scores, setting, "identity", 1e-8))
    for strategy in ("diagonal", "kfac", "ekfac"):
        for damping in (1e-8, None):
            about = {"damping": "0.1 of the mean eigenvalue" if damping is None else damping}
            main = strategy == "ekfac" and damping is None
            yield Case(strategy, about, partial(scores, setting, strategy, damping), main=main)


if __name__ == "__main__":
    main("kronfluence", cases)
