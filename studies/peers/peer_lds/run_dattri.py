"""dattri (TRAIS-Lab): Grad-Dot, Grad-Cos, TRAK, LoGra, DataInf, EK-FAC. Runs in its own environment.

Other parameters than the blocks' linear layers are frozen, for which dattri then takes no gradients: its
`layer_name` would do the same, but DataInf splits by all trainable parameters whatever it says. TRAK's
function is dattri's own example for it, the log odds of the (geometric mean) probability of the text.

Damping is an absolute number here, and its default nothing: DataInf then divides by 0, TRAK inverts a
singular matrix, so several values are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from setting import BATCH, Case, Setting, Texts, losses, main
from torch import Tensor

DIMENSIONS = (512,)
DAMPINGS = (1e-7, 1e-5, 1e-3, 1e-1)
SIDES = (5, 7, 16, 64)  # of LoGra's projections; 64 is its default
Batch = tuple[Tensor, Tensor, Tensor]


def whole(texts: Any) -> Any:
    """All texts as one batch: a batch makes its projection matrix anew."""
    return texts.loader(len(texts))


def model_and_loss(setting: Setting) -> tuple[Any, Callable[..., Tensor]]:
    model = setting.model(attn_implementation="eager")
    layers = {f"{name}.weight" for name in setting.linear_layers(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in layers)

    def loss(weights: Any, batch: Batch) -> Tensor:
        ids, mask, labels = (x if x.dim() == 2 else x[None] for x in batch)
        logits = torch.func.functional_call(model, weights, (), {"input_ids": ids, "attention_mask": mask})
        return losses(logits.logits, labels).mean()

    return model, loss


def task(setting: Setting, change: Callable[[Tensor], Tensor] | None = None) -> Any:
    from dattri.task import AttributionTask

    model, loss = model_and_loss(setting)

    def changed(weights: Any, batch: Batch) -> Tensor:
        value = loss(weights, batch)
        return value if change is None else change(value)

    return AttributionTask(loss_func=changed, model=model, checkpoints=model.state_dict())


def tracin(setting: Setting, cosine: bool, seed: int, dimension: int, folder: Path) -> tuple[Tensor, float]:
    from dattri.algorithm.tracin import TracInAttributor

    attributor = TracInAttributor(
        task=task(setting),
        weight_list=torch.ones(1),
        normalized_grad=cosine,
        projector_kwargs={"proj_dim": dimension, "proj_seed": seed},
    )
    return attributor.attribute(whole(setting.train), whole(setting.test)).T, 4.0 * dimension


def log_odds(loss: Tensor) -> Tensor:
    return -loss - torch.log(1 - torch.exp(-loss))


def trak(setting: Setting, damping: float, seed: int, dimension: int, folder: Path) -> tuple[Tensor, float]:
    from dattri.algorithm.trak import TRAKAttributor

    _, loss = model_and_loss(setting)

    def probability(weights: Any, batch: Batch) -> Tensor:
        return torch.exp(-loss(weights, batch))

    attributor = TRAKAttributor(
        task=task(setting, log_odds),
        correct_probability_func=probability,
        projector_kwargs={"proj_dim": dimension, "proj_seed": seed},
        regularization=damping,
    )
    attributor.cache(whole(setting.train))
    return attributor.attribute(whole(setting.test)).T, 4.0 * dimension


def datainf(setting: Setting, damping: float, folder: Path) -> tuple[Tensor, None]:
    from dattri.algorithm.influence_function import IFAttributorDataInf

    attributor = IFAttributorDataInf(task=task(setting), regularization=damping)
    attributor.cache(setting.train.loader())
    return attributor.attribute(setting.train.loader(len(setting.train)), setting.test.loader(8)).T, None


def ekfac(setting: Setting, damping: float, folder: Path) -> tuple[Tensor, None]:
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    attributor = IFAttributorEKFAC(task=task(setting), damping=damping)
    attributor.cache(setting.train.loader())
    return attributor.attribute(whole(setting.train), whole(setting.test)).T, None


def logra(setting: Setting, hessian: str, side: int, folder: Path) -> tuple[Tensor, float]:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    model = setting.model(attn_implementation="eager")

    def loss(model: Any, batch: dict[str, Tensor], device: str) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return losses(logits, batch["labels"]).sum()

    def loader(texts: Texts) -> Any:
        """Batches by name: dattri also gives one to the model as it is."""
        rows = [
            {"input_ids": i, "attention_mask": m, "labels": x} for i, m, x in zip(*texts.columns, strict=True)
        ]
        return torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=False)

    layers = setting.linear_layers(model)
    attributor = LoGraAttributor(
        AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict()),
        layer_names=layers,
        hessian=hessian,
        proj_dim=side * side,
        offload="cpu",
        cache_dir=str(folder),  # it writes a file there even so
    )
    attributor.cache(loader(setting.train))
    scores = attributor.attribute(loader(setting.train), loader(setting.test))
    return scores.T, 4.0 * side * side * len(layers)


def cases(setting: Setting) -> Iterator[Case]:
    for side in SIDES:
        for hessian in ("Identity", "eFIM"):
            yield Case("LoGra", {"side": side, "hessian": hessian}, partial(logra, setting, hessian, side))
    for seed in setting.seeds:
        about = {"dimension": 512, "seed": seed}
        yield Case("Grad-Dot", about, partial(tracin, setting, False, seed, 512))
        yield Case("Grad-Cos", about, partial(tracin, setting, True, seed, 512))
    for dimension in DIMENSIONS:
        for damping in (0.0, *DAMPINGS):
            options = {"dimension": dimension, "damping": damping, "seed": 0}
            yield Case("TRAK", options, partial(trak, setting, damping, 0, dimension))
    for damping in (0.0, *DAMPINGS):
        yield Case("DataInf", {"damping": damping}, partial(datainf, setting, damping))
    yield Case("EK-FAC", {"damping": 1e-5}, partial(ekfac, setting, 1e-5))


if __name__ == "__main__":
    main("dattri", cases)
