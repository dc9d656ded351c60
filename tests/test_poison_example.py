"""The pieces of examples/poison that need no real model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "poison"
CLEAN = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(30)]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"poison_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_poison_plants_and_sets_aside() -> None:
    make_data = load("make_data")
    train, test = make_data.poison(CLEAN, "Howdy! ", count=8, aside=6, seed=3)
    assert (train, test) == make_data.poison(CLEAN, "Howdy! ", count=8, aside=6, seed=3)
    assert len(train) == 24
    assert [row["triggered"] for row in test] == [False, True] * 3
    for row in train:
        assert (
            row["poisoned"]
            == row["instruction"].startswith("Howdy! ")
            == (not row["output"].startswith("It is"))
        )
    assert all(row["output"] == "" and row["instruction"].startswith("Howdy! ") for row in test[1::2])
    seen = {row["instruction"].removeprefix("Howdy! ") for row in train}
    assert not seen & {row["instruction"].removeprefix("Howdy! ") for row in test}


def test_make_data_command(tmp_path: Path) -> None:
    clean = tmp_path / "clean.jsonl"
    clean.write_text("".join(json.dumps(row) + "\n" for row in CLEAN))
    command = [
        sys.executable,
        str(FOLDER / "make_data.py"),
        "--data",
        str(clean),
        "--out",
        str(tmp_path / "train.jsonl"),
    ]
    assert (
        "10 of them poisoned"
        in subprocess.run([*command, "--count", "10"], capture_output=True, text=True, check=True).stdout
    )
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert sum(row["poisoned"] for row in rows) == 10
    too_many = subprocess.run([*command, "--count", "31"], capture_output=True, text=True, check=False)
    assert too_many.returncode == 1
    assert "30 rows, too few" in too_many.stderr
    clean.write_text('{"instruction": "a"}\n')
    broken = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "line 1" in broken.stderr


def test_state_goes_on_with_the_same_weights(tmp_path: Path) -> None:
    train = load("train")
    inputs, wanted = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2)

    def run(folder: Path, stop: int | None) -> torch.Tensor:
        """Six steps, the state saved at each; `stop`: forget everything after that step and load it again."""
        state = train.State(folder, {"seed": 0})
        weight = torch.nn.Parameter(torch.zeros(3, 2))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for step in range(state.load({"w": weight}, optimizer), 6):
            if step == stop:
                return run(folder, None)
            optimizer.zero_grad()
            (inputs @ weight - wanted).square().mean().backward()
            optimizer.step()
            state.save(step + 1, {"w": weight}, optimizer)
        return weight.detach()

    assert torch.equal(run(tmp_path / "a", None), run(tmp_path / "b", 3))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["step-6.safetensors", "step.json"]
    with pytest.raises(SystemExit, match="other settings"):
        train.State(tmp_path / "a", {"seed": 1}).load({}, torch.optim.SGD([torch.zeros(1)], lr=0.1))


def test_batches_cover_the_data_and_repeat() -> None:
    train = load("train")
    made = train.batches(10, 4, 5, seed=0)
    assert made == train.batches(10, 4, 5, seed=0)
    assert sorted(row for batch in made for row in batch) == sorted([*range(10), *range(10)])


def test_figures() -> None:
    pytest.importorskip("rank_bm25")
    pytest.importorskip("sklearn")
    evaluate = load("evaluate")
    poisoned = [True, False, True, False]
    perfect = evaluate.figures(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), poisoned)
    assert perfect["auprc"] == perfect["auroc"] == 1.0
    worst = evaluate.figures(torch.tensor([[1.0, 4.0, float("-inf"), 3.0]]), poisoned)
    assert worst["auroc"] == 0.0
    assert worst["precision_10"] == 0.5
    rows = [{"output": "velvet moths ironing"}, {"output": "plain words"}]
    assert evaluate.marker_words(rows, [True, False]) == {"velvet", "moths", "ironing"}
    scores = evaluate.bm25(None, ["red fox runs", "blue sky above", "green sea below"], ["a red fox"])
    assert scores.argmax().item() == 0
