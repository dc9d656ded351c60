"""PEFT adapters around a transformers model or inside of it: the parameters that they train, and loading one.

transformers itself can put the layers of an adapter into a model (`model.add_adapter`, `load_adapter`, or an
adapter in the model's own folder), without peft's wrapper. So everything is read from the layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.errors import UserError, reason_of
from rapidin.gradients.vocabulary import fit_vocabulary
from rapidin.gradients.weights import describe_weights
from rapidin.tasks.names import CAUSAL, peft_task_of

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def has_adapter(model: Any) -> bool:
    """Whether a model has the layers of an adapter, or the learned prompts of one."""
    return hasattr(model, "peft_config") and (
        _prompts(model) is not None or any(True for _ in _layers(model))
    )


def active_adapters(model: Any) -> list[str]:
    """The names of the active adapters."""
    if _prompts(model) is not None:
        return [model.active_adapter]
    names: dict[str, None] = {}
    for layer in _layers(model):
        # The attention layers of adaption prompts have no such list; only one adapter can be active there.
        active: list[str] = [model.active_adapter] if _adapts_attention(layer) else layer.active_adapters
        names.update(dict.fromkeys(active))
    return list(names)


def trained_names(model: Any) -> list[str]:
    """Names of the parameters that a model's active adapters train.

    Raises UserError if none of them is used in the forward pass.
    """
    active = active_adapters(model)
    _check_takes_part(model, active)
    configs = [model.peft_config[name] for name in active]
    named = list(model.named_parameters())
    trained = [name for name, p in named if p.requires_grad]
    if not trained or any(config.inference_mode for config in configs):
        # If an adapter is loaded for inference, its weights are frozen like all others, except biases. So
        # its layers and configs tell which weights are its own.
        own = {id(p) for p in _own_parameters(model, active)}
        trained = [name for name, p in named if id(p) in own]
    if not trained:
        raise UserError("the adapter has no weights in this model")
    return trained


def _prompts(model: Any) -> nn.Module | None:
    """The module that makes the prompts which the active adapter puts in front of a text, if it does."""
    encoders = getattr(model, "prompt_encoder", None)
    active = getattr(model, "active_adapter", None)
    return encoders[active] if encoders and isinstance(active, str) and active in encoders else None


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers that peft has put into a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or _adapts_attention(module):
            yield module


def _adapts_attention(module: nn.Module) -> bool:
    return type(module).__name__.startswith("AdaptedAttention")


def _check_takes_part(model: Any, active: list[str]) -> None:
    layers = list(_layers(model))
    if not active:
        raise UserError("no adapter of this model is active", "activate one with model.set_adapter(NAME)")
    if any(getattr(layer, "merged", False) for layer in layers):
        raise UserError(
            "the adapter is merged into the model's weights, so its own weights are not used",
            "call model.unmerge_adapter(), or give the merged model without the adapter and the model from "
            "before tuning as base",
        )
    disabled = any(getattr(layer, "disable_adapters", False) for layer in layers)
    if _prompts(model) is not None:  # peft then calls the base model instead
        disabled = vars(model).get("forward") == model.base_model.forward
    if disabled:
        enable = "enable_adapter_layers" if hasattr(model, "enable_adapter_layers") else "enable_adapters"
        raise UserError(
            "the adapter is disabled, so its weights are not used",
            f"enable it with model.{enable}(), or call rapidin outside of disable_adapter()",
        )


def _own_parameters(model: Any, active: list[str]) -> Iterator[nn.Parameter]:
    """The parameters that tuning trains, whether they are frozen now or not."""
    prompts: Any = _prompts(model)
    if prompts is not None:
        # For inference the prompts are the embedding itself, whatever else made them in training.
        used = prompts.embedding if model.peft_config[active[0]].inference_mode else prompts
        yield from (p for name, p in used.named_parameters() if "frozen" not in name)
    for layer in _layers(model):
        if _adapts_attention(layer):
            named = layer.named_parameters(recurse=False)
            yield from (p for name, p in named if name.startswith("adaption_"))
        for container in (*getattr(layer, "adapter_layer_names", ()), "modules_to_save"):
            try:
                of_adapters: Any = attrgetter(container)(layer)
            except AttributeError:
                continue
            for name in active:
                own: Any = of_adapters[name] if of_adapters and name in of_adapters else None
                if isinstance(own, nn.Parameter):
                    yield own
                elif isinstance(own, nn.Module):
                    yield from own.parameters()
    yield from _own_biases(model, active)


def _own_biases(model: Any, active: list[str]) -> Iterator[nn.Parameter]:
    """The model's biases that the active adapters train."""
    kinds = {str(getattr(model.peft_config[name], "bias", "none")) for name in active}
    if "all" in kinds:
        yield from (p for name, p in model.named_parameters() if "bias" in name)
    if any(kind.endswith("_only") for kind in kinds):
        for layer in _layers(model):
            bias = getattr(getattr(layer, "base_layer", None), "bias", None)
            if isinstance(bias, nn.Parameter):
                yield bias


# ----------------------------------------------------------------------------------------------- loading

_SAMPLE = 1 << 16  # bytes of each end of a file of weights, to compare two


def other_base(adapter: str, name: str) -> str:
    """A message that an adapter was made for another model than `name`; "" if it was not, or does not say.

    A base model and its chat version have the same shapes, so names are compared; of two local
    folders, files.
    """
    from peft import PeftConfig

    recorded = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not recorded or _same_model(str(recorded), name):
        return ""
    return (
        f"the adapter was made for the model '{recorded}', but the model is '{name}': the weights fit, but "
        "the gradients are meaningful only if both are the same model"
    )


def _same_model(one: str, other: str) -> bool:
    if _short_name(one) == _short_name(other) and not (os.path.isdir(one) and os.path.isdir(other)):
        return True
    if not (os.path.isdir(one) and os.path.isdir(other)):
        return False
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    ends = [_ends_of_weights(Path(folder)) for folder in (one, other)]
    return bool(ends[0]) and ends[0] == ends[1]


def _short_name(name: str) -> str:
    """The last part of a model's name or path; for the folder of a download, of the name on the hub."""
    parts = Path(name).parts
    cached = next((part for part in parts if part.startswith("models--")), None)
    return (cached.rpartition("--")[2] if cached else parts[-1] if parts else "").lower()


def _ends_of_weights(folder: Path) -> list[tuple[str, int, bytes, bytes]]:
    """(name, size, first bytes, last bytes) of each file of weights."""
    ends = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_SAMPLE)
            file.seek(max(0, size - _SAMPLE))
            ends.append((path.name, size, first, file.read(_SAMPLE)))
    return ends


@dataclass(frozen=True)
class SavedHead:
    """The head of a classifier that an adapter brings with it (`modules_to_save`).

    modules: the names of the modules that it saved; outputs: how many the head has.
    """

    modules: tuple[str, ...]
    outputs: int

    @property
    def task(self) -> str:
        """The task that such a model is for."""
        return "regression" if self.outputs == 1 else "classification"

    @staticmethod
    def of(adapter: str) -> SavedHead | None:
        """The head in an adapter's folder; None if it is not a classifier's, or is on the Hugging Face
        Hub."""
        folder = Path(adapter)
        try:
            config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            modules = tuple(config.get("modules_to_save") or ())
            if config.get("task_type") != "SEQ_CLS" or not modules:
                return None
            from peft import load_peft_weights

            weights = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, AttributeError):
            return None  # loading the adapter says what is wrong
        own = [name for name in sorted(weights) if name.endswith(".weight") and weights[name].ndim == 2]
        own = [name for name in own if not {*modules}.isdisjoint(name.split("."))]
        return SavedHead(modules, len(weights[own[-1]])) if own else None

    def start(self, model: nn.Module, info: dict[str, Any]) -> None:
        """Let the head of a model whose file has none begin at zero, as a base for the adapter's.

        info: what transformers reports of loading the model; such weights are taken out of it, and those of
        the head that the model was saved with.
        """
        new = {name for name in info["missing_keys"] if not {*self.modules}.isdisjoint(name.split("."))}
        if not new:
            return
        for name, parameter in model.named_parameters():
            if name in new:
                nn.init.zeros_(parameter)
        info["missing_keys"] = {*info["missing_keys"]} - new
        info["unexpected_keys"] = ()


def load_adapter(model: Any, adapter: str, task: str = CAUSAL) -> Any:
    """The model with the adapter of a folder or name. Raises UserError if they do not fit."""
    from peft import PeftConfig, PeftModel

    path = Path(adapter)
    if not os.path.exists(path):
        if path.is_absolute() or adapter.startswith(".") or adapter.count("/") != 1:
            raise UserError(f"adapter not found: '{adapter}'")
    elif not (path / ADAPTER_CONFIG).exists():
        raise UserError(f"'{adapter}' is not an adapter: it has no {ADAPTER_CONFIG}")
    elif not any((path / name).exists() for name in _WEIGHTS):
        raise UserError(f"the adapter '{adapter}' has no weights: there is no {' and no '.join(_WEIGHTS)}")
    try:
        config = PeftConfig.from_pretrained(adapter)
        made_for = getattr(config.task_type, "value", config.task_type)
        fits = made_for in (None, "FEATURE_EXTRACTION", peft_task_of(task))
        if fits:
            fit_vocabulary(model, adapter, config)
            # peft refuses to train prompts that are loaded; their gradients are taken all the same.
            loaded = PeftModel.from_pretrained(model, adapter, is_trainable=not config.is_prompt_learning)
            wrong = _wrong_weights(loaded, adapter)
    except Exception as error:
        raise UserError(f"cannot load the adapter '{adapter}' on this model: {reason_of(error)}") from error
    if not fits:
        raise UserError(f"the adapter '{adapter}' was made for the task {made_for}, not for '{task}'")
    if wrong:
        raise UserError(
            f"the weights of the adapter '{adapter}' do not fit this model: {wrong}",
            "use the model that the adapter was made for, or save the adapter again",
        )
    return loaded


def _wrong_weights(model: Any, adapter: str) -> str:
    """Describes, as `describe_weights`, what is wrong with an adapter that has just been loaded."""
    from peft import load_peft_weights, set_peft_model_state_dict

    active = model.active_adapter
    if model.peft_config[active].is_prompt_learning:
        return ""  # peft itself loads its few tensors by name, and raises if one is missing
    # peft only warns, and only about tuner weights, so the weights are set again to get the lists of names.
    weights = load_peft_weights(adapter, device="cpu")
    twice = _saved_twice(weights)
    result = set_peft_model_state_dict(model, weights, adapter_name=active)
    trained, missing = set(trained_names(model)), set(result.missing_keys)
    aliases: dict[int, list[str]] = {}  # a parameter that layers share is in the file under one of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    lacking = [
        names[0] for names in aliases.values() if trained.intersection(names) and missing.issuperset(names)
    ]
    # Projections that are not trained are buffers, which the file may hold too (VeRA).
    buffers = {name.rpartition(".")[0] for name, _ in model.named_buffers(remove_duplicate=False)}
    more = [key for key in result.unexpected_keys if key not in buffers and key not in twice]
    return describe_weights(lacking, more)


def _saved_twice(weights: Mapping[str, Tensor]) -> set[str]:
    """The keys of what peft saves under another name too, where the model's tables of tokens have grown."""
    marks = (".modules_to_save.", ".token_adapter.")
    marked = [key for key in weights if any(mark in key for mark in marks)]
    return {
        key
        for key in marked
        if any(
            other != key and value.shape == weights[key].shape and torch.equal(value, weights[key])
            for other, value in weights.items()
        )
    }


def check_own_adapter(model: Any, folder: str) -> None:
    """Raises UserError unless the file of an adapter in a model's own folder holds the weights that the
    adapter has in the model, into which transformers has put it."""
    from peft import get_peft_model_state_dict, load_peft_weights

    (active,) = active_adapters(model)
    in_model = set(get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False))
    in_file = {key.removeprefix("base_model.model.") for key in load_peft_weights(folder, device="cpu")}
    others = {name for name, _ in model.named_parameters()}
    wrong = describe_weights(in_model - in_file, in_file - in_model - others)
    if wrong:
        raise UserError(
            f"the weights of the adapter in '{folder}' do not fit the model there: {wrong}",
            "save the adapter again",
        )
