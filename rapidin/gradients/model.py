"""A loaded model with its tokenizer, its path from base to tuned, and the hashes that identify it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.errors import UserError
from rapidin.gradients import fsdp
from rapidin.gradients.adapters import has_adapter, trained_names
from rapidin.gradients.path import WeightPath, adapter_path
from rapidin.gradients.quantized import check_gradients, plain_tensors
from rapidin.gradients.tokenizers import template_hash, tokenizer_hash, vocabulary_hash
from rapidin.tasks.forward import device_of, inner_model

MEMORY = "memory"  # the key of `LoadedModel.source` that says that the model was not loaded by its names


@dataclass
class LoadedModel:
    """A model ready for gradients.

    model: transformers or peft model, or any module; tokenizer: its tokenizer, None if it reads no text;
    path: from the untuned to the tuned weights;
    trained: names of the parameters that an adapter trains (None without one); source: names it was loaded by
    (model, adapter, base, tokenizer, dtype); sharded: each process of a run holds a shard of every weight
    (`rapidin.gradients.fsdp`), so that all run the same passes; notes: what the user should know of how it
    was loaded.
    """

    model: Any
    tokenizer: Any
    path: WeightPath = field(default_factory=WeightPath)
    trained: list[str] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    notes: list[str] = field(default_factory=list)
    _identity: dict[str, str] | None = None

    @staticmethod
    def of(model: Any, tokenizer: Any) -> LoadedModel:
        """Wraps a model that is in memory already.

        Raises UserError if an adapter takes no part in it, or quantized layers have no gradients.
        """
        if not isinstance(model, nn.Module):
            raise UserError(
                f"the model is a {type(model).__name__}, not a torch module",
                "load one by its name or folder with rapidin.load_model",
            )
        check_gradients(model)
        source = {
            "model": getattr(getattr(inner_model(model), "config", None), "_name_or_path", None) or None,
            "adapter": None,
            "base": None,
            "dtype": str(model.dtype).removeprefix("torch.") if hasattr(model, "dtype") else None,
            MEMORY: "yes",
        }
        if not has_adapter(model):
            return LoadedModel(model, tokenizer, source=source)
        trained = trained_names(model)
        return LoadedModel(model, tokenizer, adapter_path(model), trained, source)

    def __repr__(self) -> str:
        names = [type(inner_model(self.model)).__name__]
        names += [f"'{self.source[key]}'" for key in ("model",) if self.source.get(key)]
        if self.trained is not None:
            names.append(f"with the adapter '{self.source.get('adapter') or 'in memory'}'")
        if self.source.get("base"):
            names.append(f"tuned from '{self.source['base']}'")
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"LoadedModel({' '.join(names)}, {count:,} parameters on {self.device})"

    @property
    def device(self) -> torch.device:
        """The device that takes the token ids."""
        return device_of(self.model)

    @property
    def context_length(self) -> int | None:
        """The longest text in tokens that the model takes; None if its config does not say."""
        return context_of(getattr(inner_model(self.model), "config", None), self.model)

    @property
    def identity(self) -> dict[str, str]:
        """SHA-256 of the weights (adapter and base apart) and of the tokenizer; computed once."""
        if self._identity is None:
            self._identity = self._hashes()
        return self._identity

    @property
    def text_identity(self) -> dict[str, str]:
        """SHA-256 of the tokenizer's vocabulary and of its chat template; empty without a tokenizer."""
        if self.tokenizer is None:
            return {}
        return {"vocabulary": vocabulary_hash(self.tokenizer), "template": template_hash(self.tokenizer)}

    def _hashes(self) -> dict[str, str]:
        trained = set(self.trained or ())
        named = dict(self.model.named_parameters())
        # The model may be at another point of the path now, which is no part of its identity.
        tuned = {id(parameter): end for parameter, _, end in self.path.ends}
        values = {name: tuned.get(id(p), p.data) for name, p in named.items()}
        owners = dict(self.model.named_modules())
        hashes = {
            "architecture": inner_model(self.model).__class__.__name__,
            "model": _hash_tensors({n: v for n, v in values.items() if n not in trained}, owners),
        }
        if self.tokenizer is not None:
            hashes["tokenizer"] = tokenizer_hash(self.tokenizer)
        if self.trained is not None:
            hashes["adapter"] = _hash_tensors({n: values[n] for n in sorted(trained)})
        if self.source.get("base") is not None:
            untuned = {id(parameter): start for parameter, start, _ in self.path.ends}
            hashes["base"] = _hash_tensors(
                {n: v for n, p in named.items() if (v := untuned.get(id(p))) is not None}
            )
        return hashes


def context_of(config: Any, model: nn.Module) -> int | None:
    """The longest text in tokens that a model with this config takes; None if the config does not say."""
    if config is None or not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not length or length < 1:  # XLNet has no limit, and says -1
        return None
    # RoBERTa and its kin count positions from the one after the padding's.
    padding = (
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    )
    return int(length) - next((int(n) + 1 for n in padding), 0)


def _hash_tensors(tensors: Mapping[str, Tensor], owners: Mapping[str, nn.Module] | None = None) -> str:
    """owners: all modules by name, needed if a device map keeps parameters outside memory."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach()
        if value.is_meta and owners is not None:
            module, _, role = name.rpartition(".")
            with fsdp.in_memory(owners[module]):
                value = getattr(owners[module], role).detach()
                _hash_tensor(digest, name, value)
        else:
            _hash_tensor(digest, name, value)
    return digest.hexdigest()


def _hash_tensor(digest: Any, name: str, value: Tensor) -> None:
    for part in plain_tensors(value):
        part = part.cpu().contiguous()
        digest.update(json.dumps([name, str(part.dtype), list(part.shape)]).encode())
        digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
