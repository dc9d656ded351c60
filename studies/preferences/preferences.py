"""Are flipped pairs of DPO found, by self-influence or by a target set?

    python studies/preferences/preferences.py --seed 0 --seed 1 --seed 2
    python studies/preferences/preferences.py --table    # the table of the README

A small Llama learns from scratch to answer questions on made-up reports
(`rapidin.evaluate.tasks.labels`), from answers of which half are right and half are any class. A LoRA adapter
is then tuned on pairs by DPO, of which a share prefers the wrong class to the right one. The pairs are cached
at two points of the path from base to tuned model, and ranked: by self-influence, which needs the cache
alone, and by their scores for a target set of correct pairs, lowest first. The baseline is the pair's own
loss. AUC: of the flipped pairs.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import flipped

from rapidin import Attributor
from rapidin.data.encoding import Encoder
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.tasks.labels import CLASSES, make_task
from rapidin.evaluate.training import add_lora, tune
from rapidin.gradients.source import GradientSource

RESULTS = Path(__file__).resolve().parent / "preferences.json"
RANKINGS = flipped.Rankings(
    self_influence=("dot:none", "datainf:none", "fisher:none"),
    target=("dot:layer", "dot:none", "datainf:layer", "fisher:layer"),
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is made: pairs, the share of them that is flipped, correct pairs of the target set and of the
    test; texts of the first training; the model's layers and width; steps of 32 texts of the first training,
    and of 16 pairs of DPO."""

    pairs: int = 400
    flipped: float = 0.2
    target: int = 60
    test: int = 200
    first: int = 2000
    layers: int = 2
    width: int = 64
    first_steps: int = 300
    steps: int = 120
    rank: int = 8
    beta: float = 0.1


QUICK = Sizes(pairs=24, target=4, test=4, first=40, layers=1, width=32, first_steps=4, steps=4)


def make_pairs(sizes: Sizes, seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """The training pairs with `flipped`, the target set and the test pairs."""

    def pair(record: Record, flip: bool, rng: random.Random) -> Record:
        right = record["label"]
        both = [f" {right}", f" {rng.choice([name for name in CLASSES if name != right])}"]
        chosen, rejected = reversed(both) if flip else both
        return {"prompt": record["prompt"], "chosen": chosen, "rejected": rejected, "flipped": flip}

    return flipped.examples_of(pair, sizes.pairs, sizes.flipped, sizes.target, sizes.test, seed)


def base_model(tokenizer: Any, sizes: Sizes, seed: int) -> LlamaForCausalLM:
    """A model that answers with the right class half of the time, learnt from other reports."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ends = {"eos_token_id": 1, "bos_token_id": None}
    config = flipped.config_of(LlamaConfig, tokenizer, sizes.width, sizes.layers, **ends)
    encoder = Encoder(tokenizer, max_length=64)
    reports = make_task(sizes.first, flipped=0.0, classes=len(CLASSES), seed=seed + 1000).train
    texts = []
    for record in reports:
        answer = record["label"] if rng.random() < 0.5 else rng.choice(list(CLASSES))
        texts.append(encoder({"prompt": record["prompt"], "completion": f" {answer}"}))
    model = LlamaForCausalLM(config)
    tune(model, texts, Recipe(batch=32, steps=sizes.first_steps, learning_rate=2e-3, warm_up=20, seed=seed))
    return model


def with_adapter(folder: Path) -> Any:
    from peft import PeftModel

    model = LlamaForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).eval()


def measure(quick: bool, seed: int, folder: Path) -> Record:
    """Everything for one seed, in a folder: the AUC of each ranking of the pairs."""
    sizes = QUICK if quick else Sizes()
    train, target, test = make_pairs(sizes, seed)
    texts = [f"{record['prompt']} {' '.join(CLASSES)}" for record in [*train, *target, *test]]
    tokenizer = flipped.tokenizer_of(texts)
    base_model(tokenizer, sizes, seed).save_pretrained(folder / "base")
    model = add_lora(
        LlamaForCausalLM.from_pretrained(folder / "base"), rank=sizes.rank, targets="all-linear", seed=seed
    )
    settings: Record = {"task": "preference", "beta": sizes.beta, "max_length": 64, "width": 1024}
    recipe = Recipe(batch=16, steps=sizes.steps, learning_rate=1e-3, warm_up=10, seed=seed)
    flipped.tune_on(Attributor(model, tokenizer, **settings).source, train, recipe, "lora_")
    model.save_pretrained(folder / "adapter")

    def attributor_of(**more: Any) -> Attributor:
        return Attributor(with_adapter(folder), tokenizer, **settings, **more)

    wrong = np.array([record["flipped"] for record in train])
    tuned = attributor_of(at=1.0, preconditioner="off").source
    won = margins(tuned, train)
    row: Record = {"seed": seed, "sizes": asdict(sizes)}
    row["auc"] = RANKINGS.aucs(attributor_of, train, target, folder)
    row["auc"]["loss, at 1"] = flipped.auc(-won, wrong)
    row["accuracy"] = {
        "train": float((won[~wrong] > 0).mean()),
        "flipped": float((won[wrong] > 0).mean()),
        "test": float((margins(tuned, test) > 0).mean()),
    }
    return row


def margins(source: GradientSource, records: Sequence[Record]) -> np.ndarray:
    """By how much each pair is won: beta times the difference of its log-probabilities, less that of the
    base; what the pair's loss is a falling function of."""
    return -torch.expm1(flipped.losses_of(source, records)).log().numpy()  # the loss is log(1 + exp(-margin))


def table(rows: Sequence[Record]) -> str:
    """The AUCs of all seeds, as a Markdown table."""
    return flipped.table([row["auc"] for row in rows], "the pair's own loss, at 1")


def main(arguments: list[str] | None = None) -> None:
    flipped.run(__doc__, RESULTS, measure, table, arguments)


if __name__ == "__main__":
    main()
