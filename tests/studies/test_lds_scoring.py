"""The scores of studies/lds from Gram matrices against their formulas written out on explicit moments."""

from __future__ import annotations

import json
from pathlib import Path

import moments
import pytest
import torch
from lds import RetrainedSet
from scoring import NORMALIZE, Grams, datainf, dot, fisher, mean_eigenvalue
from torch import Tensor

LDS = Path(__file__).parents[2] / "studies" / "lds"
N, TESTS, WIDTHS = 12, 5, (7, 30)  # a block narrower than there are rows, and one wider


@pytest.fixture
def rows() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [
        [torch.randn(n, w, generator=generator, dtype=torch.float64) * (w + 1) for w in WIDTHS]
        for n in (N, TESTS)
    ]
    return made[0], made[1]


def inverse(x: Tensor, added: Tensor) -> Tensor:
    """(second moment of x + added)^-1."""
    return torch.linalg.inv(x.T @ x / len(x) + added * torch.eye(x.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("how", [*NORMALIZE, "weighted"])
def test_normalized(rows: tuple[list[Tensor], list[Tensor]], how: str) -> None:
    known = [[x.clone() for x in group] for group in rows]
    for group, of_queries in zip(known, (False, True), strict=True):
        whole = torch.cat(group, 1).norm(dim=1, keepdim=True)
        lengths = sum(x.norm(dim=1, keepdim=True) for x in group)
        logs = torch.cat([x.norm(dim=1, keepdim=True).log() for x in group], 1).mean(1, keepdim=True)
        for x in group:
            own = x.norm(dim=1, keepdim=True)
            x /= {
                "none": torch.ones_like(whole),
                "cosine": whole,
                "layer": own,
                "weighted": lengths if of_queries else own / (logs / 4).exp(),
            }[how]
    wanted = sum(q @ x.T for x, q in zip(*known, strict=True))
    torch.testing.assert_close(dot(Grams.of(*rows).normalized(how)), wanted)


def test_mean_eigenvalue(rows: tuple[list[Tensor], list[Tensor]]) -> None:
    values = [torch.linalg.eigvalsh(x.T @ x / N) for x in rows[0]]
    grams = Grams.of(*rows)
    energy = torch.stack([v.square().sum() / v.sum() for v in values])
    torch.testing.assert_close(mean_eigenvalue(grams, "energy"), energy)
    count = torch.stack([v.sum() / N for v in values])
    torch.testing.assert_close(mean_eigenvalue(grams, "count"), count)


def test_noise_of_codes_is_not_counted(rows: tuple[list[Tensor], list[Tensor]]) -> None:
    grams = Grams.of(*rows)
    noisy = grams.train + 3 * torch.eye(N, dtype=torch.float64)
    found = mean_eigenvalue(Grams(noisy, grams.cross, grams.lengths, grams.true), "energy")
    torch.testing.assert_close(found, mean_eigenvalue(grams, "energy"))


def test_fisher(rows: tuple[list[Tensor], list[Tensor]]) -> None:
    grams = Grams.of(*rows)
    added = 0.2 * mean_eigenvalue(grams, "energy")
    wanted = sum(q @ inverse(x, d) @ x.T for x, q, d in zip(*rows, added, strict=True))
    torch.testing.assert_close(fisher(grams, 0.2), wanted)


def test_left_out_is_the_moment_of_the_others(rows: tuple[list[Tensor], list[Tensor]]) -> None:
    grams = Grams.of(*rows)
    added = 0.2 * mean_eigenvalue(grams, "energy")
    wanted = torch.zeros(TESTS, N, dtype=torch.float64)
    for x, q, d in zip(*rows, added, strict=True):
        for j in range(N):
            others = x.clone()
            others[j] = 0  # the moment is still a mean over n
            wanted[:, j] += q @ inverse(others, d) @ x[j]
    torch.testing.assert_close(fisher(grams, 0.2, left_out=True), wanted)


def test_datainf(rows: tuple[list[Tensor], list[Tensor]]) -> None:
    damping = torch.tensor([0.5, 3.0], dtype=torch.float64)
    wanted = torch.zeros(TESTS, N, dtype=torch.float64)
    for x, q, d in zip(*rows, damping, strict=True):
        # the mean over the rows of (y y^T + d)^-1, each by the Sherman-Morrison formula
        swapped = (
            sum(torch.linalg.inv(torch.outer(y, y) + d * torch.eye(len(y), dtype=y.dtype)) for y in x) / N
        )
        wanted += q @ swapped @ x.T
    torch.testing.assert_close(datainf(Grams.of(*rows), damping), wanted)


def test_the_readme_says_what_the_moments_need() -> None:
    """The table of LDS by the number of texts that K-FAC's moments are fitted on is that of the results."""
    found = json.loads((LDS / "moments.json").read_text())
    readme = (LDS / "README.md").read_text()
    for name in ("kjv", "orders"):
        means = [f"{sum(each['lds']) / len(each['lds']):.3f}" for each in found if each["set"] == name]
        assert f"| `{name}` | {' | '.join(means)} |" in readme


@pytest.mark.full
def test_moments_are_measured_again() -> None:
    """One figure of the stored results, from gradients to LDS."""
    stored = json.loads((LDS / "moments.json").read_text())
    (wanted,) = (each["lds"][0] for each in stored if (each["set"], each["sample"]) == ("kjv", 32))
    assert moments.measured(RetrainedSet(LDS / "kjv"), 32, 0) == pytest.approx(wanted, abs=2e-3)
