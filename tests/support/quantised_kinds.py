"""Models with quantised weights that run on a CPU: most kinds quantise a tiny Llama in memory.

A kind needs its library, which the tests' environment may lack.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import packed_folders
import torch
from measured_models import TOLERANCE, own_sketches
from packaging.version import Version
from tiny import tiny_llama
from torch import nn

from rapidin.data.encoding import Encoded
from rapidin.gradients.parameters import Target


def _llama() -> Any:
    # Groups of 32 weights and kernels for multiples of 16 set the sizes.
    return tiny_llama(hidden_size=64, intermediate_size=64)


def _torchao(config: Callable[[Any], Any]) -> Callable[[], Any]:
    def make() -> Any:
        from torchao import quantization

        model = _llama()
        quantization.quantize_(model.model.layers, config(quantization))
        return model

    return make


def _replaced(make_layer: Callable[[nn.Linear], nn.Module]) -> Callable[[], Any]:
    """Every linear layer of the blocks is replaced."""

    def make() -> Any:
        model = _llama()
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(name, make_layer(module))
        return model.eval()

    return make


def _bitsandbytes(kind: str, **settings: Any) -> Callable[[], Any]:
    def layer(linear: nn.Linear) -> nn.Module:
        from bitsandbytes import nn as bnb

        made = getattr(bnb, kind)(linear.in_features, linear.out_features, bias=False, **settings)
        made.load_state_dict({"weight": linear.weight.data})
        return made.to("cpu")

    return _replaced(layer)


def _hqq(bits: int) -> Callable[[], Any]:
    def layer(linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=32)
        return HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")

    return _replaced(layer)


def _quanto(weights: str) -> Callable[[], Any]:
    # Not of 4 bits: unpacking them would compile an extension.
    def make() -> Any:
        from optimum import quanto

        model = _llama()
        quanto.quantize(model, weights=getattr(quanto, weights), include="model.layers.*")
        quanto.freeze(model)
        return model

    return make


def _bitnet(kind: str) -> Callable[[], Any]:
    def layer(linear: nn.Linear) -> nn.Module:
        from transformers.integrations import bitnet

        if kind == "AutoBitLinear":
            made = bitnet.AutoBitLinear(
                linear.in_features, linear.out_features, bias=False, online_quant=True
            )
            made.weight.data = linear.weight.data.clone()
            return made
        made = bitnet.BitLinear(linear.in_features, linear.out_features, bias=False, dtype=torch.float32)
        scale = 1 / linear.weight.data.abs().mean()
        ternary = (linear.weight.data * scale).round().clamp(-1, 1)
        made.weight.data = bitnet.pack_weights(ternary) if hasattr(bitnet, "pack_weights") else ternary
        made.weight_scale.data = scale.reshape(1)
        return made

    return _replaced(layer)


class Quantised(NamedTuple):
    """library: what must be installed; tolerance: what its own arithmetic allows; lora: whether peft has LoRA
    for its layers, from the version since_peft on; unpacked: whether all weights are plain once the model is
    loaded; since_transformers: the version from which on they are."""

    make: Callable[[], Any]
    library: str
    tolerance: float = TOLERANCE
    lora: bool = True
    since_peft: str = "0.17"
    unpacked: bool = False
    since_transformers: str = "4.57"


_TORCHAO = {"library": "torchao", "since_peft": "0.20"}

KINDS: dict[str, Quantised] = {
    "torchao, int8": Quantised(_torchao(lambda q: q.Int8WeightOnlyConfig()), **_TORCHAO),
    "torchao, int8 with int8 inputs": Quantised(
        _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()), **_TORCHAO
    ),
    "torchao, int4": Quantised(
        _torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))),
        **_TORCHAO,
    ),
    "torchao, float8": Quantised(_torchao(lambda q: q.Float8WeightOnlyConfig()), **_TORCHAO),
    # Its layers compute in float16.
    "bitsandbytes, int8": Quantised(
        _bitsandbytes("Linear8bitLt", has_fp16_weights=False), "bitsandbytes", tolerance=2e-3
    ),
    "bitsandbytes, NF4": Quantised(
        _bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32), "bitsandbytes"
    ),
    "bitsandbytes, FP4": Quantised(
        _bitsandbytes("Linear4bit", quant_type="fp4", compute_dtype=torch.float32), "bitsandbytes"
    ),
    "HQQ, 8 bits": Quantised(_hqq(8), "hqq"),
    "HQQ, 4 bits": Quantised(_hqq(4), "hqq"),
    "quanto, int8": Quantised(_quanto("qint8"), "optimum.quanto"),
    "quanto, float8": Quantised(_quanto("qfloat8"), "optimum.quanto"),
    "BitNet, rounded while it runs": Quantised(_bitnet("AutoBitLinear"), "transformers"),
    "BitNet, packed": Quantised(_bitnet("BitLinear"), "transformers", lora=False),
    "GPTQ, 4 bits": Quantised(packed_folders.gptq, "gptqmodel", since_transformers="5"),
    # Its kernel for CPUs computes in float16.
    "AWQ, 4 bits": Quantised(packed_folders.awq, "gptqmodel", tolerance=2e-3, since_transformers="5"),
    "compressed-tensors, int4": Quantised(
        partial(packed_folders.compressed, "W4A16"),
        "compressed_tensors",
        lora=False,
        since_transformers="5",
    ),
    "compressed-tensors, float8 with float8 inputs": Quantised(
        partial(packed_folders.compressed, "FP8_DYNAMIC"),
        "compressed_tensors",
        lora=False,
        since_transformers="5",
    ),
    "fp8 in blocks, unpacked when loaded": Quantised(
        packed_folders.fp8, "transformers", unpacked=True, since_transformers="5"
    ),
    "MXFP4 of GPT-OSS, unpacked when loaded": Quantised(
        packed_folders.mxfp4, "transformers", lora=False, unpacked=True, since_transformers="5"
    ),
    "GGUF, 8 bits, unpacked when loaded": Quantised(packed_folders.gguf, "gguf", unpacked=True),
}


def exists(kind: str) -> bool:
    """Whether a kind's library is installed, and a peft and transformers that know it."""
    since = {"peft": KINDS[kind].since_peft, "transformers": KINDS[kind].since_transformers}
    if any(Version(version(library)) < Version(oldest) for library, oldest in since.items()):
        return False
    try:
        return importlib.util.find_spec(KINDS[kind].library) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def with_lora(make: Callable[[], Any]) -> Any:
    """A LoRA adapter on quantised layers, as QLoRA trains it."""
    from peft import LoraConfig, get_peft_model

    model = make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tuned = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
        )
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return tuned.eval()


class _Unpacked(nn.Module):
    """The outputs of a quantised layer, and the gradients of a linear layer of the weight it stands for."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        one = torch.eye(inputs)[None].requires_grad_()  # without a gradient some kernels are coarser
        self.weight = nn.Parameter(layer(one)[0].T.detach().clone())
        self._layer = [layer]  # hidden from torch: its weight is no parameter of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = nn.functional.linear(x, self.weight)
        return own + (self._layer[0](x) - own).detach()


def unpacked_sketches(model: Any, targets: Sequence[Target], chosen: Sequence[Encoded]) -> torch.Tensor:
    """`own_sketches` of the model itself, where layers whose weights get no gradient from autograd are
    replaced by `_Unpacked`."""
    for name, dense in _llama().model.layers.named_modules():
        layer = model.model.layers.get_submodule(name)
        if isinstance(dense, nn.Linear) and not _is_plain(layer, dense.weight.shape):
            model.model.layers.set_submodule(name, _Unpacked(layer, dense.in_features))
    return own_sketches(model, targets, chosen)


def _is_plain(layer: Any, shape: torch.Size) -> bool:
    weight = getattr(layer, "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.shape == shape
