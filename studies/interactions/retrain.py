"""What leaving a group of texts out does, on data with and without groups that occur twice.

    python studies/interactions/retrain.py

For each set of ../lds two versions: `plain`, its 240 texts in 16 groups of 15 that are alike, and `twice`, 11
of these groups, the first 5 of which come twice under two names. The base is tuned on all rows, and on all
rows but those of one group, with several seeds each. Writes NAME-VERSION.npz: `groups` [rows], the group of
each row; `rows` [rows], its number among the set's texts; `asked` [queries], texts of the set that are asked
about beside its test texts; `whole` [seeds, queries] and `without` [groups, seeds, queries], losses. Rerun to
resume.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "lds"))
from exact import shared_runs
from lds import BASE, RetrainedSet, sets
from make import measured, tune

HERE = Path(__file__).resolve().parent
GROUPS, SIZE, TWICE, SEEDS = 16, 15, 5, 4
VERSIONS = ("twice", "plain")
Numbers = npt.NDArray[np.int64]


def alike(texts: list[str]) -> list[list[int]]:
    """Groups of texts that share the most runs of characters with the first of the group."""
    shared = shared_runs(texts, texts)
    left = list(range(len(texts)))
    groups = []
    while left:
        others = sorted(left[1:], key=lambda n: (-int(shared[left[0], n]), n))[: SIZE - 1]
        groups.append([left[0], *others])
        left = [n for n in left if n not in groups[-1]]
    return groups


def rows_of(truth: RetrainedSet, version: str) -> tuple[Numbers, Numbers]:
    """(the text of each row, the group of each row)."""
    groups = alike(truth.description["train"])[:GROUPS]
    if version == "twice":
        groups = groups[: GROUPS - TWICE]
        groups += groups[:TWICE]
    return np.concatenate(groups), np.repeat(np.arange(GROUPS), SIZE)


def queries_of(truth: RetrainedSet, rows: Numbers, groups: Numbers) -> tuple[Tensor, Numbers]:
    """The test texts, and after them one text of each group; and the numbers of the latter."""
    train, test = truth.texts()
    asked = np.array([rows[groups == g][g % SIZE] for g in range(GROUPS)])
    return torch.cat([test, train[torch.from_numpy(asked)]]), asked


def retrain(folder: Path, version: str) -> None:
    truth = RetrainedSet(folder)
    rows, groups = rows_of(truth, version)
    queries, asked = queries_of(truth, rows, groups)
    path = HERE / f"{folder.name}-{version}.npz"
    losses = np.full((GROUPS + 1, SEEDS, len(queries)), np.nan, np.float32)  # the last is with all groups
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            losses = np.concatenate([file["without"], file["whole"][None]])
    base, ids = truth.weights(BASE), truth.texts()[0][torch.from_numpy(rows)]
    started, left = time.monotonic(), np.argwhere(np.isnan(losses).any(2))
    for done, (group, seed) in enumerate(left, 1):
        kept = torch.from_numpy(groups != group)
        first = truth.description["seed"] * 1_000_000 + 500_000
        model = tune(base, ids[kept], truth.characters, truth.description["epochs"], first + int(seed))
        losses[group, seed] = measured(model, queries).numpy()
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file, rows=rows, groups=groups, asked=asked, whole=losses[-1], without=losses[:-1]
            )
        os.replace(partial, path)
        if done % 10 == 0 or done == len(left):
            minutes = (time.monotonic() - started) / done * (len(left) - done) / 60
            print(f"{path.stem}: {done} of {len(left)}, {minutes:.1f} min left", flush=True)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    for version in VERSIONS:
        for folder in sets():
            retrain(folder, version)


if __name__ == "__main__":
    main()
