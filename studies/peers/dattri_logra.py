"""dattri's LoGra attributor without a Hessian, in the peers' environment: caches texts and asks questions.

    python dattri_logra.py MODEL TEXTS.jsonl QUESTIONS.jsonl OUT

Its own writing to disk needs pinned memory, so a GPU; here what it holds is saved by torch at the end.
OUT/questions.json gets the seconds of a question, by a clock and by the processor: medians of one at a time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_speed import BATCH_TOKENS, SIDE

BATCH = 8  # examples


def loss_of(model: Any, batch: Any, device: str) -> Any:
    import torch

    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**given, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def collate(chosen: list[list[int]]) -> Any:
    """A batch by names, with labels: of questions dattri takes the loss that the model returns."""
    import torch

    shape = len(chosen), max(map(len, chosen))
    ids, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    for row, tokens in enumerate(chosen):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def medians(asks: list[Callable[[], object]]) -> dict[str, float]:
    """Seconds of a call, by a clock and by the processor."""
    taken = []
    for ask in asks:
        clock, cpu = time.perf_counter(), time.process_time()
        ask()
        taken.append((time.perf_counter() - clock, time.process_time() - cpu))
    return {name: statistics.median(each[n] for each in taken) for n, name in enumerate(("clock", "cpu"))}


def main(model_folder: str, data: str, questions: str, out: str) -> None:
    import torch
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    def encoded(path: str) -> list[list[int]]:
        texts = [json.loads(line)["text"] for line in Path(path).read_text("utf-8").splitlines()]
        return [tokenizer(text, truncation=True, max_length=BATCH_TOKENS)["input_ids"] for text in texts]

    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    attributor = LoGraAttributor(
        AttributionTask(loss_func=loss_of, model=model, checkpoints=model.state_dict()),
        layer_names=linear,
        hessian="Identity",
        proj_dim=SIDE**2,
        offload="cpu",
    )

    def loader(rows: list[list[int]], batch: int) -> Any:
        return DataLoader(rows, batch_size=batch, collate_fn=collate, shuffle=False)

    train = loader(sorted(encoded(data), key=len), BATCH)
    attributor.cache(train)
    Path(out).mkdir()
    kept = [attributor.offload_manager.retrieve_gradients(n) for n in range(len(train))]
    torch.save(kept, Path(out) / "gradients.pt")
    asks = [lambda row=row: attributor.attribute(train, loader([row], 1)) for row in encoded(questions)]
    (Path(out) / "questions.json").write_text(json.dumps(medians(asks)))


if __name__ == "__main__":
    main(*sys.argv[1:])
