"""Tune a LoRA adapter on instruction data; stopped at any moment, the same command goes on where it was.

    python train.py --model MODEL --data train.jsonl --out ADAPTER

MODEL is a Hugging Face folder or name, or a folder with one GGUF file. Every --save-every steps the weights
and the optimizer's state are written to ADAPTER/state. A run that was killed and started again ends with the
same adapter as one that was not.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rapidin.data.encoding import Encoder, Status
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.evaluate.saving import ResumeState
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import add_lora, tune
from rapidin.gradients.load import load_model


def main() -> None:
    options = parse()
    examples = open_examples(options.data)
    if (options.out / "adapter_model.safetensors").exists():
        sys.exit(f"{options.out} holds a finished adapter; name another --out")
    loaded = load_model(options.model, dtype="float32")
    model = add_lora(loaded.model, rank=options.rank, targets=options.targets.split(","), seed=options.seed)
    encoder = Encoder(loaded.tokenizer, max_length=options.max_length)
    encoded = [made for made in map(encoder, examples) if made.status == Status.OK]
    recipe = Recipe(
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        warm_up=options.warm_up,
        seed=options.seed,
    )
    settings = recipe.to_json() | {
        "model": options.model,
        "data": examples.identity,
        "rank": options.rank,
        "targets": options.targets,
        "max_length": options.max_length,
    }
    state = ResumeState(options.out / "state", settings, every=options.save_every)

    console = Console()
    size = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(f"{len(encoded)} of {len(examples)} examples; {size:,} weights; {options.steps} steps")
    with progress_bar(console) as bar:
        task = bar.add_task("tuning", total=options.steps, loss=float("nan"))

        def tell(done: int, steps: int, loss: float) -> None:
            bar.update(task, completed=done, loss=loss)
            if not console.is_terminal and done % 10 == 1:
                print(f"step {done} of {steps}, loss {loss:.3f}", flush=True)

        tune(model, encoded, recipe, on_step=tell, state=state)
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
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
