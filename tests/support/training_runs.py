"""Small training runs with `SketchCallback`, and the caches that their sketches are compared with."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import CONTEXT, records, tiny_llama, tiny_tokenizer
from torch import Tensor

from rapidin.attribution.attributor import Attributor
from rapidin.cache import Cache
from rapidin.data.encoding import Encoder

WIDTH = 128
ROWS = 16
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rapidin.integrations.transformers", "transformers.models.llama"])


def token_rows(some: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """The rows of a trainer's data set, encoded as rapidin does."""
    encoder = Encoder(tiny_tokenizer(), max_length=CONTEXT)
    rows = []
    for record in some:
        text = encoder(record)
        labels = [i if counts else -100 for i, counts in zip(text.ids, text.target, strict=True)]
        rows.append({"input_ids": text.ids, "attention_mask": [1] * len(text.ids), "labels": labels})
    return rows


def new_trainer(
    folder: Path, callback: Any = None, model: Any = None, rows: Any = None, cls: Any = None, **arguments: Any
) -> Any:
    """A trainer of a tiny Llama in batches of 4. callback: a `SketchCallback`; arguments: of the training."""
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
    }
    tokenizer = tiny_tokenizer()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4.57 leaves it set after a run in bf16
    trainer = (cls or Trainer)(
        model=tiny_llama() if model is None else model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=token_rows(records(ROWS)) if rows is None else rows,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


def cached(folder: Path, model: Any, some: Any, **settings: Any) -> Tensor:
    """The sketches that `rapidin cache` makes of a model."""
    with torch.no_grad():
        settings = {"at": 1.0, "preconditioner": "off", "width": WIDTH} | settings
        attributor = Attributor(model.eval(), tiny_tokenizer(), **settings)
    return sketches_of(attributor.cache(some, folder, dtype="float32"))


def sketches_of(cache: Cache | Path) -> Tensor:
    """All sketches of a cache, [rows, blocks, width], each of its own length."""
    cache = cache if isinstance(cache, Cache) else Cache(cache)
    rows = list(range(len(cache)))
    blocks = cache.sketches(rows).view(len(rows), len(cache.manifest.layers), -1)
    return blocks * cache.lengths(rows)[..., None]


def worst(got: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    return float(((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


def in_processes(size: int, folder: Path, arguments: dict[str, Any], *, keep_steps: bool = False) -> None:
    """A run in several processes that share their gradients by gloo, into folder/run and folder/cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        process = _CONTEXT.Process(target=_one, args=(rank, size, port, folder, arguments, keep_steps))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(180)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size


def _one(rank: int, size: int, port: int, folder: Path, arguments: dict[str, Any], keep_steps: bool) -> None:
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (named | {"MASTER_PORT": port}).items()})
    torch.set_num_threads(1)
    from rapidin.integrations.transformers import SketchCallback

    callback = SketchCallback(folder / "cache", width=WIDTH, dtype="float32", keep_steps=keep_steps)
    trainer = new_trainer(folder / "run", callback, ddp_backend="gloo", **arguments)
    trainer.train()
