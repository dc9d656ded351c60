"""What `peers.py lds` does itself, without the packages it compares: its arithmetic, rows and table."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from made_truth import made_truth
from tiny import tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.evaluate import ground_truth
from rapidin.evaluate.settings import GroundTruthSettings, Recipe
from rapidin.gradients.load import load_model

ROOT = Path(__file__).parents[2]


def part(name: str) -> ModuleType:
    return import_module(f"peer_lds.{name}")


@pytest.fixture
def truth_folder(tmp_path: Path) -> Path:
    return made_truth(tmp_path / "truth")


def test_the_interval_holds_the_mean_about_95_times_in_100() -> None:
    judge = part("judge")
    assert judge.interval(np.full(20, 0.25)) == (0.25, 0.25)
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(200):
        low, high = judge.interval(rng.normal(0.5, 0.1, 50), seed=trial)
        inside += low < 0.5 < high
    assert 180 <= inside <= 198


def row(package: str, lds: float | None, size: float | None = 2000.0, **settings: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"package": package, "version": "1", "method": "dot", "at": "1"}
    made |= {"settings": settings, "bytes": size, "seconds": 1.0}
    if lds is None:
        return made | {"failed": "ValueError: a | b"}
    return made | {"lds": lds, "interval": [lds - 0.05, lds + 0.05]}


def test_the_table_merges_seeds_orders_by_lds_and_names_what_failed() -> None:
    judge = part("judge")
    rows = [row("a", 0.4, seed=0), row("a", 0.5, seed=1), row("b", 0.7, 90000.0), row("c", None)]
    lines = judge.table(rows).splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["b", "a", "c"]
    assert "| 0.450 |" in lines[1]
    assert "0.400-0.500" in lines[1]
    assert "failed: ValueError: a / b" in lines[2]
    few = judge.table(rows, budget=2048).splitlines()[2:]
    assert len(few) == 1
    assert few[0].startswith("| a dot ")
    best = judge.best_each([row("a", 0.4, damping=1), row("a", 0.6, damping=2), row("c", None)])
    assert [r["lds"] for r in best] == [0.6]


def test_only_the_packages_asked_for_run_again(
    truth_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = part("judge")
    helps = np.load(truth_folder / "helps.npy")
    started = []

    def start(package: str, python: str, arguments: list[str], work: Path) -> list[dict[str, Any]]:
        started.append((package, arguments[1]))
        work.mkdir(parents=True)
        np.save(work / "0.npy", helps)
        made = row(package, 0.0)
        return [{k: v for k, v in made.items() if k not in ("lds", "interval")} | {"scores": "0.npy"}]

    models = {at: tmp_path / f"model-{at}" for at in judge.PLACES}
    given = {"prepare": lambda truth, work: (tmp_path / "texts.json", models), "start": start}
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"rows": [row("bergson", 0.125), row("traker", 0.5)]}))
    judge.lds(
        tmp_path, truth_folder, out, only=["traker", "rapidin"], seeds=1, work=tmp_path / "work", **given
    )
    assert [name for name, _ in started] == ["traker", "traker", "rapidin"]
    assert [model for _, model in started] == [*map(str, models.values()), str(models[1.0])]
    written = json.loads(out.read_text())
    assert written["retrainings"] == 40
    found = [(r["package"], r["lds"]) for r in written["rows"]]
    assert found[0] == ("bergson", 0.125)
    assert [name for name, _ in found[1:]] == ["traker", "traker", "rapidin"]
    assert min(lds for _, lds in found[1:]) > 0.99
    assert "| rapidin dot |" in capsys.readouterr().out


def test_a_case_that_fails_is_a_row_that_says_why(tmp_path: Path) -> None:
    setting = part("setting")
    texts = setting.Texts.of(
        [{"ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"ids": [4, 5], "labels": [-100, 5]}], 0
    )
    here = setting.Setting(tmp_path, tmp_path, tmp_path, "0.5", (0,), texts, texts, {})

    def broken(folder: Path) -> tuple[torch.Tensor, float | None]:
        raise RuntimeError("no such thing")

    cases = [
        setting.Case("good", {"seed": 0}, lambda folder: (torch.eye(2), 8.0)),
        setting.Case("broken", {}, broken),
        setting.Case("NaN", {}, lambda folder: (torch.full((2, 2), torch.nan), None)),
        setting.Case("shape", {}, lambda folder: (torch.zeros(2, 3), None)),
    ]
    setting.run_cases(here, "torch", cases)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r.get("failed", "")[:24] for r in rows] == [
        "",
        "RuntimeError: no such th",
        "ValueError: 4 scores are",
        "ValueError: scores of sh",
    ]
    assert rows[0]["bytes"] == 8.0
    assert rows[0]["at"] == "0.5"
    np.testing.assert_array_equal(np.load(tmp_path / rows[0]["scores"]), np.eye(2))


def test_a_texts_loss_is_the_mean_over_its_counted_tokens_whatever_the_padding() -> None:
    setting = part("setting")
    rows = [{"ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"ids": [4, 5], "labels": [-100, 5]}]
    texts = setting.Texts.of(rows, 0)
    assert texts.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(2)
    wanted = [-(log_p[0, 1, 3] + log_p[0, 2, 4]) / 2, -log_p[1, 0, 5]]
    torch.testing.assert_close(setting.losses(logits, texts.labels).double(), torch.stack(wanted))


def test_trak_sees_an_adapters_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies" / "peers" / "peer_lds"))
    traker = import_module("run_traker")
    model = tiny_lora(tiny_llama(tie_word_embeddings=True)).eval()
    ids = torch.arange(12)[None]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(ids).logits
    traker.freeze(model)
    names = [name for name, _ in model.named_parameters()]
    assert names
    assert all(".lora_" in name for name in names)
    model.load_state_dict(state)
    torch.testing.assert_close(model(ids).logits, before)


def test_a_gguf_base_becomes_a_folder_that_the_packages_can_read(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.gguf", tiny_llama(), tiny_tokenizer())
    rows = [{"prompt": f"{n} ", "completion": f"is {n * n}"} for n in range(8)]
    settings = GroundTruthSettings(Recipe(epochs=1, batch=4), lora=2, subsets=3, checkpoints=0, max_length=24)
    ground_truth.make(tmp_path / "truth", str(tmp_path / "model"), rows, rows[:2], settings, device="cpu")
    _, models = part("judge").prepare_texts(tmp_path / "truth", tmp_path / "work")
    said = json.loads((models[1.0] / "adapter_config.json").read_text())
    again = load_model(str(tmp_path / "model"))
    assert load_model(said["base_model_name_or_path"]).identity == again.identity
