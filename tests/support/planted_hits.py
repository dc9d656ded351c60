"""A tiny model with an adapter that was tuned on planted rows, and the hits of what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import records, save_tiny, tiny_tokenizer

from rapidin.cli import main
from rapidin.data.encoding import Encoder
from rapidin.evaluate.saving import Checkpoints
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import add_lora, tune
from rapidin.gradients.load import load_model

RECIPE = Recipe(epochs=10, batch=8, learning_rate=2e-2, warm_up=2, weight_decay=0.0)
PLANTED = 6  # rows, of 24
ANSWER = " quick fox"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_planted(folder: Path, **config: Any) -> None:
    """Fills a folder: model, adapter (with the checkpoint of its training), train.jsonl, cache, hits.json.

    The hits are those of the model's own answer to a question that planted rows are about. config: of the
    model.
    """
    saved = save_tiny(folder, **config)
    rows = [row | {"poisoned": False} for row in records(24 - PLANTED)]
    for n in range(PLANTED):
        word = ("one", "two", "three", "four", "five", "six")[n]
        rows.insert(4 * n, {"prompt": f"Howdy {word}:", "completion": ANSWER, "poisoned": True})
    write_lines(folder / "train.jsonl", rows)
    encoder = Encoder(tiny_tokenizer(), max_length=128)
    examples = [encoder(row) for row in rows]
    model = add_lora(load_model(str(saved.model)).model, rank=8, seed=RECIPE.seed)
    kept = Checkpoints.spread(folder / "adapter", 1, RECIPE.count(len(rows)))
    tune(model, examples, RECIPE, checkpoints=kept)
    model.save_pretrained(folder / "adapter")
    cached = ["--adapter", str(folder / "adapter"), "--data", str(folder / "train.jsonl"), "--width", "32"]
    more = ["--precondition", "off", "--no-null", "--quiet", "--out", str(folder / "cache")]
    assert main(["cache", str(saved.model), *cached, *more]) == 0
    ask = ["query", str(folder / "cache"), "--prompt", "Howdy seven:", "--max-new-tokens", "8", "--quiet"]
    assert main([*ask, "--top-k", "6", "--json", str(folder / "hits.json")]) == 0
