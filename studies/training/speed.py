"""What sketching in training costs: tokens a second and peak memory with `SketchCallback` and without.

    python studies/training/speed.py --out studies/training/speed.json

A Llama of random weights is trained by transformers' Trainer on random tokens. Each run is a process of its
own with one thread; ways are run in turns, `--turns` times, and the medians are kept. Seconds are those of
the processor, which other programs on the machine change less than those of a clock. `cache` is what the
callback saves: caching the same examples after training, with tokens a second of that alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH, BATCH, WARM = 80, 128, 8, 3  # examples, tokens of each, examples a step, steps not timed
WAYS = {
    "plain": {},
    "callback": {"width": 512},
    "callback, 2,048 numbers a layer": {"width": 2048},
    "plain, checkpointing": {"checkpointing": True},
    "callback, checkpointing": {"checkpointing": True, "width": 512},
    "plain, LoRA": {"lora": True},
    "callback, LoRA": {"lora": True, "width": 512},
    "callback, optimizer's moments": {"width": 512, "precondition": "optimizer"},
    "cache": {"cache": True, "width": 512},
}


def model_of(lora: bool) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        )
    )  # fmt: skip
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", lora_dropout=0.0)
        model = get_peft_model(model, config)
    return model


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(2048)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def rows() -> list[dict[str, list[int]]]:
    import torch

    ids = torch.randint(2, 2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": each, "labels": each} for each in ids]


def run(way: dict[str, Any], folder: Path) -> dict[str, float]:
    """Train in this process, or cache; tokens a second and peak memory."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    torch.set_num_threads(1)
    started: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM:
                started.append(time.process_time())

    model, steps = model_of(bool(way.get("lora"))), ROWS // BATCH
    if way.get("cache"):
        from rapidin.attribution.attributor import Attributor

        attributor = Attributor(model, tokenizer(), at=1.0, preconditioner="off", width=way["width"])
        begun = time.process_time()
        attributor.cache(rows(), folder / "cache")
        seconds, tokens = time.process_time() - begun, ROWS * LENGTH
    else:
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=BATCH, num_train_epochs=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
            gradient_checkpointing=bool(way.get("checkpointing")),
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows(), processing_class=tokenizer(),
            data_collator=default_data_collator,
        )  # fmt: skip
        if "width" in way:
            from rapidin.integrations.transformers import SketchCallback

            others = {name: value for name, value in way.items() if name in ("width", "precondition")}
            trainer.add_callback(SketchCallback(folder / "cache", **others))
        trainer.add_callback(Clock())
        trainer.train()
        seconds, tokens = time.process_time() - started[0], (steps - WARM) * BATCH * LENGTH
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": tokens / seconds, "peak_bytes": float(memory)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="run one way in this process")
    options = parser.parse_args()
    if options.way:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(WAYS[options.way], Path(folder))))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way]
            made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[way].append(json.loads(made.splitlines()[-1]))
            print(way, found[way][-1], flush=True)
        result = {
            way: {key: round(statistics.median(each[key] for each in runs), 1) for key in runs[0]}
            for way, runs in found.items()
        }
        turns = len(found["plain"])
        settings = {"rows": ROWS, "length": LENGTH, "batch": BATCH, "threads": 1, "turns": turns}
        if options.out:
            options.out.write_text(json.dumps({"settings": settings, "ways": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
