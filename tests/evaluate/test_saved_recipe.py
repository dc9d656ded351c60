"""What the files of the Hugging Face Trainer say of how a model was tuned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from training_runs import new_trainer, token_rows

from rapidin.data.encoding import Encoder
from rapidin.errors import UserError
from rapidin.evaluate.saved_recipe import saved_recipe
from rapidin.evaluate.saving import Checkpoints
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import add_lora, losses, tune


def write(folder: Path, **state: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_our_own_checkpoint_gives_the_recipe_back(tmp_path: Path) -> None:
    encoder = Encoder(tiny_tokenizer(), max_length=64)
    examples = [encoder({"prompt": f"Say {n}", "completion": " one"}) for n in range(10)]
    recipe = Recipe(epochs=2, batch=5, learning_rate=1e-2, warm_up=2, betas=(0.9, 0.98), weight_decay=0.1)
    kept = Checkpoints.spread(tmp_path, 2, 4)
    tune(add_lora(tiny_llama(), rank=2), examples, recipe, checkpoints=kept)
    found = saved_recipe(tmp_path, 10)
    assert found is not None
    assert (found.steps, found.batch, found.betas, found.weight_decay) == (4, 5, (0.9, 0.98), 0.1)
    assert [found.rate(step, 4) for step in range(4)] == pytest.approx(
        [recipe.rate(step, 4) for step in range(4)]
    )
    assert found.learning_rate == 1e-2


def test_a_state_of_transformers_counts_all_devices_and_accumulated_batches(tmp_path: Path) -> None:
    logs = [{"step": 50, "learning_rate": 1.5e-4}, {"step": 100, "learning_rate": 1e-4}, {"step": 150}]
    write(tmp_path, global_step=200, max_steps=200, epoch=2.0, train_batch_size=4, log_history=logs)
    found = saved_recipe(tmp_path, 1600)
    assert found is not None
    assert (found.steps, found.batch, found.weight_decay) == (200, 16, 0.0)
    # On the line through what was logged, before and behind it too.
    assert found.rate(0, 200) == pytest.approx(1.99e-4)
    assert found.rate(149, 200) == pytest.approx(0.5e-4)
    assert found.rate(199, 200) == pytest.approx(0.0, abs=1e-12)


def test_the_last_checkpoint_counts_and_other_folders_do_not(tmp_path: Path) -> None:
    assert saved_recipe(tmp_path, 10) is None
    for step in (9, 10):
        write(
            tmp_path / f"checkpoint-{step}", global_step=step, log_history=[{"step": 1, "learning_rate": 1}]
        )
    write(tmp_path / "checkpoint-best", global_step=99, log_history=[])
    found = saved_recipe(tmp_path, 10)
    assert found is not None
    assert (found.steps, found.rate(5, 10)) == (10, 1.0)


@pytest.mark.parametrize("text", ["", "[]", '{"global_step": 0, "log_history": []}', '{"global_step": 3}'])
def test_a_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(UserError, match=r"trainer_state\.json' cannot be read"):
        saved_recipe(tmp_path, 10)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    write(tmp_path, global_step=2, log_history=[{"step": 1, "learning_rate": 0.1}])
    for name in ("training_args.bin", "optimizer.pt"):
        torch.save(Bomb(), tmp_path / name)
    found = saved_recipe(tmp_path, 10)
    assert found is not None
    assert found.betas == (0.9, 0.999)
    assert not (tmp_path / "ran").exists()


def test_the_recipe_of_a_real_trainer_is_found_and_gives_a_like_model(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Say {n % 3}:", "completion": " one two" if n % 3 else " lazy dog"} for n in range(16)
    ]
    trainer = new_trainer(
        tmp_path,
        model=add_lora(tiny_llama(), rank=4),
        rows=token_rows(rows),
        num_train_epochs=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="epoch",
    )
    encoder = Encoder(tiny_tokenizer(), max_length=64)
    examples = [encoder(row) for row in rows]
    before = losses(trainer.model, examples).mean()
    trainer.train()
    found = saved_recipe(tmp_path, len(rows))
    assert found is not None
    assert (found.steps, found.batch) == (24, 4)
    assert (found.betas, found.weight_decay) == ((0.9, 0.98), 0.05)
    assert found.learning_rate == pytest.approx(2e-2, rel=1e-3)
    # Older versions of transformers log the rate of the step after.
    assert found.rate(11, 24) == pytest.approx(2e-2 * (1 + math.cos(math.pi * 7 / 20)) / 2, rel=0.11)
    model = add_lora(tiny_llama(), rank=4)
    tune(model, examples, found)
    theirs, ours = (float(losses(each, examples).mean()) for each in (trainer.model, model))
    assert theirs < before - 2
    assert ours == pytest.approx(theirs, abs=0.1 * float(before - theirs))
