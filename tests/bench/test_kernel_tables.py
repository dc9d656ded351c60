"""The tables of docs/reference/kernels.md that scripts make: still what the scripts say, of models as they
are."""

from __future__ import annotations

from typing import Any

import doc_tables
import kernels_reached
import low_rank_error
import pytest
import torch

from rapidin.gradients.parameters import find_targets, matrix_shape

pytestmark = pytest.mark.full

PAGE = doc_tables.DOCS / "reference" / "kernels.md"


def test_the_page_says_which_kernels_the_defaults_reach(emulated_cuda: Any) -> None:
    assert doc_tables.read(PAGE, "kernels reached") == kernels_reached.table(emulated_cuda), (
        "run python bench/kernels_reached.py --write"
    )


def config_of(model: kernels_reached.Model) -> Any:
    """One layer of it, as transformers has it."""
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

    hidden, attended = model.linear[0]
    if model.name == "GPT-2":
        return GPT2Config(n_embd=hidden, n_layer=1)
    if model.name.startswith("Pythia"):
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
        return GPTNeoXConfig(**sizes, num_hidden_layers=1, num_attention_heads=16)
    head = 128 if hidden > 2048 or "Qwen" in model.name else 64
    kind = Qwen3Config if "Qwen" in model.name else LlamaConfig
    return kind(
        hidden_size=hidden,
        intermediate_size=model.linear[4][1],
        num_hidden_layers=1,
        num_attention_heads=attended // head,
        num_key_value_heads=model.linear[1][1] // head,
        head_dim=head,
    )


@pytest.mark.parametrize("model", kernels_reached.MODELS, ids=lambda model: model.name)
def test_models_have_the_layers_that_are_listed(model: kernels_reached.Model) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        one_layer = AutoModelForCausalLM.from_config(config_of(model))
    shapes = [matrix_shape(target.shape) for target in find_targets(one_layer)]
    if model.name == "GPT-2":  # its weights are stored [in, out]
        shapes = [(i, o) for o, i in shapes]
    assert sorted((i, o) for o, i in shapes) == sorted(model.linear)


def test_the_page_says_what_rounding_the_directions_does() -> None:
    found = low_rank_error.errors()
    lines = doc_tables.read(PAGE, "rounding of a LowRank").splitlines()[2:]
    said = {
        cells[1].strip(): [float(c) for c in cells[2:-1]] for cells in (line.split("|") for line in lines)
    }
    assert said.keys() == found.keys()
    for name, errors in found.items():
        assert said[name] == pytest.approx(errors, rel=0.5), name
    worst = {name: max(errors) for name, errors in found.items()}
    assert worst["two bfloat16 everywhere"] < 2e-4
    assert worst["the CPU kernel"] < 2e-5
    assert worst["one bfloat16 everywhere"] > 1e-2
    assert worst["`CS(U)` and `c` as TF32"] > worst["preconditioned features rounded to bfloat16"]
