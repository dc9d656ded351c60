"""Make a ground truth for the linear datamodelling score; `lds.py` reads it.

    python studies/lds/make.py NAME --pretrain FILE --tune FILE --epochs E --seed S

FILE of --pretrain is one long text, FILE of --tune has a text a line; lines too short, or with a character
that the other file lacks, are passed over. Rerun with the same arguments to resume a killed run: finished
retrainings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lds import (
    BASE,
    CONTEXT,
    DESCRIPTION,
    HERE,
    RETRAINED,
    TUNED,
    CharGPT,
    RetrainedSet,
    block_matrices,
    encode,
    text_losses,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

LENGTH = CONTEXT + 1
TRAIN, TEST = 240, 48
RETRAININGS, SEEDS = 100, 2
BATCH, RATE = 16, 5e-4
PRETRAIN_BATCH, PRETRAIN_RATE = 32, 2e-3


def describe(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the set is made of, and the pretraining text without the characters that the set lacks."""
    pretrain, tune = (Path(f).read_text("utf-8") for f in (options.pretrain, options.tune))
    # A character of only one file would have an embedding that one half of the training never touches.
    characters = "".join(sorted(set(pretrain) & set(tune)))
    texts = sorted({line[:LENGTH] for line in tune.splitlines() if len(line) >= LENGTH})
    texts = [text for text in texts if set(text) <= set(characters)]
    if len(texts) < TRAIN + TEST:
        raise SystemExit(f"{options.tune}: {len(texts)} usable texts, {TRAIN + TEST} are needed")
    order = np.random.default_rng([options.seed, 0]).permutation(len(texts))
    chosen = [texts[i] for i in order[: TRAIN + TEST]]
    description = {
        "pretrain": Path(options.pretrain).name,
        "pretrain_steps": options.pretrain_steps,
        "tune": Path(options.tune).name,
        "epochs": options.epochs,
        "seed": options.seed,
        "characters": characters,
        "train": chosen[:TRAIN],
        "test": chosen[TRAIN:],
    }
    return description, "".join(c for c in pretrain if c in set(characters))


def pretrain(text: str, characters: str, steps: int, seed: int) -> CharGPT:
    """A model trained on random windows of `text`."""
    torch.manual_seed(seed)
    model = CharGPT(len(characters))
    ids = encode([text], characters)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_RATE, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_RATE, total_steps=steps, pct_start=0.1)
    started, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - LENGTH, (PRETRAIN_BATCH, 1))
        loss = text_losses(model, ids[starts + torch.arange(LENGTH)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 100 == 0:
            left = (time.monotonic() - started) / step * (steps - step)
            print(
                f"pretraining: step {step}/{steps}, loss {recent / 100:.3f}, {left / 60:.1f} min left",
                flush=True,
            )
            recent = 0.0
    return model


def batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(BATCH)


def tune(
    base: dict[str, Tensor],
    ids: Tensor,
    characters: str,
    epochs: int,
    seed: int,
    visit: Callable[[int, CharGPT, torch.optim.Optimizer], None] | None = None,
) -> CharGPT:
    """The base model tuned on `ids`. visit: called after each step with its number, from 1, the model and the
    optimizer."""
    model = CharGPT(len(characters))
    model.load_state_dict(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    for step, batch in enumerate(batches(len(ids), epochs, seed), 1):
        optimizer.zero_grad()
        text_losses(model, ids[batch]).mean().backward()
        optimizer.step()
        if visit is not None:
            visit(step, model, optimizer)
    return model


@dataclass(frozen=True)
class Retuned:
    """A set's tuning on all its texts, done again.

    states: the weights by share of the training done; moments: the optimizer's second moment (`exp_avg_sq`)
    of the blocks' matrices at the end, in the order of `block_matrices`; apart: the root mean square distance
    of the end, in float16, from the stored tuned model, over that of the base.
    """

    states: dict[float, dict[str, Tensor]]
    moments: list[Tensor]
    apart: float


def tune_again(truth: RetrainedSet, shares: Sequence[float]) -> Retuned:
    """Tune a set's base on all its texts with the seed that made the set, and keep states on the way.

    shares: of the training, 1 is the end. The end, in float16, is the stored tuned model to the bit where
    this script made the set with the same torch on a like processor; of another set it is a model like it.
    """
    epochs, seed = truth.description["epochs"], truth.description["seed"]
    base, tuned = truth.weights(BASE), truth.weights(TUNED)
    ids = truth.texts()[0]
    steps = epochs * -(-len(ids) // BATCH)
    wanted = {round(share * steps): share for share in shares}
    states: dict[float, dict[str, Tensor]] = {}
    moments: list[Tensor] = []

    def visit(step: int, model: CharGPT, optimizer: torch.optim.Optimizer) -> None:
        if step in wanted:
            states[wanted[step]] = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if step == steps:
            layers = block_matrices(model).values()
            moments.extend(optimizer.state[layer.weight]["exp_avg_sq"].clone() for layer in layers)

    end = tune(base, ids, truth.characters, epochs, seed * 1_000_000, visit).state_dict()
    moved, missed = (
        sum(float((tuned[k] - other[k].half().float()).square().sum()) for k in tuned)
        for other in (base, end)
    )
    return Retuned(states, moments, (missed / moved) ** 0.5)


def save_half(model: CharGPT, path: Path) -> None:
    """Weights in float16, written at once or not at all."""
    partial = path.with_suffix(".partial")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, partial)
    os.replace(partial, path)


def random_halves(seed: int) -> np.ndarray:
    """Masks [retrainings, training texts], half of each row true."""
    generator = np.random.default_rng([seed, 1])
    masks = np.zeros((RETRAININGS, TRAIN), bool)
    for mask in masks:
        mask[generator.permutation(TRAIN)[: TRAIN // 2]] = True
    return masks


def save_losses(path: Path, masks: np.ndarray, losses: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, masks=np.packbits(masks, axis=1), losses=losses)
    os.replace(partial, path)


@torch.no_grad()
def measured(model: CharGPT, ids: Tensor) -> Tensor:
    return text_losses(model, ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="the folder beside this file that the set goes to")
    parser.add_argument("--pretrain", required=True, help="text file the base is trained on")
    parser.add_argument("--tune", required=True, help="text file with a tuning text a line")
    parser.add_argument("--epochs", type=int, required=True, help="epochs of tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    options = parser.parse_args()

    folder = HERE / options.name
    folder.mkdir(exist_ok=True)
    description, text = describe(options)
    path = folder / DESCRIPTION
    if path.exists() and json.loads(path.read_text("utf-8")) != description:
        raise SystemExit(f"{folder} was begun with other texts or options: give another name or remove it")
    path.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8")
    characters, seed, epochs = description["characters"], options.seed, options.epochs
    train, test = (encode(description[part], characters) for part in ("train", "test"))

    if not (folder / BASE).exists():
        save_half(pretrain(text, characters, options.pretrain_steps, seed), folder / BASE)
    # Every tuning starts from the rounded weights, so that the stored base is where they really began.
    base = {k: v.float() for k, v in load_file(folder / BASE).items()}

    first = seed * 1_000_000  # seeds of tuning: this one for all texts, the ones after it for the halves
    if not (folder / TUNED).exists():
        tuned = tune(base, train, characters, epochs, first)
        untuned = tune(base, train, characters, 0, first)
        for name, ids in (("training", train), ("test", test)):
            before, after = (measured(model, ids).mean().item() for model in (untuned, tuned))
            print(f"tuning: mean loss of the {name} texts {before:.3f} -> {after:.3f}", flush=True)
        save_half(tuned, folder / TUNED)

    masks = random_halves(seed)
    losses = np.full((RETRAININGS, SEEDS, TEST), np.nan, np.float32)
    if (folder / RETRAINED).exists():
        with np.load(folder / RETRAINED, allow_pickle=False) as file:
            losses = file["losses"]
    left = np.argwhere(np.isnan(losses).any(2))
    started = time.monotonic()
    for done, (mask, repeat) in enumerate(left, 1):
        half = train[torch.from_numpy(masks[mask])]
        model = tune(base, half, characters, epochs, first + 1 + int(mask) * SEEDS + int(repeat))
        losses[mask, repeat] = measured(model, test).numpy()
        save_losses(folder / RETRAINED, masks, losses)
        if done % 5 == 0 or done == len(left):
            minutes = (time.monotonic() - started) / done * (len(left) - done) / 60
            print(
                f"retraining: {losses.size // TEST - len(left) + done}/{RETRAININGS * SEEDS}, "
                f"loss {losses[mask, repeat].mean():.3f}, {minutes:.1f} min left",
                flush=True,
            )


if __name__ == "__main__":
    main()
