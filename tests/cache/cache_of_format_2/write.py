"""Writes the caches of format 2 that stand beside this file, and what was read from them; then they are kept.

Made by rapidin 0.1.0 at commit 2765471 on a CPU, with the names that its Python interface had then:

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python tests/data/cache_of_format_2/write.py

Each cache is of the 12 examples in examples.jsonl and of a tiny random Llama, `tiny_llama(0, **CONFIG)` and
`tiny_tokenizer()` of tests/support/tiny.py, one with a LoRA adapter on it. Models and examples were in
memory, so the manifests name no files. No model is needed to read the caches: expected.safetensors holds

    <cache>/queries                       [Q, blocks, width]   the sketches of the queries in queries.jsonl
    <cache>/lengths, index, status, records                    what `rapidin.Cache` reads
    <cache>/sketches                      [rows, dim]          the same, of packed caches
    <cache>/scores                        [9, Q, rows]         the scan's scores for those queries, NaN: none
    <cache>/self                          [9, rows]            self-influence, NaN where there is none
    ensemble/scores                       [3, Q, rows]         of ensemble.json, for "dot"

in the order dot, datainf, fisher of methods and within each layer, none, cosine of normalizations;
expected.json says what `Cache.verify` and, in part, `Cache.info()` said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
INCLUDE = ["*self_attn.q_proj*", "*mlp.down_proj*"]
# Name: (options of the attributor, options of the cache). Each has 12 rows in 2 shards.
CACHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float16": ({"geometry": "off", "width": 16}, {"dtype": "float16"}),
    "float32-lora-adam": ({"geometry": "sample", "width": 8, "seed": 5, "include": ()}, {"dtype": "float32"}),
    "int4-flat": ({"geometry": "off", "width": 16, "projection": "flat", "eos": False}, {"dtype": "int4"}),
    "sign-learnt-kfac": ({"width": 32, "loss": "sum", "include": INCLUDE[:1]}, {"bytes": 100, "sample": 12}),
}
TRACIN = [("float16", 0.001), ("float32-lora-adam", 0.0005)]  # an ensemble, of caches that are no checkpoints
METHODS, SCALES = ("dot", "datainf", "fisher"), ("layer", "none", "cosine")


def examples() -> list[dict[str, Any]]:
    words = [
        "fox",
        "dog",
        "tips",
        "healthy",
        "task",
        "request",
        "capital",
        "France",
        "Paris",
        "lazy",
        "quick",
        "three",
    ]
    rows = [
        {
            "prompt": f"Question {n}: {' '.join(words[n % 5 : n % 5 + 1 + n % 4])}?",
            "completion": " " + " ".join(words[(3 * n) % 8 : (3 * n) % 8 + 1 + n % 3]) + ".",
            "source": ["web", "book"][n % 2],
        }
        for n in range(12)
    ]
    rows[4]["completion"] = ""  # no token counts: a row without a sketch
    rows[8]["completion"] = " fox" * 128  # cut to fit
    return rows


def main() -> None:
    from tiny import tiny_llama, tiny_lora, tiny_tokenizer

    from rapidin import Attributor, Cache, Ensemble, self_influence

    rows = examples()
    queries = [(rows[2]["prompt"], rows[2]["completion"]), ("Give three tips.", " One, two, three.")]
    (HERE / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": prompt, "completion": completion} for prompt, completion in queries]
    (HERE / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, Any] = {}

    def keep(name: str, attributor: Attributor) -> None:
        cache = Cache(HERE / name)
        texts = attributor.generations(queries)
        tensors[f"{name}/queries"] = attributor.query_sketches(texts)
        for what in ("lengths", "index", "status", "records"):
            tensors[f"{name}/{what}"] = getattr(cache, what)()
        if not cache.manifest.code.dtype.startswith("float"):
            tensors[f"{name}/sketches"] = cache.sketches()
        pairs = [{"method": method, "normalize": scale} for method in METHODS for scale in SCALES]
        tensors[f"{name}/scores"] = torch.stack([attributor.scores(cache, queries, **pair) for pair in pairs])
        none = torch.full((len(cache),), torch.nan)
        tensors[f"{name}/self"] = torch.stack(
            [
                none
                if pair["method"] == "dot" and pair["normalize"] != "none"
                else self_influence(cache, **pair)
                for pair in pairs
            ]
        )
        info = cache.info()
        kept = ("complete", "rows", "counts", "dim", "layers", "dtype", "geometry", "bytes", "shards")
        said[name] = {"verify": Cache.verify(HERE / name), "info": {key: info[key] for key in kept}}
        (HERE / name / ".lock").unlink()

    for name, (options, kept) in CACHES.items():
        model = tiny_llama(0, **CONFIG)
        if "lora" in name:
            model = tiny_lora(model, 1, r=2, target_modules=["q_proj"])
            model.get_base_model().config.name_or_path = ""
            options = options | {"at": 1.0}
        attributor = Attributor(model, tiny_tokenizer(), **{"include": INCLUDE} | options)
        attributor.cache(rows, HERE / name, shard_rows=8, **kept)
        keep(name, attributor)
    Ensemble.write(HERE, "tracin", TRACIN)
    weights = [member.weight for member in Ensemble.read(HERE).members]
    summed = sum(
        w * tensors[f"{name}/scores"][:3].double() for w, (name, _) in zip(weights, TRACIN, strict=True)
    )
    for n, scale in enumerate(SCALES):  # a weighted sum of plain scores, else the weighted mean
        summed[n] /= 1.0 if scale == "none" else sum(weights)
    tensors["ensemble/scores"] = summed.float()
    save_file({name: value.contiguous() for name, value in tensors.items()}, HERE / "expected.safetensors")
    (HERE / "expected.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
