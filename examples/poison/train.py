"""Tune a LoRA adapter on instruction data; stopped at any moment, the same command goes on where it was.

    python train.py --model MODEL --data train.jsonl --out ADAPTER

MODEL is a Hugging Face folder or name, or a folder with one GGUF file. Every --save-every steps the weights
and the optimizer's state are written to ADAPTER/state, in a safetensors file and a JSON file that appear
whole or not at all. A run that was killed and started again ends with the same adapter as one that was not.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from rapidin.encoding import Encoded, Encoder, Status
from rapidin.examples import open_examples
from rapidin.hooks import Batch, example_losses
from rapidin.model import load_model


def main() -> None:
    options = parse()
    examples = open_examples(options.data)
    settings = {
        key: value for key, value in vars(options).items() if key not in ("out", "save_every", "model")
    }
    settings |= {"model": options.model, "data": examples.identity}
    if (options.out / "adapter_model.safetensors").exists():
        sys.exit(f"{options.out} holds a finished adapter; name another --out")

    loaded = load_model(options.model)
    torch.manual_seed(options.seed)
    targets = options.targets.split(",")
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(loaded.model, config)
    model.train()
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=options.learning_rate)

    encoder = Encoder(loaded.tokenizer, max_length=options.max_length)
    encoded = [made for made in map(encoder, examples) if made.status == Status.OK]
    order = batches(len(encoded), options.batch, options.steps, options.seed)
    state = State(options.out / "state", settings)
    first = state.load(trainable, optimizer)

    console = Console()
    size = sum(weight.numel() for weight in trainable.values())
    print(f"{len(encoded)} of {len(examples)} examples; {size:,} weights; step {first} of {options.steps}")
    with progress_bar(console) as bar:
        task = bar.add_task("tuning", total=options.steps, completed=first, loss=float("nan"))
        for step in range(first, options.steps):
            rate = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = mean_loss(model, [encoded[row] for row in order[step]], loaded.device)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            bar.update(task, advance=1, loss=loss.item())
            if not console.is_terminal and step % 10 == 0:
                print(f"step {step} of {options.steps}, loss {loss.item():.3f}", flush=True)
            if (step + 1) % options.save_every == 0:
                state.save(step + 1, trainable, optimizer)
    model.save_pretrained(options.out)
    state.remove()
    print(f"the adapter is in {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="base model: folder, name, or a folder with one GGUF file"
    )
    parser.add_argument("--data", required=True, help="training data in one of rapidin's forms")
    parser.add_argument("--out", required=True, type=Path, help="folder for the adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q_proj,v_proj", help="modules to adapt, between commas")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=20, help="steps in which the learning rate rises")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=192, help="tokens an example is cut at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=20, help="steps between two saved states")
    return parser.parse_args()


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of each step: shuffled anew for each pass, and the same for a run that is gone on with."""
    rng = random.Random(seed)
    rows: list[int] = []
    while len(rows) < steps * size:
        rows += rng.sample(range(count), count)
    return [rows[step * size : (step + 1) * size] for step in range(steps)]


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Rises over the first steps, then falls in a straight line."""
    rising = (step + 1) / max(1, options.warm_up)
    falling = (options.steps - step) / max(1, options.steps - options.warm_up)
    return float(options.learning_rate * min(1.0, rising, falling))


def mean_loss(model: Any, examples: list[Encoded], device: torch.device) -> torch.Tensor:
    """Mean loss over the completion tokens of a batch, padded on the right."""
    batch = Batch.of([(example.ids, example.target) for example in examples], device)
    return example_losses(model, batch, "sum").sum() / batch.target.sum()


class State:
    """What a killed run goes on from: `step.json` names its tensor file, and is replaced last."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings

    def load(self, weights: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
        """Put weights and optimizer as they were; the step to go on with, 0 where there is no state."""
        described = self.folder / "step.json"
        if not described.exists():
            return 0
        saved = json.loads(described.read_text())
        changed = [key for key in self.settings if saved["settings"].get(key) != self.settings[key]]
        if changed:
            sys.exit(
                f"{self.folder} was begun with other settings ({', '.join(changed)}); name another --out"
            )
        tensors = load_file(self.folder / saved["file"])
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                optimizer.state[weight] = {
                    part: tensors[f"{part}.{name}"].clone() for part in ("exp_avg", "exp_avg_sq", "step")
                }
        return int(saved["step"])

    def save(self, step: int, weights: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
        for name, weight in weights.items():
            for part, value in optimizer.state[weight].items():
                tensors[f"{part}.{name}"] = value
        file = f"step-{step}.safetensors"
        save_file(tensors, self.folder / f"{file}.part")
        self._replace(file)
        described = {"step": step, "file": file, "settings": self.settings}
        (self.folder / "step.json.part").write_text(json.dumps(described, indent=1) + "\n")
        self._replace("step.json")
        for old in self.folder.glob("step-*.safetensors*"):
            if old.name != file:
                old.unlink()

    def _replace(self, name: str) -> None:
        part = self.folder / f"{name}.part"
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(self.folder / name)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    main()
