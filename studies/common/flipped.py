"""What the studies of flipped labels and of flipped preferences share: examples, a tokenizer, the sizes of a
small model, training, rankings and the AUCs of these, the file of results and its table.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import doc_tables
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rapidin import Attributor, self_influence
from rapidin.cache import Cache
from rapidin.evaluate.metrics import auroc
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.tasks.labels import CLASSES, make_task
from rapidin.evaluate.training import losses
from rapidin.files import replace_file
from rapidin.gradients.source import GradientSource

PRECONDITIONERS = ("kfac", "off")
POINTS = (0.5, 1.0)
Record = dict[str, Any]


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def examples_of(
    made_of: Callable[[Record, bool, random.Random], Record],
    train: int,
    flipped: float,
    target: int,
    test: int,
    seed: int,
) -> tuple[list[Record], list[Record], list[Record]]:
    """So many examples to train on, of which a share is flipped, of the target set and of the test.

    made_of: an example of a report with its class; whether it is flipped; and what draws at random.
    """
    made = make_task(train, flipped=0.0, target=target, test=test, classes=len(CLASSES), seed=seed)
    rng = random.Random(seed)
    wrong = set(rng.sample(range(train), round(flipped * train)))
    return (
        [made_of(record, n in wrong, rng) for n, record in enumerate(made.train)],
        [made_of(record, False, rng) for record in made.target],
        [made_of(record, False, rng) for record in made.test],
    )


def config_of(kind: Any, tokenizer: PreTrainedTokenizerFast, width: int, layers: int, **more: Any) -> Any:
    """The configuration of a small model of this kind."""
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        **more,
    )


def tune_on(source: GradientSource, records: Sequence[Record], recipe: Recipe, *names: str) -> None:
    """Tunes the weights of the source's model whose names contain one of these, by the losses that gradients
    are later taken of."""
    model, task = source.loaded.model, source.task
    examples = source.prepared([source.example(record) for record in records])
    weights = [p for name, p in model.named_parameters() if any(each in name for each in names)]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.count(len(examples))
    for step, chosen in enumerate(recipe.batches(len(examples))):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, steps)
        batch = task.batch([examples[n] for n in chosen], source.loaded.device)
        optimizer.zero_grad()
        torch.autograd.backward(task.losses(model, batch).mean())
        optimizer.step()


def losses_of(source: GradientSource, records: Sequence[Record]) -> Tensor:
    """The loss of each record, [n] float64."""
    examples = source.prepared([source.example(record) for record in records])
    return losses(source.loaded.model, examples, task=source.task).double()


def auc(values: np.ndarray, flipped: np.ndarray) -> float:
    return round(float(auroc(values[None], flipped)[0]), 4)


@dataclass(frozen=True)
class Rankings:
    """The methods of a study, as METHOD:NORMALIZE: of self-influence, and of scores for a target set."""

    self_influence: tuple[str, ...]
    target: tuple[str, ...]

    def aucs(
        self,
        attributor_of: Callable[..., Attributor],
        train: Sequence[Record],
        target: Sequence[Record],
        folder: Path,
    ) -> dict[str, float]:
        """The AUC of each ranking, at each point with each preconditioner.

        attributor_of: takes `at` and `preconditioner`. train: records with `flipped`.
        """
        flipped = np.array([record["flipped"] for record in train])
        found = {}
        for point in POINTS:
            for preconditioner in PRECONDITIONERS:
                attributor = attributor_of(at=point, preconditioner=preconditioner)
                cache = attributor.cache(
                    train, folder / f"{preconditioner}-{point:g}", dtype="float32", null=False
                )
                for name, values in self._values(attributor, cache, target):
                    found[f"{name}, {preconditioner}, at {point:g}"] = auc(values, flipped)
        return found

    def _values(
        self, attributor: Attributor, cache: Cache, target: Sequence[Record]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(name, values [N]) of each ranking, large for what looks flipped."""
        for name in self.self_influence:
            method, normalize = name.split(":")
            values = self_influence(cache, method=method, normalize=normalize)
            yield f"self-influence {name}", values.numpy()
        for name in self.target:
            method, normalize = name.split(":")
            scores = attributor.scores(cache, target, method=method, normalize=normalize, together=True)
            yield f"target set {name}", -scores[0].numpy()


# ------------------------------------------------------------------------------------------------ results


def table(found: Sequence[dict[str, float]], loss: str) -> str:
    """The AUCs of all seeds, as a Markdown table; those of the loss at 1 in a line with this title."""
    names = [name for name in found[0] if not name.startswith("loss")]
    settings = [f"{p}, at {point:g}" for point in POINTS for p in PRECONDITIONERS]

    def cell(name: str) -> str:
        return " / ".join(f"{each[name]:.3f}" for each in found)

    lines = [
        [kind, *(cell(f"{kind}, {setting}") for setting in settings)]
        for kind in dict.fromkeys(name.split(", ")[0] for name in names)
    ]
    lines.append([loss, cell("loss, at 1"), *[""] * (len(settings) - 1)])
    return doc_tables.table([f"AUC of {len(found)} seeds", *settings], lines)


def run(
    description: str | None,
    results: Path,
    measure: Callable[[bool, int, Path], Record],
    table: Callable[[Sequence[Record]], str],
    arguments: list[str] | None,
) -> None:
    """The command line of a study: measure(quick, seed, folder) makes the row of a seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, action="append", default=[], help="may be repeated")
    parser.add_argument("--out", type=Path, default=results, help="file of results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that every line runs")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    options = parser.parse_args(arguments)
    rows: list[Record] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in options.seed:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = measure(options.quick, seed, Path(folder))
        rows = sorted([*(each for each in rows if each["seed"] != seed), row], key=lambda each: each["seed"])
        lines = ",\n".join(json.dumps(each) for each in rows)
        replace_file(options.out, f'{{"rows": [\n{lines}\n]}}\n'.encode())
        print(f"seed {seed}: {row['accuracy']}", flush=True)
    if options.table or options.seed:
        print(table(rows))
