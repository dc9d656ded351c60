"""Models whose adapter was trained with more tokens, or fewer, than the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_PREFIX = "base_model.model."
# The axis of tokens of what an adapter saves of a table.
_AXES = {
    "weight": 0,
    "base_layer.weight": 0,
    "token_adapter.base_layer.weight": 0,
    "original_module.weight": 0,
    "modules_to_save.weight": 0,
    "lora_B.weight": 0,
    "lora_embedding_A": 1,
}


def fit_vocabulary(model: Any, adapter: str, config: Any) -> None:
    """Gives a model's tables of tokens the size that an adapter was trained with, as far as its file tells.

    A new token begins as the mean of the others, around which transformers draws new tokens, so that the
    model is the same whenever it is loaded. config: the adapter's.
    """
    tables = _tables(model)
    if not tables:
        return
    before = len(model.get_input_embeddings().weight)
    rows = _saved_rows(adapter, list(tables)) or max([before, *(n + 1 for n in _trained_indices(config))])
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model).values():
            weight = table.weight
            if rows > before and len(weight) == rows:
                weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def _tables(model: Any) -> dict[str, Any]:
    """The modules with a row for each token, by name: the embedding, and the output head."""
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return {}
    if getattr(getattr(found[0], "weight", None), "ndim", 0) != 2:
        return {}
    return {name: module for name, module in model.named_modules() if any(module is each for each in found)}


def _saved_rows(adapter: str, tables: list[str]) -> int:
    """The number of tokens in the tables that an adapter has saved, 0 if it saved none."""
    for key, shape in _shapes(adapter).items():
        for table in tables:
            axis = _AXES.get(key.removeprefix(f"{_PREFIX}{table}."))
            if axis is not None and len(shape) == 2:
                return shape[axis]
    return 0


def _shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that an adapter has saved, by their names."""
    path = Path(adapter) / "adapter_model.safetensors"
    if path.is_file():
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    from peft import load_peft_weights

    return {name: tuple(value.shape) for name, value in load_peft_weights(adapter, device="cpu").items()}


def _trained_indices(config: Any) -> list[int]:
    """The tokens whose rows alone an adapter trains."""
    indices = getattr(config, "trainable_token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [int(index) for each in lists for index in each]
