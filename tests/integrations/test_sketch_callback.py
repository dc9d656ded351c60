"""`SketchCallback`: the sketches of a training's own backward passes are those of `rapidin cache`."""

from __future__ import annotations

import copy
import gc
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import records, tiny_llama, tiny_lora
from training_runs import ROWS, WIDTH, cached, in_processes, new_trainer, sketches_of, token_rows, worst
from transformers import TrainingArguments

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble
from rapidin.cache import Cache
from rapidin.cli.tables import info_report
from rapidin.errors import CoverageWarning, UserError
from rapidin.gradients.calls import Call
from rapidin.integrations.transformers import SketchCallback

SAME = 1e-5
_ARGUMENTS = {each.name for each in fields(TrainingArguments)}
BY_LENGTH = (  # the older name is that of transformers 4.57
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in _ARGUMENTS
    else {"group_by_length": True}
)

IN_ORDER = {"train_sampling_strategy": "sequential"} if "train_sampling_strategy" in _ARGUMENTS else {}


def callback_into(folder: Path, **by_name: Any) -> SketchCallback:
    return SketchCallback(folder / "cache", width=WIDTH, dtype="float32", **by_name)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 3},  # the last step has fewer batches
        {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"num_train_epochs": 2, "dataloader_num_workers": 1},
        BY_LENGTH,
    ],
    ids=str,
)
def test_sketches_are_those_of_a_cache_at_the_same_weights(tmp_path: Path, arguments: dict[str, Any]) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), **arguments)
    trainer.train()
    expected = cached(tmp_path / "expected", trainer.model, records(ROWS))
    assert worst(sketches_of(tmp_path / "cache"), expected) < SAME


def test_an_adapters_sketches_are_those_of_a_cache(tmp_path: Path) -> None:
    model = tiny_lora(tiny_llama(), lora_dropout=0.0)
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), model)
    trainer.train()
    assert (
        worst(sketches_of(tmp_path / "cache"), cached(tmp_path / "expected", trainer.model, records(ROWS)))
        < SAME
    )


def test_bfloat16_changes_sketches_by_its_rounding_alone(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), bf16=True)
    trainer.train()
    error = worst(sketches_of(tmp_path / "cache"), cached(tmp_path / "expected", tiny_llama(), records(ROWS)))
    assert SAME < error < 0.03


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_two_processes_make_the_sketches_of_one(tmp_path: Path, arguments: dict[str, Any]) -> None:
    in_processes(2, tmp_path, arguments)
    expected = cached(tmp_path / "expected", tiny_llama(), records(ROWS))
    assert worst(sketches_of(tmp_path / "cache"), expected) < SAME


def test_the_log_of_the_steps_is_removed_unless_it_is_to_be_kept(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run", callback_into(tmp_path)).train()
    assert not (tmp_path / "run" / "rapidin").exists()
    kept = SketchCallback(tmp_path / "other", width=WIDTH, steps=tmp_path / "steps", keep_steps=True)
    new_trainer(tmp_path / "run", kept).train()
    assert (tmp_path / "steps" / "sketches-0").stat().st_size == 4 * ROWS * WIDTH * 14


@pytest.mark.parametrize("keep", [True, False])
def test_other_files_in_the_folder_of_the_log_are_let_alone(tmp_path: Path, keep: bool) -> None:
    steps = tmp_path / "steps"
    (steps / "mine").mkdir(parents=True)
    (steps / "mine" / "notes").write_text("notes")
    (steps / "rates-0").write_text("of an older run")
    callback = SketchCallback(tmp_path / "cache", width=WIDTH, steps=steps, keep_steps=keep)
    new_trainer(tmp_path / "run", callback, max_steps=1).train()
    assert (steps / "mine" / "notes").read_text() == "notes"
    assert (steps / "rates-0").exists() == keep


@pytest.mark.full
def test_nothing_of_a_step_is_kept(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    kept = []

    class Counting(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gc.collect()
            kept.append(sum(isinstance(each, Call) for each in gc.get_objects()))

    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), per_device_train_batch_size=2)
    trainer.add_callback(Counting())
    trainer.train()
    assert kept == [0] * 8


def scale_gradients(trainer: Any, overflow_at: int) -> None:
    """Scale losses as mixed precision does, and let the gradients of one step overflow."""
    from transformers import TrainerCallback

    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    class Scaling(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == overflow_at:
                next(trainer.model.parameters()).grad.fill_(torch.inf)

    trainer.add_callback(Scaling())


def test_the_scale_of_mixed_precision_is_divided_out_and_skipped_steps_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), optim="sgd")
    scale_gradients(trainer, overflow_at=2)
    trainer.train()
    cache = Cache(tmp_path / "cache")
    assert "step 3 was skipped after an overflow" in caplog.text
    seen = cache.lengths(list(range(ROWS))).sum(1) > 0
    assert int(seen.sum()) == ROWS - 4
    expected = cached(tmp_path / "expected", trainer.model, records(ROWS))
    assert worst(sketches_of(cache)[seen], expected[seen]) < SAME


class Summed:
    """The sum that TracIn takes, of plain gradients: of each row its sketch in each step, times the rate."""

    def __init__(self, folder: Path, trainer: Any, rows: list[dict[str, Any]]) -> None:
        self.sums: Any = torch.zeros(len(rows), 14, WIDTH, dtype=torch.float64)
        self.rates: list[float] = []
        original, numbers = trainer.training_step, {tuple(row["input_ids"]): n for n, row in enumerate(rows)}
        self._count = 0

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._count += 1
            rate = trainer.optimizer.param_groups[0]["lr"]
            mask = inputs["attention_mask"].bool()
            chosen = [
                numbers[tuple(ids[m].tolist())] for ids, m in zip(inputs["input_ids"], mask, strict=True)
            ]
            copy = tiny_llama()
            copy.load_state_dict(trainer.model.state_dict())
            made = cached(folder / str(self._count), copy, [records(ROWS)[n] for n in chosen])
            for n, sketch in zip(chosen, made, strict=True):
                self.sums[n] += rate * sketch.double()
                self.rates.append(rate)
            return original(model, inputs, *args, **kwargs)

        trainer.training_step = training_step


def test_rows_are_sums_over_epochs_weighted_by_the_learning_rates_of_their_steps(tmp_path: Path) -> None:
    rows = token_rows(records(ROWS))
    trainer = new_trainer(
        tmp_path / "run", callback_into(tmp_path), learning_rate=0.05, num_train_epochs=2, rows=rows,
        lr_scheduler_type="linear", optim="sgd",
    )  # fmt: skip
    summed = Summed(tmp_path / "alone", trainer, rows)
    trainer.train()
    cache = Cache(tmp_path / "cache")
    record = cache.manifest.gradient["training"]
    assert record["weight"] == pytest.approx(sum(summed.rates) / ROWS)
    assert worst(sketches_of(cache) * record["weight"], summed.sums.float()) < SAME
    assert (record["first_step"], record["last_step"], record["visits"], record["seen"]) == (1, 8, 32, 16)
    steps, rates = zip(*record["learning_rates"], strict=True)
    assert list(steps) == list(range(1, 9))
    assert rates == pytest.approx([summed.rates[4 * n] for n in range(8)])


def test_examples_that_are_not_seen_have_no_influence(tmp_path: Path) -> None:
    trainer = new_trainer(
        tmp_path / "run", callback_into(tmp_path), max_steps=2, rows=token_rows(records(ROWS)), seed=1
    )
    trainer.train()
    cache = Cache(tmp_path / "cache")
    lengths = cache.lengths(list(range(ROWS))).sum(1)
    assert int((lengths > 0).sum()) == 8 == cache.manifest.gradient["training"]["seen"]
    expected = cached(tmp_path / "expected", trainer.model, records(ROWS))
    seen = lengths > 0
    assert worst(sketches_of(cache)[seen], expected[seen]) < SAME


class Stop(Exception):
    """Ends a run as a crash does."""


def stop_at(trainer: Any, step: int) -> None:
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Stop

    trainer.add_callback(Stopping())


RESUMED = {"learning_rate": 0.05, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("per_checkpoint", [False, True])
@pytest.mark.full
def test_a_run_that_resumes_has_the_rows_of_one_that_does_not_stop(
    tmp_path: Path, per_checkpoint: bool
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    new_trainer(whole / "run", callback_into(whole, per_checkpoint=per_checkpoint), **RESUMED).train()
    trainer = new_trainer(broken / "run", callback_into(broken, per_checkpoint=per_checkpoint), **RESUMED)
    stop_at(trainer, 5)  # the checkpoint is of step 3: two steps are done again
    with pytest.raises(Stop):
        trainer.train()
    trainer = new_trainer(broken / "run", callback_into(broken, per_checkpoint=per_checkpoint), **RESUMED)
    trainer.train(resume_from_checkpoint=True)
    names = [f"cache/checkpoint-{n}" for n in (3, 6, 8)] if per_checkpoint else ["cache"]
    for name in names:
        one, other = Cache(whole / name), Cache(broken / name)
        assert one.manifest.gradient["training"] == other.manifest.gradient["training"]
        torch.testing.assert_close(sketches_of(one), sketches_of(other), rtol=1e-5, atol=1e-7)
    if per_checkpoint:
        assert (whole / "cache/ensemble.json").read_bytes() == (broken / "cache/ensemble.json").read_bytes()


def test_a_run_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    in_processes(2, tmp_path, arguments, keep_steps=True)
    expected = sketches_of(tmp_path / "cache")
    # Again from the second checkpoint; the rest is made by one process.
    resumed = callback_into(tmp_path / "one", steps=tmp_path / "run" / "rapidin")
    trainer = new_trainer(tmp_path / "run", resumed, **arguments | {"per_device_train_batch_size": 4})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert worst(sketches_of(tmp_path / "one" / "cache"), expected) < SAME


def test_a_run_is_not_resumed_without_its_sketches(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 2}
    new_trainer(tmp_path / "run", **arguments).train()
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), **arguments)
    with pytest.raises(UserError, match="there are no sketches of the steps before"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_checkpoints_are_queried_as_one_at_their_own_weights(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path, per_checkpoint=True), **RESUMED)
    trainer.train()
    asked = [(records(ROWS)[3]["prompt"], records(ROWS)[3]["completion"])]
    ensemble = Ensemble.read(tmp_path / "cache")
    assert ensemble.kind == "tracin"
    scores = ensemble.scores(asked, normalize="none")[0]
    expected = torch.zeros(ROWS, dtype=torch.float64)
    for step in (3, 6, 8):
        folder = tmp_path / "cache" / f"checkpoint-{step}"
        weight = Cache(folder).manifest.gradient["training"]["weight"]
        alone = Attributor.from_cache(folder).scores(folder, asked, normalize="none")[0]
        expected += weight * alone.double()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)
    assert int(scores.argmax()) == 3


@pytest.mark.parametrize("given", [True, False])
def test_a_query_finds_the_model_and_the_examples(tmp_path: Path, given: bool) -> None:
    some = records(160) if given else token_rows(records(160))
    callback = callback_into(tmp_path, data=some if given else None)
    new_trainer(
        tmp_path / "run", callback, rows=token_rows(records(160)), save_strategy="epoch",
        per_device_train_batch_size=32,
    ).train()  # fmt: skip
    assert Cache(tmp_path / "cache").manifest.null is not None
    shown = Console(file=io.StringIO(), width=200)
    shown.print(info_report(Cache(tmp_path / "cache").info()))
    assert "sketched by Trainer in steps 1 to 5, 160 times" in shown.file.getvalue()  # type: ignore[attr-defined]
    (result,) = Attributor.from_cache(tmp_path / "cache").query(tmp_path / "cache", [some[5]], examples=some)
    assert result.top[0].index == 5
    assert result.top[0].example == some[5]
    assert Cache.verify(tmp_path / "cache") == []


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_optimizers_moments_precondition_both_sides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, epochs: int
) -> None:
    trainer = new_trainer(
        tmp_path / "run", callback_into(tmp_path, precondition="optimizer"), learning_rate=1e-3,
        num_train_epochs=epochs, save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    cache = Cache(tmp_path / "cache")
    # The first step has no second moment yet, so its four examples are not counted in it.
    assert "the examples of step 1 do not count in it: the optimizer had no second moments yet" in caplog.text
    assert "step 2" not in caplog.text
    assert cache.manifest.gradient["training"]["visits"] == epochs * ROWS - 4
    assert cache.manifest.preconditioner is not None
    assert cache.manifest.preconditioner["kind"] == "optimizer"
    saved = tmp_path / "run" / f"checkpoint-{4 * epochs}"
    by_file = Attributor(
        Attributor.from_cache(tmp_path / "cache").loaded, at=1.0, width=WIDTH, preconditioner=saved
    )
    made = by_file.source.preconditioner
    found = Attributor.from_cache(tmp_path / "cache").source.preconditioner
    assert made is not None
    assert found is not None
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor)


@pytest.mark.parametrize(
    "arguments", [{"optim": "sgd"}, {"optim": "sgd", "optim_args": "momentum=0.9"}], ids=str
)
def test_an_optimizer_without_second_moments_is_refused_after_the_first_step(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    callback = callback_into(tmp_path, precondition="optimizer")
    trainer = new_trainer(tmp_path / "run", callback, **arguments)
    with pytest.raises(UserError, match=r"second moment.*use precondition='off'"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_gradients_that_are_not_scaled_yet_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_lora(tiny_llama(), lora_dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as before any training, so that A has no gradient in the first step
            torch.nn.init.zeros_(parameter)
    callback = callback_into(tmp_path, precondition="optimizer")
    new_trainer(tmp_path / "run", callback, model, learning_rate=1e-3, save_strategy="epoch").train()
    said = [line for line in caplog.messages if "not scaled as long as their second moments are 0" in line]
    assert len(said) == 1
    assert "lora_A" in said[0]


class OfCopies(torch.optim.AdamW):
    """Keeps its state under copies of the parameters, as optimizers with weights of their own do."""

    def step(self, closure: Any = None) -> Any:
        made = super().step(closure)
        self.state = {p.detach().clone(): state for p, state in self.state.items()}  # type: ignore[assignment]
        return made


def test_an_optimizer_whose_state_is_of_other_parameters_is_refused(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path, precondition="optimizer"))
    trainer.optimizer = OfCopies(trainer.model.parameters(), lr=0.0)
    with pytest.raises(UserError, match=r"no second moment for 'model.layers.0.*use precondition='off'"):
        trainer.train()


@pytest.mark.parametrize("precondition", ["off", "optimizer"])
@pytest.mark.parametrize("frozen", [True, False], ids=["no gradient", "not in the optimizer"])
def test_parameters_that_the_training_does_not_change_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, precondition: str, frozen: bool
) -> None:
    callback = callback_into(tmp_path, precondition=precondition)
    trainer = new_trainer(tmp_path / "run", callback, save_strategy="epoch")
    first = list(trainer.model.model.layers[0].parameters())
    if frozen:
        for parameter in first:
            parameter.requires_grad_(False)
    else:
        left = [p for p in trainer.model.parameters() if all(p is not each for each in first)]
        trainer.optimizer = torch.optim.AdamW(left, lr=0.0)
    trainer.train()
    cache = Cache(tmp_path / "cache")
    names = [layer.name for layer in cache.manifest.layers]
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)
    seen = ROWS - (4 if precondition == "optimizer" else 0)
    assert int((cache.lengths(list(range(ROWS))) > 0).all(1).sum()) == seen
    assert f"{len(names)} parameters that the training does not change are left out, such as" in caplog.text
    source = Attributor.from_cache(tmp_path / "cache").source
    assert [target.name for target in source.targets] == names


def test_an_optimizer_that_changes_nothing_that_counts_is_refused(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path))
    trainer.optimizer = torch.optim.SGD(trainer.model.model.norm.parameters(), lr=0.0)
    with pytest.raises(UserError, match=r"changes none of the 14 parameters.*include="):
        trainer.train()


def test_a_model_of_which_little_counts_is_warned_about(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.expert_table = torch.nn.Parameter(torch.zeros(160, 160))
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), model, max_steps=1)
    with pytest.warns(CoverageWarning, match="experts .*layers.1.mlp.expert_table"):
        trainer.train()


def passes_of(trainer: Any) -> list[bool]:
    """Whether the model is in training mode, in each of its forward passes in the training to come."""
    modes: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    return modes


@pytest.mark.parametrize("precondition", ["off", "optimizer"])
def test_gradients_are_compared_with_autograds_once(tmp_path: Path, precondition: str) -> None:
    callback = callback_into(tmp_path, precondition=precondition)
    trainer = new_trainer(tmp_path / "run", callback, gradient_accumulation_steps=2)
    modes = passes_of(trainer)
    trainer.train()
    first = modes.index(True)
    assert first > 0
    assert modes[first : first + 4] == [True] * 4  # without a check in between
    assert Cache(tmp_path / "cache").manifest.gradient["check"]["compared"] == 14


def test_gradients_are_compared_at_the_first_batch_that_has_one(tmp_path: Path) -> None:
    rows = token_rows(records(ROWS))
    for row in rows[:4]:
        row["labels"] = [-100] * len(row["labels"])
    callback = callback_into(tmp_path)
    trainer = new_trainer(tmp_path / "run", callback, rows=rows, gradient_accumulation_steps=2, **IN_ORDER)
    trainer.train()
    assert Cache(tmp_path / "cache").manifest.gradient["check"]["compared"] == 14


def test_a_loss_of_the_trainers_own_is_refused_at_the_first_batch_that_has_one(tmp_path: Path) -> None:
    rows = token_rows(records(ROWS))
    for row in rows[:4]:
        row["labels"] = [-100] * len(row["labels"])
    trainer = new_trainer(
        tmp_path / "run", callback_into(tmp_path), cls=with_added_loss(), rows=rows,
        gradient_accumulation_steps=2, **IN_ORDER,
    )  # fmt: skip
    with pytest.raises(UserError, match="adds something to the loss"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"limit": 4}, "`limit` says how `data` is read, and there is no `data`"),
        ({"map": "prompt=question"}, "`map` says how `data` is read"),
        ({"streaming": True}, "`streaming` says how `data` is read"),
        ({"per_checkpoint": True, "null": True}, "leave out `null`"),
    ],
    ids=str,
)
def test_an_argument_that_would_have_no_effect_is_refused(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        SketchCallback(tmp_path, **arguments)


@pytest.mark.parametrize("name", ["beta", "dropout", "decoys"])
def test_what_the_training_decides_is_no_argument(tmp_path: Path, name: str) -> None:
    with pytest.raises(TypeError, match=f"no argument '{name}'"):
        SketchCallback(tmp_path, **{name: None})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"torch_compile": True}, "compiled"),
    ],
    ids=str,
)
def test_a_training_that_cannot_be_sketched_is_refused(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), **arguments)
    with pytest.raises(UserError, match=said):
        trainer.train()


def with_added_loss() -> Any:
    """The class of a trainer that adds something to the loss of its model."""
    from transformers import Trainer

    class Other(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            output = model(**inputs, num_items_in_batch=kwargs.get("num_items_in_batch"))
            return output.loss + 0.1 * output.loss.square()

    return Other


def test_a_loss_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), cls=with_added_loss())
    with pytest.raises(UserError, match="adds something to the loss"):
        trainer.train()


def test_another_trainer_of_trl_is_refused_by_its_name(tmp_path: Path) -> None:
    from transformers import Trainer

    kto = type("KTOTrainer", (Trainer,), {"__module__": "trl.trainer.kto_trainer"})
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), cls=type("AnswerTrainer", (kto,), {}))
    with pytest.raises(UserError, match="the loss of KTOTrainer is not known"):
        trainer.train()


def test_a_loss_of_pairs_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    from transformers import Trainer

    dpo = type("DPOTrainer", (Trainer,), {"__module__": "trl.trainer.dpo_trainer"})
    own = type("Own", (dpo,), {"compute_loss": lambda *_, **__: torch.zeros(())})
    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), cls=own)
    with pytest.raises(UserError, match=r"a loss of its own \(compute_loss\)"):
        trainer.train()


def test_weighted_tokens_are_refused(tmp_path: Path) -> None:
    from transformers import Trainer

    class Other(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"]
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    trainer = new_trainer(tmp_path / "run", callback_into(tmp_path), cls=Other)
    with pytest.raises(UserError, match="not the one that its model returned"):
        trainer.train()


def test_a_finished_cache_is_not_written_over(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run", callback_into(tmp_path)).train()
    with pytest.raises(UserError, match="holds a cache"):
        new_trainer(tmp_path / "run", callback_into(tmp_path)).train()


def test_a_damaged_record_of_the_training_is_refused(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run", callback_into(tmp_path), max_steps=1).train()
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in {
        "learning_rates": [], "visits": -1, "trainer": 3, "weight": "1", "seen": None,
    }.items():  # fmt: skip
        damaged = copy.deepcopy(manifest)
        damaged["gradient"]["training"][name] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"'training' of 'gradient' is|manifest"):
            Cache(tmp_path / "cache")
    path.write_text(json.dumps(manifest))
    assert Cache(tmp_path / "cache").manifest.gradient["training"] == manifest["gradient"]["training"]


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no argument 'widht'"):
        SketchCallback(tmp_path, widht=3)
    with pytest.raises(TypeError, match="no argument 'at'"):
        SketchCallback(tmp_path, at=0.5)
