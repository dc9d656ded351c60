"""Are flipped labels of a classifier found, by self-influence or by a target set?

    python studies/flipped_labels/flipped_labels.py --seed 0 --seed 1 --seed 2
    python studies/flipped_labels/flipped_labels.py --table    # the table of the README

The setting is that of "mislabeled data detection" of DataInf (Kwon et al., ICLR 2024): an encoder with a LoRA
adapter and a new head is tuned on two classes, of whose labels a share is flipped, and the examples are
ranked by their influence on correct ones. Theirs is RoBERTa-large on GLUE; here all is made on the spot. A
small BERT with random weights stands for a pretrained model: all of its weights first learn the four kinds of
goods of made-up reports (`rapidin.evaluate.tasks.labels`), from a quarter of the goods. Then it is tuned on
few reports of all goods, and learns whether these can be eaten. The baseline is the example's own loss. AUC:
of the flipped examples.
"""

from __future__ import annotations

import copy
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import flipped

from rapidin import Attributor
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.tasks.labels import CLASSES, make_task

RESULTS = Path(__file__).resolve().parent / "flipped_labels.json"
RANKINGS = flipped.Rankings(
    self_influence=("dot:none", "datainf:none", "fisher:none"),
    target=("dot:layer", "dot:none", "datainf:layer", "datainf:none", "fisher:layer", "fisher:none"),
)
EATEN = ("fruit", "grain")
Record = dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """Modules with an adapter of this rank, and passes over the examples in steps of 32."""

    modules: tuple[str, ...]
    epochs: int
    rank: int = 8


@dataclass(frozen=True)
class Sizes:
    """How much is made: training examples, the share of them that is flipped, correct ones of the target set
    and of the test; reports of the first training, how many of the eight goods of each kind it knows, and its
    steps of 32; the model's layers and width."""

    train: int = 400
    flipped: float = 0.2
    target: int = 100
    test: int = 200
    first: int = 2000
    known: int = 2
    first_steps: int = 300
    layers: int = 2
    width: int = 64


TUNINGS = {
    "short": Tuning(("value",), epochs=10),
    "long": Tuning(("query", "key", "value", "dense"), epochs=40),
}
QUICK = Sizes(train=24, target=4, test=4, first=100, known=4, first_steps=4, layers=1, width=32)


def make_examples(sizes: Sizes, seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """The training examples with `flipped`, the target set and the test examples."""

    def example(record: Record, flip: bool, _: random.Random) -> Record:
        eaten = record["label"] in EATEN
        return {"text": record["prompt"], "label": int(eaten != flip), "flipped": flip}

    return flipped.examples_of(example, sizes.train, sizes.flipped, sizes.target, sizes.test, seed)


def first_examples(sizes: Sizes, seed: int) -> list[Record]:
    """Other reports with their kind of goods, on goods that are known alone."""
    kinds = list(CLASSES)
    made = make_task(sizes.first, flipped=0.0, classes=len(kinds), seed=seed + 1000).train
    known = {goods for names in CLASSES.values() for goods in names[: sizes.known]}
    return [
        {"text": record["prompt"], "label": kinds.index(record["label"])}
        for record in made
        if known.intersection(re.findall("[a-z]+", record["prompt"]))
    ]


def base_model(tokenizer: Any, reports: Sequence[Record], sizes: Sizes, seed: int) -> Any:
    """A model all of whose weights have learnt the four kinds from these reports, with a random head for two
    classes."""
    torch.manual_seed(seed)
    config = flipped.config_of(BertConfig, tokenizer, sizes.width, sizes.layers)
    base = BertForSequenceClassification(config)
    kinds = copy.deepcopy(config)
    kinds.num_labels = len(CLASSES)
    first = BertForSequenceClassification(kinds).eval()  # without dropout
    recipe = Recipe(batch=32, steps=sizes.first_steps, learning_rate=1e-3, warm_up=20, seed=seed)
    source = Attributor(first, tokenizer, at=1.0, preconditioner="off", max_length=64).source
    flipped.tune_on(source, reports, recipe, "")
    base.bert.load_state_dict(first.bert.state_dict())
    return base


def measure(quick: bool, seed: int, folder: Path) -> Record:
    """Everything for one seed, in a folder: the AUC of each ranking of the examples, for each tuning."""
    train, target, test = make_examples(sizes_of(quick), seed)
    wrong = np.array([record["flipped"] for record in train])
    row: Record = {"seed": seed, "sizes": asdict(sizes_of(quick)), "accuracy": {}, "auc": {}}
    for name, attributor_of in tunings(quick, seed, folder):
        source = attributor_of(at=1.0, preconditioner="off").source
        lost = flipped.losses_of(source, train).numpy()
        low = np.log(2)  # of two classes the one with a lower loss is predicted
        row["accuracy"][name] = {
            "train": round(float((lost[~wrong] < low).mean()), 4),
            "flipped": round(float((lost[wrong] < low).mean()), 4),
            "test": round(float((flipped.losses_of(source, test).numpy() < low).mean()), 4),
        }
        row["auc"][name] = RANKINGS.aucs(attributor_of, train, target, folder / f"{name}-caches")
        row["auc"][name]["loss, at 1"] = flipped.auc(lost, wrong)
    return row


def sizes_of(quick: bool) -> Sizes:
    return QUICK if quick else Sizes()


def tunings(quick: bool, seed: int, folder: Path) -> Iterator[tuple[str, Callable[..., Attributor]]]:
    """Tunes a model in each way, in a folder; the name of the way, and what makes an attributor of the
    model."""
    sizes = sizes_of(quick)
    train, target, test = make_examples(sizes, seed)
    reports = first_examples(sizes, seed)
    tokenizer = flipped.tokenizer_of([each["text"] for each in [*train, *target, *test, *reports]])
    base_model(tokenizer, reports, sizes, seed).save_pretrained(folder / "base")
    for name, tuning in TUNINGS.items():
        if quick:
            tuning = replace(tuning, epochs=2)
        yield name, tune_adapter(tokenizer, train, tuning, seed, folder / "base", folder / name)


def tune_adapter(
    tokenizer: Any, train: Sequence[Record], tuning: Tuning, seed: int, base: Path, folder: Path
) -> Callable[..., Attributor]:
    """Tunes an adapter and the head, into a folder; what makes an attributor of the tuned model."""
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=2 * tuning.rank,
        target_modules=list(tuning.modules),
        task_type=TaskType.SEQ_CLS,
    )
    settings: Record = {"max_length": 64, "width": 1024}
    torch.manual_seed(seed)
    model = get_peft_model(BertForSequenceClassification.from_pretrained(base), config).eval()
    recipe = Recipe(batch=32, epochs=tuning.epochs, learning_rate=3e-3, warm_up=10, seed=seed)
    source = Attributor(model, tokenizer, at=1.0, preconditioner="off", **settings).source
    flipped.tune_on(source, train, recipe, "lora_", "modules_to_save")
    model.save_pretrained(folder)

    def attributor_of(**more: Any) -> Attributor:
        model = BertForSequenceClassification.from_pretrained(base)
        tuned = PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
        return Attributor(tuned, tokenizer, **settings, **more)

    return attributor_of


def table(rows: Sequence[Record]) -> str:
    """The AUCs of all seeds, as a Markdown table for each tuning."""
    tables = []
    for name, tuning in TUNINGS.items():
        shares = {
            key: " / ".join(f"{row['accuracy'][name][key]:.1%}" for row in rows)
            for key in ("test", "train", "flipped")
        }
        title = (
            f"{tuning.epochs} epochs, LoRA on {', '.join(tuning.modules)}. Right are {shares['test']} of the "
            f"test, {shares['train']} of the correct training labels; {shares['flipped']} of the flipped "
            "labels are predicted."
        )
        found = flipped.table([row["auc"][name] for row in rows], "the example's own loss, at 1")
        tables.append(f"{title}\n\n{found}")
    return "\n".join(tables)


def main(arguments: list[str] | None = None) -> None:
    flipped.run(__doc__, RESULTS, measure, table, arguments)


if __name__ == "__main__":
    main()
