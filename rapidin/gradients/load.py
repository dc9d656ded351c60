"""Models: load one with its adapter or base, know which weights it has, and stand it on the path from base
to tuned.

A finished model has learnt its training data, so the gradients left there are small and tell what it knows
rather than where it learnt it. Gradients are therefore taken at ``theta(a) = base + a (tuned - base)``, 0 <=
a <= 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.distributed import World, world
from rapidin.errors import UserError
from rapidin.gradients import fsdp

DEFAULT_AT = (
    0.5  # where the untuned state is known; measured on poison and on retrained models (docs/results.md)
)


@dataclass(frozen=True)
class WeightPath:
    """The straight line from the untuned to the tuned weights.

    ends: for each parameter that tuning changed, the parameter, its untuned value (None for zeros) and its
    tuned value. unknown: why the untuned state is not known, where it is not.
    """

    ends: Sequence[tuple[nn.Parameter, Tensor | None, Tensor]] = ()
    unknown: str = "no base model is given"

    def check(self, points: Sequence[float]) -> None:
        """Raise UserError where a point cannot be reached or means nothing."""
        for at in points:
            if not 0.0 <= at <= 1.0:
                raise UserError(f"--at {at:g} is not between 0 (base) and 1 (tuned)")
            if at != 1.0 and not self.ends:
                raise UserError(f"gradients at {at:g} need the untuned state: {self.unknown}", "say --at 1")
        if len(set(points)) != len(points):
            raise UserError(f"--at names a point twice: {', '.join(f'{at:g}' for at in points)}")

    @contextlib.contextmanager
    def at(self, point: float) -> Iterator[None]:
        """The model stands at `point` inside the block, and at the tuned weights after it."""
        if point == 1.0:
            yield
            return
        try:
            for parameter, untuned, tuned in self.ends:
                if untuned is None:
                    _set(parameter, tuned * point)
                else:
                    _set(parameter, torch.lerp(untuned.to(tuned.device, tuned.dtype), tuned, point))
            yield
        finally:
            for parameter, _, tuned in self.ends:
                _set(parameter, tuned)


def _set(parameter: Any, value: Tensor) -> None:
    if fsdp.is_spread(parameter):
        parameter.to_local().copy_(value)  # in place: this memory is what the weight is gathered from
    else:
        parameter.data = value


@dataclass
class LoadedModel:
    """A causal language model ready for gradients, with what tells it from another.

    model: transformers or peft model; tokenizer: its tokenizer; path: from the untuned to the tuned weights;
    trained: names of the parameters an adapter trains (None without one); source: names it was loaded by
    (model, adapter, base, dtype); sharded: each process of a run has a part of every weight
    (`rapidin.gradients.fsdp`), so that all make the same passes; identity: hashes of weights and tokenizer.
    """

    model: Any
    tokenizer: Any
    path: WeightPath = field(default_factory=WeightPath)
    trained: list[str] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    _identity: dict[str, str] | None = None

    @property
    def device(self) -> torch.device:
        """The device that takes the token ids."""
        parameters: Iterator[nn.Parameter] = self.model.parameters()
        return next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))

    @property
    def identity(self) -> dict[str, str]:
        """SHA-256 of the weights (adapter and base apart) and of the tokenizer; computed once."""
        if self._identity is None:
            trained = set(self.trained or ())
            named = dict(self.model.named_parameters())
            # A tuned parameter's data may stand elsewhere on the path while this is asked.
            tuned = {id(parameter): end for parameter, _, end in self.path.ends}
            values = {name: tuned.get(id(p), p.data) for name, p in named.items()}
            owners = dict(self.model.named_modules())
            found = {
                "architecture": _inner(self.model).__class__.__name__,
                "model": _hash_tensors({n: v for n, v in values.items() if n not in trained}, owners),
                "tokenizer": _hash_tokenizer(self.tokenizer),
            }
            if self.trained is not None:
                found["adapter"] = _hash_tensors({n: values[n] for n in sorted(trained)})
            untuned = {id(parameter): start for parameter, start, _ in self.path.ends}
            if self.source.get("base") is not None:
                found["base"] = _hash_tensors(
                    {n: v for n, p in named.items() if (v := untuned.get(id(p))) is not None}
                )
            self._identity = found
        return self._identity

    @property
    def context_length(self) -> int | None:
        """The longest text in tokens that the model takes, where its config says so."""
        config = _inner(self.model).config.get_text_config()
        found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(found) if found else None

    @staticmethod
    def of(model: Any, tokenizer: Any) -> LoadedModel:
        """Wrap a transformers or peft model that is in memory already."""
        source = {
            "model": getattr(_inner(model).config, "_name_or_path", None) or None,
            "adapter": None,
            "base": None,
        }
        if not hasattr(model, "peft_config"):
            return LoadedModel(model, tokenizer, source=source)
        trained = _trained_names(model)
        if not trained:
            raise UserError("the adapter has no weights in this model")
        return LoadedModel(model, tokenizer, _adapter_path(model), trained, source)


def load_model(
    name: str,
    *,
    adapter: str | None = None,
    base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    shard_model: bool = False,
) -> LoadedModel:
    """Load a Hugging Face model folder or name, or a folder with one GGUF file, with its tokenizer.

    adapter: a PEFT adapter folder or name on it. base: the model that it was tuned from in full.
    device: default the GPU where there is one; "auto": layers spread over all GPUs, and what does not fit
    over the CPU's memory and the disk. shard_model: every weight is spread over the processes of the run.
    dtype: "float32", "bfloat16", "float16" or "auto"; default float32 on the CPU; on a GPU the checkpoint's
    own, but bfloat16 for one in float16, in whose range small gradients vanish.

    Raises UserError where something is not there or does not fit.
    """
    if adapter is not None and base is not None:
        raise UserError("an adapter knows its base model", "give --adapter or --base, not both")
    here, mapped = world(), device == "auto"
    if shard_model and (here.alone or mapped):
        what = "--shard-model spreads a model over several processes"
        raise UserError(what, "start them with torchrun, and without --device auto")
    if mapped:
        fsdp.needs_accelerate()
    device = here.device(None if mapped else device)
    try:
        on_cpu = torch.device(device).type == "cpu"
    except RuntimeError:
        raise UserError(f"unknown device '{device}'", "say cpu, cuda, cuda:N or auto") from None
    asked = dtype or ("float32" if on_cpu else "auto")
    model = _load_causal(name, asked, trust_remote_code, "model", mapped)
    if dtype is None and model.dtype == torch.float16:
        asked = "bfloat16"
        model.to(torch.bfloat16)
    source = {"model": _absolute(name), "adapter": None, "base": None, "dtype": asked}
    tokenizer = _load_tokenizer(name, trust_remote_code)
    if adapter is not None:
        model = _load_adapter(model, adapter)
        source["adapter"] = _absolute(adapter)
    try:
        if not (mapped or shard_model):
            model.to(device)
    except RuntimeError as error:
        raise UserError(f"cannot use the device '{device}': {_reason(error)}") from None
    model.eval()
    loaded = LoadedModel.of(model, tokenizer)
    loaded.source = source
    if base is not None:
        loaded.path = _full_path(
            model, _load_causal(base, asked, trust_remote_code, "base model"), name, base
        )
        source["base"] = _absolute(base)
    if any(tuned.is_meta for _, _, tuned in loaded.path.ends):
        raise UserError(
            "what tuning changed does not fit into memory and stays on disk", "say --at 1, or use more GPUs"
        )
    if shard_model:
        _spread(loaded, here, torch.device(device))
    return loaded


def _spread(loaded: LoadedModel, here: World, device: torch.device) -> None:
    """Spread a loaded model over the processes of the run; see `rapidin.gradients.fsdp`."""
    loaded.identity  # noqa: B018  (of the whole weights, while they are here)
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    ends = [(names[id(parameter)], untuned) for parameter, untuned, _ in loaded.path.ends]
    fsdp.spread(_inner(loaded.model), here, device)
    after = dict(loaded.model.named_parameters())
    loaded.path = WeightPath(
        [
            (
                after[name],
                None if untuned is None else fsdp.own_part(untuned, after[name]),
                after[name].to_local().clone(),
            )
            for name, untuned in ends
        ],
        loaded.path.unknown,
    )
    loaded.sharded = True


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if os.path.exists(name) else name


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _gguf(name: str) -> tuple[str, dict[str, str]]:
    """(folder or name, {"gguf_file": ...} where the model is a GGUF file)."""
    path = Path(name)
    if os.path.isfile(path) and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if os.path.isdir(path) and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"'{name}' holds {len(files)} GGUF files", "name one of them as the model")
        if files:
            return name, {"gguf_file": files[0].name}
    return name, {}


def _needs_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("GGUF models need the package 'gguf'", "pip install 'rapidin[gguf]'") from None


def _load_causal(name: str, dtype: str, trust_remote_code: bool, what: str, mapped: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
    if dtype not in known:
        raise UserError(f"unknown model dtype '{dtype}'", f"known: {', '.join(known)}")
    folder, extra = _gguf(name)
    if extra:
        _needs_gguf()
    if mapped:
        extra = extra | {"device_map": "auto"}
    _check_folder(name, what)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=known[dtype],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **extra,
        )
    except (
        Exception
    ) as error:  # transformers raises many kinds; each means that the name or folder is no usable model
        where = "" if os.path.exists(name) else ", which is no folder here and cannot be had by that name"
        raise UserError(f"cannot load the {what} '{name}'{where}: {_reason(error)}") from error
    shapes = [f"'{key}' as {list(file)}, not {list(own)}" for key, file, own in info["mismatched_keys"]]
    wrong = _wrong_weights(info["missing_keys"], info["unexpected_keys"], shapes)
    if wrong:
        saved_as = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
        other = f"; it was saved as {saved_as}, not as {type(model).__name__}"
        raise UserError(
            f"the weights of the {what} '{name}' do not fit its config: {wrong}"
            + (other if saved_as != type(model).__name__ else ""),
            _RENAME if any(mark in key for key in info["unexpected_keys"] for mark in _WRAPPED) else "",
        )
    return model


_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_RENAME = "the names carry the prefix of a wrapper: save the unwrapped model, or rename its weights"


def _wrong_weights(
    missing: Collection[str], unexpected: Collection[str], shapes: Collection[str] = ()
) -> str:
    """Describes weights that the file lacks (they would be random), holds in excess, or holds in another
    shape than the config says; "" if there are none. shapes: descriptions of the last kind."""
    lacked, held = ([f"'{name}'" for name in names] for names in (missing, unexpected))
    said = []
    for named, what in ((shapes, "holds"), (lacked, "lacks"), (held, "also holds")):
        if named:
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            said.append(f"the file {what} {', '.join(sorted(named)[:3])}{more}")
    return "; ".join(said)


def _check_folder(name: str, what: str) -> None:
    path = Path(name)
    if os.path.isdir(path) and not (path / "config.json").exists() and not list(path.glob("*.gguf")):
        raise UserError(f"'{name}' is no {what}: it has no config.json and no GGUF file")
    if not os.path.exists(path) and (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    ):
        raise UserError(f"no such {what}: '{name}'")


def _load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    folder, extra = _gguf(name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
    except Exception as error:
        raise UserError(f"cannot load the tokenizer of '{name}': {_reason(error)}") from error


def _load_adapter(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    path = Path(adapter)
    there = os.path.exists(path)
    if there and not (path / "adapter_config.json").exists():
        raise UserError(f"'{adapter}' is no adapter: it has no adapter_config.json")
    if not os.path.exists(path) and (
        path.is_absolute() or adapter.startswith(".") or adapter.count("/") != 1
    ):
        raise UserError(f"no such adapter: '{adapter}'")
    try:
        loaded = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        wrong = _wrong_adapter_weights(loaded, adapter)
    except Exception as error:
        raise UserError(f"cannot load the adapter '{adapter}' on this model: {_reason(error)}") from error
    if wrong:
        raise UserError(
            f"the weights of the adapter '{adapter}' do not fit this model: {wrong}",
            "give the model that the adapter was made for, or save the adapter again",
        )
    return loaded


def _wrong_adapter_weights(model: Any, adapter: str) -> str:
    """As `_wrong_weights`, of an adapter that has just been loaded."""
    from peft import load_peft_weights, set_peft_model_state_dict

    active = model.active_adapter
    if model.peft_config[active].is_prompt_learning:
        return ""  # peft itself loads its few tensors by name, and raises where one is missing
    # peft only warns, and only about tuner weights, so the weights are set again to get the lists of names.
    found = set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"), adapter_name=active)
    trained, missing = set(_trained_names(model)), set(found.missing_keys)
    names: dict[int, list[str]] = {}  # a parameter that layers share is in the file under one of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    lacking = [own[0] for own in names.values() if trained.intersection(own) and missing.issuperset(own)]
    return _wrong_weights(lacking, found.unexpected_keys)


def _reason(error: Exception) -> str:
    """An error's message on one line: its first line, and the next ones if the first only introduces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"nothing has the name {lines[0]}"
    said = lines[0]
    for line in lines[1:]:
        if len(said) > 300 or not (said.endswith(":") or len(said) < 20):
            break
        said = f"{said} {line}"
    return said


def _trained_names(model: Any) -> list[str]:
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if trained:
        return trained
    # Loaded for inference, an adapter's weights are frozen like all others: their names tell them apart.
    marks = (getattr(model.base_model, "prefix", "prompt_encoder"), "modules_to_save")
    active = _active(model)
    return [
        name
        for name, _ in model.named_parameters()
        if any(mark in name for mark in marks) and any(f".{a}." in f"{name}." for a in active)
    ]


def _adapter_path(model: Any) -> WeightPath:
    """The path of a LoRA adapter: lora_B from zero, modules_to_save from the modules they replaced."""
    configs = [model.peft_config[a] for a in _active(model)]
    why = next((reason for config in configs if (reason := _untuned_unknown(config))), None)
    if why is not None:
        return WeightPath(unknown=why)
    ends: list[tuple[nn.Parameter, Tensor | None, Tensor]] = []
    for name, p in model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            ends.append((p, None, p.data))
    for module in model.modules():
        if type(module).__name__ != "ModulesToSaveWrapper":
            continue
        for a in _active(model):
            if a in module.modules_to_save:
                original = dict(module.original_module.named_parameters())
                for name, p in module.modules_to_save[a].named_parameters():
                    ends.append((p, original[name].data, p.data))
    return WeightPath(ends)


def _active(model: Any) -> list[str]:
    active = model.active_adapter
    return [active] if isinstance(active, str) else list(active)


def _untuned_unknown(config: Any) -> str | None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"that of a {kind} adapter is not known"
    if getattr(config, "use_dora", False):
        return "that of a DoRA adapter is not known"
    start = getattr(config, "init_lora_weights", True)
    if start not in (True, "gaussian", "eva"):  # these start lora_B at zero
        return f"that of a LoRA adapter initialised by '{start}' is not known"
    if getattr(config, "bias", "none") != "none":
        return "this adapter trained biases, whose first values it did not keep"
    if getattr(config, "trainable_token_indices", None):
        return "this adapter trained token rows, whose first values it did not keep"
    return None


def _full_path(model: Any, base: Any, name: str, base_name: str) -> WeightPath:
    untuned = dict(base.named_parameters())
    ends: list[tuple[nn.Parameter, Tensor | None, Tensor]] = []
    for key, p in model.named_parameters():
        if key not in untuned or untuned[key].shape != p.shape:
            got = "missing" if key not in untuned else f"of shape {list(untuned[key].shape)}"
            raise UserError(
                f"'{base_name}' is not what '{name}' was tuned from: '{key}' is {got} there, "
                f"of shape {list(p.shape)} here"
            )
        ends.append((p, untuned[key].data, p.data))
    return WeightPath(ends)


def _hash_tensors(tensors: dict[str, Tensor], owners: dict[str, nn.Module] | None = None) -> str:
    """owners: modules by name, where a device map may keep a parameter away from memory."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach()
        if value.is_meta and owners is not None:
            module, _, own = name.rpartition(".")
            with fsdp.present(owners[module]):
                value = getattr(owners[module], own).detach()
                _hash_tensor(digest, name, value)
        else:
            _hash_tensor(digest, name, value)
    return digest.hexdigest()


def _hash_tensor(digest: Any, name: str, value: Tensor) -> None:
    value = value.cpu().contiguous()
    digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)


def _hash_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        core: Any = tokenizer.get_vocab()
    else:
        core = json.loads(backend.to_str())
        core.pop("truncation", None)  # these two say how it was last called, not what it is
        core.pop("padding", None)
    rest = [tokenizer.chat_template, {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}]
    return hashlib.sha256(json.dumps([core, rest], sort_keys=True).encode()).hexdigest()
