"""What studies/fidelity/fidelity.py counts, and how it varies the shared basis of a codec."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

import fidelity
from doc_tables import DOCS, read
from fidelity import figures, of_shared_size


def test_figures_by_hand() -> None:
    exact = np.arange(200.0)
    got = exact.copy()
    got[[0, 195]] = got[[195, 0]]  # one of the best has the worst place
    found = figures(exact, got)
    assert (found["top10"], found["top100"]) == (9, 99)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 * 195**2 / (200 * (200**2 - 1)))
    assert found["rmse"] == pytest.approx(np.sqrt(2 * 195**2 / 200) / exact.std())


def test_a_shared_basis_with_room_for_the_sample_tells_its_rows_apart() -> None:
    made = torch.randn(90, 4, 64, generator=torch.Generator().manual_seed(0))
    lengths = made.norm(dim=2)
    rows = made / lengths[:, :, None]
    others, taught = of_shared_size(rows, lengths, sample=60, shared=60, size=300, seed=0)
    _, with_few = of_shared_size(rows, lengths, sample=60, shared=8, size=300, seed=0)
    assert taught["spearman"] > 0.99 > with_few["spearman"] + 0.05
    assert taught["rmse"] < 0.1
    assert others["spearman"] < 0.9  # of these it knows what 60 random directions of 256 hold


def test_the_page_shows_the_results() -> None:
    study = Path(fidelity.__file__).parent
    made = fidelity.tables([*sorted(study.glob("*.json")), study.parent / "lds" / "codes.json"])
    assert len(made) == 12
    for name, table in made.items():
        assert read(DOCS / "measured" / "fidelity.md", name) == table, name
