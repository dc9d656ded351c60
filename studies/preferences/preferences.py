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

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rapidin import Attributor, self_influence
from rapidin.cache import Cache
from rapidin.data.encoding import Encoder
from rapidin.evaluate.metrics import auroc
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.tasks.labels import CLASSES, make_task
from rapidin.evaluate.training import add_lora, losses, tune
from rapidin.files import replace_file
from rapidin.gradients.source import GradientSource

RESULTS = Path(__file__).resolve().parent / "preferences.json"
SELF = ("dot:none", "datainf:none", "fisher:none")
TARGET = ("dot:layer", "dot:none", "datainf:layer", "fisher:layer")
POINTS = (0.5, 1.0)
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


def make_pairs(sizes: Sizes, seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """The training pairs with `flipped`, the target set and the test pairs."""
    made = make_task(
        sizes.pairs, flipped=0.0, target=sizes.target, test=sizes.test, classes=len(CLASSES), seed=seed
    )
    rng = random.Random(seed)

    def pair(record: Record, flipped: bool = False) -> Record:
        right = record["label"]
        both = [f" {right}", f" {rng.choice([name for name in CLASSES if name != right])}"]
        chosen, rejected = reversed(both) if flipped else both
        return {"prompt": record["prompt"], "chosen": chosen, "rejected": rejected, "flipped": flipped}

    wrong = set(rng.sample(range(sizes.pairs), round(sizes.flipped * sizes.pairs)))
    train = [pair(record, n in wrong) for n, record in enumerate(made.train)]
    return train, [pair(record) for record in made.target], [pair(record) for record in made.test]


def tokenizer_of(records: Sequence[Record]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    texts = [f"{record['prompt']} {' '.join(CLASSES)}" for record in records]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def base_model(tokenizer: Any, sizes: Sizes, seed: int) -> LlamaForCausalLM:
    """A model that answers with the right class half of the time, learnt from other reports."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    encoder = Encoder(tokenizer, max_length=64)
    reports = make_task(sizes.first, flipped=0.0, classes=len(CLASSES), seed=seed + 1000).train
    texts = []
    for record in reports:
        answer = record["label"] if rng.random() < 0.5 else rng.choice(list(CLASSES))
        texts.append(encoder({"prompt": record["prompt"], "completion": f" {answer}"}))
    model = LlamaForCausalLM(config)
    tune(model, texts, Recipe(batch=32, steps=sizes.first_steps, learning_rate=2e-3, warm_up=20, seed=seed))
    return model


def tune_by_dpo(source: GradientSource, records: Sequence[Record], sizes: Sizes, seed: int) -> None:
    """Tunes the adapter of the source's model on pairs, by the losses that gradients are later taken of."""
    model, task = source.loaded.model, source.task
    examples = source.prepared([source.example(record) for record in records])
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    recipe = Recipe(batch=16, steps=sizes.steps, learning_rate=1e-3, warm_up=10, seed=seed)
    for step, chosen in enumerate(recipe.batches(len(examples))):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, sizes.steps)
        batch = task.batch([examples[n] for n in chosen], source.loaded.device)
        optimizer.zero_grad()
        task.losses(model, batch).mean().backward()
        optimizer.step()


def with_adapter(folder: Path) -> Any:
    from peft import PeftModel

    model = LlamaForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).eval()


def measure(sizes: Sizes, seed: int, folder: Path) -> Record:
    """Everything for one seed, in a folder: the AUC of each ranking of the pairs."""
    train, target, test = make_pairs(sizes, seed)
    tokenizer = tokenizer_of([*train, *target, *test])
    base_model(tokenizer, sizes, seed).save_pretrained(folder / "base")
    model = add_lora(
        LlamaForCausalLM.from_pretrained(folder / "base"), rank=sizes.rank, targets="all-linear", seed=seed
    )
    settings = {"task": "preference", "beta": sizes.beta, "max_length": 64, "width": 1024}
    tune_by_dpo(Attributor(model, tokenizer, **settings).source, train, sizes, seed)
    model.save_pretrained(folder / "adapter")
    flipped = np.array([record["flipped"] for record in train])
    row: Record = {"seed": seed, "sizes": asdict(sizes), "auc": {}}
    tuned = Attributor(with_adapter(folder), tokenizer, at=1.0, preconditioner="off", **settings).source
    row["accuracy"] = {
        "train": float((margins(tuned, train)[~flipped] > 0).mean()),
        "flipped": float((margins(tuned, train)[flipped] > 0).mean()),
        "test": float((margins(tuned, test) > 0).mean()),
    }
    for point in POINTS:
        for preconditioner in ("kfac", "off"):
            attributor = Attributor(
                with_adapter(folder), tokenizer, at=point, preconditioner=preconditioner, **settings
            )
            cache = attributor.cache(train, folder / f"{preconditioner}-{point:g}", dtype="float32")
            found = dict(rankings(attributor, cache, target))
            row["auc"] |= {
                f"{name}, {preconditioner}, at {point:g}": round(float(auroc(values[None], flipped)[0]), 4)
                for name, values in found.items()
            }
    row["auc"]["loss, at 1"] = round(float(auroc(-margins(tuned, train)[None], flipped)[0]), 4)
    return row


def rankings(
    attributor: Attributor, cache: Cache, target: Sequence[Record]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values [N]) of each ranking, large for what looks flipped."""
    for name in SELF:
        method, normalize = name.split(":")
        yield f"self-influence {name}", self_influence(cache, method=method, normalize=normalize).numpy()
    for name in TARGET:
        method, normalize = name.split(":")
        scores = attributor.scores(cache, target, method=method, normalize=normalize, together=True)
        yield f"target set {name}", -scores[0].numpy()


def margins(source: GradientSource, records: Sequence[Record]) -> np.ndarray:
    """By how much each pair is won: beta times the difference of its log-probabilities, less that of the
    base; what the pair's loss is a falling function of."""
    examples = source.prepared([source.example(record) for record in records])
    found = losses(source.loaded.model, examples, task=source.task).double()
    return -torch.expm1(found).log().numpy()  # the loss is log(1 + exp(-margin))


# ------------------------------------------------------------------------------------------------ results


def table(rows: Sequence[Record]) -> str:
    """The AUCs of all seeds, as a Markdown table."""
    names = list(rows[0]["auc"])
    kinds = list(dict.fromkeys(name.split(", ")[0] for name in names if "kfac" in name or "off" in name))
    settings = [f"{p}, at {point:g}" for point in POINTS for p in ("kfac", "off")]
    lines = [f"| AUC of {len(rows)} seeds | {' | '.join(settings)} |", "| --- |" + " --- |" * len(settings)]
    for kind in kinds:
        cells = [
            " / ".join(f"{row['auc'][f'{kind}, {setting}']:.3f}" for row in rows) for setting in settings
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lost = " / ".join(f"{row['auc']['loss, at 1']:.3f}" for row in rows)
    lines.append(f"| the pair's own loss, at 1 | {lost} |" + " |" * (len(settings) - 1))
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, action="append", default=[], help="may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that every line runs")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    options = parser.parse_args(arguments)
    rows: list[Record] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    sizes = Sizes()
    if options.quick:
        sizes = replace(
            sizes, pairs=24, target=4, test=4, first=40, layers=1, width=32, first_steps=4, steps=4
        )
    for seed in options.seed:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = measure(sizes, seed, Path(folder))
        rows = sorted([*(each for each in rows if each["seed"] != seed), row], key=lambda each: each["seed"])
        lines = ",\n".join(json.dumps(each) for each in rows)
        replace_file(options.out, f'{{"rows": [\n{lines}\n]}}\n'.encode())
        print(f"seed {seed}: {row['accuracy']}", flush=True)
    if options.table or options.seed:
        print(table(rows))


if __name__ == "__main__":
    main()
