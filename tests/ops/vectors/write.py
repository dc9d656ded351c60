"""Writes hash.json and sketches.json: test vectors for any implementation, written once and then kept.

python tests/ops/vectors/write.py
"""

import json
from pathlib import Path

import torch

from rapidin.ops import reference
from rapidin.ops.reference import sketch_hash

HERE = Path(__file__).parent
SEEDS = (0, 1, 0x9E3779B97F4A7C15, 2**64 - 1)


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


words = [
    {
        "seed": seed,
        "stream": stream,
        "first": first,
        "words": sketch_hash.words(seed, stream, first + torch.arange(4)).tolist(),
    }
    for seed in SEEDS
    for stream in (0, 1, 3, 12)
    for first in (0, 2**32 - 4)
]
permutations = [
    {
        "seed": seed,
        "stream": stream,
        "first": first,
        "n": n,
        "permutation": sketch_hash.permutation(seed, stream, first, n).tolist(),
    }
    for seed in SEEDS
    for stream, first, n in ((0, 0, 1), (0, 0, 7), (2, 14, 7), (8, 32, 16))
]
linear = []
for seed in SEEDS:
    for dim in (5, 16):
        inputs, grads = integers(2, 3, 7, seed=1), integers(2, 3, 20, seed=2)
        sketch = reference.linear_sketch(inputs, grads, dim, seed=seed)
        linear.append(
            {
                "seed": seed,
                "dim": dim,
                "inputs": inputs.tolist(),
                "grads": grads.tolist(),
                "sketch": sketch.tolist(),
            }
        )
flat = []
for seed in SEEDS:
    for dim in (8, 64, 384):
        tensors = [integers(3, 5, seed=3), integers(150, seed=4), integers(300, seed=5)]
        (sketch,), _ = reference.flat_sketch([x[None] for x in tensors], dim, seed=seed)
        flat.append(
            {"seed": seed, "dim": dim, "tensors": [x.tolist() for x in tensors], "sketch": sketch.tolist()}
        )

(HERE / "hash.json").write_text(json.dumps({"words": words, "permutations": permutations}) + "\n")
(HERE / "sketches.json").write_text(json.dumps({"linear": linear, "flat": flat}) + "\n")
