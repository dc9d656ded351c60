"""Loading of models from Hugging Face folders or names, with an adapter or a base model, and of GGUF files.

`load_model` reads model, tokenizer, adapter and base, and refuses weights that do not fit their config.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from rapidin.distributed import World, world
from rapidin.errors import UserError
from rapidin.gradients import fsdp
from rapidin.gradients.model import LoadedModel, trained_names
from rapidin.gradients.path import WeightPath, base_path
from rapidin.tasks.forward import inner_model
from rapidin.tasks.names import CAUSAL, loader_of, task_of_config, task_of_folder

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}


def load_model(
    name: str,
    *,
    adapter: str | None = None,
    base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    shard_model: bool = False,
    task: str | None = None,
) -> LoadedModel:
    """Load a Hugging Face model folder or name, or a folder with one GGUF file, with its tokenizer.

    adapter: a PEFT adapter folder or name on it. base: the model that it was tuned from in full.
    device: default the GPU if there is one; "auto": layers are spread over all GPUs, and what does not fit
    over the CPU's memory and the disk. shard_model: every weight is sharded over the processes of the run.
    dtype: "float32", "bfloat16", "float16" or "auto"; default float32 on the CPU; on a GPU the checkpoint's
    own, but bfloat16 for one in float16, in whose range small gradients vanish. task: what the model is for
    (`rapidin.tasks.names`), by default what it was saved for, and a causal language model where that is not
    clear.

    Raises UserError if something is not found or does not fit.
    """
    if adapter is not None and base is not None:
        raise UserError("an adapter knows its base model", "give --adapter or --base, not both")
    here, mapped = world(), device == "auto"
    if shard_model and (here.alone or mapped):
        what = "--shard-model spreads a model over several processes"
        raise UserError(what, "start them with torchrun, and without --device auto")
    if mapped:
        fsdp.require_accelerate()
    device = here.device(None if mapped else device)
    load_dtype = dtype or ("float32" if _is_cpu(device) else "auto")
    task = task or saved_task(name, trust_remote_code)
    model = _load_task(name, task, load_dtype, trust_remote_code, "model", mapped)
    if dtype is None and model.dtype == torch.float16:
        load_dtype = "bfloat16"
        model.to(torch.bfloat16)
    tokenizer = _load_tokenizer(name, trust_remote_code)
    if adapter is not None:
        model = _load_adapter(model, adapter)
    try:
        if not (mapped or shard_model):
            model.to(device)
    except RuntimeError as error:
        raise UserError(f"cannot use the device '{device}': {_reason(error)}") from None
    model.eval()
    loaded = LoadedModel.of(model, tokenizer)
    loaded.source = {
        "model": _absolute(name),
        "adapter": None if adapter is None else _absolute(adapter),
        "base": None if base is None else _absolute(base),
        "dtype": load_dtype,
    }
    if base is not None:
        untuned = _load_task(base, task, load_dtype, trust_remote_code, "base model")
        loaded.path = base_path(model, untuned, name, base)
    if any(tuned.is_meta for _, _, tuned in loaded.path.ends):
        raise UserError(
            "the parameters that tuning changed do not fit into memory", "use --at 1, or more GPUs"
        )
    if shard_model:
        _shard(loaded, here, torch.device(device))
    return loaded


def _is_cpu(device: str) -> bool:
    try:
        return torch.device(device).type == "cpu"
    except RuntimeError:
        raise UserError(f"unknown device '{device}'", "use cpu, cuda, cuda:N or auto") from None


def _shard(loaded: LoadedModel, here: World, device: torch.device) -> None:
    """Shard a loaded model over the processes of the run; see `rapidin.gradients.fsdp`."""
    loaded.identity  # noqa: B018  (of the whole weights, while this process has them)
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    ends = [(names[id(parameter)], untuned) for parameter, untuned, _ in loaded.path.ends]
    fsdp.shard(inner_model(loaded.model), here, device)
    after = dict(loaded.model.named_parameters())
    loaded.path = WeightPath(
        [
            (
                after[name],
                None if untuned is None else fsdp.local_shard(untuned, after[name]),
                after[name].to_local().clone(),
            )
            for name, untuned in ends
        ],
        loaded.path.unknown,
    )
    loaded.sharded = True


# ------------------------------------------------------------------------------------------------ models


def saved_task(name: str, trust_remote_code: bool = False) -> str:
    """The task that a model was saved for; "causal" where that is not clear, or there is no such model."""
    if os.path.exists(name):
        return task_of_folder(name) or CAUSAL
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception:  # loading the model says what is wrong
        return CAUSAL
    return task_of_config(config)


def _load_task(
    name: str, task: str, dtype: str, trust_remote_code: bool, what: str, mapped: bool = False
) -> Any:
    import transformers

    if dtype not in _DTYPES:
        raise UserError(f"unknown model dtype '{dtype}'", f"use one of {', '.join(_DTYPES)}")
    folder, extra = _gguf(name)
    if extra:
        _require_gguf()
    if mapped:
        extra = extra | {"device_map": "auto"}
    _check_folder(name, what)
    try:
        model, info = getattr(transformers, loader_of(task)).from_pretrained(
            folder,
            dtype=_DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **extra,
        )
    except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
        where = "" if os.path.exists(name) else ", which is not a folder here and cannot be downloaded"
        raise UserError(f"cannot load the {what} '{name}'{where}: {_reason(error)}") from error
    _check_weights(model, info, name, what)
    return model


_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_RENAME = "the names have the prefix of a wrapper: save the unwrapped model, or rename its weights"


def _check_weights(model: Any, info: Any, name: str, what: str) -> None:
    """Raises UserError unless a model's file holds the weights that its config describes, and no others.

    info: what transformers reports of loading it.
    """
    shapes = [
        f"'{key}' as {list(in_file)}, not {list(expected)}"
        for key, in_file, expected in info["mismatched_keys"]
    ]
    wrong = _describe_weights(info["missing_keys"], info["unexpected_keys"], shapes)
    if not wrong:
        return
    saved_as = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    other = f"; it was saved as {saved_as}, not as {type(model).__name__}"
    raise UserError(
        f"the weights of the {what} '{name}' do not fit its config: {wrong}"
        + (other if saved_as != type(model).__name__ else ""),
        _RENAME if any(prefix in key for key in info["unexpected_keys"] for prefix in _WRAPPED) else "",
    )


def _describe_weights(
    missing: Collection[str], unexpected: Collection[str], shapes: Collection[str] = ()
) -> str:
    """Describes weights that a file lacks (they would be random), holds in excess, or holds in another shape
    than the config says; "" if there are none. shapes: descriptions of the last kind."""
    lacked, in_excess = ([f"'{name}'" for name in names] for names in (missing, unexpected))
    sentences = []
    for names, verb in ((shapes, "holds"), (lacked, "lacks"), (in_excess, "also holds")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            sentences.append(f"the file {verb} {', '.join(sorted(names)[:3])}{more}")
    return "; ".join(sentences)


def _check_folder(name: str, what: str) -> None:
    path = Path(name)
    if os.path.isdir(path) and not (path / "config.json").exists() and not list(path.glob("*.gguf")):
        raise UserError(f"'{name}' is not a {what}: it has no config.json and no GGUF file")
    if not os.path.exists(path) and (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    ):
        raise UserError(f"{what} not found: '{name}'")


def _gguf(name: str) -> tuple[str, dict[str, str]]:
    """(folder or name, {"gguf_file": ...} if the model is a GGUF file)."""
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


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("GGUF models need the package 'gguf'", "pip install 'rapidin[gguf]'") from None


def _load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    folder, extra = _gguf(name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
    except Exception as error:
        raise UserError(f"cannot load the tokenizer of '{name}': {_reason(error)}") from error


# ---------------------------------------------------------------------------------------------- adapters


def _load_adapter(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    path = Path(adapter)
    if not os.path.exists(path):
        if path.is_absolute() or adapter.startswith(".") or adapter.count("/") != 1:
            raise UserError(f"adapter not found: '{adapter}'")
    elif not (path / "adapter_config.json").exists():
        raise UserError(f"'{adapter}' is not an adapter: it has no adapter_config.json")
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
    """Describes, as `_describe_weights`, what is wrong with an adapter that has just been loaded."""
    from peft import load_peft_weights, set_peft_model_state_dict

    active = model.active_adapter
    if model.peft_config[active].is_prompt_learning:
        return ""  # peft itself loads its few tensors by name, and raises if one is missing
    # peft only warns, and only about tuner weights, so the weights are set again to get the lists of names.
    result = set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"), adapter_name=active)
    trained, missing = set(trained_names(model)), set(result.missing_keys)
    aliases: dict[int, list[str]] = {}  # a parameter that layers share is in the file under one of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    lacking = [
        names[0] for names in aliases.values() if trained.intersection(names) and missing.issuperset(names)
    ]
    return _describe_weights(lacking, result.unexpected_keys)


# ---------------------------------------------------------------------------------------------- messages


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if os.path.exists(name) else name


def _reason(error: Exception) -> str:
    """An error's message on one line: its first line, and the next ones if the first only introduces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"there is no {lines[0]}"
    message = lines[0]
    for line in lines[1:]:
        if len(message) > 300 or not (message.endswith(":") or len(message) < 20):
            break
        message = f"{message} {line}"
    return message
