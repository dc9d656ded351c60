"""Bergson (EleutherAI): gradient dot products, TrackStar, TRAK, EK-FAC. Runs in its own environment.

All at `loss_reduction="mean"`, the mean loss of a text's counted tokens, and without `lm_head`. Bytes are
those of a row as Bergson stores it, numbers in float32, the model's type; for TrackStar and TRAK, whose
pipelines take the training gradients anew for every query, those of the row that an index would keep. A
module has side x side numbers; side 5 comes nearest to 2,048 bytes for 21 modules, side 7 if they were kept
in float16; 16 is Bergson's default, 0 keeps the whole gradients.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from setting import Case, Setting, main
from torch import Tensor

SIDES = (5, 7, 16, 32, 0)
FEW = (5, 7)  # sides that keep about 2,048 bytes: these with several seeds
# (unit_normalize, mix_hessians, damping); the last is its default
TRACKSTAR = (
    (True, False, 1.0),
    (True, False, 0.1),
    (True, False, 10.0),
    (True, True, 0.1),
    (False, True, 0.1),
)
MAIN = (TRACKSTAR[0], TRACKSTAR[-1])  # of the main cases
GLOBAL = (512,)  # numbers of TRAK's one vector for all modules: 2,048 bytes


def write_texts(setting: Setting, folder: Path) -> dict[str, str]:
    """The token ids and labels as jsonl, which Bergson takes as they are."""
    files = {}
    for part in ("train", "test"):
        file = folder / f"{part}.jsonl"
        rows = ({"input_ids": row["ids"], "labels": row["labels"]} for row in setting.rows[part])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[part] = str(file)
    return files


def index_config(setting: Setting, folder: Path, name: str, part: str, **options: Any) -> Any:
    from bergson.config.config import DataConfig, IndexConfig

    return IndexConfig(
        run_path=str(folder / name),
        overwrite=True,
        model=str(setting.model_folder),
        data=DataConfig(dataset=write_texts(setting, folder)[part]),
        loss_reduction="mean",
        filter_modules="*lm_head*",
        **{"token_batch_size": 1024} | options,
    )


def query_config(setting: Setting, folder: Path) -> Any:
    from bergson.config.config import QuerySetConfig

    return QuerySetConfig(dataset=write_texts(setting, folder)["test"], aggregation="none")


def read(folder: Path) -> Tensor:
    from bergson.data import load_scores

    scores = load_scores(folder)
    return torch.from_numpy(np.asarray(scores[:], dtype=np.float64).copy()).T


def row_bytes(folder: Path) -> float:
    """Bytes of a row of an index that Bergson made."""
    info = json.loads((folder / "info.json").read_text())
    return (folder / "gradients.bin").stat().st_size / info["num_grads"]


def execute(command: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        command.execute()


def dot(setting: Setting, side: int, seed: int, unit: bool, folder: Path) -> tuple[Tensor, float]:
    from bergson.cli.commands import Build, Score
    from bergson.config.config import PreprocessConfig, ScoreConfig

    options = {"projection_dim": side, "projection_seed": seed}
    prepared = partial(PreprocessConfig, unit_normalize=unit)
    execute(Build(index_config(setting, folder, "query", "test", **options), prepared()))
    execute(Build(index_config(setting, folder, "index", "train", **options), prepared()))
    scored = index_config(setting, folder, "scores", "train", **options)
    execute(Score(ScoreConfig(query_path=str(folder / "query")), scored, prepared()))
    return read(folder / "scores"), row_bytes(folder / "index")


def one_group(setting: Setting, folder: Path) -> Path:
    """The optimizer's state in one group of parameters, in the model's order.

    The Trainer has two, first those with weight decay; Bergson 2.5.1 sorts them by the parameters that need
    gradients, after it has frozen all but one, and so refuses.
    """
    assert setting.optimizer is not None
    saved = torch.load(setting.optimizer / "optimizer.pt", weights_only=True)
    named = dict(setting.model().named_parameters())
    order = sorted(named, key=lambda name: named[name].dim() < 2)  # stable: norms behind the matrices
    if [len(group["params"]) for group in saved["param_groups"]] != [
        sum(p.dim() >= 2 for p in named.values()),
        sum(p.dim() < 2 for p in named.values()),
    ]:
        raise ValueError("the optimizer's groups are not the matrices and the rest")
    at = {name: number for number, name in enumerate(named)}
    state = {at[name]: saved["state"][number] for number, name in enumerate(order)}
    file = folder / "optimizer.pt"
    torch.save({"state": state, "param_groups": [{"params": list(range(len(named)))}]}, file)
    return file


def trackstar(
    setting: Setting, side: int, seed: int, unit: bool, mixed: bool, damping: float, adam: bool, _: Path
) -> tuple[Tensor, float]:
    """The pipeline; its second moments are those of an earlier case of the same side, seed and adam, if any.

    adam: gradients are divided by the roots of AdamW's second moments first, elementwise.
    """
    from bergson.cli.commands import Trackstar
    from bergson.config.config import InversionConfig, PreprocessConfig, TrackstarConfig

    folder = setting.work / "trackstar"
    same = folder / f"{side}-{seed}-{adam}"
    if not same.exists():
        shutil.rmtree(folder, ignore_errors=True)
        same.mkdir(parents=True)
    for step in ("query", "scores"):
        shutil.rmtree(folder / "run" / step, ignore_errors=True)
    config = TrackstarConfig(
        query=query_config(setting, folder),
        preprocess_cfg=PreprocessConfig(
            unit_normalize=unit, inversion_cfg=InversionConfig(damping_factor=damping)
        ),
        mix_hessians=mixed,
        resume=True,
    )
    options: dict[str, Any] = {"projection_dim": side, "projection_seed": seed}
    if adam:
        options["optimizer_state"] = str(one_group(setting, folder))
    execute(Trackstar(index_config(setting, folder, "run", "train", **options), config))
    return read(folder / "run/scores"), row_bytes(folder / "run/query")


def trak(setting: Setting, numbers: int, seed: int, damping: float, folder: Path) -> tuple[Tensor, float]:
    from bergson.cli.commands import Trak
    from bergson.config.config import InversionConfig, PreprocessConfig, TrakConfig

    config = TrakConfig(
        query=query_config(setting, folder),
        preprocess_cfg=PreprocessConfig(inversion_cfg=InversionConfig(damping_factor=damping)),
    )
    options: dict[str, Any] = {"projection_dim": numbers, "projection_seed": seed}
    options |= {"projection_target": "global", "loss_fn": "log_odds", "token_batch_size": 1 << 15}
    execute(Trak(index_config(setting, folder, "run", "train", **options), config))
    return read(folder / "run/scores"), row_bytes(folder / "run/query")


def ekfac(setting: Setting, damping: float, folder: Path) -> tuple[Tensor, None]:
    from bergson.cli.commands import Ekfac
    from bergson.config.config import (
        HessianConfig,
        HessianPipelineConfig,
        InversionConfig,
        PreprocessConfig,
        ScoreConfig,
    )

    config = HessianPipelineConfig(
        query=query_config(setting, folder), inversion_cfg=InversionConfig(damping_factor=damping)
    )
    hessian = HessianConfig(method="kfac", ev_correction=True)
    index = index_config(setting, folder, "run", "train", projection_dim=0)
    execute(Ekfac(index, hessian, ScoreConfig(), PreprocessConfig(), config))
    return read(folder / "run/scores"), None


def cases(setting: Setting) -> Iterator[Case]:
    for numbers, damping in product(GLOBAL, (0.0, 0.1, 1.0, 10.0)):
        options = {"numbers": numbers, "damping": damping, "seed": 0}
        yield Case("TRAK", options, partial(trak, setting, numbers, 0, damping))
    for damping in (0.1, 1.0, 10.0):
        score = partial(ekfac, setting, damping)
        yield Case("EK-FAC", {"damping": damping}, score, main=damping == 0.1)
    for seed in setting.seeds:
        for side in SIDES if seed == 0 else FEW:
            about: dict[str, Any] = {"side": side, "seed": seed}
            for unit in (False, True):
                yield Case("dot", {"unit_normalize": unit, **about}, partial(dot, setting, side, seed, unit))
            # Eigenvalues of 1,024 numbers a module take minutes: there only the best of the others.
            for unit, mixed, damping in TRACKSTAR[: 0 if not side else 1 if side == 32 else None]:
                options = {"unit_normalize": unit, "mix_hessians": mixed, "damping": damping}
                score = partial(trackstar, setting, side, seed, unit, mixed, damping, False)
                main = side == 16 and (unit, mixed, damping) in MAIN
                yield Case("TrackStar", options | about, score, main=main)
            if 0 < side < 32 and setting.optimizer:
                options = {"unit_normalize": True, "mix_hessians": False, "damping": 0.1, "AdamW": True}
                score = partial(trackstar, setting, side, seed, True, False, 0.1, True)
                yield Case("TrackStar", options | about, score)
    shutil.rmtree(setting.work / "trackstar", ignore_errors=True)


if __name__ == "__main__":
    main("bergson", cases)
