"""LDS of caches that were made in training, beside caches of the trained model and of its checkpoints.

    python studies/lds/llama.py kjv --pretrain tinyshakespeare.txt --out kjv
    rapidin eval lds kjv/base --data kjv/train.jsonl --test kjv/test.jsonl --out truth --epochs 6 \\
        --batch-size 16 --learning-rate 5e-4 --schedule constant --warmup-steps 1 --subsets 60 --seeds 2 \\
        --checkpoints 6
    python studies/training/retraining.py truth kjv/base --out studies/training/lds.json

Tunes the base once more as the truth's model was tuned, with transformers' Trainer and `SketchCallback`, and
scores each cache as a query reads it. The truth has to be tuned whole, in epochs, without a warm-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.checkpoints import checkpoint_folders
from rapidin.attribution.clock import Clock
from rapidin.attribution.ensemble import Ensemble
from rapidin.attribution.options import QueryOptions
from rapidin.data.encoding import Encoded, Encoder
from rapidin.data.records import NO_LOSS
from rapidin.evaluate import lds
from rapidin.evaluate.ground_truth import GroundTruth
from rapidin.evaluate.methods import each_score, parse_methods
from rapidin.gradients.load import load_model
from rapidin.integrations.transformers import SketchCallback

WIDTH = 4096
METHODS = "dot:none,dot:layer,fisher:layer"


def train(truth: GroundTruth, base: Path, folder: Path, max_length: int, **of_callback: Any) -> None:
    """Tune the base on the truth's rows, and leave a cache in folder/cache."""
    from transformers import Trainer, TrainingArguments

    loaded = load_model(str(base), dtype="float32")
    loaded.model.requires_grad_(True)
    recipe = truth.description["settings"]["recipe"]
    encoder = Encoder(loaded.tokenizer, max_length=max_length)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=recipe["batch"],
        num_train_epochs=recipe["epochs"], learning_rate=recipe["learning_rate"],
        lr_scheduler_type=recipe["schedule"],
        adam_beta1=recipe["betas"][0], adam_beta2=recipe["betas"][1],
        weight_decay=recipe["weight_decay"], max_grad_norm=recipe["clip"] or 0.0, save_strategy="epoch",
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model=loaded.model, args=arguments, train_dataset=[encoder(r) for r in truth.examples("train")],
        processing_class=loaded.tokenizer, data_collator=collated,
    )  # fmt: skip
    data = truth.folder / "train.jsonl"
    trainer.add_callback(
        SketchCallback(folder / "cache", data=data, width=WIDTH, max_length=max_length, **of_callback)
    )
    trainer.train()


def collated(texts: Sequence[Encoded]) -> dict[str, Tensor]:
    """A batch of the texts, padded."""
    ids = [torch.tensor(text.ids) for text in texts]
    labels = [i.masked_fill(~torch.tensor(t.target), NO_LOSS) for i, t in zip(ids, texts, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LOSS),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("truth", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    truth = GroundTruth(options.truth)
    settings = truth.description["settings"]
    recipe = settings["recipe"]
    if settings["lora"] is not None or recipe["steps"] is not None or recipe["warm_up"] > 1:
        sys.exit(
            f"retraining: '{options.truth}' was tuned with an adapter, for some steps or with a warm-up; "
            "make it with --epochs and --warmup-steps 1"
        )
    context = load_model(str(options.base)).context_length
    max_length = min(settings["max_length"], context or settings["max_length"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way, of_callback in {
            "one": {},
            "per_checkpoint": {"per_checkpoint": True},
            "one_optimizer": {"precondition": "optimizer"},
            "per_checkpoint_optimizer": {"per_checkpoint": True, "precondition": "optimizer"},
        }.items():
            train(truth, options.base, folder / way, max_length, **of_callback)
        data = truth.folder / "train.jsonl"
        sizes: dict[str, Any] = {"width": WIDTH, "max_length": max_length}
        common = ["--data", str(data), "--width", str(WIDTH), "--max-length", str(max_length), "--quiet"]
        run = folder / "one" / "run"
        *_, last = checkpoint_folders(run).values()
        for kind in ("off", "kfac"):
            halfway = load_model(str(last), base=str(options.base), dtype="float32")
            Attributor(halfway, at=0.5, preconditioner=kind, **sizes).cache(data, folder / f"halfway_{kind}")
            end = load_model(str(last), dtype="float32")
            Attributor(end, at=1.0, preconditioner=kind, **sizes).cache(data, folder / f"end_{kind}")
            made = folder / f"checkpoints_{kind}"
            named = ["--checkpoints", str(run), "--precondition", kind, "--out", str(made)]
            command = [sys.executable, "-m", "rapidin", "cache", str(options.base), *named, *common]
            subprocess.run(command, check=True)
        caches = {
            **{f"in training, {way.replace('_', ' ')}": folder / way / "cache" for way in
               ("one", "per_checkpoint", "one_optimizer", "per_checkpoint_optimizer")},
            **{f"{where}, {kind}": folder / f"{where}_{kind}" for kind in ("off", "kfac")
               for where in ("end", "halfway", "checkpoints")},
        }  # fmt: skip
        result: dict[str, dict[str, list[float]]] = {}
        for label, path in caches.items():
            query = Ensemble.read(path).sketched(
                list(truth.examples("test")), QueryOptions(normalize="none", max_new_tokens=1), Clock()
            )
            result[label] = {}
            for method, scores, _ in each_score(query.sketches, query.texts, parse_methods(METHODS)):
                result[label][str(method)] = [
                    round(value, 4) for value in lds.score(truth.masks, truth.losses, scores)
                ]
            print(label, result[label], flush=True)
    made_with = {"width": WIDTH, "retrainings": truth.done, "tests": len(truth.examples("test"))}
    if options.out:
        options.out.write_text(json.dumps({"settings": made_with, "lds": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
