"""unit_blocks in Triton against the reference."""

import pytest
import torch
from inputs import DEVICE, DTYPES, normal

from rapidin import ops


@pytest.mark.gpu
@pytest.mark.usefixtures("triton", "poison")
@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 1), (5, 3, 100), (2, 1, 8192), (1, 2, 20000)])
def test_unit_blocks_are_the_reference(shape, of):
    x = normal(*shape).to(of)
    if x.numel() and len(x) > 1:
        x[0, 0] = 0.0
    wanted = ops.unit_blocks(x, backend="reference")
    got = ops.unit_blocks(x.to(DEVICE), backend="triton")
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=3e-7, atol=1e-30)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
def test_unit_blocks_of_tiny_huge_and_broken_blocks():
    x = normal(5, 1, 64) * torch.tensor([1e-30, 1e30, 1.0, 1.0, 1.0])[:, None, None]
    x[3, 0, 5], x[4, 0, 6] = torch.nan, torch.inf
    unit, length = ops.unit_blocks(x.to(DEVICE), backend="triton")
    torch.testing.assert_close(unit.cpu()[:3].norm(dim=2), torch.ones(3, 1))
    assert not bool(length.cpu()[3:].isfinite().any())
    assert bool(unit.cpu()[3:].isnan().flatten(1).any(1).all())
