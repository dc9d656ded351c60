"""Models that are no causal language models are told by what they do with six tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny import VOCABULARY, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.errors import UserError
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.probe import check_causal, is_causal

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = [7, 30, 55, 91, 140, 200]


def of_kind(auto: str, kind: str, **settings: Any) -> Any:
    """A random model of transformers' class `auto`, for a config of this kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SMALL | settings)
        return getattr(transformers, auto).from_config(config).eval()


BIDIRECTIONAL = ["bert", "roberta", "electra", "camembert", "rembert", "roformer", "megatron-bert", "ernie"]


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_bidirectional_models_are_refused_and_their_decoders_are_not(kind: str) -> None:
    model = of_kind("AutoModelForCausalLM", kind)
    assert not is_causal(model, IDS)
    with pytest.raises(UserError, match=f"{type(model).__name__} is not causal") as error:
        Attributor(model, tiny_tokenizer())
    assert "\n" not in str(error.value)
    decoder = of_kind("AutoModelForCausalLM", kind, is_decoder=True)
    assert is_causal(decoder, IDS)
    check_causal(LoadedModel.of(decoder, tiny_tokenizer()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_lora(tiny_llama())])
def test_causal_models_pass_in_every_precision(make: Callable[[], Any], dtype: torch.dtype) -> None:
    assert is_causal(make().to(dtype), IDS)


def test_a_bidirectional_model_in_half_precision_is_refused() -> None:
    model = of_kind("AutoModelForCausalLM", "bert", initializer_range=0.15).to(torch.bfloat16)
    assert not is_causal(model, IDS)


REFUSED = {
    "classifier": (
        lambda: of_kind("AutoModelForSequenceClassification", "llama", pad_token_id=0),
        "returns 2",
    ),
    "reward model": (
        lambda: of_kind("AutoModelForSequenceClassification", "llama", pad_token_id=0, num_labels=1),
        "reward models",
    ),
    "token classifier": (lambda: of_kind("AutoModelForTokenClassification", "llama"), "6 x 2 numbers"),
    "without a head": (lambda: of_kind("AutoModel", "llama"), "no output head"),
    "answers marked in a text": (lambda: of_kind("AutoModelForQuestionAnswering", "llama"), "no output head"),
    "encoder and decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
            )
        ),
        "an encoder-decoder model",
    ),
    "images": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
                vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
            )
        ),
        "cannot run on token ids alone",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_with_what_they_are(kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(UserError, match=words) as error:
        check_causal(LoadedModel.of(make(), tiny_tokenizer()))
    assert "\n" not in str(error.value)


class Model(torch.nn.Module):
    """Logits by a rule, with a config as transformers' models have."""

    def __init__(self, rule: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)
        self.seen: list[bool] = []

    def forward(self, input_ids: torch.Tensor, **other: Any) -> Any:
        self.seen.append(self.training)
        return SimpleNamespace(logits=self.rule(self.table(input_ids)))


def test_a_model_that_keeps_a_state_of_its_last_call_is_refused() -> None:
    """As the layers of RecurrentGemma do in transformers 4.57."""
    model = tiny_llama()
    inner, last = model.model.norm.forward, torch.zeros(1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal last
        output: torch.Tensor = inner(x) + 0 * last.expand(len(x))[:, None, None]
        last = x.detach()[:, 0, 0]
        return output

    model.model.norm.forward = forward
    with pytest.raises(UserError, match="keeps a state of its last call") as error:
        Attributor(model, tiny_tokenizer())
    assert "newer version" in str(error.value)


def test_rounding_noise_and_draws_are_not_taken_for_later_tokens() -> None:
    """Where a batch changes results a little, and where a model draws random numbers while it evaluates."""
    torch.manual_seed(3)
    assert is_causal(Model(lambda x: x.cumsum(1) * (1 + 1e-6 * torch.randn_like(x))), IDS)
    assert is_causal(Model(lambda x: x.cumsum(1) + torch.randn_like(x)), IDS)
    assert not is_causal(Model(lambda x: x.cumsum(1) + 0.01 * x.flip(1)), IDS)
    # in one text alone, as a router close to a tie may
    calls: list[int] = []

    def once(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x.cumsum(1) + (x.flip(1) if len(calls) == 1 else 0.0)

    assert is_causal(Model(once), IDS)
    assert len(calls) == 2


def test_the_probe_leaves_everything_as_it_was() -> None:
    model = Model(lambda x: torch.nn.functional.dropout(x, 0.5))
    model.table.eval()
    model.train(True)
    model.table.training = False
    state = torch.random.get_rng_state()
    is_causal(model, IDS)
    assert model.training
    assert not model.table.training
    assert not any(model.seen)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_name_is_no_model_in_memory() -> None:
    with pytest.raises(UserError, match=r"the model is a str.*load_model"):
        LoadedModel.of("some-lab/model", tiny_tokenizer())


def test_a_text_of_one_token_says_nothing() -> None:
    with pytest.raises(ValueError, match="two different tokens"):
        is_causal(tiny_llama(), [3, 3, 3])


def test_without_a_tokenizer_and_with_one_of_few_words() -> None:
    check_causal(LoadedModel.of(tiny_llama(), None))
    check_causal(LoadedModel.of(tiny_llama(), lambda text, add_special_tokens: {"input_ids": [5] * 4}))


def test_training_mode_does_not_reach_answers_or_losses() -> None:
    """After a Trainer a model is in training mode, with dropout on."""
    kinds = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = tiny_gpt2(**kinds)
    attributor = Attributor(model, tiny_tokenizer(), preconditioner="off", width=64)
    text = attributor.source.encoder({"prompt": "one two", "completion": " three four"})
    answers, sketches = [], []
    for training in (False, True, True):
        model.train(training)
        model.transformer.h[0].eval()
        answers.append(attributor.generate("Howdy! What is", max_new_tokens=12))
        sketches.append(attributor.source.sketches([text])[0])
        assert model.training == training
        assert not model.transformer.h[0].training
        assert model.transformer.h[1].training == training
    assert len(set(answers)) == 1
    assert torch.equal(sketches[0], sketches[1])
    assert torch.equal(sketches[0], sketches[2])
