"""A set's texts with a Hugging Face model to tune on them: for `rapidin eval lds` and other packages.

    python studies/lds/llama.py kjv --pretrain tinyshakespeare.txt --out FOLDER
    rapidin eval lds FOLDER/base --data FOLDER/train.jsonl --test FOLDER/test.jsonl --out TRUTH ...

FOLDER gets `train.jsonl` and `test.jsonl` (a "text" a line, those of `set.json`) and `base`: a Llama of
372,000 parameters (width 96, 3 blocks, MLP 3 times the width) that reads characters, trained on windows of
the --pretrain file, which is the set's own, as `make.py` trains its model. The tokenizer has no
marks for the start or end of a text, so that every package sees the same 97 tokens and predicts the same 96.
The context is said to be 1,024 tokens (the positions are rotary, no weight depends on it): Bergson makes no
batch of more tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from lds import CONTEXT, DESCRIPTION, HERE, WIDTH
from make import LENGTH, PRETRAIN_BATCH, PRETRAIN_RATE

PAD = "<pad>"
SAID_CONTEXT = 1024


def character_tokenizer(characters: str) -> Any:
    """A fast tokenizer with a token a character, the pad token last."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: number for number, character in enumerate([*characters, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, model_max_length=SAID_CONTEXT)


def small_llama(tokens: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=SAID_CONTEXT,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokens - 1,
        )
    )


def pretrain(text: str, tokenizer: Any, steps: int, seed: int) -> Any:
    """A model trained on random windows of `text`."""
    torch.manual_seed(seed)
    model = small_llama(len(tokenizer))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_RATE, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_RATE, total_steps=steps, pct_start=0.1)
    started, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - LENGTH, (PRETRAIN_BATCH, 1))
        windows = ids[starts + torch.arange(LENGTH)]
        logits = model(input_ids=windows[:, :CONTEXT], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 100 == 0:
            left = (time.monotonic() - started) / step * (steps - step)
            print(f"step {step}/{steps}, loss {recent / 100:.3f}, {left / 60:.1f} min left", flush=True)
            recent = 0.0
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", help="a folder beside this file")
    parser.add_argument("--pretrain", required=True, type=Path, help="text file the base is trained on")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    description = json.loads((HERE / args.set / DESCRIPTION).read_text("utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        lines = (json.dumps({"text": text}) + "\n" for text in description[part])
        (args.out / f"{part}.jsonl").write_text("".join(lines), "utf-8")
    tokenizer = character_tokenizer(description["characters"])
    known = set(description["characters"])
    text = "".join(c for c in args.pretrain.read_text("utf-8") if c in known)
    pretrain(text, tokenizer, args.steps, args.seed).save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")


if __name__ == "__main__":
    main()
