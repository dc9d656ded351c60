"""The trainer: what a step is, resuming, checkpoints as the Hugging Face Trainer lays them out."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rapidin.data.encoding import Encoder
from rapidin.errors import UserError
from rapidin.evaluate.saving import Checkpoints, ResumeState, save_model
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import Tuner, add_lora, tune
from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    encoder = Encoder(tiny_tokenizer(), max_length=64)
    return [encoder({"prompt": f"Say {n}", "completion": " one" * (1 + n % 4)}) for n in range(10)]


def weights(model: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def test_batches_cover_the_data_and_repeat() -> None:
    recipe = Recipe(epochs=2, batch=4, seed=3)
    made = list(recipe.batches(10))
    assert made == list(recipe.batches(10))
    assert [len(rows) for rows in made] == [4, 4, 2] * 2
    for part in (made[:3], made[3:]):
        assert sorted(row for rows in part for row in rows) == list(range(10))
    assert made[:3] != made[3:]
    assert list(Recipe(steps=4, batch=4, seed=3).batches(10)) == made[:4]


def test_rates_rise_and_fall() -> None:
    recipe = Recipe(learning_rate=2.0, warm_up=4)
    rates = [recipe.rate(step, 10) for step in range(10)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(a > b for a, b in pairwise(rates[3:]))
    assert rates[9] == pytest.approx(2 / 7)
    constant = Recipe(learning_rate=2.0, warm_up=0, schedule="constant")
    assert [constant.rate(step, 10) for step in range(10)] == [2.0] * 10


def test_rates_of_another_training_are_followed() -> None:
    recipe = Recipe(rates=((0.2, 1.0), (0.6, 3.0), (1.0, 1.0)))
    assert [recipe.rate(step, 5) for step in range(5)] == pytest.approx([1.0, 2.0, 3.0, 2.0, 1.0])
    assert [recipe.rate(step, 10) for step in range(2)] == pytest.approx([0.5, 1.0])
    assert Recipe(rates=((0.5, 0.3),)).rate(0, 10) == 0.3
    assert Recipe(rates=((0.1, 2.0), (0.2, 1.0))).rate(9, 10) == 0.0


def test_a_tuner_starts_an_adapter_of_a_configuration_anew(examples: list[Any]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    tuner = Tuner(LoadedModel.of(tiny_llama(), tiny_tokenizer()), lora=config)
    recipe = Recipe(epochs=2, batch=4, learning_rate=1e-2)
    first, other = weights(tuner.tuned(examples, recipe)), weights(tuner.tuned(examples[:5], recipe))
    again = weights(tuner.tuned(examples, recipe))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    wrong = Tuner(LoadedModel.of(tiny_llama(), None), lora=LoraConfig(target_modules=["none_such"]))
    with pytest.raises(UserError, match="no modules none_such; it has"):
        wrong.tuned(examples, recipe)


def test_first_step_is_that_of_adamw_written_out(examples: list[Any]) -> None:
    model, other = tiny_llama(), tiny_llama()
    recipe = Recipe(epochs=1, batch=10, learning_rate=1e-2, weight_decay=0.1, clip=None)
    loss = tune(model, examples, recipe)
    total, count = torch.zeros(()), 0
    for example in examples:
        logits = other(input_ids=torch.tensor([example.ids])).logits[0, :-1]
        log = logits.log_softmax(-1)[range(len(example.ids) - 1), example.ids[1:]]
        target = torch.tensor(example.target[1:])
        total, count = total - log[target].sum(), count + int(target.sum())
    (total / count).backward()
    assert loss == pytest.approx((total / count).item(), rel=1e-5)
    for made, weight in zip(model.parameters(), other.parameters(), strict=True):
        grad = weight.grad
        # The first step of Adam: both moments are the gradient's own.
        wanted = weight * (1 - 1e-2 * 0.1) - 1e-2 * grad / (grad.abs() + 1e-8)
        far = grad.abs() > 1e-5  # where rounding of the gradient decides no sign
        assert torch.allclose(made[far], wanted[far], atol=2e-5)


def test_only_the_adapter_moves_and_runs_repeat(examples: list[Any]) -> None:
    def tuned() -> tuple[Any, float]:
        model = add_lora(tiny_llama(), rank=2, targets=("q_proj", "v_proj"), seed=5)
        return model, tune(model, examples, Recipe(epochs=3, batch=4, learning_rate=1e-2, seed=1))

    (one, first), (two, second) = tuned(), tuned()
    assert first == second
    base = dict(tiny_llama().named_parameters())
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        if "lora" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(a, base[plain])
    assert any(bool(p.any()) for n, p in one.named_parameters() if "lora_B" in n)


def test_a_killed_run_ends_with_the_same_weights(examples: list[Any], tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, batch=3, learning_rate=1e-2)

    class Killed(Exception):
        pass

    def stop(done: int, steps: int, loss: float) -> None:
        if done == 8:
            raise Killed

    # With dropout, whose random numbers must go on as well.
    alone, model = tiny_gpt2(resid_pdrop=0.2), tiny_gpt2(resid_pdrop=0.2)
    tune(alone, examples, recipe)
    with pytest.raises(Killed):
        tune(model, examples, recipe, state=ResumeState(tmp_path, {"a": 1}, every=3), on_step=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-6.safetensors", "step.json"]
    again = tiny_gpt2(seed=9, resid_pdrop=0.2)
    steps: list[int] = []
    tune(
        again,
        examples,
        recipe,
        state=ResumeState(tmp_path, {"a": 1}, every=3),
        on_step=lambda done, _, __: steps.append(done),
    )
    assert steps == list(range(7, 13))
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(again), strict=True))
    with pytest.raises(UserError, match=r"other settings \(a\)"):
        tune(tiny_gpt2(), examples, recipe, state=ResumeState(tmp_path, {"a": 2}))


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_are_laid_out_as_the_trainers(lora: bool, examples: list[Any], tmp_path: Path) -> None:
    model = tiny_llama()
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    if lora:
        model = add_lora(model, rank=2)
    recipe = Recipe(epochs=2, batch=5, learning_rate=1e-2, warm_up=2)
    steps = recipe.count(len(examples))
    where = Checkpoints.spread(tmp_path / "checkpoints", 2, steps, tiny_tokenizer())
    tune(model, examples, recipe, checkpoints=where)
    assert sorted(p.name for p in where.folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    last = where.folder / "checkpoint-4"
    described = json.loads((last / "trainer_state.json").read_text())
    assert described["global_step"] == 4
    assert [entry["step"] for entry in described["log_history"]] == [1, 2, 3, 4]
    assert [entry["learning_rate"] for entry in described["log_history"]] == [
        pytest.approx(recipe.rate(step, 4)) for step in range(4)
    ]
    saved = torch.load(last / "optimizer.pt", weights_only=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [n for n in trained if "norm" not in n]
    order = decayed + [n for n in trained if n not in decayed]
    assert [len(group["params"]) for group in saved["param_groups"]] == [
        len(decayed),
        len(order) - len(decayed),
    ]
    for index, name in enumerate(order):
        assert saved["state"][index]["exp_avg_sq"].shape == trained[name].shape
    if lora:
        loaded = load_model(str(tmp_path / "base"), adapter=str(last)).model
    else:
        loaded = load_model(str(last)).model
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(loaded), strict=True))
    if not lora:
        save_model(model, tmp_path / "saved", tiny_tokenizer())
        assert len(load_model(str(tmp_path / "saved")).tokenizer) == len(tiny_tokenizer())


def test_trainers_order_of_weights() -> None:
    """Against the rule of the installed transformers itself."""
    trainer = pytest.importorskip("transformers.trainer")
    from rapidin.evaluate.training import parameter_groups

    class Args:
        pass

    for model in (tiny_llama(), tiny_gpt2(), add_lora(tiny_llama(), rank=2)):
        decayed = set(trainer.Trainer.get_decay_parameter_names(Args(), model))
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        wanted = [[p for n, p in named if (n in decayed) == side] for side in (True, False)]
        made = [group["params"] for group in parameter_groups(model)]
        assert [[id(p) for p in group] for group in made] == [[id(p) for p in group] for group in wanted]


def test_mistakes_are_one_line(examples: list[Any]) -> None:
    with pytest.raises(UserError, match="no example"):
        tune(tiny_llama(), [], Recipe())
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(UserError, match="no weight"):
        tune(frozen, examples, Recipe())
    with pytest.raises(UserError, match="lower `learning_rate`"):
        tune(tiny_llama(), examples, Recipe(epochs=50, batch=5, learning_rate=1e30))
    with pytest.raises(UserError, match="no modules nothing_proj; it has"):
        add_lora(tiny_llama(), targets=("nothing_proj",))
    with pytest.raises(UserError, match="9 checkpoints of 4 steps"):
        Checkpoints.spread(Path("nowhere"), 9, 4)
