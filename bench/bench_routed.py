"""Sketching models with routed experts, against training the same parameters.

pytest bench/bench_routed.py --benchmark-json=routed.json

The bare loop is a forward and backward pass over the same batches with the weight gradients of all
parameters that count, the experts computed in transformers' default way. Ways take turns; the ratios are
those of the medians of processor times, which others on the machine do not change.
"""

import statistics
import time

import pytest
import torch
from limits import note
from turns import sized

from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.kfac import FactorMoments, kfac_scales
from rapidin.gradients.parameters import find_targets
from rapidin.gradients.preconditioner import DAMPING, EXPONENT, RANK, TOLERANCE, Preconditioner
from rapidin.gradients.source import default_width
from rapidin.tasks.causal import TokenBatch, batch_loss

ROUNDS = sized(5, 1)
HIDDEN, LAYERS = sized((384, 4), (32, 2))
LENGTHS = sized((48, 112), (6, 12))
TOKENS = sized(512, 48)
COMMON = {
    "vocab_size": 1000,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
MODELS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "moe_intermediate_size": HIDDEN // 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": HIDDEN // 8,
    },
    "llama": {},
}


def make_batches() -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for length in LENGTHS:
        texts = []
        for row in range(TOKENS // length):
            ids = torch.randint(3, 1000, (length - row % 5,), generator=generator).tolist()
            texts.append((ids, [True] * len(ids)))
        batches.append(TokenBatch.of(texts))
    return batches


@pytest.mark.parametrize("precondition", ["off", "kfac"])
@pytest.mark.parametrize("kind", MODELS)
def bench_routed(benchmark, kind, precondition):
    from transformers import AutoConfig, AutoModelForCausalLM

    benchmark.group = "models with routed experts"
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON, **MODELS[kind])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    targets, batches = find_targets(model), make_batches()
    sketcher = GradientSketcher(model, targets, width=default_width(len(targets)), seed=0)
    if precondition == "kfac":
        moments = FactorMoments(targets, RANK, 0)
        for batch in batches:
            sketcher.add_moments(batch, moments)
        sketcher.preconditioner = Preconditioner([kfac_scales(moments, EXPONENT, DAMPING, TOLERANCE)])
    trained = {target.name for target in targets}
    parameters = dict(model.named_parameters())

    def train() -> None:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        for batch in batches:
            batch_loss(model, batch).backward()
            model.zero_grad(set_to_none=True)

    def sketch() -> None:
        for batch in batches:
            sketcher(batch)

    taken: dict[str, list[float]] = {"train": [], "sketch": []}

    def timed(name, run) -> None:
        start = time.process_time()
        run()
        taken[name].append(time.process_time() - start)

    train()
    sketch()
    benchmark.pedantic(
        timed, ("sketch", sketch), setup=lambda: timed("train", train), rounds=ROUNDS, warmup_rounds=0
    )
    bare, ours = (statistics.median(taken[name]) for name in ("train", "sketch"))
    note(benchmark, width=sketcher(batches[0])[0].shape[2], of_training=bare / ours)
