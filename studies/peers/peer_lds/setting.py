"""What every `run_<package>.py` reads and writes.

    python run_<package>.py TEXTS.json MODEL WORK --truth TRUTH --at 1 [--seeds 3] [--main]

TEXTS.json holds token ids and labels, made once, so that all packages see the same tokens and count the same
ones; MODEL is a Hugging Face folder, of the place that --at names, or an adapter's, whose matrices are then
all that counts; TRUTH is what `rapidin eval lds` made. --main runs the main cases alone.
WORK gets `rows.json`, a row a case, and the scores beside it as .npy; a case that fails is a row that says
why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NOT_A_TARGET = -100
BATCH = 16
MEMORY = 12 << 30  # bytes of addresses: who wants more fails alone, and does not take the machine with it


@dataclass(frozen=True)
class Texts:
    """ids, mask, labels: [n, longest] int64, padded on the right; labels hold NOT_A_TARGET where the loss of
    predicting the token does not count."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: list[dict[str, list[int]]], pad: int) -> Texts:
        longest = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, NOT_A_TARGET)
        for n, row in enumerate(rows):
            length = len(row["ids"])
            ids[n, :length] = torch.tensor(row["ids"])
            mask[n, :length] = 1
            labels[n, :length] = torch.tensor(row["labels"])
        return cls(ids, mask, labels)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.mask, self.labels

    def loader(self, size: int = BATCH) -> Any:
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*self.columns), batch_size=size, shuffle=False
        )


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over the counted tokens of each text: logits [n, T, V], labels [n, T] -> [n]."""
    wanted = labels[:, 1:]
    each = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), wanted, ignore_index=NOT_A_TARGET, reduction="none"
    )
    return each.sum(1) / (wanted != NOT_A_TARGET).sum(1)


@dataclass(frozen=True)
class Setting:
    """at: the place between base and tuned model that MODEL stands at; seeds: of projections and sketches."""

    model_folder: Path
    truth: Path
    work: Path
    at: str
    seeds: tuple[int, ...]
    train: Texts
    test: Texts
    rows: dict[str, list[dict[str, list[int]]]]

    def model(self, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=torch.float32, **options)
        loaded.config.use_cache = False
        return loaded.eval()

    @property
    def optimizer(self) -> Path | None:
        """The last checkpoint of the tuning, where its optimizer's state was kept."""
        found = [file.parent for file in (self.truth / "checkpoints").glob("checkpoint-*/optimizer.pt")]
        return max(found, key=lambda folder: int(folder.name.split("-")[1]), default=None)

    @property
    def is_adapter(self) -> bool:
        """Whether MODEL is an adapter."""
        return (self.model_folder / "adapter_config.json").exists()

    def linear_layers(self, model: Any) -> list[str]:
        """The linear layers of the blocks, by module name; of an adapter, its own."""
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and ".layers." in name
            and (not self.is_adapter or ".lora_" in name)
        ]


@dataclass(frozen=True)
class Case:
    """score: given an empty folder, (scores [test, train], larger = more helpful; bytes it keeps of an
    example, None where it keeps nothing of single examples). about: more for the row; `score` may add to it.
    main: a case that is worth its time on a model that is not small: the method's own defaults, or what was
    best on the small one.
    """

    method: str
    settings: dict[str, Any]
    score: Callable[[Path], tuple[Tensor, float | None]]
    note: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    main: bool = False


def run_cases(setting: Setting, package: str, cases: Iterable[Case]) -> None:
    """Run them in order; rows.json is written anew after each. What it holds already is not run again, but
    for what failed."""
    file = setting.work / "rows.json"
    done: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = [row for row in done if "failed" not in row]
    for case in cases:
        key = json.dumps([case.method, case.settings, case.about.get("at", setting.at)])
        name = hashlib.sha256(key.encode()).hexdigest()[:12] + ".npy"
        if any(row.get("scores") == name for row in done):
            continue
        folder = setting.work / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        row: dict[str, Any] = {"package": package, "version": version(package), "method": case.method}
        row |= {"at": setting.at, "settings": case.settings, **case.about}
        if case.note:
            row["note"] = case.note
        start = time.perf_counter()
        try:
            scores, size = case.score(folder)
            values = scores.detach().cpu().double().numpy()
            if values.shape != (len(setting.test), len(setting.train)):
                raise ValueError(f"scores of shape {values.shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"{int((~np.isfinite(values)).sum())} scores are NaN or Inf")
            np.save(setting.work / name, values)
            row |= {"bytes": size, "scores": name}
        except Exception as error:  # a package may raise anything, and the others are to go on
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        row |= case.about
        row["seconds"] = round(time.perf_counter() - start, 2)
        done.append(row)
        file.write_text(json.dumps(done, indent=1))
        print(f"{package} {case.method} {case.settings}: {row['seconds']} s", flush=True)
    shutil.rmtree(setting.work / "scratch", ignore_errors=True)


def main(package: str, cases: Callable[[Setting], Iterable[Case]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--at", default="1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--main", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    args.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.texts.read_text())
    train, test = (Texts.of(rows[part], rows["pad"]) for part in ("train", "test"))
    setting = Setting(args.model, args.truth, args.work, args.at, tuple(range(args.seeds)), train, test, rows)
    run_cases(setting, package, (case for case in cases(setting) if case.main or not args.main))
