"""Tasks of the user's own: any module, no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rapidin
from rapidin import Attributor, UserError
from rapidin.tasks import Batch, Example, Task


class Points(Task):
    """Points in the plane with a number."""

    name = "points"

    def example(self, record: dict[str, Any]) -> Example:
        return Example({"x": torch.tensor(record["x"]), "y": torch.tensor(record["y"])})

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]) ** 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))


def records(n: int = 12) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(2).tolist(), "y": float(torch.randn(()))} for _ in range(n)]


def test_a_cache_of_a_task_of_ones_own(tmp_path: Path) -> None:
    model = net()
    attributor = Attributor(model, task=Points(), include=["*"])
    cache = attributor.cache(records(), tmp_path / "cache")
    assert cache.manifest.gradient["task"] == "points"
    assert "tokenizer" not in cache.manifest.model["identity"]
    results = attributor.query(cache, [records()[5]], examples=records())
    assert results[0].top[0].row == 5
    assert results[0].top[0].example == records()[5]
    found = rapidin.self_influence(cache, normalize="none")
    assert found.argmax() >= 0
    assert not found.isnan().any()
    again = Attributor.like(cache.manifest, model, task=Points())
    assert torch.equal(again.scores(cache, records()[:2]), attributor.scores(cache, records()[:2]))
    finer = attributor.cache(records(), tmp_path / "finer", dtype="float32")
    assert attributor.query(cache, [records()[5]], examples=records(), rescore=finer)[0].top[0].row == 5


def test_a_cache_says_which_task_it_needs(tmp_path: Path) -> None:
    class Others(Points):
        name = "others"

    model = net()
    cache = Attributor(model, task=Points()).cache(records(), tmp_path / "cache")
    with pytest.raises(UserError, match=r"'points' is not built in.*task="):
        Attributor.like(cache.manifest, model)
    with pytest.raises(UserError, match="other settings"):
        Attributor.like(cache.manifest, model, task=Others())
    with pytest.raises(UserError, match="Sequential does not say what it is for"):
        Attributor(model)
    with pytest.raises(UserError, match="reads texts, and there is no tokenizer"):
        Attributor(model, task="causal")
    with pytest.raises(UserError, match="does not say which model made it"):
        Attributor.from_cache(cache.path)
    with pytest.raises(UserError, match="generates no text"):
        Attributor(model, task=Points()).generate("text")


def test_what_mixes_the_examples_is_noticed(tmp_path: Path) -> None:
    """A layer that sees the examples of a batch on another axis has them one at a time."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:  # [B, T, 3], as [T, B, 3] for the layer
            return self.layer(x.transpose(0, 1)).transpose(0, 1).tanh()

    class Series(Points):
        name = "series"

        def losses(self, model: nn.Module, batch: Batch) -> Tensor:
            return (model(batch["x"]).mean((1, 2)) - batch["y"]) ** 2

    torch.manual_seed(1)
    rows = [{"x": torch.randn(5, 3).tolist(), "y": 1.0} for _ in range(4)]
    source = Attributor(Turned(), task=Series(), preconditioner="off").source
    sketch, _ = source.sketches([source.example(row) for row in rows])
    assert source.batches.one_at_a_time
    alone = torch.cat([source.sketches([source.example(row)])[0] for row in rows])
    torch.testing.assert_close(sketch, alone)


def test_records_of_tensors_are_told_apart() -> None:
    """Large tensors print alike; their hash is of all of their numbers."""
    from rapidin.data.records import record_hash

    a, b = torch.zeros(3000), torch.zeros(3000)
    b[1500] = 1
    assert str(a) == str(b)
    hashes = [record_hash({"x": x}) for x in (a, b, a.clone(), a.double(), a.numpy(), b.numpy())]
    assert hashes[0] == hashes[2]
    assert len({hashes[n] for n in (0, 1, 3, 4, 5)}) == 5


def test_a_task_must_say_what_it_is() -> None:
    with pytest.raises(NotImplementedError):
        Task().example({})
    with pytest.raises(NotImplementedError):
        Task().losses(net(), None)
    source = Attributor(net(), task=Points()).source
    with pytest.raises(UserError, match="needs a causal language model, and the task is 'points'"):
        source.encoder  # noqa: B018
