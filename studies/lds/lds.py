"""Ready ground truths for the linear datamodelling score (LDS): a scoring method is judged in seconds.

    for folder in sets():
        truth = RetrainedSet(folder)
        train, test = truth.texts()          # character ids, [240, 97] and [48, 97]
        model = truth.model(at=0.5)          # half-way from the base (0) to the tuned model (1)
        ...                                  # scores [48, 240]: how much each training text helps a test text
        print(folder.name, truth.lds(scores))

README.md says what the sets are and how they were made; `make.py` makes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rapidin.evaluate.lds import correlations

HERE = Path(__file__).resolve().parent

WIDTH = 96
BLOCKS = 3
HEADS = 4
CONTEXT = 96  # a text has one character more: the last is only predicted

DESCRIPTION = "set.json"
BASE = "base.safetensors"
TUNED = "tuned.safetensors"
RETRAINED = "retrained.npz"


class Block(nn.Module):
    """A pre-norm transformer block with four matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        ]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class CharGPT(nn.Module):
    """A character-level GPT of about 360,000 parameters."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def block_matrices(model: CharGPT) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name: what gradients are usually taken of."""
    return {f"blocks.{n}": m for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}


def text_losses(model: CharGPT, ids: Tensor) -> Tensor:
    """Mean loss a character of each text: ids [n, length] -> [n]."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def encode(texts: list[str], characters: str) -> Tensor:
    """Texts of one length as ids [n, length]."""
    index = {c: i for i, c in enumerate(characters)}
    return torch.tensor([[index[c] for c in text] for text in texts])


def sets() -> list[Path]:
    """The folders of the sets beside this file."""
    return sorted(path.parent for path in HERE.glob(f"*/{DESCRIPTION}"))


class RetrainedSet:
    """A set: a base model, the model tuned on the training texts, and what retraining on halves of them did.

    `masks` [retrainings, training texts] holds which texts each retraining saw, `losses` [retrainings, test
    texts] the loss of every test text after it, the mean over the seeds; `seed_losses` has one more axis, the
    seeds, in the middle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description: dict[str, Any] = json.loads((self.folder / DESCRIPTION).read_text("utf-8"))
        self.characters: str = self.description["characters"]
        with np.load(self.folder / RETRAINED, allow_pickle=False) as file:
            packed, self.seed_losses = file["masks"], file["losses"]
        self.masks = np.unpackbits(packed, axis=1, count=len(self.description["train"])).astype(bool)
        if np.isnan(self.seed_losses).any():
            raise ValueError(f"{self.folder} is unfinished: rerun make.py with the same arguments")
        self.losses = self.seed_losses.mean(1)

    def texts(self) -> tuple[Tensor, Tensor]:
        """Character ids of the training texts [240, 97] and of the test texts [48, 97]."""
        train, test = (encode(self.description[part], self.characters) for part in ("train", "test"))
        return train, test

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights in a file of the set, BASE or TUNED, in float32."""
        return {k: v.float() for k, v in load_file(self.folder / name).items()}

    def model(self, at: float | dict[str, Tensor] = 1.0) -> CharGPT:
        """The base (0), the tuned model (1), or a point on the line through both; or a model of these
        weights. In float32."""
        model = CharGPT(len(self.characters))
        if isinstance(at, dict):
            model.load_state_dict(at)
        else:
            base, tuned = self.weights(BASE), self.weights(TUNED)
            model.load_state_dict({k: torch.lerp(base[k], tuned[k], at) for k in base})
        return model.eval()

    def loss(self, model: CharGPT, ids: Tensor) -> Tensor:
        """Mean loss a character of each text: ids [n, 97] -> [n]."""
        return text_losses(model, ids)

    def lds(self, scores: Tensor | npt.ArrayLike) -> float:
        """How well `scores` [test, training], larger = more helpful, predict the retrainings: 1 is perfect.

        The mean of `by_text`.
        """
        return float(self.by_text(scores).mean())

    def by_text(self, scores: Tensor | npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The score of each test text: `rapidin.evaluate.lds.correlations`."""
        values = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=np.float64)
        return correlations(self.masks, self.losses, values)
