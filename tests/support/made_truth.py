"""A ground truth of `rapidin eval lds` whose losses are made of known scores."""

from pathlib import Path

import numpy as np


def made_truth(folder: Path) -> Path:
    """40 retrainings on halves of 12 texts, two seeds, five test texts whose loss falls with what is kept.

    helps.npy in it holds the scores that the losses are made of, [5, 12].
    """
    rng = np.random.default_rng(0)
    masks = np.stack([rng.permutation(12) < 6 for _ in range(40)])
    helps = rng.normal(size=(5, 12))
    losses = -(masks @ helps.T)[:, None] + 0.01 * rng.normal(size=(40, 2, 5))
    folder.mkdir()
    (folder / "lds.json").write_text("{}")
    np.savez(folder / "retrained.npz", masks=masks, losses=losses.astype(np.float32))
    np.save(folder / "helps.npy", helps)
    return folder
