"""Caching a model's examples, against a bare forward and backward pass over the same batches.

pytest bench/bench_caching.py --benchmark-json=caching.json

The bare loop takes the same batches to the same losses with all parameters frozen, so that only input
gradients are computed; it has no hooks but the one that begins the graph at the embeddings. The caching loop
is `Attributor`'s: hooks, sketches, unit blocks and their code, all but the writing of the shards. The two
take turns batch by batch.

The model is a Llama of SmolLM2-135M's shape with random weights; RAPIDIN_BENCH_MODEL=FOLDER takes a real one.
Peaks are of the whole process, so "above the bare loop" holds the code's basis too.
"""

import os
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from limits import note
from torch import nn
from turns import clear_peak, in_turns, peak_mb, sized

from rapidin import Attributor, load_model, ops
from rapidin.attribution.caching import format_of
from rapidin.attribution.options import CacheOptions
from rapidin.cache import codec
from rapidin.cache.codec import Basis, Codec, FloatCodec, PackedCodec
from rapidin.cli.demo_session.tokenizer import train_tokenizer
from rapidin.data.encoding import Encoded, Status, by_length
from rapidin.gradients.adam import Moments
from rapidin.gradients.kfac import FactorMoments, kfac_scales
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.preconditioner import (
    DAMPING,
    EXPONENT,
    FLOOR,
    RANK,
    TOLERANCE,
    Preconditioner,
)
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import TokenBatch, example_losses

EXAMPLES = sized(32, 12)
LENGTHS = sized((64, 192), (12, 24))  # tokens, of which the second half count
BATCH_TOKENS = sized(1024, 64)
SAMPLE = sized(512, 24)  # that the code learns from: enough for all directions that it may have
BYTES = 2048


def random_llama() -> LoadedModel:
    """SmolLM2-135M's shape, or a tiny one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads = sized((576, 1536, 30, 9, 3), (48, 64, 2, 4, 2))
    config = LlamaConfig(
        vocab_size=sized(49152, 512),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    torch.manual_seed(0)
    return LoadedModel.of(LlamaForCausalLM(config).eval(), train_tokenizer(["a few words"]))


def with_lora(loaded: LoadedModel) -> LoadedModel:
    """The model with an adapter as if it had been trained: lora_B is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    tuned = get_peft_model(
        loaded.model,
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return LoadedModel.of(tuned.eval(), loaded.tokenizer)


def make_model(kind: str) -> LoadedModel:
    folder = os.environ.get("RAPIDIN_BENCH_MODEL")
    loaded = load_model(folder, device="cpu") if folder else random_llama()
    return with_lora(loaded) if kind == "LoRA" else loaded


def make_examples(vocabulary: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(*LENGTHS, (EXAMPLES,), generator=generator).tolist()
    texts = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths)
    return [Encoded(ids, [t >= len(ids) // 2 for t in range(len(ids))], Status.OK) for ids in texts]


def bare_loop(model: nn.Module) -> Callable[[list[Encoded]], None]:
    """A forward and a backward pass that computes input gradients alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def run(texts: list[Encoded]) -> None:
        batch = TokenBatch.of([(e.ids, e.target) for e in texts])
        hook = model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_())
        with torch.enable_grad():
            example_losses(model, batch).sum().backward()
        hook.remove()

    return run


def make_code(source: GradientSource, texts: list[Encoded], dtype: str) -> Codec:
    """A code as the caching loop learns it. The sample is mixed from a few sketches: how long packing takes
    depends on the sizes alone."""
    blocks, width = source.blocks, source.width
    if dtype == "float16":
        return FloatCodec(dtype, blocks, width)
    few = ops.unit_blocks(source.sketches(texts)[0])[0]
    weights = torch.randn(SAMPLE, len(few))
    mixed = torch.einsum("sn,nbw->sbw", weights, few) + 0.5 * torch.randn(SAMPLE, blocks, width)
    units, lengths = ops.unit_blocks(mixed)
    wanted = format_of(CacheOptions(bytes=BYTES), source.width)
    learnt = codec.learn_basis(units, codec.shared_size(wanted, blocks))
    shape = codec.fit_shape(wanted, blocks, width, learnt)
    return PackedCodec(
        shape, width, source.settings.seed, Basis.of(learnt, shape, lengths, source.settings.seed).rounded()
    )


class CachingLoop:
    """A model's examples in batches, the longest last, and what is done to each: `bare`, or `sketch` with a
    `pack` after the last. `fit` comes before sketching; its time is not counted."""

    def __init__(self, kind: str, dtype: str) -> None:
        self.dtype = dtype
        self.loaded = make_model(kind)
        self.texts = make_examples(self.loaded.model.get_input_embeddings().num_embeddings)
        order = by_length(range(EXAMPLES), self.texts, BATCH_TOKENS)
        self.batches = [[self.texts[n] for n in chosen] for chosen in order]
        self._bare = bare_loop(self.loaded.model)
        self._sketches: list[torch.Tensor] = []

    def fit(self) -> None:
        """Measures the preconditioner, and what the code learns."""
        plain = Attributor(self.loaded, batch_tokens=BATCH_TOKENS).source
        self.source = plain.with_preconditioner(plain.fit_preconditioner(self.batches[0]))
        self.code = make_code(self.source, self.batches[0], self.dtype)

    def bare(self, number: int) -> None:
        self._bare(self.batches[number])

    def bare_with_our_products(self, number: int) -> None:
        """The bare loop with its linear layers multiplied as caching multiplies them."""
        with ops.faster_linear(self.loaded.model):
            self._bare(self.batches[number])

    def sketch(self, number: int) -> None:
        self._sketches.append(self.source.sketches(self.batches[number])[0])

    def preconditioner_share(self) -> float:
        """Multiply-adds of K-FAC's products, counted, over those of the linear layers in the bare loop: two
        products of each weight, the output head's at the positions alone from which the loss counts.

        As if each token's factors were preconditioned in the sketch, which is the way for wide layers; for
        adapters fewer are done.
        """
        batches = [TokenBatch.of([(e.ids, e.target) for e in texts]) for texts in self.batches]
        tokens = sum(batch.ids.numel() for batch in batches)
        kept = sum(len(batch.ids) * (batch.ids.shape[1] - batch.first) for batch in batches)
        head = self.loaded.model.get_output_embeddings()
        bare = products = 0.0
        for module in self.loaded.model.modules():
            if isinstance(module, nn.Linear):
                counted = kept / tokens if module is head else 1.0
                bare += 2 * module.in_features * module.out_features * counted
        for scale in self.source.preconditioner.at(None).values():
            for n, low_rank in zip(scale.shape, (scale.row_low_rank, scale.column_low_rank), strict=True):
                products += (low_rank.rank if low_rank else 0) * (n + min(n, self.source.width))
        return products / bare

    def pack(self) -> None:
        self.code.encode(*ops.unit_blocks(torch.cat(self._sketches)))
        self._sketches.clear()


@pytest.mark.parametrize("dtype", ["sign", "float16"])
@pytest.mark.parametrize("kind", ["linear layers", "LoRA"])
def bench_caching(benchmark, kind, dtype):
    name = os.environ.get("RAPIDIN_BENCH_MODEL", "random Llama")
    benchmark.group = f"caching, {name}, {kind}"
    loop = CachingLoop(kind, dtype)
    last = len(loop.batches) - 1  # the longest texts
    loop.bare(last)
    counted = clear_peak()
    loop.bare(last)
    bare_peak = peak_mb() if counted else 0.0
    loop.fit()

    def cache_batch(number: int) -> None:
        """Sketch one batch; the last one ends a group of them, which is packed as a whole."""
        loop.sketch(number)
        if number == last:
            loop.pack()

    cache_batch(0)
    counted = counted and clear_peak()
    cache_batch(last)
    peak = peak_mb() if counted else 0.0

    taken: list[float] = []
    order = iter(range(len(loop.batches)))

    def bare_first() -> tuple[tuple[int], dict[str, int]]:
        number = next(order)
        start = time.perf_counter()
        loop.bare(number)
        taken.append(time.perf_counter() - start)
        return (number,), {}

    benchmark.pedantic(cache_batch, setup=bare_first, rounds=len(loop.batches))
    seconds = sum(benchmark.stats.stats.data)
    benchmark.extra_info["beside"] = {"bare loop, a batch": sum(taken) / len(taken)}
    tokens = sum(len(e.ids) for e in loop.texts)
    note(
        benchmark,
        of_bare_loop=sum(taken) / seconds,
        examples_per_s=EXAMPLES / seconds,
        tokens_per_s=tokens / seconds,
        bare_examples_per_s=EXAMPLES / sum(taken),
        bytes_an_example=loop.code.row_bytes,
        **({"mb_above_bare_loop": peak - bare_peak, "peak_mb": peak} if counted else {}),
    )


@pytest.mark.parametrize("kind", ["linear layers", "LoRA"])
def bench_check(benchmark, kind):
    """The comparison of gradients with autograd's before caching, against sketching all examples."""
    name = os.environ.get("RAPIDIN_BENCH_MODEL", "random Llama")
    benchmark.group = f"check, {name}, {kind}"
    loaded = make_model(kind)
    texts = make_examples(loaded.model.get_input_embeddings().num_embeddings)
    source = Attributor(loaded, batch_tokens=BATCH_TOKENS).source
    counted = clear_peak()
    start = time.perf_counter()
    source.sketches(texts)
    seconds = time.perf_counter() - start
    peak = peak_mb() if counted else 0.0
    counted = counted and clear_peak()
    check = benchmark.pedantic(lambda: source.checked(texts), rounds=2, warmup_rounds=1)
    assert check.compared == len(source.targets)
    note(
        benchmark,
        of_caching=benchmark.stats.stats.min / seconds,
        examples=EXAMPLES,
        tokens=sum(len(e.ids) for e in texts),
        **({"mb_above_caching": peak_mb() - peak} if counted else {}),
    )


@pytest.mark.parametrize("form", ["sample", "kfac"])
@pytest.mark.parametrize("kind", ["linear layers", "LoRA"])
def bench_preconditioner(benchmark, kind, form):
    """Sketching a batch with the factors preconditioned, against the same without."""
    name = os.environ.get("RAPIDIN_BENCH_MODEL", "random Llama")
    benchmark.group = f"preconditioner, {name}, {kind}"
    loaded = make_model(kind)
    texts = make_examples(loaded.model.get_input_embeddings().num_embeddings)
    chosen = by_length(range(EXAMPLES), texts, BATCH_TOKENS)[-1]
    batch = TokenBatch.of([(texts[n].ids, texts[n].target) for n in chosen])
    sketcher = Attributor(loaded, batch_tokens=BATCH_TOKENS).source.sketcher
    if form == "kfac":
        factors = FactorMoments(sketcher.targets, RANK, 0)
        measure = partial(sketcher.add_moments, batch, factors)
        measure()
        preconditioner = Preconditioner([kfac_scales(factors, EXPONENT, DAMPING, TOLERANCE)])
    else:
        moments = Moments(sketcher.targets)
        measure = partial(sketcher.squares, batch)
        moments.add(measure())
        preconditioner = Preconditioner([moments.scales(EXPONENT, FLOOR)])

    def sketch(with_preconditioner: Preconditioner | None) -> None:
        sketcher.preconditioner = with_preconditioner
        sketcher(batch)

    others = {"without": lambda: sketch(None), "moments for a preconditioner": measure}
    best = in_turns(benchmark, lambda: sketch(preconditioner), others, seconds=60.0)
    ours = benchmark.stats.stats.min
    note(
        benchmark,
        tokens=int(batch.mask.sum()),
        of_without=best["without"] / ours,
        moments_over_sketch=best["moments for a preconditioner"] / best["without"],
    )
