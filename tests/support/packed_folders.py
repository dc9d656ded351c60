"""Folders with packed weights, as the tools that quantise models write them, of tiny models; loaded again by
transformers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from causal_types import tiny_causal
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor

_GROUP, _BLOCK = 32, 32
_NIBBLES = torch.arange(0, 32, 4)  # the bits where each of eight numbers of 4 bits begins
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _llama() -> Any:
    return tiny_llama(hidden_size=64, intermediate_size=64)


def gptq() -> Any:
    """Weights of 4 bits, packed along the inputs."""
    return _of_layers("gptq", {"backend": "torch", "desc_act": False, "sym": True})


def awq() -> Any:
    """Weights of 4 bits, packed along the outputs."""
    return _of_layers("awq", {"backend": "torch_awq", "version": "gemm", "zero_point": True})


def _of_layers(method: str, settings: dict[str, Any]) -> Any:
    model, packed = _llama(), {}
    for name, weight in model.state_dict().items():
        if "proj" not in name:
            packed[name] = weight
            continue
        o, i = weight.shape
        groups = weight.view(o, i // _GROUP, _GROUP)
        scales = groups.abs().amax(2) / 7
        numbers = ((groups / scales[..., None]).round().clamp(-8, 7) + 8).view(o, i).int().T
        base = name.removesuffix(".weight")
        zeros = torch.full((i // _GROUP, o // 8, 8), 7 if method == "gptq" else 8)
        packed[f"{base}.qzeros"] = _packed(zeros, 2)
        packed[f"{base}.scales"] = scales.T.half()
        if method == "gptq":
            packed[f"{base}.qweight"] = _packed(numbers.reshape(i // 8, 8, o), 1)
            packed[f"{base}.g_idx"] = (torch.arange(i) // _GROUP).int()
        else:
            packed[f"{base}.qweight"] = _packed(numbers.reshape(i, o // 8, 8)[..., _AWQ_ORDER], 2)
    return _loaded(model, packed, {"quant_method": method, "bits": 4, "group_size": _GROUP, **settings})


def _packed(numbers: Tensor, axis: int) -> Tensor:
    """Eight numbers of 4 bits along an axis as one of 32."""
    shifts = _NIBBLES.view([8 if a == axis else 1 for a in range(numbers.ndim)])
    return (numbers << shifts).sum(axis).to(torch.int32)


def fp8() -> Any:
    """Weights of 8 bits, with a scale for each block."""
    model, packed = _llama(), {}
    for name, weight in model.state_dict().items():
        packed[name] = weight
        if "proj" in name:
            blocks = weight.unfold(0, _BLOCK, _BLOCK).unfold(1, _BLOCK, _BLOCK)
            scales = blocks.abs().amax((2, 3)) / 448
            wide = scales.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
            packed[name] = (weight / wide).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = scales
    settings = {"weight_block_size": [_BLOCK, _BLOCK], "activation_scheme": "dynamic"}
    return _loaded(model, packed, {"quant_method": "fp8", **settings})


def mxfp4() -> Any:
    """GPT-OSS's experts of 4 bits, with an exponent for each 32 numbers."""
    model, packed = tiny_causal("gpt_oss", intermediate_size=64), {}
    for name, weight in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = weight
            continue
        e, i, o = weight.shape
        groups = weight.mT.reshape(e, o, i // 32, 32)
        exponents = (groups.abs().amax(-1) / 6).log2().floor() + 1
        numbers = ((groups / 2 ** exponents[..., None])[..., None] - _MXFP4).abs().argmin(-1)
        packed[f"{name}_blocks"] = (numbers[..., 0::2] | (numbers[..., 1::2] << 4)).to(torch.uint8)
        packed[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return _loaded(model, packed, {"quant_method": "mxfp4", "modules_to_not_convert": []})


def compressed(scheme: str) -> Any:
    """Weights of compressed-tensors, by the name of one of its schemes."""
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    model = _llama()
    settings = quantization.preset_name_to_scheme(scheme, ["Linear"])
    if settings.weights.group_size:
        settings.weights.group_size = _GROUP
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"all": settings}, ignore=["lm_head"])
    )
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            groups = module.weight.view(
                len(module.weight), -1, settings.weights.group_size or module.in_features
            )
            scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), settings.weights)
            module.weight_scale.data = scale.view(module.weight_scale.shape)
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    with tempfile.TemporaryDirectory() as folder:
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return _read(Path(folder))


def gguf() -> Any:
    """A GGUF file whose weights are of 8 bits."""
    from gguf_files import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "tiny.gguf", _llama(), tiny_tokenizer(), quantised=True)
        return _read(Path(folder), gguf_file="tiny.gguf")


def _loaded(model: Any, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Any:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.config.save_pretrained(place)
        config = json.loads((place / "config.json").read_text())
        config |= {"quantization_config": quantization, "dtype": "float32"}
        (place / "config.json").write_text(json.dumps(config))
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, place / "model.safetensors", metadata={"format": "pt"})
        return _read(place)


def _read(place: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **settings).eval()
