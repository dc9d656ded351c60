"""Gradients of routed experts, routers and weights that no linear module applies, against autograd's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from causal_types import tiny_causal
from own_gradients import SEED, WIDTH, exact_gradients, own_gradients, own_sketches, relative_error, texts
from routed import with_linear_experts
from tiny import tiny_lora, tiny_tokenizer

from rapidin import ops
from rapidin.gradients.calls import ChangedInputError, NotBatchedError
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.coverage import coverage_of
from rapidin.gradients.kfac import FactorMoments, kfac_scales
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import Target, block_seed, find_targets
from rapidin.gradients.preconditioner import Preconditioner
from rapidin.gradients.scale import Scale
from rapidin.ops import reference
from rapidin.tasks.causal import TokenBatch, example_losses

QUICK = {"mixtral", "gpt_oss", "llama4_text", "jetmoe", "dbrx", "mamba", "deepseek_v3"}
OTHERS = {
    "deepseek_v2", "deepseek_v32", "ernie4_5_moe", "falcon_mamba", "glm4_moe", "glm_moe_dsa", "granitemoe",
    "jamba", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
}  # fmt: skip
TYPES = [*sorted(QUICK), *(pytest.param(kind, marks=pytest.mark.full) for kind in sorted(OTHERS))]
# Types of which some parameters are neither part of products nor added, so that examples come one at a time.
SINGLE = {"falcon_mamba", "gpt_oss", "jamba", "mamba", "qwen3_next"}
STACKED = ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "dbrx"]


def experts_of(model: Any) -> list[Target]:
    return [target for target in find_targets(model) if target.stack]


def errors(model: Any, targets: list[Target], *, batched: bool = True) -> tuple[float, float]:
    """The largest relative errors of sketches, one at a time and in a batch, against autograd's."""
    expected = torch.stack([own_sketches(model, targets, text) for text in texts()])
    # What is less than a hundred thousandth of an example's whole gradient is rounding.
    size = expected.norm(dim=-1) + 1e-5 * expected.flatten(1).norm(dim=1)[:, None]

    def largest(got: torch.Tensor) -> float:
        return float(((got - expected).norm(dim=-1) / size).max())

    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    alone = torch.cat([sketcher(TokenBatch.of([text]))[0] for text in texts()])
    if not batched:
        return largest(alone), 0.0
    together, _ = GradientSketcher(model, targets, width=WIDTH, seed=SEED)(TokenBatch.of(texts()))
    return largest(alone), largest(together)


@pytest.mark.parametrize("kind", TYPES)
def test_default_targets_are_right_in_batches(kind: str) -> None:
    model = tiny_causal(kind)
    targets = find_targets(model)
    assert max(errors(model, targets)) < 1e-4
    if kind not in ("mamba", "falcon_mamba"):
        assert any(target.stack for target in targets)


@pytest.mark.parametrize("kind", TYPES)
def test_every_parameter_is_right(kind: str) -> None:
    model = tiny_causal(kind)
    targets = find_targets(model, include=["*"])
    assert {t.name for t in targets} == {name for name, _ in model.named_parameters()}
    assert max(errors(model, targets, batched=kind not in SINGLE)) < 1e-4
    if kind in SINGLE:
        with pytest.raises(NotBatchedError) as raised:
            GradientSketcher(model, targets, width=WIDTH, seed=SEED)(TokenBatch.of(texts()))
        assert raised.value.name


@pytest.mark.parametrize("kind", ["gathered", "sorted"])
@pytest.mark.parametrize("include", [(), ("*",)])
def test_experts_of_linear_layers(kind: str, include: tuple[str, ...]) -> None:
    model = with_linear_experts(kind)
    targets = find_targets(model, include=include)
    assert sum("experts" in t.name for t in targets) == (24 if not include else 32)
    assert max(errors(model, targets)) < 1e-4


ADAPTERS: dict[str, Any] = {
    "mixtral": {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    "llama4_text": {"target_modules": [], "target_parameters": ["gate_up_proj"]},
    "jetmoe": {"target_modules": ["router.layer"], "target_parameters": ["input_linear.weight"]},
    "qwen3_next": {"target_modules": "all-linear", "target_parameters": ["down_proj"]},
    "linear": {"target_modules": ["up", "gate", "down", "router"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_experts(kind: str) -> None:
    base = with_linear_experts("gathered") if kind == "linear" else tiny_causal(kind)
    model = tiny_lora(base, lora_dropout=0.0, fan_in_fan_out=False, **ADAPTERS[kind])
    targets = find_targets(model, trained=LoadedModel.of(model, None).trained)
    assert sum("lora_B" in t.name for t in targets if "expert" in t.name or "linear" in t.name) >= 2
    assert max(errors(model, targets)) < 1e-4


class Gain(torch.nn.Module):
    """Multiplies the features of a module's output by a vector, in several ways."""

    WAYS: ClassVar[dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
        "row": lambda x, w: x * w,
        "column": lambda x, w: w.flatten() * x,
        "from one": lambda x, w: x * (1 * w.flatten()),
        "in place": lambda x, w: x.mul_(w.flatten()),
        "of heads": lambda x, w: (x.unflatten(-1, (4, 8)) * w.view(4, 8)).flatten(-2),
        "of itself": lambda x, w: x * (w * w).flatten(),
        "twice": lambda x, w: (x * w.flatten()) * w.flatten(),
    }

    def __init__(self, inner: torch.nn.Module, way: str) -> None:
        super().__init__()
        self.inner, self.way = inner, way
        shape = {"row": (1, 32), "column": (32, 1)}.get(way, (32, 1))
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 2, 32).view(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.WAYS[self.way](self.inner(x), self.gain)


@pytest.mark.parametrize("way", Gain.WAYS)
def test_features_times_a_vector(way: str) -> None:
    model = tiny_causal("llama")
    for layer in model.model.layers:
        layer.mlp = Gain(layer.mlp, way)
    targets = find_targets(model, include=["gain", "q_proj"])
    assert len(targets) == 4
    batched = way in ("row", "column", "from one", "twice")
    assert max(errors(model, targets, batched=batched)) < 1e-4
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    sketcher(TokenBatch.of(texts()[:1]))
    assert bool(sketcher.single_names) == (not batched)


def test_a_row_that_is_changed_after_it_was_multiplied() -> None:
    class Changed(Gain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.inner(x)
            output = inner * self.gain.flatten()
            inner.mul_(2)
            return output

    model = tiny_causal("llama")
    model.model.layers[0].mlp = Changed(model.model.layers[0].mlp, "row")
    sketcher = GradientSketcher(model, find_targets(model, include=["gain"]), width=WIDTH, seed=SEED)
    with pytest.raises(ChangedInputError):
        sketcher(TokenBatch.of(texts()))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_way_of_computing_experts(kind: str, implementation: str) -> None:
    model = tiny_causal(kind)
    model.set_experts_implementation(implementation)
    targets = find_targets(model, include=["experts"])
    assert len(targets) == (8 if kind == "gpt_oss" else 4)  # with biases
    assert max(errors(model, targets)) < 1e-4
    assert model.config._experts_implementation == implementation


def test_what_one_example_does_not_reach_is_zero() -> None:
    model = with_linear_experts("sorted")
    with torch.no_grad():  # no token comes to the last expert
        for layer in model.model.layers:
            layer.mlp.router.weight[-1] = 0
            layer.mlp.router.weight[:-1].abs_().add_(10).mul_(torch.tensor([1.0, -1.0, 1.0])[:, None])
    targets = find_targets(model)
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    sketches, _ = sketcher(TokenBatch.of(texts()))
    expected = torch.stack([own_sketches(model, targets, text) for text in texts()])
    assert bool((~expected.any(-1)).any(0).any()), "every example reaches every expert"
    assert torch.equal(sketches.any(-1), expected.any(-1))
    for gradient, sketch in zip(exact_gradients(sketcher, texts()[0]), expected[0], strict=True):
        assert bool(gradient.any()) == bool(sketch.any())


def test_a_real_mixture_of_experts_counts_by_default() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    real: dict[str, dict[str, Any]] = {
        "mixtral": {},
        "olmoe": {},
        "gpt_oss": {},
        "deepseek_v3": {"num_hidden_layers": 61},
        "qwen3_moe": {
            "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        },
    }  # fmt: skip
    for kind, settings in real.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        coverage = coverage_of(model, find_targets(model))
        assert coverage.share > 0.95, (kind, coverage.text)


# ------------------------------------------------------------------------------- preconditioners


def stacks_of(model: Any, targets: list[Target]) -> list[torch.Tensor]:
    """Each target's gradients [B, E, O, I] of each text, by autograd."""
    each = [own_gradients(model, text) for text in texts()]
    return [
        torch.stack([g[t.name] if t.name in g else torch.zeros(t.shape) for g in each]).view(
            len(each), t.stack, *t.matrix
        )
        for t in targets
    ]


@pytest.mark.parametrize("projection", ["tensor", "flat", "rapidgrad"])
@pytest.mark.parametrize("kind", STACKED)
def test_preconditioned_sketches(kind: str, projection: Any) -> None:
    model = tiny_causal(kind)
    targets = experts_of(model)
    torch.manual_seed(2)
    table = {t.name: Scale(*(torch.randn(n).exp() for n in t.matrix)) for t in targets}
    sketcher = GradientSketcher(
        model, targets, width=WIDTH, seed=SEED, projection=projection, preconditioner=Preconditioner([table])
    )
    got, _ = sketcher(TokenBatch.of(texts()))
    blocks = []
    for target, stack in zip(targets, stacks_of(model, targets), strict=True):
        scaled = stack * table[target.name].rows[:, None] * table[target.name].columns
        seed = block_seed(SEED, target.name)
        if projection == "tensor":
            blocks.append(reference.stack_sketch(scaled, WIDTH, seed=seed).float())
        else:
            blocks.append(ops.flat_sketch([scaled.flatten(1)], WIDTH, seed=seed, batched=True))
    expected = torch.stack(blocks, 1)
    if projection == "rapidgrad":
        expected = torch.nn.functional.normalize(expected, dim=-1).sum(1, keepdim=True)
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("kind", STACKED)
def test_squares_are_sums_over_all_experts(kind: str) -> None:
    model = tiny_causal(kind)
    targets = experts_of(model)
    found = GradientSketcher(model, targets, width=8, seed=0).squares(TokenBatch.of(texts()))
    for (rows, columns), stack in zip(found, stacks_of(model, targets), strict=True):
        squared = stack.double().square()
        torch.testing.assert_close(rows, squared.sum((1, 3)), rtol=1e-3, atol=1e-6 * float(rows.max()))
        torch.testing.assert_close(columns, squared.sum((1, 2)), rtol=1e-3, atol=1e-6 * float(columns.max()))


@pytest.mark.parametrize("kind", STACKED)
def test_kfac_is_the_same_in_batches_and_one_at_a_time(kind: str) -> None:
    model = tiny_causal(kind)
    targets = experts_of(model)
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    tables = []
    for batches in ([texts()], [[text] for text in texts()]):
        moments = FactorMoments(targets, 64, SEED)
        for batch in batches:
            sketcher.add_moments(TokenBatch.of(batch), moments)
        tables.append(kfac_scales(moments, 0.5, 0.1, 0.0))
    for target, stack in zip(targets, stacks_of(model, targets), strict=True):
        together, alone = (table[target.name].formed(stack.flatten(0, 1)) for table in tables)
        assert together.shape == (len(texts()) * target.stack, *target.matrix)
        torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max()))


def test_experts_share_moments_that_are_the_mean_of_each_experts() -> None:
    model = tiny_causal("mixtral")
    experts = [t for t in experts_of(model) if "gate_up_proj" in t.name]
    linear = [
        Target(f"{t.name}.{e}", t.matrix, ()) for t in experts for e in range(t.stack)
    ]  # as if each were a parameter
    sketcher = GradientSketcher(model, experts, width=WIDTH, seed=SEED)
    shared = FactorMoments(experts, 200, SEED)
    sketcher.add_moments(TokenBatch.of(texts()), shared)
    apart = FactorMoments(linear, 200, SEED)
    seen = _routed_factors(model)
    for n, (e, columns, rows) in enumerate(seen):
        apart.add_factors(4 * (n // 4) + e, columns[None], rows[None])
    for n in range(len(experts)):
        own = [apart.rows[m]._sum for m in range(4 * n, 4 * n + 4)]
        total = torch.stack(own).sum(0)
        torch.testing.assert_close(
            shared.rows[n]._sum, total, rtol=1e-4, atol=1e-6 * float(total.abs().max())
        )
        spectra = shared.spectra(n)
        assert spectra is not None
        mean = float(total.trace()) / (4 * len(texts()) * experts[n].matrix[0])
        assert spectra[0].mean == pytest.approx(mean, rel=1e-4)


def _routed_factors(model: Any) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, inputs, output gradients) of the first product of each expert, layer after layer, expert after
    expert, from the experts computed here."""
    found: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    batch = TokenBatch.of(texts())

    def keep(key: tuple[int, int], seen: torch.Tensor, grad: torch.Tensor) -> None:
        found.setdefault(key, []).append((seen, grad))

    def experts(layer: int, module: Any) -> Any:
        def forward(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(x)
            for e in range(4):
                token, place = torch.where(chosen == e)
                product = x[token] @ module.gate_up_proj[e].T
                if not product.requires_grad:
                    product = product.detach().requires_grad_()
                product.register_hook(partial(keep, (layer, e), x[token].detach()))
                gate, up = product.chunk(2, -1)
                hidden = module.act_fn(gate) * up
                total = total.index_add(
                    0, token, hidden @ module.down_proj[e].T * weights[token, place, None]
                )
            return total

        return forward

    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.forward = experts(number, layer.mlp.experts)
    try:
        example_losses(model, batch).sum().backward()
    finally:
        for layer in model.model.layers:
            del layer.mlp.experts.forward
    model.zero_grad(set_to_none=True)
    return [(e, *found[layer, e][0]) for layer, e in sorted(found)]


# --------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("projection", ["tensor", "flat"])
@pytest.mark.parametrize("kind", [*STACKED, "linear", "linear sorted"])
def test_positions_of_experts_sum_to_the_sketch(kind: str, projection: Any) -> None:
    model = (
        with_linear_experts("sorted" if "sorted" in kind else "gathered")
        if "linear" in kind
        else tiny_causal(kind)
    )
    targets = find_targets(model)
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED, projection=projection)
    for some in ([texts()[1]], [texts()[2]], texts()[1:3]):
        batch = TokenBatch.of(some)
        vectors = torch.randn(3, len(targets), WIDTH)
        products, sketches = sketcher.positions(batch, vectors)
        expected, _ = sketcher(batch)
        assert products.shape == (len(some), batch.length, 3, len(targets))
        assert relative_error(sketches, expected) < 1e-4
        torch.testing.assert_close(
            products.sum(1),
            torch.einsum("qnw,bnw->bqn", vectors, expected),
            rtol=1e-3,
            atol=1e-4 * float(products.abs().max()),
        )


def test_the_part_of_one_position() -> None:
    model = tiny_causal("mixtral")
    targets = [t for t in experts_of(model) if "layers.1" in t.name]
    text = texts()[1]
    vectors = torch.randn(1, len(targets), WIDTH)
    (products,), _ = GradientSketcher(model, targets, width=WIDTH, seed=SEED).positions(
        TokenBatch.of([text]), vectors
    )
    experts = model.model.layers[1].mlp.experts
    weights = {name: getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    inner = experts.forward
    for position in (0, 2, len(text[0]) - 2):

        def forward(x: Any, chosen: Any, weight: Any, position: int = position) -> Any:
            # Only this position's products are with weights that have a gradient.
            own = inner(x, chosen, weight)
            for name, p in weights.items():
                setattr(experts, name, torch.nn.Parameter(p.detach(), requires_grad=False))
            others = inner(x, chosen, weight)
            for name, p in weights.items():
                setattr(experts, name, p)
            alone = torch.arange(len(x)) == position
            return torch.where(alone[:, None], own, others)

        experts.forward = forward
        grads = own_gradients(model, text)
        experts.forward = inner
        for n, target in enumerate(targets):
            sketch = reference.stack_sketch(grads[target.name], WIDTH, seed=block_seed(SEED, target.name))
            expected = float((sketch.float() * vectors[0, n]).sum())
            assert float(products[position, 0, n]) == pytest.approx(
                expected, rel=1e-3, abs=1e-5 * float(products.abs().max())
            )


def test_what_a_check_finds_out_about_gradients_is_kept() -> None:
    from rapidin.data.encoding import Encoded, Status
    from rapidin.gradients.settings import GradientSettings
    from rapidin.gradients.source import GradientSource

    model = tiny_causal("mamba")
    source = GradientSource(LoadedModel.of(model, tiny_tokenizer()), GradientSettings(include=("*",)))
    encoded = [Encoded(ids, target, Status.OK) for ids, target in texts()]
    check = source.checked(encoded)
    assert check is not None
    assert any("A_log" in name for name in check.by_autograd)
    assert not check.mixed
    after = source.with_check(check)
    assert any("A_log" in name for name in after.sketcher.single_names)
    assert after.batches.one_at_a_time
    assert "autograd computes the gradient" in after.batches.why_one_at_a_time
    sketches, status = after.sketches(encoded)
    assert not status.any()
    assert sketches.any(-1).all()
