"""Quantized weights: gradients that get lost are noticed, and what there is has a hash."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import records, tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.errors import UserError
from rapidin.gradients.model import LoadedModel


class Int8Linear(torch.nn.Module):
    """A linear layer with a weight of eight bits and one scale a row, as inference kernels have them."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight * self.scale).T


class NoGradient(Int8Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class WrongGradient(Int8Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.detach() + 0.5 * (y - y.detach())


class RefusesGradient(Int8Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the kernel has no backward pass\nfor this")


def with_layer(kind: type[Int8Linear], dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_llama().to(dtype)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = kind(mlp.up_proj)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_layers_with_gradients_are_taken(dtype: torch.dtype) -> None:
    loaded = LoadedModel.of(with_layer(Int8Linear, dtype), tiny_tokenizer())
    source = Attributor(loaded, preconditioner="off", width=64).source
    assert bool(source.sketches([source.encoder(records(1)[0])])[0].any())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NoGradient, "does not propagate gradients"),
        (WrongGradient, "relative error of 1;"),
        (RefusesGradient, "the kernel has no backward pass"),
    ],
)
def test_layers_that_lose_gradients_are_refused(kind: type[Int8Linear], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        LoadedModel.of(with_layer(kind), None)
    assert "'model.layers.1.mlp.up_proj'" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_bitsandbytes_has_packed_are_refused() -> None:
    model = tiny_llama()
    layer: Any = model.model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True
    LoadedModel.of(model, None)
    assert not layer.support_avx512bf16_for_cpu, "it would pack its weights when the model generates"
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(UserError, match=r"packed .*load the model again"):
        LoadedModel.of(model, None)


def saved(folder: Path) -> Path:
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quantized(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes_keep_their_gradients(tmp_path: Path, nested: bool) -> None:
    """On a CPU with AVX512-BF16 a model that has generated would lose those of its 4-bit layers."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
    )
    loaded = LoadedModel.of(quantized(saved(tmp_path), config), tiny_tokenizer())
    attributor = Attributor(loaded, preconditioner="off", width=64)
    source = attributor.source
    some = [source.encoder(record) for record in records(3)]
    before, identity = source.sketches(some)[0], loaded._hashes()
    attributor.generate("Howdy! What is", max_new_tokens=4)
    assert torch.equal(source.sketches(some)[0], before)
    assert loaded._hashes() == identity


def test_weights_of_torchao_have_a_hash_and_gradients(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    hashes = set()
    for config in (torchao.Int8WeightOnlyConfig(), torchao.Float8WeightOnlyConfig()):
        loaded = LoadedModel.of(quantized(saved(tmp_path), TorchAoConfig(config)), tiny_tokenizer())
        source = Attributor(loaded, preconditioner="off", width=64).source
        assert bool(source.sketches([source.encoder(records(1)[0])])[0].any())
        assert loaded._hashes() == loaded.identity
        hashes.add(loaded.identity["model"])
    assert len(hashes) == 2
    dynamic = quantized(tmp_path, TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()))
    with pytest.raises(UserError, match="does not propagate gradients"):
        LoadedModel.of(dynamic, None)


class Parts(torch.Tensor):
    """A weight of two tensors, as torchao's are."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Parts:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{function} is not for weights of parts")


def test_a_weight_of_several_tensors_is_hashed_part_by_part() -> None:
    from rapidin.gradients.model import _hash_tensors

    numbers, scale = torch.arange(6, dtype=torch.int8).view(2, 3), torch.ones(2, 1)
    found = {
        _hash_tensors({"w": weight})
        for weight in (Parts(numbers, scale), Parts(numbers + 1, scale), Parts(numbers, 2 * scale))
    }
    assert len(found) == 3
    assert _hash_tensors({"w": Parts(numbers.clone(), scale.clone())}) in found


class Rounded(torch.nn.Linear):
    """A layer that rounds its inputs, which stops the gradient, with plain weights, as compressed-tensors has
    them after they are unpacked."""

    quantization_scheme = "of 8 bits"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.round())


class Float8(torch.nn.Linear):
    """A layer with a weight of eight bits that is a float."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input.detach(), self.weight.to(input))


@pytest.mark.parametrize("kind", [Rounded, Float8])
def test_layers_that_stop_the_gradient_are_refused(kind: type[torch.nn.Linear]) -> None:
    model = tiny_llama()
    layer = kind(32, 48, bias=False)
    if kind is Float8:
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    model.model.layers[1].mlp.up_proj = layer
    with pytest.raises(UserError, match="it does not propagate gradients"):
        LoadedModel.of(model, tiny_tokenizer())


def test_weights_that_the_first_call_would_unpack_are_unpacked_first() -> None:
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    packed = layer.weight
    del layer.weight
    layer.quantization_scheme = "of 4 bits"
    handle = model.register_forward_pre_hook(lambda *_: unpack(model))

    def unpack(whole: Any) -> None:
        layer.weight = packed
        del whole.ct_decompress_hook
        handle.remove()

    model.ct_decompress_hook = handle
    model.hf_quantizer = SimpleNamespace(compressor=SimpleNamespace(decompress_model=unpack))
    attributor = Attributor(model, tiny_tokenizer(), preconditioner="off", width=64)
    assert any("layers.1.mlp.up_proj" in target.name for target in attributor.source.targets)


def test_weights_that_are_no_parameters_are_named_as_the_reason() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                layer.set_submodule(name, Int8Linear(module))
    with pytest.raises(UserError, match=r"none of its parameters.*`adapter`"):
        Attributor(model, tiny_tokenizer())
