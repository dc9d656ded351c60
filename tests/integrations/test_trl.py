"""`SketchCallback` with the trainers of TRL, where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import records, save_tiny, tiny_llama, tiny_tokenizer
from training_runs import ROWS, WIDTH, cached, sketches_of, worst

from rapidin.attribution.attributor import Attributor
from rapidin.cache import Cache
from rapidin.data.encoding import Encoded, Status
from rapidin.errors import UserError
from rapidin.integrations.transformers import SketchCallback
from rapidin.tasks.preference import Preference

trl = pytest.importorskip("trl")

ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "learning_rate": 0.0,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "epoch",
    "disable_tqdm": True,
    "max_length": None,
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}


def tuned(folder: Path, data: Any = None, **arguments: Any) -> Any:
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(output_dir=str(folder / "run"), **ARGUMENTS | arguments),
        train_dataset=Dataset.from_list(records(ROWS)),
        processing_class=tiny_tokenizer(),
    )
    trainer.add_callback(SketchCallback(folder / "cache", data=data, width=WIDTH, dtype="float32"))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "arguments",
    [{}, {"padding_free": True}, {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}],
    ids=str,
)
def test_sketches_of_fine_tuning_are_those_of_a_cache(tmp_path: Path, arguments: dict[str, Any]) -> None:
    some = records(ROWS)
    trainer = tuned(tmp_path, some, **arguments)
    expected = cached(tmp_path / "expected", trainer.model, some)
    assert worst(sketches_of(tmp_path / "cache"), expected) < 1e-5


def unpacked(dataset: Any) -> list[dict[str, list[int]]]:
    texts = []
    for row in dataset:
        start = 0
        for length in row["seq_lengths"]:
            texts.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
            start += length
    return texts


def test_packed_texts_have_rows_of_their_own(tmp_path: Path) -> None:
    trainer = tuned(tmp_path, packing=True, max_length=64)
    texts = unpacked(trainer.train_dataset)
    assert len(trainer.train_dataset) < len(texts) == len(Cache(tmp_path / "cache")) == ROWS
    expected = cached(tmp_path / "expected", trainer.model, texts)
    assert worst(sketches_of(tmp_path / "cache"), expected) < 1e-5
    attributor = Attributor.from_cache(tmp_path / "cache")
    (result,) = attributor.query(tmp_path / "cache", [texts[7]], examples=texts)
    assert (result.top[0].index, result.top[0].example) == (7, texts[7])


def test_numbers_of_data_are_refused_where_the_trainer_packs_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="packed data have other numbers"):
        tuned(tmp_path, records(ROWS), packing=True, max_length=64)


def test_a_loss_that_weighs_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss 'dft' is not known"):
        tuned(tmp_path, loss_type="dft")


def pairs() -> list[dict[str, str]]:
    return [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"] + " dog"}
        for a, b in zip(records(ROWS), records(ROWS, 1), strict=True)
    ]


def preferring(folder: Path, lora: bool, **arguments: Any) -> Any:
    """A trainer of preferences whose model is not its reference."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    saved = save_tiny(folder / "saved").model
    model, reference = (AutoModelForCausalLM.from_pretrained(saved) for _ in range(2))
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=None if lora else reference,
        args=trl.DPOConfig(output_dir=str(folder / "run"), beta=0.3, **ARGUMENTS | arguments),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tiny_tokenizer(),
        peft_config=adapter if lora else None,
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if not lora or "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trainer.add_callback(SketchCallback(folder / "cache", data=pairs(), width=WIDTH, dtype="float32"))
    return trainer


def text(prompt: Sequence[int], answer: Sequence[int]) -> Encoded:
    return Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), Status.OK)


@pytest.mark.parametrize(
    ("lora", "arguments"),
    [
        (True, {}),
        (False, {}),
        (False, {"gradient_accumulation_steps": 2, "precompute_ref_log_probs": True}),
    ],
    ids=str,
)
def test_sketches_of_preferences_are_those_of_the_pairs(
    tmp_path: Path, lora: bool, arguments: dict[str, Any]
) -> None:
    trainer = preferring(tmp_path, lora, **arguments)
    trainer.train()
    attributor = Attributor.from_cache(tmp_path / "cache")
    task = attributor.source.task
    assert isinstance(task, Preference)
    examples = []
    for row in trainer.train_dataset:
        texts = [text(row["prompt_ids"], row[f"{kind}_ids"]) for kind in ("chosen", "rejected")]
        examples.append(task.of_texts(texts, 1.0))
    expected, _ = attributor.source.sketches(examples)
    assert worst(sketches_of(tmp_path / "cache"), expected) < 1e-5
    assert task.beta == 0.3
    (result,) = attributor.query(tmp_path / "cache", [pairs()[3]], examples=pairs())
    assert result.top[0].index == 3


def test_other_losses_of_preferences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the training uses the loss ipo"):
        preferring(tmp_path, True, loss_type="ipo").train()
