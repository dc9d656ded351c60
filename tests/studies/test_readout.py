"""studies/readout sketches what it says, and its README has the table of what it found."""

from __future__ import annotations

import json
import runpy

import doc_tables
import torch
from lds import CharGPT
from torch import Tensor
from torch.nn import functional as F

STUDY = doc_tables.DOCS.parent / "studies" / "readout"
MODULE = runpy.run_path(str(STUDY / "readout.py"))
RESULTS = json.loads((STUDY / "readout.json").read_text())


def test_the_residual_channel_is_the_gradient_of_the_output_layer() -> None:
    torch.manual_seed(0)
    model = CharGPT(11)
    ids = torch.randint(11, (3, 20))
    (residual, projected) = MODULE["channels"](model, ids)
    for text, got in zip(ids, residual, strict=True):
        loss = F.cross_entropy(model(text[None, :-1])[0], text[1:], reduction="sum")
        (want,) = torch.autograd.grad(loss, model.head.weight)
        torch.testing.assert_close(got, F.normalize(want.flatten(), dim=0), rtol=1e-4, atol=1e-5)
    assert projected.shape == (3, 96 * 96)


def test_sketches_keep_products() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 300)
    found = torch.stack([both(x, y, seed) for seed in range(300)])
    torch.testing.assert_close(found.mean(0), (x * y).sum(1), rtol=0, atol=6.0)


def both(x: Tensor, y: Tensor, seed: int) -> Tensor:
    sketched = (MODULE["count_sketch"](each, 64, seed) for each in (x, y))
    product = next(sketched) * next(sketched)
    return product.sum(1)


def test_the_readme_shows_the_results() -> None:
    assert doc_tables.read(STUDY / "README.md", "table") == MODULE["table"](RESULTS)


def test_the_layers_below_say_more() -> None:
    for row in RESULTS:
        if row["way"] == "both channels":
            (blocks,) = [
                other
                for other in RESULTS
                if (other["set"], other["point"], other["way"])
                == (row["set"], row["point"], "blocks, no preconditioner")
            ]
            assert row["mean"] < blocks["mean"]
